"""Models away from the CPU: the same answers, and few journeys. On a GPU where there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torchvision
from played_device import NAME, played_device
from torch import nn

from api_schemas.methods import METHODS
from service.inference.batch import Unfinished, run
from service.inference.contrast import Contrast
from service.inference.questions import InferenceResult, Question
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool

pytestmark = pytest.mark.timeout(60)

SIZE = 64


@dataclass(frozen=True, slots=True)
class Device:
    """Where a test runs, and how near its maps, −1..1, must be to the CPU's."""

    name: str
    tolerance: float


@pytest.fixture(params=[NAME, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == NAME:
        with played_device():
            yield Device(NAME, 3e-5)
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    yield Device("cuda", 1e-3)


def convolutions() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.resnet18(weights=None, num_classes=11)


def windows() -> nn.Module:
    """Swin: channels last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.SwinTransformer(
            [4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=11
        )


def tokens() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torchvision.models.VisionTransformer(SIZE, 16, 2, 2, 32, 64, num_classes=11)
        nn.init.normal_(net.heads.head.weight)  # a fresh head is zero, and so is every gradient
        return net


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`package.module:function` builders come from this file."""
    monkeypatch.setitem(sys.modules, "test_devices_models", sys.modules[__name__])


def load(function: str, device: str = "cpu") -> LoadedModel:
    size = replace(ModelSpec("x", "y").input, size=(SIZE, SIZE), resize=SIZE)
    spec = ModelSpec(function, f"test_devices_models:{function}", input=size)
    return load_model(spec, device=device, allow_random_weights=True)


def picture(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def answers(
    model: LoadedModel, asked: list[Question], *, folded: bool = False
) -> list[InferenceResult]:
    """What one batch gives, its methods of many passes worked off."""
    found = []
    with ModelPool([model], replicas=1).lease(model, folded=folded) as replica:
        for each in run(replica, asked):
            answer = each
            while isinstance(answer, Unfinished):
                answer = answer.step(replica) or answer
            assert isinstance(answer, InferenceResult), answer
            found.append(answer)
    return found


def assert_same(
    some: list[InferenceResult], others: list[InferenceResult], tolerance: float
) -> None:
    for one, other in zip(some, others, strict=True):
        for mine, theirs in zip(one.explanations, other.explanations, strict=True):
            assert (mine.class_id, mine.flags) == (theirs.class_id, theirs.flags)
            np.testing.assert_allclose(mine.grid, theirs.grid, atol=tolerance)
        for mine, theirs in zip(one.activations, other.activations, strict=True):
            assert (mine.layer, mine.kind, mine.part) == (theirs.layer, theirs.kind, theirs.part)
            largest = float(np.abs(theirs.values).max())
            np.testing.assert_allclose(mine.values, theirs.values, atol=tolerance * largest)
        scores = [[each.score for each in answer.predictions] for answer in (one, other)]
        np.testing.assert_allclose(*scores, atol=tolerance)


REFUSED = {
    "convolutions": {"attention_rollout", "gae"},
    "windows": {"attention_rollout", "gae", "guided_backprop", "guided_gradcam"},
    "tokens": {"cam", "guided_backprop", "guided_gradcam"},
}


@pytest.mark.parametrize("function", REFUSED)
def test_every_method_answers_as_on_the_cpu(device: Device, function: str) -> None:
    there, here = load(function, device.name), load(function)
    methods = sorted(METHODS.keys() - REFUSED[function])
    for method in methods:
        layers = here.target_layers(())
        few = {"targets": (3, 7), "contrast": Contrast((5,)), "samples": 8, "steps": 3}
        asked = [Question(picture(0), method=method, layers=layers, **few)]
        assert_same(answers(there, asked), answers(here, asked), device.tolerance)


def test_activations_are_brought_over(device: Device) -> None:
    there, here = load("convolutions", device.name), load("convolutions")
    kinds = ("output", "input", "grad_output", "grad_input")
    asked = [
        Question(picture(seed), layers=("layer4",), activations=("conv1", "layer2"), kinds=kinds)
        for seed in range(3)
    ]
    assert_same(answers(there, asked), answers(here, asked), device.tolerance)


def test_a_mixed_batch_answers_as_on_the_cpu(device: Device) -> None:
    there, here = load("convolutions", device.name), load("convolutions")
    asked = [
        Question(picture(0), layers=("layer4",)),
        Question(picture(1), layers=("layer4", "layer3"), method="layercam", explain_top=3),
        Question(picture(2), method=None),
        Question(picture(3), layers=("layer3",), targets=(1,), contrast=Contrast((2,))),
    ]
    assert_same(
        answers(there, asked, folded=True), answers(here, asked, folded=True), device.tolerance
    )


@pytest.mark.parametrize("count", [1, 8])
def test_a_batch_travels_once_each_way_whatever_its_size(count: int) -> None:
    """Each journey from a GPU waits until that has done all its work."""
    with played_device() as crossings:
        model = load("convolutions", NAME)
        asked = [Question(picture(seed), layers=("layer4",)) for seed in range(count)]
        answers(model, asked[:1], folded=True)  # the normalisation's numbers are kept from here on
        crossings.to_cpu.clear()
        crossings.to_device.clear()
        answers(model, asked, folded=True)
    assert crossings.to_device == [(count, 3, SIZE, SIZE), (1, count, 11)]
    assert crossings.to_cpu == [(count, 11), (count, 2, 2)]


def test_the_played_device_is_apart() -> None:
    with played_device() as crossings:
        there = torch.ones(2).to(NAME)
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(2)
        assert float(there.sum()) == 2
        assert crossings.to_cpu == [()], "to look at a value is to fetch it"
