"""The gradient family on eleven architectures: against two peers, and in float64 on paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import oracles
import pytest
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, HiResCAM
from pytorch_grad_cam.xgrad_cam import XGradCAM as GradCamsXGradCAM
from torch import Tensor
from torchcam.methods import GradCAM as TorchGradCAM
from torchcam.methods import LayerCAM, XGradCAM

from service.errors import InvalidOption
from service.models.loaded import LoadedModel
from service.questions import Answer, Question

pytestmark = [pytest.mark.reference, pytest.mark.timeout(120)]


@dataclass(frozen=True)
class Case:
    """An architecture, an early layer of it, and its last one where that is not the default."""

    name: str
    early: str
    last: str | None = None
    side: int = 160
    real: bool = False
    last_to_map: Callable[[Tensor], Tensor] | None = None
    early_to_map: Callable[[Tensor], Tensor] | None = None

    def model(self) -> LoadedModel:
        if self.real:
            return oracles.real(self.name)
        return oracles.architecture(self.name, self.side, self.side)

    def places(
        self, model: LoadedModel
    ) -> list[tuple[str, Callable[[Tensor], Tensor] | None, float]]:
        """Each layer, how the peers are told to make a map of it, and how near ours must be."""
        assert model.target_layer is not None
        last = self.last or model.target_layer
        return [(last, self.last_to_map, 1e-4), (self.early, self.early_to_map, 5e-2)]


LINEAR_HEADS = {"resnet50", "googlenet", "mobilenet_v2", "efficientnet_b0", "swin_t"}
VIT = oracles.tokens_to_map(14, 14)
CASES = [
    Case("alexnet", "features.3", side=224),
    Case("vgg16_bn", "features.23", side=96),
    Case("resnet50", "layer2"),
    Case("densenet121", "features.denseblock2"),
    Case("googlenet", "inception3b"),
    Case("mobilenet_v2", "features.7", side=224, real=True),
    Case("squeezenet1_1", "features.6", side=224, real=True),
    Case("efficientnet_b0", "features.3"),
    Case("convnext_tiny", "features.3"),
    Case("vit_b_16", "encoder.layers.encoder_layer_5.ln_1", None, 224, False, VIT, VIT),
    Case("swin_t", "features.3", "norm", 224, False, *2 * [oracles.channels_first]),
]


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


def test_each_method_agrees_with_the_peers(case: Case) -> None:
    """Raw maps: to 1e-4 of the maximum at the last layer, to 5e-2 at an early one.

    Grad-CAM++ is not here: neither peer computes it. The sign of an eigenvector is anyone's choice.
    """
    model = case.model()
    pixels = oracles.picture(1, *model.preprocessing.crop)
    target, image = oracles.best(model, pixels), oracles.input_of(model, pixels)
    for layer, to_map, tolerance in case.places(model):
        ours = by_the_service(
            model,
            ["gradcam", "hirescam", "layercam", "xgradcam", "eigencam"],
            layer,
            pixels,
            target,
        )
        with oracles.without_in_place(model.module) as net:
            methods = [TorchGradCAM, LayerCAM, XGradCAM]
            torchcam = oracles.by_torchcam(methods, net, [layer], image, target, to_map=to_map)
            (gradcam,), (hirescam,), (xgradcam,), (eigencam,) = (
                oracles.by_grad_cam(method, net, [layer], image, target, to_map=to_map)
                for method in (GradCAM, HiResCAM, GradCamsXGradCAM, EigenCAM)
            )
        peers: dict[str, list[Tensor]] = {
            "gradcam": [torchcam[0][0], gradcam.relu()],
            "layercam": [torchcam[1][0]],
            "xgradcam": [torchcam[2][0], xgradcam.relu()],
            "hirescam": [hirescam.relu()],
            "eigencam": [eigencam.relu(), (-eigencam).relu()],
        }
        distances = {
            method: min(oracles.distance(ours[method], expected) for expected in maps)
            for method, maps in peers.items()
        }
        assert max(distances.values()) <= tolerance, (layer, distances)


def gradcam(a: Tensor, g: Tensor) -> Tensor:
    """Selvaraju et al. 2017, equations 1 and 2."""
    return (g.mean(dim=(1, 2), keepdim=True) * a).sum(dim=0).relu()


def gradcampp(a: Tensor, g: Tensor) -> Tensor:
    """Chattopadhay et al. 2018, equations 10 and 19, with S for exp's argument left out of both."""
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
    share = a / a.sum(dim=(1, 2), keepdim=True)
    weights = torch.nan_to_num(share * g, posinf=0, neginf=0).sum(dim=(1, 2), keepdim=True)
    return (weights * a).sum(dim=0).relu()


ON_PAPER = (gradcam, gradcampp, hirescam, layercam, xgradcam)


def test_in_float64_each_method_is_the_papers_formula_on_a_full_backward_pass(
    case: Case,
) -> None:
    """To 1e-6 of the maximum, at the last layer and at an early one."""
    model = oracles.in_double(case.model())
    pixels = oracles.picture(2, *model.preprocessing.crop)
    target = oracles.best(model, pixels)
    for path, to_map, _ in case.places(case.model()):
        layer = f"net.{path}"
        activation, gradient = oracles.full_backward(
            model, layer, pixels, lambda logits: logits[target], to_map or (lambda maps: maps)
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
    """Where the head is one linear layer behind the mean; elsewhere there is no CAM."""
    model = case.model()
    pixels = oracles.picture(1, *model.preprocessing.crop)
    (layer, *_), *_ = case.places(model)
    target = oracles.best(model, pixels)
    cam, gradcam = oracles.answers(
        model,
        *(
            Question(pixels, targets=(target,), method=method, layers=(layer,))
            for method in ("cam", "gradcam")
        ),
    )
    assert isinstance(gradcam, Answer)
    if case.name not in LINEAR_HEADS:
        assert isinstance(cam, InvalidOption)
        assert "global average pooling" in cam.detail
        return
    assert isinstance(cam, Answer)
    expected = oracles.raw(gradcam.explanations[0])
    assert oracles.distance(cam.explanations[0], expected * expected.numel()) < 1e-4
