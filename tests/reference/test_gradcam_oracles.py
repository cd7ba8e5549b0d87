"""Grad-CAM as `run` answers it: against Captum, against a full backward pass, and on paper."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import LayerGradCam
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient
from tiny import PaperNet, loaded
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import functional as transforms

from service.app import create_app
from service.images.decode import Source, decode, fit_to_model
from service.inference.batch import run
from service.inference.questions import Explanation, InferenceResult, Question
from service.models.catalog import parse_model
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool
from service.models.probes.layers import trace_layers
from service.settings import Settings

pytestmark = pytest.mark.reference

SHARED = Path(__file__).parent.parent.parent.parent / "shared" / "data"

ARCHITECTURES = {
    "resnet18": "layer2.0",
    "mobilenet_v2": "features.7",
    "squeezenet1_1": "features.6",
    "densenet121": "features.denseblock2",
    "efficientnet_b0": "features.3",
}
"""Each with an inner layer; the last layer is the one that the service chooses."""


def pictures(count: int, side: int = 224) -> Tensor:
    """Seeded uint8 pictures (count, 3, side, side) with coarse shapes and fine grain."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = functional.interpolate(coarse, size=side, mode="bicubic", align_corners=False)
    grain = 0.1 * torch.randn(count, 3, side, side, generator=generator)
    return ((smooth + grain).clamp(0, 1) * 255).to(torch.uint8)


def normalised(pixels: Tensor, model: LoadedModel) -> Tensor:
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (model.preprocessing.mean, model.preprocessing.std)
    )
    return (pixels.float() / 255 - mean) / std


def model_of(architecture: str) -> LoadedModel:
    """The real weights where they are at hand, else random ones with settled statistics.

    A fresh net scales its features down layer by layer, to 1e-9 in the deepest ones. One pass in
    training mode gives every batch normalisation the statistics of what reaches it.
    """
    weights = SHARED / "weights" / f"{architecture}.fp16.safetensors"
    at = f"@{weights}" if weights.exists() else ""
    model = load_model(parse_model(f"torchvision/{architecture}{at}"), allow_random_weights=True)
    if model.random_weights:
        norms = [each for each in model.module.modules() if isinstance(each, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            model.module(normalised(pictures(6)[3:], model))
        model.module.eval()
    return model


@contextmanager
def without_in_place(module: nn.Module) -> Iterator[nn.Module]:
    """A private copy, trainable, in which nothing is overwritten: what the oracles need.

    DenseNet calls the function `relu(…, inplace=True)` beside its modules.
    """
    private = copy.deepcopy(module).requires_grad_()
    for each in private.modules():
        if getattr(each, "inplace", False):
            each.inplace = False
    relu = functional.relu

    def relu_into_new(values: Tensor, inplace: bool = False) -> Tensor:
        return relu(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "relu", relu_into_new)
        yield private


def targets_with_evidence(model: LoadedModel, batch: Tensor) -> list[int]:
    """For each image its best class that no image before it has."""
    with torch.no_grad():
        ranking = model.replicate()(batch).argsort(dim=1, descending=True).tolist()
    chosen: list[int] = []
    for row in ranking:
        chosen.append(next(class_id for class_id in row if class_id not in chosen))
    return chosen


def by_captum(model: LoadedModel, layer: str, batch: Tensor, targets: list[int]) -> Tensor:
    with without_in_place(model.module) as net:
        oracle = LayerGradCam(net, net.get_submodule(layer))
        maps = oracle.attribute(batch, target=targets, relu_attributions=True)
    return maps.detach()[:, 0]


def by_full_backward(model: LoadedModel, layer: str, batch: Tensor, targets: list[int]) -> Tensor:
    """Selvaraju et al. word by word: `.backward()` through everything, `.grad` at the layer."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    with without_in_place(model.module) as net:
        net.get_submodule(layer).register_forward_hook(keep)
        logits = net(batch)
        logits[range(len(targets)), targets].sum().backward()
    (activation,) = kept
    assert activation.grad is not None
    alpha = activation.grad.mean(dim=(2, 3), keepdim=True)
    return (alpha * activation).sum(dim=1).relu().detach()


def by_the_service(
    model: LoadedModel, layer: str, pixels: Tensor, targets: list[int]
) -> list[Explanation]:
    questions = [
        Question(image, targets=(target,), layers=(layer,))
        for image, target in zip(pixels, targets, strict=True)
    ]
    with ModelPool([model], replicas=1).lease(model.name) as replica:
        answers = run(replica, questions)
    return [only_explanation(answer) for answer in answers]


def only_explanation(answer: object) -> Explanation:
    assert isinstance(answer, InferenceResult)
    (explanation,) = answer.explanations
    return explanation


def distance(explanation: Explanation, expected: Tensor) -> float:
    """The largest difference of the raw maps, as a share of the expected map's maximum."""
    raw = torch.from_numpy(explanation.grid.copy()) * explanation.high
    return float((raw - expected).abs().max() / expected.max())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradcam_equals_captum_and_full_backward(architecture: str) -> None:
    """Three images with three targets in one batch; last layer to 1e-5, an inner one to 1e-3."""
    model = model_of(architecture)
    assert model.target_layer is not None
    pixels = pictures(3)
    batch = normalised(pixels, model)
    targets = targets_with_evidence(model, batch)
    for layer, tolerance in ((model.target_layer, 1e-5), (ARCHITECTURES[architecture], 1e-3)):
        found = by_the_service(model, layer, pixels, targets)
        for oracle in (by_captum, by_full_backward):
            for mine, theirs in zip(found, oracle(model, layer, batch, targets), strict=True):
                assert mine.high > 1e-4, "a map of noise would agree with anything"
                assert mine.grid.max() == 1
                assert distance(mine, theirs) <= tolerance, (layer, oracle.__name__)


@pytest.mark.timeout(60)
def test_the_oracles_tell_targets_and_layers_apart() -> None:
    """The comparison above would fail for a neighbour's target, image or layer."""
    model = model_of("resnet18")
    pixels = pictures(3)
    batch = normalised(pixels, model)
    targets = targets_with_evidence(model, batch)
    found = by_the_service(model, "layer4", pixels, targets)
    turned = [*targets[1:], targets[0]]
    wrong = (
        by_full_backward(model, "layer4", batch, turned),
        by_full_backward(model, "layer4", batch.roll(1, 0), targets),
        by_full_backward(model, "layer4.0", batch, targets),
    )
    for expected in wrong:
        for mine, theirs in zip(found, expected, strict=True):
            assert distance(mine, theirs) > 1e-2


RED, GREEN, YELLOW, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 0), (0, 0, 0)
QUARTERS = [[RED, GREEN], [YELLOW, BLACK]]


def test_gradcam_of_four_pixels_is_the_one_on_paper() -> None:
    """PaperNet has A₀ = red, A₁ = 2·green and y = W·mean(A) with W = [[1, −1], [2, 3]].

    The gradient of y_k at A_c is W_kc / 4 in each of the 4 pixels, so each weight is W_kc / 4. With
    red = [[1, 0], [1, 0]] and green = [[0, 1], [1, 0]]:

        class 0: ReLU(red − 2·green) / 4   = [[1, 0], [0, 0]] / 4
        class 1: ReLU(2·red + 6·green) / 4 = [[2, 6], [8, 0]] / 4
        y₀ = 2/4 − 4/4 = −1/2,   y₁ = 2·2/4 + 3·4/4 = 4
    """
    model = loaded(PaperNet(), side=2)
    pixels = torch.tensor(QUARTERS, dtype=torch.uint8).permute(2, 0, 1)
    with ModelPool([model], replicas=1).lease("tiny") as replica:
        (answer,) = run(replica, [Question(pixels, targets=(0, 1), layers=("maps",))])
    assert isinstance(answer, InferenceResult)
    zero, one = answer.explanations
    assert zero.grid.tolist() == [[1, 0], [0, 0]]
    assert (zero.low, zero.high) == (0, 0.25)
    assert one.grid.tolist() == [[0.25, 0.75], [1, 0]]
    assert (one.low, one.high) == (0, 2)
    assert {each.class_id: each.logit for each in answer.predictions} == {0: -0.5, 1: 4}
    assert zero.score == pytest.approx(1 / (1 + np.exp(4.5)), abs=1e-7)
    assert "target_not_predicted" in zero.flags
    assert "target_not_predicted" not in one.flags


def test_gradcam_over_http_is_the_one_on_paper() -> None:
    """The picture of above in quarters of 128 pixels; the centre crop leaves 112 of each.

    A function's model gets ImageNet's normalisation, which makes of full and absent colour

        red   (1 − .485) / .229 = 2.248908   and   −.485 / .229 = −2.117904
        green (1 − .456) / .224 = 2.428571   and   −.456 / .224 = −2.035714

    and of the quarters red, green, yellow, black, before the division by 224²:

        class 0: red − 2·green    6.320337   −6.975046   −2.608235    1.953525
        class 1: 2·red + 6·green −7.716469   10.335621   19.069245  −16.450094
    """
    picture = np.array(QUARTERS, dtype=np.uint8).repeat(128, axis=0).repeat(128, axis=1)
    body = io.BytesIO()
    Image.fromarray(picture).save(body, "PNG")
    settings = Settings(models=("tiny:paper",), workers=1)
    with TestClient(create_app(settings)) as client:
        response = client.post(
            "/explain?targets=0&targets=1&layer=maps&include=grid",
            content=body.getvalue(),
            headers={"content-type": "image/png"},
        )
    assert response.status_code == 200, response.text
    expected = ([[6.320337, 0], [0, 1.953525]], [[0, 10.335621], [19.069245, 0]])
    explanations = response.json()["results"][0]["explanations"]
    for explanation, quarters in zip(explanations, expected, strict=True):
        paper = np.array(quarters).repeat(112, axis=0).repeat(112, axis=1)
        assert explanation["layer"] == "maps"
        assert explanation["range"] == pytest.approx([0, paper.max() / 224**2], rel=1e-5)
        assert np.abs(grid_of(explanation) - paper / paper.max()).max() < 1e-6


def grid_of(explanation: dict) -> NDArray[np.float32]:
    grid = explanation["grid"]
    return np.frombuffer(base64.b64decode(grid["data"]), "<f4").reshape(grid["shape"])


class Watched(nn.Module):
    """Keeps what a model is fed where an activation can be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.fed = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fed(x).mean(dim=(2, 3))


def fed(model: LoadedModel, source: Source) -> Tensor:
    """What `run` feeds the model for a picture."""
    module = Watched()
    layers = trace_layers(module, torch.zeros(1, 3, *model.preprocessing.crop)).layers
    watched = replace(model, module=module, layers=layers)
    question = Question(fit_to_model(source, model.preprocessing).pixels, activations=("fed",))
    with ModelPool([watched], replicas=1).lease(model.name) as replica:
        (answer,) = run(replica, [question])
    assert isinstance(answer, InferenceResult)
    return torch.from_numpy(answer.activations[0].values.copy())


def photographs(folder: Path) -> list[Source]:
    """Four photographs, not all of one shape."""
    files = sorted((folder / "demo_images").glob("*.jpg"))[:4]
    found = [decode(file.read_bytes(), max_pixels=50_000_000) for file in files]
    assert len({each.pixels.shape for each in found}) > 1
    return found


def tensor_of(source: Source) -> Tensor:
    return torch.from_numpy(source.pixels).permute(2, 0, 1)


ENTRIES = pytest.mark.parametrize(
    ("architecture", "interpolation"),
    [
        ("resnet18", "bilinear"),
        ("mobilenet_v2", "bilinear"),
        ("efficientnet_b0", "bicubic"),
        ("efficientnet_b1", "bilinear"),
    ],
)


def entry(architecture: str, interpolation: str) -> tuple[LoadedModel, ImageClassification]:
    """A model with its weights entry's preset, which are known to be of that kind."""
    model = load_model(parse_model(f"torchvision/{architecture}"), allow_random_weights=True)
    preset = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
    assert preset.interpolation.value == model.preprocessing.interpolation == interpolation
    return model, preset


@pytest.mark.timeout(60)
@ENTRIES
def test_the_model_is_fed_what_torchvisions_preset_makes(
    architecture: str, interpolation: str, shared_data: Path
) -> None:
    """Bit for bit, where the preset is given what torchvision resizes as uint8.

    The preset itself resizes with torchvision's older functions, which round tensors and Pillow's
    images differently: its two answers for one photograph differ in more than a tenth of all
    values. All that follows the resize is the preset's own.
    """
    model, preset = entry(architecture, interpolation)
    for source in photographs(shared_data):
        resized = transforms.resize(
            tensor_of(source), preset.resize_size, interpolation=preset.interpolation
        )
        assert torch.equal(fed(model, source), preset(resized))


@pytest.mark.timeout(60)
@ENTRIES
def test_a_photograph_that_needs_no_resizing_is_fed_as_the_preset_feeds_it(
    architecture: str, interpolation: str, shared_data: Path
) -> None:
    """Bit for bit, with nothing between: as a tensor and as Pillow's image."""
    model, preset = entry(architecture, interpolation)
    for photograph in photographs(shared_data):
        side = preset.resize_size[0]
        cut = Source(np.ascontiguousarray(photograph.pixels[:side, : side + 75]), "JPEG", "")
        assert torch.equal(fed(model, cut), preset(tensor_of(cut)))
        assert torch.equal(fed(model, cut), preset(Image.fromarray(cut.pixels)))


@pytest.mark.timeout(60)
@ENTRIES
def test_the_preset_on_pillows_image_differs_in_the_rounding_of_few_pixels(
    architecture: str, interpolation: str, shared_data: Path
) -> None:
    """At most 1 % of the values, by at most two levels of 255 (bicubic) or one (bilinear)."""
    model, preset = entry(architecture, interpolation)
    level = 1 / 255 / torch.tensor(preset.std)[:, None, None]
    for source in photographs(shared_data):
        expected = preset(Image.fromarray(source.pixels))
        levels = ((fed(model, source) - expected) / level).abs()
        assert levels.max() < {"bilinear": 1.01, "bicubic": 2.01}[interpolation]
        assert (levels > 0.5).float().mean() < 0.01
