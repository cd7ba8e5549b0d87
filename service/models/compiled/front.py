"""A cut model: what every engine for its front is, and the lane that front and tail make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn

from service.models.catalog import Floating

Precision = Floating | Literal["int8"]
"""What a front computes in; `int8` is made by `camserve calibrate`."""


class Front(Protocol):
    """Pixels uint8 (B, C, h, w), on the CPU, to the target layer's output.

    That is float32 (B, ...) on the model's device, in memory of its own; any number of threads may
    call it at once. wide: whether nothing else runs, so that it may have all cores.
    """

    def __call__(self, pixels: Tensor, *, wide: bool = False) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest differences from the hooked lane, each as a share of the largest absolute value."""

    activation: float
    map: float
    logits: float


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest differences between the two lanes, as shares of the largest absolute value."""

    activation: float
    map: float
    logits: float

    def is_within(self, tolerance: Tolerance) -> bool:
        return (
            self.activation <= tolerance.activation
            and self.map <= tolerance.map
            and self.logits <= tolerance.logits
        )

    def __str__(self) -> str:
        return (
            f"activation by {self.activation:.1g}, map by {self.map:.1g}, logits by "
            f"{self.logits:.1g} of the maximum"
        )


@dataclass(frozen=True, slots=True)
class CompiledLane:
    """What answers the common request: predictions, and maps at `layer` from its gradient.

    tail:      from the layer's output to the model's output. It carries no hooks, so that all
               worker threads share it.
    parity:    with the hooked lane; None for an int8 front, which was measured when it was made.
    precision: of the front: `float32`, or what the operator chose: `bf16`, `int8`.
    instead:   why the front is not in the precision that was chosen.
    """

    layer: str
    front: Front
    tail: fx.GraphModule
    parity: Parity | None = None
    precision: Precision = "float32"
    instead: str | None = None


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
