"""Models that soil their replica when an image is red, each in its own way, and answer well."""

from __future__ import annotations

import torch
from tiny import SmallNet
from torch import Tensor, nn


class Soiling(SmallNet):
    """Answers every image as `SmallNet` does; what a red one leaves behind has a name."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if bool((x[:, 0, 0, 0] > 1.0).any()):
            getattr(self, self.fault)()
        return logits

    def training_mode(self) -> None:
        self.train()

    def gradient(self) -> None:
        self.head.bias.grad = torch.ones_like(self.head.bias)

    def hook(self) -> None:
        self.features[0].register_forward_hook(lambda *_: None)

    def buffer(self) -> None:
        self.features[1].running_mean.add_(100.0)

    def weights(self) -> None:
        with torch.no_grad():
            self.head.weight.mul_(-1.0)


def leaves_training_mode() -> nn.Module:
    return Soiling("training_mode")


def leaves_a_gradient() -> nn.Module:
    return Soiling("gradient")


def leaves_a_hook() -> nn.Module:
    return Soiling("hook")


def changes_a_buffer() -> nn.Module:
    return Soiling("buffer")


def changes_its_weights() -> nn.Module:
    return Soiling("weights")
