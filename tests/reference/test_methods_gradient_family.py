"""The gradient family on eleven architectures: against the peers, and in float64 on paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import oracles
import pytest
import torch
from pytorch_grad_cam import EigenCAM, HiResCAM
from torch import Tensor
from torchcam.methods import GradCAM, LayerCAM, XGradCAM

from service.errors import InvalidOption
from service.inference.questions import InferenceResult, Question
from service.models.loaded import LoadedModel

pytestmark = [pytest.mark.reference, pytest.mark.timeout(120)]


@dataclass(frozen=True)
class Case:
    """An architecture, an early layer of it, and its last one where that is not the default.

    to_map: what the peers are given to make maps of what both layers return.
    """

    name: str
    early: str
    side: int = 128
    real: bool = False
    last: str | None = None
    to_map: Callable[[Tensor], Tensor] | None = None

    def model(self) -> LoadedModel:
        if self.real:
            return oracles.real(self.name)
        return oracles.architecture(self.name, self.side, self.side)

    def last_of(self, model: LoadedModel) -> str:
        assert model.target_layer is not None
        return self.last or model.target_layer


VIT = "encoder.layers.encoder_layer_5.ln_1"
CASES = [
    Case("alexnet", "features.3"),
    Case("vgg16_bn", "features.23", side=96),
    Case("resnet50", "layer2"),
    Case("densenet121", "features.denseblock2"),
    Case("googlenet", "inception3b"),
    Case("mobilenet_v2", "features.7", side=224, real=True),
    Case("squeezenet1_1", "features.6", side=224, real=True),
    Case("efficientnet_b0", "features.3"),
    # Not a layer right before a LayerNorm: HiResCAM vanishes there, as g · A sums to zero.
    Case("convnext_tiny", "features.4", side=96),
    Case("vit_b_16", VIT, side=112, to_map=oracles.tokens_to_map(7, 7)),
    Case("swin_t", "features.3", side=128, last="norm", to_map=oracles.channels_first),
]
LINEAR_HEADS = {"resnet50", "googlenet", "mobilenet_v2", "efficientnet_b0", "swin_t"}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Each architecture in turn, with all of its tests together: it is built once."""
    if request.param.real:
        request.getfixturevalue("shared_data")
    return request.param


def by_the_service(
    model: LoadedModel, methods: list[str], layer: str, pixels: Tensor, target: int
) -> dict[str, Tensor]:
    """The raw map of each method, all in one batch."""
    questions = [
        Question(pixels, targets=(target,), method=each, layers=(layer,)) for each in methods
    ]
    found = oracles.explained(model, *questions)
    return {each.method: oracles.raw(each) for each in found}


def by_the_peers(
    case: Case, model: LoadedModel, pixels: Tensor, target: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """By method, the raw map at the early layer and at the last one."""
    image, layers = oracles.input_of(model, pixels), [case.early, case.last_of(model)]
    with oracles.without_in_place(model.module) as net:
        found = zip(
            ("gradcam", "layercam", "xgradcam", "hirescam", "eigencam"),
            (
                *oracles.by_torchcam(
                    (GradCAM, LayerCAM, XGradCAM), net, layers, image, target, to_map=case.to_map
                ),
                *(
                    oracles.by_grad_cam(method, net, layers, image, target, to_map=case.to_map)
                    for method in (HiResCAM, EigenCAM)
                ),
            ),
            strict=True,
        )
        return {method: (early, last) for method, (early, last) in found}


def test_each_method_agrees_with_a_peer(case: Case) -> None:
    """Raw maps: to 1e-4 of the maximum at the last layer, to 5e-2 at an early one.

    Grad-CAM++ is not here: neither peer computes it. The sign of an eigenvector is anyone's choice.
    """
    model = case.model()
    pixels = oracles.picture(1, *model.preprocessing.crop)
    target = oracles.best(model, pixels)
    peers = by_the_peers(case, model, pixels, target)
    for place, (layer, tolerance) in enumerate(((case.early, 5e-2), (case.last_of(model), 1e-4))):
        ours = by_the_service(model, list(peers), layer, pixels, target)
        distances = {
            method: min(
                oracles.distance(ours[method], (sign * maps[place]).relu())
                for sign in ((1, -1) if method == "eigencam" else (1,))
            )
            for method, maps in peers.items()
        }
        if case.name == "densenet121":
            # Its last map is signed and XGrad-CAM divides by the sum of a channel: where that is
            # near zero, float32 is what differs. The test in float64 below makes no exception.
            assert distances.pop("xgradcam") <= 1e-3
        assert max(distances.values()) <= tolerance, (layer, distances)


def gradcam(a: Tensor, g: Tensor) -> Tensor:
    """Selvaraju et al. 2017, equations 1 and 2."""
    return (g.mean(dim=(1, 2), keepdim=True) * a).sum(dim=0).relu()


def gradcampp(a: Tensor, g: Tensor) -> Tensor:
    """Chattopadhay et al. 2018, equations 10 and 19; exp(y), which scales every g, left out."""
    numerator = g**2
    denominator = 2 * g**2 + a.sum(dim=(1, 2), keepdim=True) * g**3
    alpha = torch.where(denominator != 0, numerator / denominator, 0)
    weights = (alpha * g.relu()).sum(dim=(1, 2), keepdim=True)
    return (weights * a).sum(dim=0).relu()


def hirescam(a: Tensor, g: Tensor) -> Tensor:
    """Draelos and Carin 2020, equation 4."""
    return (g * a).sum(dim=0).relu()


def layercam(a: Tensor, g: Tensor) -> Tensor:
    """Jiang et al. 2021, equations 5 and 6."""
    return (g.relu() * a).sum(dim=0).relu()


def xgradcam(a: Tensor, g: Tensor) -> Tensor:
    """Fu et al. 2020, equation 8."""
    share = torch.nan_to_num(a / a.sum(dim=(1, 2), keepdim=True))
    return ((share * g).sum(dim=(1, 2), keepdim=True) * a).sum(dim=0).relu()


ON_PAPER = (gradcam, gradcampp, hirescam, layercam, xgradcam)


def test_in_float64_each_method_is_the_papers_formula_on_a_full_backward_pass(case: Case) -> None:
    """To 1e-6 of the maximum, at the last layer and at an early one."""
    single = case.model()
    model = oracles.in_double(single)
    pixels = oracles.picture(2, *model.preprocessing.crop)
    target = oracles.best(model, pixels)
    to_map = case.to_map or (lambda maps: maps)
    for layer in (f"net.{case.last_of(single)}", f"net.{case.early}"):
        activation, gradient = oracles.full_backward(
            model, layer, pixels, lambda logits: logits[target], to_map
        )
        assert activation.dtype == torch.float64
        ours = by_the_service(model, [each.__name__ for each in ON_PAPER], layer, pixels, target)
        distances = {
            formula.__name__: oracles.distance(
                ours[formula.__name__], formula(activation, gradient)
            )
            for formula in ON_PAPER
        }
        assert max(distances.values()) <= 1e-6, (layer, distances)


def test_cam_is_gradcam_times_the_number_of_cells_or_is_refused(case: Case) -> None:
    """CAM needs one linear layer behind the mean; elsewhere there is none to be had."""
    model = case.model()
    pixels = oracles.picture(1, *model.preprocessing.crop)
    target, layers = oracles.best(model, pixels), (case.last_of(model),)
    cam, same = oracles.answers(
        model,
        Question(pixels, targets=(target,), method="cam", layers=layers),
        Question(pixels, targets=(target,), method="gradcam", layers=layers),
    )
    assert isinstance(same, InferenceResult)
    if case.name not in LINEAR_HEADS:
        assert isinstance(cam, InvalidOption)
        assert "global average pooling" in cam.detail
        return
    assert isinstance(cam, InferenceResult)
    expected = oracles.raw(same.explanations[0])
    assert oracles.distance(cam.explanations[0], expected * expected.numel()) < 1e-4
