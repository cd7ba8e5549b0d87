"""Measure a model's attention: which tokens attend to which, and which of them the head reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.cam.attention import AttentionMode
from service.cam.layouts import Layout
from service.errors import first_line
from service.models.catalog import Select
from service.models.probes.layers import Layer
from service.models.probes.logits import logits_in
from service.models.probes.torch_state import kept_torch_state

PROBE_BYTES = 1 << 30
"""Bytes of attention, computed by the model itself, up to which it is measured."""


@dataclass(frozen=True, slots=True)
class TokenAttention:
    """The attention of a plain transformer: in every layer from the same tokens to the same tokens.

    calls:  the numbers of the attention calls that the logits depend on. heads: the most of a call.
    rows:   the tokens of the last call's output that the head reads: class tokens, or all that are
            averaged, or those of a pooling attention.
    tokens: in each layer. layout: where the tokens are in the image.
    class_token: whether the head reads only tokens without a position in the image.
    """

    calls: tuple[int, ...]
    heads: int
    rows: tuple[int, ...]
    tokens: int
    layout: Layout
    class_token: bool

    @property
    def layer_bytes(self) -> int:
        """Bytes of the attention of one layer for one image, in float32."""
        return 4 * self.heads * self.tokens**2


class NoTokenAttention(Exception):
    """Why attention has no map; completes the sentence "it cannot be explained by it: …"."""


Followed = dict[int, tuple[tuple[int, ...], Tensor]]
"""By number, the shape and the gradient of each attention that the logits depend on."""


def may_attend(layers: Sequence[Layer]) -> bool:
    """Whether layers look as if the model had attention between tokens."""
    tokens = any(layer.layout is not None and layer.layout.kind == "tokens" for layer in layers)
    return tokens or any("Att" in layer.type for layer in layers)


def token_attention(
    module: nn.Module,
    image: Tensor,
    layers: Sequence[Layer],
    target: str | None,
    select: Select,
    *,
    used: Followed | None = None,
) -> TokenAttention:
    """Run a model on one image, normalised (1, C, h, w), and follow its attention back.

    layers: those of the model. target: the one whose layout is used if it has one of these tokens.
    used: what another pass has followed already.

    Raises NoTokenAttention.
    """
    if not may_attend(layers):
        raise NoTokenAttention("it has no attention between tokens")
    used = _followed(module, image, select) if used is None else used
    if not used:
        raise NoTokenAttention(
            "it has no attention between tokens that its logits depend on, neither "
            "scaled_dot_product_attention nor a softmax over keys"
        )
    shapes = [shape for shape, _ in used.values()]
    length, (_, last) = _same_tokens(shapes), used[max(used)]
    read = last.cpu().abs().sum(dim=(*range(last.ndim - 2), last.ndim - 1)).nonzero()
    rows = tuple(read.flatten().tolist())
    layout = _layout(layers, length, target)
    pooled = shapes[-1][-2] != length
    return TokenAttention(
        tuple(used),
        max(math.prod(shape[:-2]) for shape in shapes),
        rows,
        length,
        layout,
        class_token=not pooled and not _tokens_of(layout).intersection(rows),
    )


def _followed(module: nn.Module, image: Tensor, select: Select) -> Followed:
    watched = WatchedAttention()
    try:
        with kept_torch_state(random=False), torch.enable_grad():
            with watched:
                output = module(image.clone())
            zeros = watched.zeros
            best = logits_in(output, select).max()
            values = torch.autograd.grad(best, zeros, allow_unused=True) if zeros else ()
    except Exception as error:
        raise NoTokenAttention(f"its attention cannot be followed ({first_line(error)})") from error
    if watched.too_large:
        raise NoTokenAttention("its attention takes too much memory to be recorded")
    return watched.followed(values)


class WatchedAttention(AttentionMode):
    """Adds a zero to each attention, or to its output, whose gradient tells what depends on it.

    points: that zero, its queries in the last but one dimension, and the attention's shape.
    too_large: whether attention takes so much memory that the rest was left out.
    """

    def __init__(self) -> None:
        super().__init__(lambda attention: self._watch(attention, attention.shape))
        self.points: list[tuple[Tensor, tuple[int, ...]]] = []
        self.too_large = False
        self._bytes = 0

    @property
    def zeros(self) -> list[Tensor]:
        """What the gradients are taken at."""
        return [zero for zero, _ in self.points]

    def followed(self, gradients: Sequence[Tensor | None]) -> Followed:
        """What the logits depend on. gradients: those at `zeros`."""
        return {
            call: (shape, value)
            for call, ((_, shape), value) in enumerate(zip(self.points, gradients, strict=True))
            if value is not None and bool(value.any())
        }

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        output = functional.scaled_dot_product_attention(query, key, value, *rest, **named)
        return self._watch(output, (*query.shape[:-1], key.shape[-2]))

    def _watch(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        if values.shape == shape:
            self._bytes += 8 * values.numel()
        self.too_large = self.too_large or self._bytes > PROBE_BYTES
        if self.too_large:
            return values
        zero = torch.zeros_like(values, requires_grad=True)
        self.points.append((zero, tuple(shape)))
        return values + zero


def _same_tokens(shapes: Sequence[tuple[int, ...]]) -> int:
    """The number of tokens that all attention is between. Raises NoTokenAttention."""
    if any(len(shape) > 4 or (len(shape) == 4 and shape[0] != 1) for shape in shapes):
        raise NoTokenAttention(
            "its attention is within windows or along axes of the image, so that no layer relates "
            "all tokens to all others"
        )
    lengths = sorted({shape[-1] for shape in shapes} | {shape[-2] for shape in shapes[:-1]})
    if len(lengths) > 1 or shapes[-1][-2] > lengths[0]:
        raise NoTokenAttention(
            "its layers attend over different numbers of tokens or channels "
            f"({', '.join(map(str, lengths))}), as in a pyramid, so that their attention cannot be "
            "multiplied"
        )
    return lengths[0]


def _layout(layers: Sequence[Layer], length: int, target: str | None) -> Layout:
    """Where so many tokens are in the image. Raises NoTokenAttention if no layer returns them."""
    known = {
        layer.path: layer.layout
        for layer in layers
        if layer.layout is not None and layer.layout.kind == "tokens" and layer.shape
        if layer.shape[0] == length
    }
    if not known:
        raise NoTokenAttention(
            f"its attention is between {length} channels or queries, not between the tokens of a "
            "layer whose positions in the image are known"
        )
    return known.get(target or "") or list(known.values())[-1]


def _tokens_of(layout: Layout) -> set[int]:
    """The tokens that have a position in the image."""
    if layout.token_order is not None:
        return set(layout.token_order)
    return set(range(layout.prefix, layout.prefix + math.prod(layout.grid)))
