"""Models small enough to check on paper, and models that fail on purpose."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from service.images.decode import Preprocessing
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel
from service.models.probes.attention import NoTokenAttention, TokenAttention, token_attention
from service.models.probes.layers import LayerTrace, trace_layers


class PaperNet(nn.Module):
    """Two channels, two classes, every number known.

    `maps` copies the red channel to its first output and twice the green one to its second;
    the head is the mean of each channel times [[1, -1], [2, 3]].
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 2, kernel_size=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.maps.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])[:, :, None, None])
            self.head.weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 3.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.maps(x)).flatten(1))


class SmallNet(nn.Module):
    """A seeded convolutional net with an in-place ReLU behind every convolution."""

    def __init__(self, classes: int = 7, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(inplace=True),
                nn.Conv2d(8, 16, 3, stride=2, padding=1),
                nn.ReLU(inplace=True),
            )
            self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


def small() -> nn.Module:
    """For `--model tiny:small`."""
    return SmallNet()


def other() -> nn.Module:
    """For `--model tiny:other`: other weights, other classes."""
    return SmallNet(classes=5, seed=1)


def paper() -> nn.Module:
    """For `--model tiny:paper`."""
    return PaperNet()


RED = 200
"""An image whose first pixel has at least this much red makes the faulty models fail."""


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, red: Tensor) -> Tensor:
        ctx.save_for_backward(red)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (red,) = ctx.saved_tensors
        if bool(red.any()):
            raise RuntimeError("planted: backward")
        return gradient, None


HANGING, RELEASED = threading.Event(), threading.Event()
"""A `hang` model sets the first where it hangs, and waits for the second."""


class Faulty(SmallNet):
    """Fails for red images alone, in the way it was told to; its replicas do too."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        if fault == "hook":
            self.features.register_forward_hook(_raise_when_red)

    def forward(self, x: Tensor) -> Tensor:
        red = x[:, 0, 0, 0] > 1.0  # normalised: RED is 1.3, the others are below 0
        if self.fault == "forward" and bool(red.any()):
            raise RuntimeError("planted: forward")
        if self.fault == "hang" and bool(red.any()):
            HANGING.set()
            RELEASED.wait()
        if self.fault == "hook":
            self.features.red = bool(red.any())
        maps = self.features(x)
        if self.fault == "backward":
            maps = _FailsBackward.apply(maps, red)
        logits = self.head(maps.mean(dim=(2, 3)))
        if self.fault == "nan":
            logits = torch.where(red[:, None], torch.nan, logits)
        return logits


def _raise_when_red(module: Any, _args: object, _output: object) -> None:
    if module.red:
        raise RuntimeError("planted: hook")


def fails_in_forward() -> nn.Module:
    return Faulty("forward")


def fails_in_hook() -> nn.Module:
    return Faulty("hook")


def fails_in_backward() -> nn.Module:
    return Faulty("backward")


def hangs() -> nn.Module:
    return Faulty("hang")


def gives_nan() -> nn.Module:
    return Faulty("nan")


def loaded(module: nn.Module, name: str = "tiny", side: int = 32) -> LoadedModel:
    """A module as the pool wants it, for square inputs of `side` pixels, mean 0 and std 1."""
    module = module.eval().requires_grad_(requires_grad=False)
    preprocessing = Preprocessing(side, (side, side), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    tried = trace_layers(module, torch.zeros(1, 3, side, side))
    labels = tuple(f"class {index}" for index in range(tried.classes))
    return LoadedModel(
        ModelSpec(name, "tests"),
        module,
        labels,
        preprocessing,
        tried.target_layer,
        tried.layers,
        version="0" * 12,
        attention=attention_of(module, side, tried),
    )


def attention_of(module: nn.Module, side: int, tried: LayerTrace) -> TokenAttention | str:
    """The attention of a module, or why it has no map, as it is measured at load."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        return token_attention(module, image, tried.layers, tried.target_layer, None)
    except NoTokenAttention as error:
        return str(error)


CORNER = (0, 0, 12, 12)
"""Left, top, width and height of the part of the input that `CornerNet`'s class 0 depends on."""


class CornerNet(nn.Module):
    """Class 0 is the mean of a known square of the input, class 1 that of the whole input."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 1, kernel_size=1, bias=False)
        with torch.no_grad():
            self.maps.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        left, top, width, height = CORNER
        maps = self.maps(x)
        square = maps[:, :, top : top + height, left : left + width]
        return torch.cat([square.mean(dim=(2, 3)), maps.mean(dim=(2, 3))], dim=1)


def corner() -> nn.Module:
    """For `--model tiny:corner`."""
    return CornerNet()
