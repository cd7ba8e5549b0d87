"""Layouts of a layer's output (channels first or last, tokens), and how each becomes a map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

_PREFIXES = (0, 1, 2, 4, 5)
"""Tokens before the patches: a class token, a distillation token, register tokens."""

MAX_EXTRA_TOKENS = 16
"""The largest number of tokens without a position in the image that `layouts_of` allows."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layer's output for one image becomes a feature map.

    kind:        `chw` a convolution's map, `hwc` Swin's, `tokens` (length, channels) with `prefix`
                 tokens without a position in the image before those that have one.
    grid:        (height, width) of the map in cells.
    token_order: the index of the token at each cell, row by row; None if the tokens follow the
                 prefix in that order.
    transposed:  whether the columns come before the rows.
    batch_axis:  the dimension of the output that tells images apart.
    """

    kind: Literal["chw", "hwc", "tokens"]
    grid: tuple[int, int]
    prefix: int = 0
    token_order: tuple[int, ...] | None = None
    transposed: bool = False
    batch_axis: int = 0

    def by_image(self, values: Tensor, *, leading: int = 0) -> Tensor:
        """The layer's outputs with the images in front, behind `leading` other dimensions."""
        return values.movedim(leading + self.batch_axis, leading) if self.batch_axis else values

    def as_given(self, values: Tensor) -> Tensor:
        """What `by_image` returned, as the layer returns it."""
        return values.movedim(0, self.batch_axis) if self.batch_axis else values

    def as_map(self, values: Tensor) -> Tensor:
        """A batch of this layer's outputs or gradients, by image, as maps (N, C, h, w)."""
        if self.kind != "tokens":
            maps = values if self.kind == "chw" else values.permute(0, 3, 1, 2)
            return maps.transpose(2, 3) if self.transposed else maps
        if self.token_order is not None:
            tokens = values[:, list(self.token_order)]
        else:
            tokens = values[:, self.prefix : self.prefix + math.prod(self.grid)]
        cells: Tensor = tokens.transpose(1, 2).unflatten(2, self.grid)
        return cells

    def scaled(self, size: tuple[int, int], trial: tuple[int, int]) -> Layout:
        """The layout of tokens for an input (height, width) of another size than that of a trial.

        Maps have their size in their shape.
        """
        if self.kind != "tokens" or size == trial:
            return self
        rows, columns = (
            math.ceil(cells * side / whole)
            for cells, side, whole in zip(self.grid, size, trial, strict=True)
        )
        return replace(self, grid=(rows, columns))

    @property
    def channel_axis(self) -> int:
        """The dimension of the channels in an output for one image, without the batch."""
        return {"chw": 0, "hwc": 2, "tokens": 1}[self.kind]


def layout_of(shape: tuple[int, ...] | None, input_size: tuple[int, int]) -> Layout | None:
    """The layout of a layer by its output's shape for one image; None if there is no map in it.

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
            grid = _grid(shape[0] - prefix, aspect)
            if grid is not None:
                return Layout("tokens", grid, prefix)
    return None


def layouts_of(shape: tuple[int, ...], input_size: tuple[int, int]) -> Iterator[Layout]:
    """Every layout that an output of this shape for one image could have, the likely ones first.

    Of tokens those in order of rows, behind tokens without a position; `token_layout` returns the
    other ones.
    """
    aspect = input_size[0] / input_size[1]
    if len(shape) == 3:
        for kind, grid in (("chw", shape[1:]), ("hwc", shape[:2])):
            if math.prod(grid) > 1 and _fits((grid[0], grid[1]), aspect):
                yield Layout(kind, (grid[0], grid[1]))  # type: ignore[arg-type]
            if math.prod(grid) > 1 and _fits((grid[1], grid[0]), aspect):
                yield Layout(kind, (grid[1], grid[0]), transposed=True)  # type: ignore[arg-type]
    if len(shape) != 2:
        return
    for extra in range(MAX_EXTRA_TOKENS + 1):
        cells = _grid(shape[0] - extra, aspect)
        if cells is not None:
            yield Layout("tokens", cells, extra)


def token_layout(length: int, grid: tuple[int, int], start: int, *, by_column: bool) -> Layout:
    """The layout of tokens where `start` of those with a position come before those without one.

    by_column: whether the tokens are in order of columns.
    """
    rows, columns = grid
    extra = length - rows * columns
    tokens = (*range(start), *range(start + extra, length))
    if by_column:
        tokens = tuple(tokens[x * rows + y] for y in range(rows) for x in range(columns))
    # No table is needed where they follow one another.
    if tokens == tuple(range(tokens[0], tokens[0] + len(tokens))):
        return Layout("tokens", grid, tokens[0])
    return Layout("tokens", grid, token_order=tokens)


def _grid(cells: int, aspect: float) -> tuple[int, int] | None:
    """The (height, width) of that many cells with the aspect ratio of the input."""
    height = round(math.sqrt(max(cells, 0) * aspect))
    width = cells // height if height else 0
    grid = (height, width)
    return grid if height * width == cells > 1 and _fits(grid, aspect) else None


def _fits(grid: tuple[int, int], aspect: float) -> bool:
    """Whether a grid could be the scaled input: strides round a side by less than one cell."""
    height, width = grid
    return abs(height - width * aspect) < max(1.0, aspect)
