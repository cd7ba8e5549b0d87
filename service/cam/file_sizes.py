"""Upper bounds for the bytes of an image, a heatmap or regions, before it is drawn.

Measured on noise, which compresses worst, and rounded up; `tests/unit/test_file_sizes.py` measures
again. Sizes are (width, height) in pixels, maps (height, width) in cells.
"""

from __future__ import annotations

import math
from typing import Literal

from service.cam.tiles import TileGrid
from service.images.declared_size import Size

_HEAD = 1024
"""Of a file: its headers, a palette, the tables of a JPEG."""

_SMALL = 256
"""Pixels below which `encoding.encode` keeps a JPEG's colour for every pixel; WebPs take more."""


def base64_bytes(size: int) -> int:
    """The length of `size` bytes in base64."""
    return 4 * -(-size // 3)


def image_bytes(size: Size, kind: Literal["jpeg", "png", "webp"]) -> int:
    """An image, as `encoding.encode` writes it."""
    width, height = size
    if kind == "png":
        return _HEAD + int((3 * width + 1) * height * 1.01)
    # Both are made of blocks of 16 x 16 pixels, filled up at the edges.
    blocks = 256 * -(-width // 16) * -(-height // 16)
    small = max(size) < _SMALL
    if kind == "jpeg":
        return _HEAD + int(blocks * (2.6 if small else 1.25))
    return _HEAD + int(blocks * (2.3 if small else 1.2))


def heatmap_bytes(size: Size, cells: tuple[int, int], shown: float = 1.0) -> int:
    """A map of (height, width) cells drawn at a size, as `encoding.level_png` writes it.

    The wider a cell is drawn, the smaller are the differences between neighbours.

    shown: the share of the image's shorter side that the map covers.
    """
    width, height = size
    enlarged = shown * min(width / cells[1], height / cells[0])
    a_pixel = min(1.05, 2 / max(enlarged, 1.0) ** 0.62)
    return _HEAD + int((width + 1) * height * a_pixel)


def tile_grid_bytes(grid: TileGrid) -> int:
    """A grid of channels. An enlarged cell is a run of equal pixels, in as many equal rows."""
    values = grid.shown * math.prod(grid.tile)
    width, height = grid.size
    return _HEAD + int(min((width + 1) * height * 1.05, values * (1.1 + 0.45 * grid.factor)))


def region_bytes(source: Size, cells: tuple[int, int], max_side: int) -> int:
    """Boxes, polygons and run lengths of a map's regions, as JSON."""
    width, height = source
    scale = min(1.0, max_side / max(source))
    pixels = math.ceil(width * scale) * math.ceil(height * scale)
    outlines = 100 * min(math.prod(cells), pixels)
    return outlines + mask_bytes(source, cells[0])


def mask_bytes(source: Size, rows: int) -> int:
    """The run lengths of one mask that was made of so many rows of cells, as JSON."""
    width, height = source
    # A column of the source has at most a run for every cell that it crosses, and one more.
    return _HEAD + 2 * width * min(rows + 2, height)


def brush_bytes(source: Size, cells: tuple[int, int]) -> int:
    """A map as the run lengths of Label Studio's brush, in a JSON list."""
    width, height = source
    # Each row crosses some of the brush's levels in every cell; a run is three bytes.
    runs = height * min(width, 6 * (cells[1] + 2))
    return _HEAD + 11 * runs
