"""Draw a layer as one image of tiles: the channels of its activation, or its kernels.

    image, left_out = channel_grid(maps)

    layer = model.get_submodule("features.0")
    weight = kernel_weight(layer)  # None if it has no kernels
    grid = draw_kernels(weight, colour=has_rgb_input(layer))

About as many tiles stand in a row as in a column. Small tiles are enlarged by a whole number, tiles
that are too large for the image are scaled down, and those without room in it are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.cam.encoding import EncodedImage, level_png
from service.errors import RenderFailed
from service.images.decode import preview_size

GRID_SIDE = 1024
"""Pixels of the longer side up to which a grid of small tiles is enlarged."""

TILE_SIDE = 128
"""Pixels of the longer side up to which a tile is enlarged."""

GAP, GAP_GREY = 2, 96
"""Pixels between two tiles, and their grey level."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """How tiles are laid out: `shown` tiles of (height, width) cells, each enlarged by `factor`."""

    tile: tuple[int, int]
    rows: int
    columns: int
    shown: int
    factor: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        sides = ((self.columns, self.tile[1]), (self.rows, self.tile[0]))
        width, height = (cells * (self.factor * side + GAP) + GAP for cells, side in sides)
        return width, height


def tile_grid(
    count: int, tile: tuple[int, int], max_side: int, tile_side: int = TILE_SIDE
) -> TileGrid:
    """Lay out `count` tiles (height, width) in an image with no side over `max_side` pixels.

    tile_side: pixels of the longer side up to which a tile is enlarged.
    """
    height, width = tile
    most_columns = max(1, (max_side - GAP) // (width + GAP))
    most_rows = max(1, (max_side - GAP) // (height + GAP))
    columns = min(most_columns, max(math.ceil(math.sqrt(count)), math.ceil(count / most_rows)))
    rows = min(most_rows, math.ceil(count / columns))
    room = [(min(max_side, GRID_SIDE) - GAP) // cells - GAP for cells in (rows, columns)]
    factor = max(1, min(min(tile_side, room[axis]) // tile[axis] for axis in (0, 1)))
    return TileGrid(tile, rows, columns, min(count, rows * columns), factor)


def channel_tiles(shape: tuple[int, int, int], max_side: int = 2048) -> TileGrid:
    """The layout of `channel_grid` for maps (C, h, w)."""
    count, height, width = shape
    width, height = preview_size((width, height), max(1, max_side - 2 * GAP))
    return tile_grid(count, (height, width), max_side)


def channel_grid(maps: NDArray[np.float32], max_side: int = 2048) -> tuple[EncodedImage, int]:
    """Draw every channel of a layer as a tile: black its least value, white its greatest.

    `maps` is (C, h, w); each channel is scaled on its own, a constant one is black. A vector, (C,)
    or (C, 1, 1), is one tile per channel, scaled together. Returns a grey PNG, no side over
    `max_side` pixels, and how many channels, the last ones, are left out. Raises ValueError if
    there is no channel or a value is not finite.
    """
    if maps.size == 0 or maps.ndim not in (1, 3) or not np.isfinite(maps).all():
        raise ValueError(f"finite maps (C, h, w) or a vector (C,) are needed, not {maps.shape}")
    count, height, width = len(maps), *(maps.shape[1:] or (1, 1))
    grid = channel_tiles((count, height, width), max_side)
    tiles = _resized(maps.reshape(count, height, width, 1)[: grid.shown], grid.tile)
    together = grid.tile == (1, 1)
    image = _laid_out(_levels(tiles, axis=None if together else (1, 2, 3)), grid)
    return EncodedImage("image/png", *grid.size, level_png(image[..., 0], None)), count - grid.shown


@dataclass(frozen=True, slots=True)
class KernelGrid:
    """An image of kernels.

    kernels:  how many the layer has.
    left_out: how many of them, the last ones, have no room in the image.
    """

    image: EncodedImage
    kernels: int
    left_out: int


def kernel_weight(module: nn.Module) -> Tensor | None:
    """The weight of a layer that has kernels, (out, in) or (out, in, ...), else None.

    A weight of one dimension, as normalisations have it, is no kernel.
    """
    with torch.no_grad():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2 or not weight.numel():
            return None
        return weight.detach()


def has_rgb_input(module: nn.Module) -> bool:
    """Whether the three input channels of a layer are those of an image."""
    if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
        return False
    return module.in_channels == 3 and module.groups == 1


def draw_kernels(weight: Tensor, *, colour: bool, max_side: int = 2048) -> KernelGrid:
    """Draw a layer's weight, each kernel from its least value (black) to its greatest (white).

    In `colour` a kernel is one tile of an output channel, (out, 3, ...), its channels scaled
    together. Otherwise it is one grey tile for each pair of output and input channel, the input
    channels of a group where there are groups. Of three dimensions the slices stand side by side.
    A matrix, (out, in) or with kernels of one number, is one grey image with a row for each output;
    there a kernel is a row.

    No side is over `max_side` pixels. The weight is only read. Raises RenderFailed where a value is
    not finite.
    """
    values = weight.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(values).all():
        raise RenderFailed("The weights of this layer are not all finite; load the model again.")
    if not colour and math.prod(values.shape[2:]) == 1:
        matrix = values.reshape(1, *values.shape[:2], 1)
        image, _ = _kernel_image(matrix, max_side, GRID_SIDE)
        return KernelGrid(image, len(values), 0)
    flat = _flat(values)
    tiles = np.moveaxis(flat, 1, -1) if colour else flat.reshape(-1, *flat.shape[2:], 1)
    image, left_out = _kernel_image(tiles, max_side, TILE_SIDE)
    return KernelGrid(image, len(tiles), left_out)


def _flat(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Kernels of one to three dimensions in two: (out, in, h, w)."""
    out, channels, *size = values.shape
    if len(size) < 2:
        return values.reshape(out, channels, 1, -1)
    slices = np.moveaxis(values.reshape(out, channels, -1, *size[-2:]), 2, 3)
    return slices.reshape(out, channels, size[-2], -1)


def _kernel_image(
    tiles: NDArray[np.float32], max_side: int, tile_side: int
) -> tuple[EncodedImage, int]:
    """Tiles, (n, h, w, 1 or 3), as a PNG; and how many are left out."""
    count, height, width, _ = tiles.shape
    limit = max_side - 2 * GAP
    # Each side for itself: of a matrix with few long rows each row stays visible.
    grid = tile_grid(count, (min(height, limit), min(width, limit)), max_side, tile_side)
    shown = _resized(tiles[: grid.shown], grid.tile)
    image = _laid_out(_levels(shown, axis=(1, 2, 3)), grid)
    return EncodedImage("image/png", *grid.size, _png(image)), count - grid.shown


def _resized(tiles: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Tiles (n, h, w, channels) at another (height, width)."""
    if tiles.shape[1:3] == size:
        return tiles
    small = [cv2.resize(tile, size[::-1], interpolation=cv2.INTER_AREA) for tile in tiles]
    return np.stack(small).reshape(len(tiles), *size, tiles.shape[3])


def _levels(tiles: NDArray[np.float32], axis: tuple[int, ...] | None) -> NDArray[np.uint8]:
    """Scale from the least value along the axes (0) to the greatest (255); a constant is 0."""
    # In float64, so that the extent of the largest floats is finite.
    values = tiles.astype(np.float64)
    least = values.min(axis=axis, keepdims=True)
    extent = values.max(axis=axis, keepdims=True) - least
    extent[extent == 0.0] = 1.0
    levels: NDArray[np.uint8] = np.rint((values - least) / extent * 255.0).astype(np.uint8)
    return levels


def _laid_out(levels: NDArray[np.uint8], grid: TileGrid) -> NDArray[np.uint8]:
    """One image, (h, w, channels), with a line round every tile; the last cells may be empty."""
    tiles = levels.repeat(grid.factor, axis=1).repeat(grid.factor, axis=2)
    count, height, width, channels = tiles.shape
    cell = height + GAP, width + GAP
    cells = np.full((grid.rows * grid.columns, *cell, channels), GAP_GREY, dtype=np.uint8)
    cells[:count, GAP:, GAP:] = tiles
    image = cells.reshape(grid.rows, grid.columns, *cell, channels).swapaxes(1, 2)
    image = image.reshape(grid.rows * cell[0], grid.columns * cell[1], channels)
    return np.pad(image, ((0, GAP), (0, GAP), (0, 0)), constant_values=GAP_GREY)


def _png(image: NDArray[np.uint8]) -> bytes:
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    written, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not written:
        raise RenderFailed("The image of this layer's kernels cannot be encoded.")
    return bytes(data)
