"""Guided backpropagation: the backward pass of a ReLU lets only positive gradients through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_RELU = {torch.relu, functional.relu, Tensor.relu}
_RELU_IN_PLACE = {torch.relu_, functional.relu_, Tensor.relu_}
_RELU6 = {functional.relu6}
_HARDTANH = {functional.hardtanh, functional.hardtanh_}


class _GuidedClamp(torch.autograd.Function):
    """Clamp to 0..`high`; backward: the gradient where it and the input's slope are positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float) -> Tensor:
        # The mask and not the input is kept: an in-place operation may overwrite the input.
        ctx.save_for_backward((x > 0) & (x < high))
        return x.clamp(0, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (passes,) = ctx.saved_tensors
        return gradient.clamp_min(0) * passes, None


class GuidedReLU(TorchFunctionMode):
    """Inside the `with`, every ReLU and ReLU6 of this thread is guided.

    Modules, functions and in-place forms all pass here; other threads do not. `count` is the number
    of ReLUs so far: a model without any cannot be guided.

    Springenberg et al., "Striving for Simplicity: The All Convolutional Net", ICLR 2015 workshop.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        high, in_place = _relu_bound(func, args, kwargs)
        if high is None:
            return func(*args, **kwargs)
        self.count += 1
        x = args[0] if args else kwargs["input"]
        guided = _GuidedClamp.apply(x, high)
        return x.copy_(guided) if in_place else guided


def _relu_bound(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float | None, bool]:
    """The upper bound of a ReLU-like call (None for other calls), and whether it is in place."""
    if func in _RELU_IN_PLACE:
        return float("inf"), True
    if func in _RELU or func in _RELU6:
        in_place = bool(kwargs.get("inplace", args[1] if len(args) > 1 else False))
        return (float("inf") if func in _RELU else 6.0), in_place
    if func in _HARDTANH:
        low, high, in_place = (
            kwargs.get(name, args[index] if len(args) > index else default)
            for index, (name, default) in enumerate(
                (("min_val", -1.0), ("max_val", 1.0), ("inplace", False)), start=1
            )
        )
        if low == 0:
            return float(high), bool(in_place) or func is functional.hardtanh_
    return None, False
