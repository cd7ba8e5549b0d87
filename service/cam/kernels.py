"""Draw the weights of a layer as one picture.

    layer = model.get_submodule("features.0")
    weight = weight_of(layer)  # None where it has no kernels
    grid = draw_kernels(weight, colour=sees_colours(layer))

The model is only read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.cam.heatmap import GAP, GAP_GREY, GRID_SIDE, TILE_SIDE, Picture
from service.errors import RenderFailed


@dataclass(frozen=True, slots=True)
class KernelGrid:
    """A picture of kernels.

    kernels:  how many the layer has.
    left_out: how many of them, the last ones, found no place in the picture.
    """

    picture: Picture
    kernels: int
    left_out: int


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight of a layer that has kernels, (out, in) or (out, in, ...), else None.

    A weight of one dimension, as normalisations have it, is no kernel.
    """
    with torch.no_grad():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2 or not weight.numel():
            return None
        return weight.detach()


def sees_colours(module: nn.Module) -> bool:
    """Whether the three channels that a layer takes are those of a picture."""
    if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
        return False
    return module.in_channels == 3 and module.groups == 1


def draw_kernels(weight: Tensor, *, colour: bool, max_side: int = 2048) -> KernelGrid:
    """Draw a layer's weight, each kernel from its least value (black) to its greatest (white).

    In `colour` a kernel is one tile of an output channel, (out, 3, ...), its channels scaled
    together. Otherwise it is one grey tile for each pair of output and input channel, the input
    channels of a group where there are groups. Of three dimensions the slices stand side by side.
    A matrix, (out, in) or with kernels of one number, is one grey picture with a row for each
    output; there a kernel is a row.

    Tiles are laid in about the square root of their number columns and enlarged by a whole number.
    No side is over `max_side` pixels: what is larger alone is scaled down, what finds no place is
    left out. Raises RenderFailed where a value is not finite.
    """
    values = weight.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(values).all():
        raise RenderFailed("The weights of this layer are not all finite; load the model again.")
    if colour:
        tiles = np.moveaxis(_flat(values), 1, -1)
    elif math.prod(values.shape[2:]) == 1:
        picture, _ = _grid(values.reshape(1, *values.shape[:2], 1), max_side, GRID_SIDE)
        return KernelGrid(picture, len(values), 0)
    else:
        flat = _flat(values)
        tiles = flat.reshape(-1, *flat.shape[2:], 1)
    picture, left_out = _grid(tiles, max_side, TILE_SIDE)
    return KernelGrid(picture, len(tiles), left_out)


def _flat(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Kernels of one to three dimensions in two: (out, in, h, w)."""
    out, channels, *size = values.shape
    if len(size) < 2:
        return values.reshape(out, channels, 1, -1)
    slices = np.moveaxis(values.reshape(out, channels, -1, *size[-2:]), 2, 3)
    return slices.reshape(out, channels, size[-2], -1)


def _grid(tiles: NDArray[np.float32], max_side: int, tile_side: int) -> tuple[Picture, int]:
    """Tiles, (n, h, w, 1 or 3), as a PNG; and how many found no place."""
    count, height, width, _ = tiles.shape
    limit = max_side - 2 * GAP
    size = min(height, limit), min(width, limit)
    most_rows, most_columns = ((max_side - GAP) // (side + GAP) for side in size)
    columns = min(most_columns, max(math.ceil(math.sqrt(count)), math.ceil(count / most_rows)))
    rows = min(most_rows, math.ceil(count / columns))
    shown = min(count, rows * columns)
    levels = _normalised(_scaled(tiles[:shown], size))
    room = [(min(max_side, GRID_SIDE) - GAP) // cells - GAP for cells in (rows, columns)]
    factor = max(1, min(min(tile_side, room[axis]) // size[axis] for axis in (0, 1)))
    levels = levels.repeat(factor, axis=1).repeat(factor, axis=2)
    sheet = _laid_out(levels, rows, columns)
    return Picture("image/png", sheet.shape[1], sheet.shape[0], _png(sheet)), count - shown


def _scaled(tiles: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Tiles that would not fit even alone are scaled down to fit."""
    if tiles.shape[1:3] == size:
        return tiles
    small = [cv2.resize(tile, size[::-1], interpolation=cv2.INTER_AREA) for tile in tiles]
    return np.stack(small).reshape(len(tiles), *size, tiles.shape[3])


def _normalised(tiles: NDArray[np.float32]) -> NDArray[np.uint8]:
    # In halves, so that the extent of the largest floats is finite.
    halves = tiles * np.float32(0.5)
    least = halves.min(axis=(1, 2, 3), keepdims=True)
    extent = halves.max(axis=(1, 2, 3), keepdims=True) - least
    extent[extent == 0.0] = 1.0
    levels: NDArray[np.uint8] = np.rint((halves - least) / extent * 255.0).astype(np.uint8)
    return levels


def _laid_out(tiles: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    """One sheet, (h, w, channels), with a line round every tile; the last places may be empty."""
    count, height, width, channels = tiles.shape
    cell = height + GAP, width + GAP
    cells = np.full((rows * columns, *cell, channels), GAP_GREY, dtype=np.uint8)
    cells[:count, GAP:, GAP:] = tiles
    sheet = cells.reshape(rows, columns, *cell, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * cell[0], columns * cell[1], channels)
    return np.pad(sheet, ((0, GAP), (0, GAP), (0, 0)), constant_values=GAP_GREY)


def _png(sheet: NDArray[np.uint8]) -> bytes:
    bgr = np.ascontiguousarray(sheet[:, :, ::-1])
    written, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not written:
        raise RenderFailed("The picture of this layer's kernels cannot be encoded.")
    return bytes(data)
