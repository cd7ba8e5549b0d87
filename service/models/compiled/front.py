"""What every engine for the front of a cut model is: a function from pixels to an activation."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from service.models.catalog import Floating

Precision = Floating | Literal["int8"]
"""What a front computes in; `int8` is made by `camserve calibrate`."""


class Front(Protocol):
    """Pixels uint8 (B, C, h, w), on the CPU, to the target layer's output.

    That is float32 (B, ...) on the model's device, in memory of its own; any number of threads may
    call it at once. wide: whether nothing else runs, so that it may have all cores.
    """

    def __call__(self, pixels: Tensor, *, wide: bool = False) -> Tensor: ...


class Normalised(nn.Module):
    """A module that takes uint8 pixels: normalised inside, so that the compiler can fuse it."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.module = module
        self.memory_format = memory_format
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Any:
        """uint8 (B, C, h, w) to whatever the module makes of it, normalised."""
        values = (pixels.to(torch.float32) / 255 - self.mean) / self.std
        return self.module(values.contiguous(memory_format=self.memory_format))
