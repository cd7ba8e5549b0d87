"""Every classifier of torchvision loads, lists its layers, and is explained at its own layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from cheap_weights import cheaply

from service.inference.batch import run
from service.inference.questions import InferenceResult, Question
from service.models import builders
from service.models.catalog import InputSpec, ModelSpec
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition

OF_EACH_FAMILY = {
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s"),
    *("googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
    *("regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn"),
    *("vit_b_32", "wide_resnet50_2"),
}
"""One model for each class and kind of block; the others, built from the same, are `large`."""

LARGE = [pytest.mark.large, pytest.mark.timeout(300)]

GRIDS = {
    "alexnet": 16,  # cells of 16 pixels: the pooling behind the last convolution is not explained
    "squeezenet": 16,
    "vgg": 16,
    "vit_b_16": 16,
    "vit_l_16": 16,
    "vit_h_14": 14,
}
"""How many pixels a side one cell of the default layer's map has; 32 where nothing is said."""

NAMES = torchvision.models.list_models(module=torchvision.models)

pytestmark = [pytest.mark.reference, pytest.mark.timeout(60)]


def smallest_side(name: str) -> int:
    """The smallest side that the model accepts and that leaves more than one cell to map.

    Swin transformers pad to windows of 7 or 8 cells, so they accept less than their weights ask
    for: 96 pixels are 24, 12, 6 and 3 cells, with windows that are whole, padded and shifted.
    """
    if name.startswith("swin"):
        return 96
    smallest = min(
        weights.meta["min_size"][0] for weights in torchvision.models.get_model_weights(name)
    )
    return max(smallest, 64)


def cell_of(name: str) -> int:
    return next((cell for family, cell in GRIDS.items() if name.startswith(family)), 32)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in OF_EACH_FAMILY else LARGE) for name in NAMES],
)
def test_it_is_served_and_explained_at_its_smallest_input(name: str, monkeypatch) -> None:
    monkeypatch.setattr(builders, "_randomised", cheaply)
    side = smallest_side(name)
    spec = ModelSpec(name, f"torchvision/{name}", input=InputSpec(size=(side, side)))
    model = load_model(spec, allow_random_weights=True)
    assert len(model.labels) == 1000
    assert len(model.layers) == len([path for path, _ in model.module.named_modules() if path])
    assert model.target_layer is not None
    assert model.no_layers is None
    assert model.no_gradients is None
    module = model.replicate()
    replica = Replica(model, module, Condition.of(module))
    noise = torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(1))
    question = Question(noise.to(torch.uint8), explain_top=4, layers=(model.target_layer,))
    (answer,) = run(replica, [question])
    assert isinstance(answer, InferenceResult)
    grids = [explanation.grid for explanation in answer.explanations]
    assert any(grid.any() for grid in grids)
    rows, columns = grids[0].shape
    assert rows == columns
    assert abs(rows - side / cell_of(name)) <= 1
    assert replica.condition.faults() == []
    assert model.stateful == ()


@pytest.mark.parametrize("entry", ["IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1"])
def test_a_vision_transformer_without_weights_has_the_size_of_its_transform(entry: str) -> None:
    """`vit_h_14`, whose default weights are fed 518 pixels, was built for 224."""
    spec = ModelSpec("m", "torchvision/vit_b_16", weights=Path(entry))
    built = builders.build(spec, allow_random_weights=True)
    assert built.preprocessing.crop == (built.module.image_size,) * 2
