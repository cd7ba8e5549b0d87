"""Ten families of timm through the extra: served, explained, fed as timm would feed them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cheap_weights import cheaply

from service.errors import ConfigurationError
from service.inference.batch import run
from service.inference.questions import InferenceResult, Question
from service.models import builders
from service.models.catalog import InputSpec, ModelSpec
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition

timm = pytest.importorskip("timm", reason="timm is not installed: pip install -e '.[timm]'")

pytestmark = [pytest.mark.reference, pytest.mark.timeout(60)]

FAMILIES = {
    "convnext_atto": 64,
    "deit_tiny_patch16_224": None,
    "efficientnet_lite0": 64,
    "ghostnet_050": 64,
    "levit_128s": None,
    "mobilenetv3_small_050": 64,
    "poolformer_s12": 64,
    "regnetx_002": 64,
    "resnet10t": 64,
    "swin_tiny_patch4_window7_224": None,
}
"""A small model of each, and the side it is tried at; None: its own."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_served_and_explained(name: str, monkeypatch) -> None:
    monkeypatch.setattr(builders, "_randomised", cheaply)
    side = FAMILIES[name]
    size = InputSpec(size=(side, side)) if side else InputSpec()
    model = load_model(ModelSpec("m", f"timm/{name}", input=size), allow_random_weights=True)
    assert model.target_layer is not None
    assert model.no_gradients is None
    module = model.replicate()
    replica = Replica(model, module, Condition.of(module))
    shape = (3, *model.preprocessing.crop)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))
    question = Question(noise.to(torch.uint8), explain_top=4, layers=(model.target_layer,))
    (answer,) = run(replica, [question])
    assert isinstance(answer, InferenceResult)
    assert any(explanation.grid.any() for explanation in answer.explanations)
    assert max(answer.explanations[0].grid.shape) > 1
    assert replica.condition.faults() == []
    assert model.stateful == ()


def test_pictures_are_fed_as_timm_configures_it() -> None:
    spec = ModelSpec("m", "timm/efficientnet_lite0")
    fed = load_model(spec, allow_random_weights=True).preprocessing
    config = timm.data.resolve_model_data_config(timm.create_model("efficientnet_lite0"))
    assert fed.crop == config["input_size"][1:]
    assert fed.resize == int(config["input_size"][1] / config["crop_pct"])
    assert (fed.mean, fed.std) == (config["mean"], config["std"])
    assert fed.interpolation == config["interpolation"]


def test_the_classes_are_those_of_the_weights_file(tmp_path: Path) -> None:
    trained = timm.create_model("resnet10t", num_classes=4)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "w.pt")
    model = load_model(ModelSpec("m", "timm/resnet10t", weights=tmp_path / "w.pt"))
    assert len(model.labels) == 4
    assert torch.equal(model.module.fc.weight, trained.fc.weight)


def test_a_mistyped_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'resnet50"):
        load_model(ModelSpec("m", "timm/resnet50_", weights=None), allow_random_weights=True)


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **arguments: object) -> torch.nn.Module:
        if pretrained:
            raise RuntimeError("planted: no route to the hub")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigurationError, match=r"no route to the hub.*--weights FILE"):
        load_model(ModelSpec("m", "timm/resnet10t"))
