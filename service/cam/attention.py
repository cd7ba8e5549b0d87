"""The attention of a model, recorded without hooks, and maps from it: rollout, GAE."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from service.cam.formulas import precise

_SOFTMAX = {torch.softmax, functional.softmax, Tensor.softmax}

Note = Callable[[Tensor], Tensor]
"""Takes the attention of one call, (N, heads, L, S), and returns the one to continue with."""


class AttentionMode(TorchFunctionMode):
    """Inside the `with`, every attention of this thread passes through `note`.

        with AttentionMode(note):
            model(images)

    ============================== =================================================================
    `scaled_dot_product_attention` `softmax(q kᵀ · scale + mask)` is computed and noted; the output
                                   is that of the noted attention.
    `softmax` over the last of at  Its output is noted: attention that a model computes by itself.
    least three dimensions
    `nn.MultiheadAttention`        Either of the two inside `F.multi_head_attention_forward`, of
                                   which a copy runs that passes them here.
    ============================== =================================================================

    Nothing is patched and other threads do not pass here. Attention with dropout runs unseen.
    """

    def __init__(self, note: Note) -> None:
        super().__init__()
        self._note = note
        inner = functional.multi_head_attention_forward
        replaced = {"scaled_dot_product_attention": self._attend, "softmax": self._softmax}
        self._multi_head = FunctionType(inner.__code__, {**inner.__globals__, **replaced})
        self._multi_head.__defaults__ = inner.__defaults__
        self._multi_head.__kwdefaults__ = inner.__kwdefaults__

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func in _SOFTMAX:
            return self._softmax(*args, **kwargs, of=func)
        if func is functional.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        names = ("attn_mask", "dropout_p", "is_causal")
        options = dict(zip(names, rest, strict=False)) | named
        if options.get("dropout_p"):
            return functional.scaled_dot_product_attention(query, key, value, **options)
        if options.get("enable_gqa"):
            heads = query.shape[-3]
            key, value = (
                each.repeat_interleave(heads // each.shape[-3], dim=-3) for each in (key, value)
            )
        return self._note(attention_weights(query, key, options)) @ value

    def _softmax(
        self, *args: Any, of: Callable[..., Any] = functional.softmax, **named: Any
    ) -> Any:
        output: Tensor = of(*args, **named)
        dim = args[1] if len(args) > 1 else named.get("dim")
        is_attention = output.ndim > 2 and dim in {-1, output.ndim - 1}
        return self._note(output) if is_attention else output


def attention_weights(query: Tensor, key: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The attention (…, L, S) of `scaled_dot_product_attention`, without dropout.

    options: its arguments `attn_mask`, `is_causal` and `scale` by name.
    """
    scale = options.get("scale")
    scores = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = scores @ key.transpose(-2, -1)
    mask = options.get("attn_mask")
    if options.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return (scores if mask is None else scores + mask).softmax(dim=-1)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0)  # sees nothing: no NaN


class Rollout:
    """Attention rollout: `Π_l (½ mean_heads(A_l) + ½ I)`, rows normalised, layer by layer.

    The note of an `AttentionMode`, for one image. `joint` (L, S) is the share that each token of
    the last layer has of each token of the first. A last layer with fewer queries than keys pools
    tokens: nothing goes around it, and its attention takes the place of the sum.

    calls: the numbers of the calls that are rolled out; others are not on the way to the logits.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020.
    """

    def __init__(self, calls: Collection[int]) -> None:
        self.joint = torch.empty(0)
        self._calls, self._seen = calls, 0

    def __call__(self, attention: Tensor) -> Tensor:
        if self._seen in self._calls:
            mean = mean_of_heads(attention.detach())
            if mean.shape[0] == mean.shape[1]:
                mean = (mean + torch.eye(len(mean), dtype=mean.dtype, device=mean.device)) / 2
                mean = mean / mean.sum(dim=-1, keepdim=True)
            self.joint = mean @ self.joint if self.joint.numel() else mean
        self._seen += 1
        return attention


class Differentiable:
    """Keeps the attention of each of some calls as a point to differentiate at, in a graph.

    The note of an `AttentionMode`. The graph begins at the first one.
    """

    def __init__(self, calls: Collection[int]) -> None:
        self.attentions: list[Tensor] = []
        self._calls, self._seen = calls, 0

    def __call__(self, attention: Tensor) -> Tensor:
        if self._seen in self._calls:
            attention = attention if attention.requires_grad else attention.requires_grad_()
            self.attentions.append(attention)
        self._seen += 1
        return attention


def relevance(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Generic attention explainability: `R ← R + mean_heads(ReLU(∂y/∂A_l ∘ A_l)) R`, from `R = I`.

    attentions: of all layers in order, each (1, heads, L, L). Returns (L, L): the relevance of each
    token of the input for each token of the output.

    Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and
    Encoder-Decoder Transformers", ICCV 2021, equations 5 and 6.
    """
    first = attentions[0]
    found = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    for attention, gradient in zip(attentions, gradients, strict=True):
        found = found + mean_of_heads((gradient * attention).detach().relu()) @ found
    return found


def mean_of_heads(attention: Tensor) -> Tensor:
    """The attention (L, S) of one image, from (1, heads, L, S) or (heads, L, S)."""
    return precise(attention).flatten(0, -3).mean(dim=0)
