"""Models as teams bring them: other channels, outputs and precisions, compiled, broken."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from tiny import SmallNet
from torch import Tensor, nn


class ManyChannels(nn.Module):
    """A seeded net on so many channels, whose kernels see each of them."""

    def __init__(self, channels: int = 10, classes: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.features = nn.Sequential(
                nn.Conv2d(channels, 8, 3, stride=2, padding=1),
                nn.ReLU(inplace=True),
            )
            self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


class ThreeOutputs(SmallNet):
    """Returns a tuple whose second element holds the logits."""

    def forward(self, x: Tensor) -> Any:
        maps = self.features(x)
        return maps, self.head(maps.mean(dim=(2, 3))), maps.sum()


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None


class DataOutput(SmallNet):
    def forward(self, x: Tensor) -> Any:
        return Answer(super().forward(x))


class DictOutput(SmallNet):
    def forward(self, x: Tensor) -> Any:
        return {"loss": x.mean(), "logits": super().forward(x)}


class TwoInputs(SmallNet):
    def forward(self, x: Tensor, age: Tensor) -> Tensor:
        return super().forward(x) + age


def many_channels(channels: int = 10, classes: int = 3) -> nn.Module:
    return ManyChannels(channels, classes)


def net(classes: int = 7, seed: int = 0) -> nn.Module:
    return SmallNet(classes, seed)


def three_outputs() -> nn.Module:
    return ThreeOutputs()


def data_output() -> nn.Module:
    return DataOutput()


def dict_output() -> nn.Module:
    return DictOutput()


def two_inputs() -> nn.Module:
    return TwoInputs()


def raises() -> nn.Module:
    raise RuntimeError("planted: no such data set")


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(SmallNet().eval(), torch.zeros(1, 3, 32, 32))


def wrapped() -> nn.Module:
    return torch.compile(SmallNet())


def compiled_inside() -> nn.Module:
    model = SmallNet()
    model.features = torch.compile(model.features)
    return model


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(
            SmallNet().eval(), {nn.Linear}, dtype=torch.qint8
        )
