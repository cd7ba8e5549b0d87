"""CAM, guided backpropagation, input gradients, integrated gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from captum.attr import GradientShap, GuidedBackprop, GuidedGradCam, IntegratedGradients, Saliency
from tiny import PaperNet, SmallNet, loaded
from torch import Tensor, nn
from torch.nn import functional
from torchcam.methods import CAM
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from service.cam.guided import GuidedReLU
from service.errors import InvalidOption
from service.inference import input_gradients
from service.inference.questions import Question
from service.models.loaded import LoadedModel

pytestmark = [
    pytest.mark.reference,
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:Setting backward hooks"),  # Captum says what it does
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require"),
]

PIXELS = oracles.picture(6, 64, 64)


def small(net: nn.Module | None = None) -> LoadedModel:
    """A small net whose classes differ: fresh heads hardly do."""
    net = net or SmallNet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        nn.init.normal_(net.head.weight, std=2)
    return loaded(net, side=64)


def ask(model: LoadedModel, method: str, target: int, **options) -> Tensor:
    question = Question(PIXELS, targets=(target,), method=method, **options)
    return oracles.raw(oracles.explained(model, question)[0])


def refusal(model: LoadedModel, method: str, **options) -> InvalidOption:
    size = model.preprocessing.crop
    question = Question(oracles.picture(6, *size), targets=(0,), method=method, **options)
    (answer,) = oracles.answers(model, question)
    assert isinstance(answer, InvalidOption)
    assert answer.code == "invalid_option"
    return answer


def tiny_vit(layers: int = 3) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = VisionTransformer(64, 16, layers, 4, 32, 64, num_classes=5)
        nn.init.normal_(net.heads.head.weight)
        nn.init.normal_(net.class_token)
    return loaded(net, side=64)


def tiny_convnext() -> LoadedModel:
    return loaded(ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]), side=64)


def tiny_swin() -> LoadedModel:
    return loaded(SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=5), side=64)


def test_cam_equals_torchcams_and_is_gradcam_times_the_number_of_cells() -> None:
    model = small()
    target = oracles.best(model, PIXELS)
    net = model.replicate()
    extractor = CAM(net, "features", "head", (3, 64, 64))
    with torch.no_grad():
        net(oracles.input_of(model, PIXELS))
    peer = extractor(target, normalized=False)[0][0].relu()
    extractor.remove_hooks()
    ours = ask(model, "cam", target, layers=("features",))
    assert oracles.distance(ours, peer) < 1e-5
    gradcam = ask(model, "gradcam", target, layers=("features",))
    assert oracles.distance(ours, gradcam * ours.numel()) < 1e-5


def test_cam_of_a_head_without_bias_and_in_float64() -> None:
    """PaperNet has no bias; a head of another precision than float32 is read too."""
    paper, double = loaded(PaperNet(), side=64), oracles.in_double(small())
    for model, layer in ((paper, "maps"), (double, "net.features")):
        target = oracles.best(model, PIXELS)
        ours = ask(model, "cam", target, layers=(layer,))
        gradcam = ask(model, "gradcam", target, layers=(layer,))
        assert oracles.distance(ours, gradcam * ours.numel()) < 1e-5


class Vgg(nn.Module):
    """What VGG and AlexNet do: the head looks at places, and has hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = SmallNet().features
        self.head = nn.Sequential(nn.Linear(16 * 256, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Densenet(SmallNet):
    """What DenseNet does: a ReLU between the last module and the pooling."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features[:4](x).relu().mean(dim=(2, 3)))


@pytest.mark.parametrize(("net", "layer"), [(Vgg(), "features"), (Densenet(), "features.3")])
def test_cam_is_refused_where_the_head_is_not_linear_in_the_mean(
    net: nn.Module, layer: str
) -> None:
    error = refusal(loaded(net, side=64), "cam", layers=(layer,))
    assert "global average pooling" in error.detail
    assert "gradcam" in error.detail


class Forms(nn.Module):
    """Three ReLUs; subclasses call them as modules, functions and in place."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.first, self.second, self.third = (
                nn.Conv2d(*channels, 3, stride=2) for channels in ((3, 8), (8, 8), (8, 16))
            )
            self.head = nn.Linear(16, 5)
        self.relu = nn.ModuleList(nn.ReLU() for _ in range(3))

    def activated(self, x: Tensor, place: int) -> Tensor:
        return self.relu[place](x)

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate((self.first, self.second, self.third)):
            x = self.activated(layer(x), place)
        return self.head(x.mean(dim=(2, 3)))


class Functions(Forms):
    """As functions that return a new tensor."""

    def activated(self, x: Tensor, place: int) -> Tensor:
        return (functional.relu, torch.relu, Tensor.relu)[place](x)


class InPlace(Forms):
    """As functions that overwrite their input."""

    def activated(self, x: Tensor, place: int) -> Tensor:
        return (torch.relu_, lambda x: functional.relu(x, inplace=True), Tensor.relu_)[place](x)


class InPlaceModules(Forms):
    """As modules that overwrite their input."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ModuleList(nn.ReLU(inplace=True) for _ in range(3))


def test_guided_backprop_equals_captums_for_relu_modules() -> None:
    model = small(Forms())
    target = oracles.best(model, PIXELS)
    image = oracles.input_of(model, PIXELS)
    peer = GuidedBackprop(model.replicate()).attribute(image, target=target)[0].sum(dim=0)
    ours = ask(model, "guided_backprop", target)
    assert oracles.distance(ours, peer) < 1e-5
    assert oracles.distance(ask(model, "input_gradient", target), peer) > 0.1


@pytest.mark.parametrize("form", [Functions, InPlace, InPlaceModules])
def test_guided_backprop_guides_a_relu_in_whatever_form_it_comes(form: type[Forms]) -> None:
    """Captum guides modules alone and does not say so; ours is bit-equal to the module twin."""
    module = small(Forms())
    target = oracles.best(module, PIXELS)
    ours = ask(small(form()), "guided_backprop", target)
    assert torch.equal(ours, ask(module, "guided_backprop", target))


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2"])
def test_guided_backprop_of_real_weights_by_hooks_on_modules(name: str, shared_data) -> None:
    """ReLU and ReLU6, on a twin that overwrites nothing: the gradient into each one clamped."""
    model = oracles.real(name)
    pixels = oracles.picture(7)
    target = oracles.best(model, pixels)
    image = oracles.input_of(model, pixels).requires_grad_()
    with oracles.without_in_place(model.module) as net:
        for each in net.modules():
            if isinstance(each, (nn.ReLU, nn.ReLU6)):
                each.register_full_backward_hook(lambda _, into, __: (into[0].clamp_min(0),))
        net(image)[0, target].backward()
    question = Question(pixels, targets=(target,), method="guided_backprop")
    (ours,) = oracles.explained(model, question)
    assert image.grad is not None
    assert oracles.distance(ours, image.grad[0].sum(dim=0)) < 1e-4


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnext])
@pytest.mark.parametrize("method", ["guided_backprop", "guided_gradcam"])
def test_a_model_with_gelu_alone_cannot_be_guided(build, method: str) -> None:
    model = build()
    assert "no ReLU" in refusal(model, method, layers=model.target_layers(())).detail


def test_guided_mode_holds_for_its_own_thread_alone() -> None:
    found: list[Tensor] = []

    def in_another_thread() -> None:
        x = torch.tensor([1.0], requires_grad=True)
        (gradient,) = torch.autograd.grad(-functional.relu(x), x)
        found.append(gradient)

    with GuidedReLU():
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        thread.join()
        x = torch.tensor([1.0], requires_grad=True)
        (guided,) = torch.autograd.grad(-functional.relu(x), x)
    assert found[0].item() == -1
    assert guided.item() == 0


def test_guided_gradcam_equals_captums() -> None:
    model = small(Forms())
    target = oracles.best(model, PIXELS)
    net = model.replicate()
    peer = GuidedGradCam(net, net.relu[2]).attribute(
        oracles.input_of(model, PIXELS), target=target, interpolate_mode="bilinear"
    )
    ours = ask(model, "guided_gradcam", target, layers=("relu.2",))
    assert oracles.distance(ours, peer[0].sum(dim=0).detach()) < 1e-5


def test_input_gradient_equals_captums() -> None:
    model = small()
    target = oracles.best(model, PIXELS)
    peer = Saliency(model.replicate()).attribute(
        oracles.input_of(model, PIXELS), target=target, abs=False
    )
    assert oracles.distance(ask(model, "input_gradient", target), peer[0].sum(dim=0)) < 1e-5


def test_integrated_gradients_equal_captums_and_are_complete() -> None:
    """The sum over all pixels is the logit less the baseline's (Sundararajan, proposition 1)."""
    model = small()
    target = oracles.best(model, PIXELS)
    image = oracles.input_of(model, PIXELS)
    peer = IntegratedGradients(model.replicate()).attribute(
        image, target=target, n_steps=50, method="gausslegendre"
    )
    ours = ask(model, "integrated_gradients", target, steps=50)
    assert oracles.distance(ours, peer[0].sum(dim=0)) < 1e-4
    with torch.no_grad():
        rise = model.replicate()(torch.cat([image, torch.zeros_like(image)]))[:, target]
    assert float(ours.sum()) == pytest.approx(float(rise[0] - rise[1]), rel=2e-2)


def test_several_targets_of_an_input_level_method_equal_one_at_a_time() -> None:
    model = small()
    for method in ("input_gradient", "guided_backprop", "integrated_gradients", "guided_gradcam"):
        options = {"layers": ("features",)} if method == "guided_gradcam" else {}
        question = Question(PIXELS, targets=(0, 5, 2), method=method, steps=9, **options)
        (answer,) = oracles.answers(model, question)
        for explanation in answer.explanations:
            alone = ask(model, method, explanation.class_id, steps=9, **options)
            assert oracles.distance(explanation, alone) < 1e-5, method


@pytest.mark.parametrize("build", [small, tiny_vit])
def test_expected_gradients_equal_captums_gradient_shap_on_the_same_draws(
    build: Callable[[], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    draws = list(input_gradients.random_baselines(PIXELS, 21, 4))
    baselines = model.normalised(torch.stack([drawn for drawn, _ in draws]))
    alphas = np.array([alpha for _, alpha in draws])
    monkeypatch.setattr(np.random, "choice", lambda many, size: np.arange(many)[:size])
    monkeypatch.setattr(np.random, "uniform", lambda _low, _high, _count: alphas)
    peer = GradientShap(model.replicate()).attribute(
        oracles.input_of(model, PIXELS), baselines, n_samples=21, stdevs=0.0, target=2
    )
    ours = ask(model, "expected_gradients", 2, samples=21, seed=4)
    assert oracles.distance(ours, peer[0].sum(dim=0).detach().double()) < 1e-5
    assert oracles.distance(ask(model, "expected_gradients", 2, samples=21, seed=5), ours) > 1e-2


def test_expected_gradients_sum_to_the_difference_from_the_mean_of_the_baselines() -> None:
    """On a linear model with any α: y(x) minus the mean of y(x'), exactly."""
    model = loaded(PaperNet(), side=64)
    ours = ask(model, "expected_gradients", 1, samples=5)
    drawn = torch.stack([each for each, _ in input_gradients.random_baselines(PIXELS, 5, 0)])
    with torch.no_grad():
        logits = model.replicate()(model.normalised(torch.cat([PIXELS[None], drawn])))[:, 1]
    assert float(ours.sum()) == pytest.approx(float(logits[0] - logits[1:].mean()), rel=1e-4)


def test_expected_gradients_do_not_depend_on_how_many_run_at_once(monkeypatch) -> None:
    model = small()
    whole = ask(model, "expected_gradients", 2, samples=9)
    monkeypatch.setattr(input_gradients, "chunk_size", lambda _model: 1)
    assert oracles.distance(ask(model, "expected_gradients", 2, samples=9), whole) < 1e-5
