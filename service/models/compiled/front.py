"""The interface of a front in any engine, and the lane of front and tail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from service.models.catalog import Floating

Precision = Floating | Literal["int8"]
"""Precision of a front; `camserve calibrate` creates `int8`."""

_CORRECTED = ("norm", "softmax", "attention", "gelu", "silu", "hardswish")
"""In the names of operators for which a correction of gradients may have a rule."""


is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)
"""Whether a replica that runs compiled parts may use all cores; see `Front`."""


@contextmanager
def alone(value: bool) -> Iterator[None]:
    """Set `is_alone` inside the `with`."""
    token = is_alone.set(value)
    try:
        yield
    finally:
        is_alone.reset(token)


class NotCompiled(Exception):
    """Why a model has no compiled lane; the sentence is shown in `/models`."""


class Front(Protocol):
    """Maps pixels, uint8 (B, C, h, w) on the CPU, to what crosses the cut; see `cut.split`.

    The first tensor is the target layer's output, float32 (B, ...). All are on the model's device,
    in new memory; any number of threads may call it concurrently. wide: whether no other batch
    runs, so that it may use all cores.
    """

    def __call__(self, pixels: Tensor, /, *, wide: bool = False) -> tuple[Tensor, ...]: ...

    def release(self) -> None:
        """Free what the next batch can have again, while none runs: after the trials at load."""


class Program(Protocol):
    """Maps the tensors that a part of a model takes to those that it returns, in new memory.

    float32 (B, C, h, w) of any size; see `compiled.parts`, and `Front` for threads and `wide`.
    """

    def __call__(self, *inputs: Tensor, wide: bool = False) -> tuple[Tensor, ...]: ...


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
    """The lane for the common request: predictions, and maps at `layer` from its gradient.

    tail:      from what the front returns to the model's output. It has no hooks, so that all
               worker threads share it.
    parity:    with the hooked lane; None for an int8 front, which `camserve calibrate` measured.
    precision: of the front: `float32`, or the configured one: `bf16`, `int8`.
    instead:   why the front does not have the configured precision.
    """

    layer: str
    front: Front
    tail: fx.GraphModule
    parity: Parity | None = None
    precision: Precision = "float32"
    instead: str | None = None

    @property
    def calls_functions(self) -> bool:
        """Whether a correction sees all that it may change in the tail; not as operators."""
        operators = (each.target for each in self.tail.graph.nodes)
        names = [each.name() for each in operators if isinstance(each, OpOverload)]
        return not any(part in name for name in names for part in _CORRECTED)


class Normalised(nn.Module):
    """A module for uint8 pixels, with the normalisation inside so that a compiler can fuse it."""

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
        """uint8 (B, C, h, w) to the output of the module for the normalised pixels."""
        values = (pixels.to(torch.float32) / 255 - self.mean) / self.std
        return self.module(values.contiguous(memory_format=self.memory_format))


def difference(expected: Tensor, actual: Tensor) -> float:
    """The largest difference as a share of the largest value; infinite if shapes differ or NaN."""
    if expected.shape != actual.shape or not bool(actual.isfinite().all()):
        return float("inf")
    largest = float(expected.abs().max())
    gap = float((expected - actual).abs().max())
    return gap / largest if largest else gap
