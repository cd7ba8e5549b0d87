"""Where the pixels are in what a layer returns: maps, maps with channels last, or tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

_PREFIXES = (0, 1, 2, 4, 5)
"""Tokens before the patches: a class token, a distillation token, register tokens."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layer's output for one image becomes a feature map.

    kind:   `chw` a convolution's map, `hwc` Swin's, `tokens` (length, channels) with `prefix`
            tokens that belong to no place.
    grid:   (height, width) of the map in cells.
    """

    kind: Literal["chw", "hwc", "tokens"]
    grid: tuple[int, int]
    prefix: int = 0

    def as_map(self, values: Tensor) -> Tensor:
        """A batch of this layer's outputs or gradients as maps (N, C, h, w)."""
        if self.kind == "chw":
            return values
        if self.kind == "hwc":
            return values.permute(0, 3, 1, 2)
        tokens = values[:, self.prefix :]
        maps: Tensor = tokens.transpose(1, 2).unflatten(2, self.grid)
        return maps


def layout_of(shape: tuple[int, ...] | None, input_size: tuple[int, int]) -> Layout | None:
    """The layout of a layer by its output's shape for one image; None where there is no map in it.

    input_size: (height, width) of the model input, whose aspect ratio a map keeps.
    """
    if shape is None:
        return None
    aspect = input_size[0] / input_size[1]
    if len(shape) == 3:
        chw, hwc = (shape[1], shape[2]), (shape[0], shape[1])
        if not _fits(chw, aspect) and _fits(hwc, aspect):
            return Layout("hwc", hwc) if math.prod(hwc) > 1 else None
        return Layout("chw", chw) if math.prod(chw) > 1 else None
    if len(shape) == 2:
        for prefix in _PREFIXES:
            height = round(math.sqrt(max(shape[0] - prefix, 0) * aspect))
            width = (shape[0] - prefix) // height if height else 0
            if height * width == shape[0] - prefix > 1 and _fits((height, width), aspect):
                return Layout("tokens", (height, width), prefix)
    return None


def _fits(grid: tuple[int, int], aspect: float) -> bool:
    """Whether a grid could be the input scaled down: strides round a side by less than one cell."""
    height, width = grid
    return abs(height - width * aspect) < max(1.0, aspect)
