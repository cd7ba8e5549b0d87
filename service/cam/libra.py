"""LibraGrad: backward passes that give each input its share of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from service.cam.attention import AttentionMode

_GATED = {functional.gelu, functional.silu, functional.hardswish}
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS_NORM = ("input", "normalized_shape", "weight", "eps")
_CENTRED = {functional.layer_norm, torch.layer_norm}
_NORMS: Mapping[Callable[..., Any], tuple[str, ...]] = {
    **dict.fromkeys(_CENTRED, _LAYER_NORM),
    **dict.fromkeys((functional.rms_norm, torch.rms_norm), _RMS_NORM),
}


class LibraMode(AttentionMode):
    """Inside the `with`, outputs stay the same, and gradients follow the rules of LibraGrad.

    ========== ====================================================================================
    attention  `A(q, k) · v`: A is constant, so that only values have a gradient.
    norm       `layer_norm` and `rms_norm`: the deviation that they divide by is constant.
    activation GELU, SiLU and the like, `x · gate(x)`: the gate is constant.
    ========== ====================================================================================

    Gradient times input then sums to the output, biases aside, in every such layer. `count` is the
    number of calls so far that a rule changed. Other threads do not pass here.

    Mehri et al., "LibraGrad: Balancing Gradient Flow for Universally Better Vision Transformer
    Attributions", CVPR 2025. Products of two learned branches (SwiGLU) have no rule here.
    """

    def __init__(self) -> None:
        super().__init__(self._constant)
        self.count = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        names = _NORMS.get(func)
        if names is not None:
            return self._norm(func, args, kwargs, dict(zip(names, args, strict=False)) | kwargs)
        if func in _GATED:
            return self._gate(func, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def _constant(self, attention: Tensor) -> Tensor:
        self.count += attention.requires_grad
        return attention.detach()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        self.count += value.requires_grad
        return functional.scaled_dot_product_attention(
            query.detach(), key.detach(), value, *rest, **named
        )

    def _norm(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        named: dict[str, Any],
    ) -> Tensor:
        """The output of a norm, with the gradient of `(x − mean) · weight / constant`."""
        output: Tensor = func(*args, **kwargs)
        self.count += output.requires_grad
        x, weight, eps = named["input"], named.get("weight"), named.get("eps", 1e-5)
        axes = tuple(range(-len(named["normalized_shape"]), 0))
        inner = x - x.mean(dim=axes, keepdim=True) if func in _CENTRED else x
        with torch.no_grad():
            spread = inner.square().mean(dim=axes, keepdim=True)
            scale = (spread + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
            scale = scale if weight is None else scale * weight
        linear: Tensor = inner * scale
        return linear + (output - linear).detach()

    def _gate(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """`x · constant`, the constant f(x) / x; at 0, where f(x) is 0, the slope ½ that it has."""
        named = dict(zip(("input",), args, strict=False)) | kwargs
        x, rest = named.pop("input"), {key: each for key, each in named.items() if key != "inplace"}
        self.count += x.requires_grad
        with torch.no_grad():
            gate = torch.where(x == 0, 0.5, func(x, **rest) / torch.where(x == 0, 1, x))
        corrected: Tensor = x * gate
        return corrected
