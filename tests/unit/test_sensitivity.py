"""How much maps depend on the weights: measured at load, against plain torch and scipy."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import picture
from scipy.stats import spearmanr
from tiny import SmallNet
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from service.inference.batch import run
from service.inference.questions import InferenceResult, Question
from service.models import loading
from service.models.catalog import InputSpec, ModelSpec
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes import sensitivity as module
from service.models.probes.condition import Condition
from service.models.probes.sensitivity import (
    HARDLY,
    IMAGES,
    Sensitivity,
    alike,
    natural_noise,
    private_copy,
)

pytestmark = pytest.mark.timeout(60)

SIDE = 32


class Blind(nn.Module):
    """Its layer is the brightness of the image, which no weight changes; all weights are positive.

    So every map of the CAM family is the brightness, whatever the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.brightness = nn.AvgPool3d((3, 4, 4))
        self.later = nn.Identity()
        self.head = nn.Linear(1, 3, bias=False)
        self.head.weight = nn.Parameter(torch.tensor([[1.0], [2.0], [3.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.later(self.brightness(x)).mean(dim=(2, 3)))


class Deep(nn.Module):
    """Four convolutions with ReLUs and a linear head, of seeded weights with both signs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.one = nn.Conv2d(3, 16, 3, stride=2, padding=1)
            self.two = nn.Conv2d(16, 16, 3, padding=1)
            self.three = nn.Conv2d(16, 16, 3, padding=1)
            self.four = nn.Conv2d(16, 16, 3, padding=1)
            self.head = nn.Linear(16, 5)

    def features(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two, self.three, self.four):
            x = layer(x).relu()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


class PartlyScripted(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            self.scripted = torch.jit.script(nn.Linear(7, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scripted(super().forward(x))


def load(build: Callable[[], nn.Module], target: str, **fields: Any) -> LoadedModel:
    sys.modules.setdefault("test_sensitivity_models", sys.modules[__name__])
    spec = ModelSpec(
        "made",
        f"test_sensitivity_models:{build.__name__}",
        input=InputSpec(size=(SIDE, SIDE), resize=SIDE),
        target_layer=target,
        **fields,
    )
    return loading.load_model(spec, sensitivity=True)


def explain(model: LoadedModel, layer: str, method: str = "gradcam") -> tuple[str, ...]:
    replica = Replica(model, model.module, Condition.of(model.module))
    (result,) = run(replica, [Question(picture(0, SIDE, SIDE), method=method, layers=(layer,))])
    assert isinstance(result, InferenceResult)
    return result.explanations[0].flags


def by_method(model: LoadedModel) -> dict[str, Sensitivity]:
    return {one.method: one for one in model.sensitivity}


def test_maps_that_no_weight_changes_are_flagged() -> None:
    model = load(Blind, "brightness")
    measured = by_method(model)["gradcam"]
    assert (measured.head, measured.half, measured.all) == pytest.approx((1, 1, 1))
    assert model.insensitive == {
        *("gradcam", "gradcampp", "hirescam", "layercam", "xgradcam", "eigencam", "cam")
    }
    assert "weights_hardly_matter" in explain(model, "brightness")


def test_the_flag_is_for_the_layer_that_was_measured_alone() -> None:
    assert "weights_hardly_matter" not in explain(load(Blind, "brightness"), "later")


def test_maps_that_the_weights_change_are_not_flagged() -> None:
    model = load(Deep, "three")
    assert "gradcam" not in model.insensitive
    assert "weights_hardly_matter" not in explain(model, "three")


def test_a_trained_model_is_flagged_for_guided_backprop_alone() -> None:
    model = loading.load_model(ModelSpec("builtin", "builtin"), sensitivity=True)
    assert model.insensitive == {"guided_backprop"}


def test_a_probe_that_leaves_the_weights_as_they_are_flags_every_method(monkeypatch) -> None:
    monkeypatch.setattr(module.torch, "randperm", lambda count, **_: torch.arange(count))
    model = load(Deep, "three")
    assert all(one.all == pytest.approx(1) for one in model.sensitivity)
    assert {"gradcam", "input_gradient"} <= model.insensitive


def test_the_correlations_are_those_of_plain_torch_and_scipy() -> None:
    model = load(Deep, "four")
    noise = model.normalised(natural_noise((3, SIDE, SIDE), IMAGES))
    expected: dict[str, list[float]] = {"head": [], "half": [], "all": []}
    for seed, image in enumerate(noise):
        net = copy.deepcopy(model.module)
        target = int(net(image[None]).argmax())
        before = gradcam(net, image, target)
        generator = torch.Generator().manual_seed(seed)
        for depth, parts in {
            "head": [net.head],
            "half": [net.four],  # .69 of the operations are done when it begins
            "all": [net.one, net.two, net.three],
        }.items():
            for tensor in [p for part in parts for p in (part.weight, part.bias)]:
                order = torch.randperm(tensor.numel(), generator=generator)
                tensor.data = tensor.flatten()[order].reshape(tensor.shape)
            after = gradcam(net, image, target)
            expected[depth].append(
                float(spearmanr(before.flatten(), after.flatten()).statistic) if after.any() else 0
            )
    measured = by_method(model)["gradcam"]
    for depth, values in expected.items():
        assert getattr(measured, depth) == pytest.approx(sum(values) / IMAGES, abs=1e-3)


def gradcam(net: Any, image: Tensor, target: int) -> Tensor:
    x = image[None]
    for layer in (net.one, net.two, net.three):
        x = layer(x).relu()
    activation = net.four(x).detach().requires_grad_()
    logit = net.head(activation.relu().mean(dim=(2, 3)))[0, target]
    (gradient,) = torch.autograd.grad(logit, activation)
    return (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1).relu()[0].detach()


def test_it_costs_42_forward_passes(monkeypatch) -> None:
    passes = {"forward": 0, "backward": 0}
    measure, gradients = loading.measure_sensitivity, module.gradients

    def count(part: nn.Module, args: tuple[Any, ...]) -> None:
        passes["forward"] += len(args[0]) if isinstance(part, Deep) else 0

    def backward(*args: Any) -> Any:
        passes["backward"] += 1
        return gradients(*args)

    def counted(subjects: Any) -> Any:
        hook = register_module_forward_pre_hook(count)
        try:
            return measure(subjects)
        finally:
            hook.remove()

    monkeypatch.setattr(loading, "measure_sensitivity", counted)
    monkeypatch.setattr(module, "gradients", backward)
    load(Deep, "four")
    assert passes == {"forward": 18, "backward": 16}
    assert passes["forward"] + 1.5 * passes["backward"] == 42


def test_a_measurement_leaves_model_hooks_and_random_numbers_as_they_were(monkeypatch) -> None:
    measure, seen = loading._sensitivity, []

    def watched(model: LoadedModel) -> Any:
        condition, random = Condition.of(model.module), torch.get_rng_state()
        values = {name: value.clone() for name, value in model.module.state_dict().items()}
        versions = [p._version for p in model.module.parameters()]
        result = measure(model)
        assert not condition.faults()
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(values[k], v) for k, v in model.module.state_dict().items())
        assert [p._version for p in model.module.parameters()] == versions
        assert all(p.grad is None for p in model.module.parameters())
        assert not any(part._forward_hooks for part in model.module.modules())
        seen.append(result)
        return result

    monkeypatch.setattr(loading, "_sensitivity", watched)
    load(SmallNet_, "features")
    assert seen[0]


def SmallNet_() -> nn.Module:  # noqa: N802 - a builder by its name
    return SmallNet()


def test_a_private_copy_shares_no_memory_with_the_model() -> None:
    net = SmallNet()
    theirs = {p.data_ptr() for p in net.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in private_copy(net).parameters())


def test_a_model_with_torchscript_inside_is_not_measured_and_keeps_its_weights() -> None:
    model = load(PartlyScripted, "features")
    assert model.sensitivity == ()
    with pytest.raises(ValueError, match="TorchScript"):
        private_copy(model.module)


def test_random_weights_are_not_measured() -> None:
    spec = ModelSpec("m", "torchvision/squeezenet1_1", input=InputSpec(size=(64, 64), resize=64))
    model = loading.load_model(spec, allow_random_weights=True, sensitivity=True)
    assert model.sensitivity == ()
    assert model.insensitive == frozenset()


def test_no_depth_begins_when_time_is_up(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", -1.0)
    assert load(Deep, "three").sensitivity == ()


def test_a_constant_map_has_nothing_in_common_with_others_and_is_no_reference() -> None:
    flat, slope = torch.zeros(2, 2), torch.arange(4.0).reshape(2, 2)
    assert alike([slope], [flat]) == 0
    assert alike([slope], [torch.full((2, 2), torch.nan)]) == 0
    assert alike([flat], [slope]) is None
    assert alike([flat, slope], [slope, slope]) == 1
    assert alike([slope], [-slope]) == 1  # absolute values are compared


@pytest.mark.parametrize(
    ("half", "whole", "hardly"),
    [(HARDLY, 0, True), (0, HARDLY, True), (0.59, 0.59, False), (None, None, False)],
)
def test_half_or_all_of_the_weights_must_matter(half, whole, hardly) -> None:
    assert Sensitivity("gradcam", 1.0, half, whole).weights_hardly_matter is hardly


def test_the_noise_has_the_spectrum_of_photographs() -> None:
    noise = natural_noise((3, 128, 128), 4)
    assert noise.dtype == torch.uint8
    assert torch.equal(noise, natural_noise((3, 128, 128), 4))
    power = torch.fft.fft2(noise.float()).abs().square().mean(dim=(0, 1))
    ratio = float(power[0, 4] / power[0, 32])
    assert 16 < ratio < 256  # amplitude 1/f: power falls by 64


def test_replaced_fields_keep_the_methods_that_are_flagged() -> None:
    model = load(Blind, "brightness")
    assert replace(model, channels_last=True).insensitive == model.insensitive
