"""Draw a class activation map: a heatmap, an overlay on the picture, a grid of channels.

A `cam` is float32 (gh, gw), -1..1, laid over the whole model input, that is, over
`geometry.window` of the source, or over the part of it that the model looks at
(`Geometry.of_map`). What is drawn is its absolute value: 0 is "no evidence" and the first colour of
the map, 1 the last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from service.cam.encoding import encode, level_png
from service.images.decode import Geometry, Rect, preview_size

_NAMES = "turbo jet viridis inferno magma plasma cividis hot cool bone parula twilight"

# Of the channel grid, in pixels: how far small maps are enlarged, and the line between two.
GRID_SIDE = 1024
TILE_SIDE = 128
GAP, GAP_GREY = 2, 96

# Rows that are drawn at once: few enough for what they need to stay in the processor's cache.
BAND = 32


def _tables() -> dict[str, NDArray[np.uint8]]:
    ramp = np.arange(256, dtype=np.uint8).reshape(256, 1)
    tables = {"gray": ramp.repeat(3, axis=1)}
    for name in _NAMES.split():
        bgr = np.asarray(cv2.applyColorMap(ramp, getattr(cv2, f"COLORMAP_{name.upper()}")))
        tables[name] = bgr.reshape(256, 3)[:, ::-1].astype(np.uint8, order="C")
    for table in tables.values():
        table.setflags(write=False)
    return tables


COLORMAPS: Mapping[str, NDArray[np.uint8]] = MappingProxyType(_tables())
"""Name to colours: uint8 (256, 3), RGB, from no evidence to the most."""


@dataclass(frozen=True, slots=True)
class Style:
    """How to draw.

    size      "source": the upright picture, bounded by max_side; "model": what the model saw, at
              the scale of its input; "native": one pixel per cell of the map
    colormap  a name in COLORMAPS
    format    of the overlay; a heatmap is always an indexed PNG
    opacity   of the colours in the overlay, 0 (the photo alone) to 1 (the colours alone)
    """

    size: Literal["source", "model", "native"] = "source"
    colormap: str = "turbo"
    format: Literal["jpeg", "png", "webp"] = "jpeg"
    opacity: float = 0.5


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture; `width` and `height` in pixels."""

    media_type: str
    width: int
    height: int
    data: bytes


def resample(
    cam: NDArray[np.float32], geometry: Geometry, size: tuple[int, int], rect: Rect
) -> NDArray[np.float32]:
    """Read the map at the centres of a raster of `size` (w, h) over `rect`, in source pixels.

    Bilinear between the centres of the cells, the outermost cells reaching to the edge: the same as
    `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`, with `antialias=True`
    where the raster is coarser than the map. 0 where a centre lies outside `geometry.seen`.

    Returns float32 (h, w). Raises ValueError if the map is not finite or not two-dimensional.
    """
    drawn = np.empty(size[::-1], dtype=np.float32)
    for rows, band in _bands(cam, geometry.of_map(cam.shape), size, rect):
        drawn[rows] = band
    return drawn


def _bands(
    cam: NDArray[np.float32], geometry: Geometry, size: tuple[int, int], rect: Rect
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """`resample`, BAND rows at a time; each array is valid until the next one.

    By torch, whose products stay in this thread: numpy's wake one on every core for a large raster.
    """
    if cam.ndim != 2 or not np.isfinite(cam).all():
        raise ValueError(f"a finite map of two dimensions is needed, not {cam.shape}")
    across = torch.from_numpy(_weights(cam.shape[1], size[0], rect, geometry, axis=0)).T
    down = torch.from_numpy(_weights(cam.shape[0], size[1], rect, geometry, axis=1))
    cells = torch.mm(down, torch.from_numpy(cam.astype(np.float32)))
    band = torch.empty(BAND, size[0])
    for start in range(0, size[1], BAND):
        part = cells[start : start + BAND]
        yield (
            slice(start, start + len(part)),
            torch.mm(part, across, out=band[: len(part)]).numpy(),
        )


def _centres(length: int, rect: Rect, axis: int) -> NDArray[np.float64]:
    """Where the middles of `length` equal parts of a side of `rect` are, in source pixels."""
    middles = np.arange(length, dtype=np.float64) + 0.5
    return np.asarray(rect[axis] + middles * (rect[axis + 2] / length))


def _inside(length: int, rect: Rect, geometry: Geometry, axis: int) -> slice:
    """Which of those middles lie in `geometry.seen`."""
    seen, tolerance = geometry.seen, 1e-9 * geometry.source_size[axis]
    edges = (seen[axis] - tolerance, seen[axis] + seen[axis + 2] + tolerance)
    first, last = np.searchsorted(_centres(length, rect, axis), edges)
    return slice(int(first), int(last))


def _weights(
    cells: int, length: int, rect: Rect, geometry: Geometry, axis: int
) -> NDArray[np.float32]:
    """How much of each cell is in each pixel of an axis: (length, cells), rows sum to 1 or 0."""
    start, extent = geometry.window[axis], geometry.window[axis + 2]
    position = (_centres(length, rect, axis) - start) * (cells / extent) - 0.5
    reach = max(1.0, rect[axis + 2] / length * cells / extent)
    weights = np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(cells)) / reach)
    inside = _inside(length, rect, geometry, axis)
    weights[inside] /= weights[inside].sum(axis=1, keepdims=True)
    weights[: inside.start] = weights[inside.stop :] = 0.0
    return weights.astype(np.float32)


def _raster(
    cam: NDArray[np.float32], geometry: Geometry, style: Style, max_side: int
) -> tuple[tuple[int, int], Rect]:
    """The (w, h) to draw and what of the source it covers."""
    if style.size == "source":
        width, height = geometry.source_size
        return preview_size(geometry.source_size, max_side), (0.0, 0.0, float(width), float(height))
    if style.size == "native":
        return (cam.shape[1], cam.shape[0]), geometry.window
    seen, window, model = geometry.seen, geometry.window, geometry.input_size
    width, height = (round(seen[2 + i] * model[i] / window[2 + i]) for i in (0, 1))
    return (max(1, width), max(1, height)), seen


def _levels(
    cam: NDArray[np.float32], geometry: Geometry, size: tuple[int, int], rect: Rect
) -> NDArray[np.uint8]:
    levels = np.empty(size[::-1], dtype=np.uint8)
    # The absolute value first: neighbours of opposite sign are evidence, and must not cancel.
    for rows, strength in _bands(np.abs(cam), geometry, size, rect):
        cv2.convertScaleAbs(strength, levels[rows], 255.0)  # rounds, and stops at 255
    return levels


def render_heatmap(
    cam: NDArray[np.float32], geometry: Geometry, style: Style, max_side: int
) -> Picture:
    """Draw the map alone: an indexed PNG whose pixel values are round(255 * |cam|).

    The palette is the colormap; outside `geometry.seen` the value is 0. `max_side` (pixels) bounds
    the size "source". Raises ValueError if the map is not finite.
    """
    geometry = geometry.of_map(cam.shape)
    size, rect = _raster(cam, geometry, style, max_side)
    data = level_png(_levels(cam, geometry, size, rect), COLORMAPS[style.colormap])
    return Picture("image/png", *size, data)


def render_overlay(
    cam: NDArray[np.float32],
    geometry: Geometry,
    style: Style,
    photo: NDArray[np.uint8],
    model_pixels: NDArray[np.uint8],
) -> Picture:
    """Lay the coloured map over the picture; outside `geometry.seen` the picture stays plain.

    `photo` is `decode.preview` of the source, drawn on for the size "source"; `model_pixels` the
    model input, drawn on for "model" and "native"; both uint8 (h, w, 3), RGB. Raises ValueError if
    the map is not finite, RenderFailed if the picture cannot be encoded.
    """
    whole, geometry = geometry, geometry.of_map(cam.shape)
    size, rect = _raster(cam, geometry, style, max(photo.shape[:2]))
    base = photo if style.size == "source" else _part(model_pixels, whole, rect)
    if size != (base.shape[1], base.shape[0]):
        base = np.asarray(cv2.resize(base, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    rows, columns = (_inside(size[axis], rect, geometry, axis) for axis in (1, 0))
    levels = _levels(cam, geometry, size, rect)[rows, columns]
    table = COLORMAPS[style.colormap].reshape(256, 1, 3).copy()
    drawn = base.copy()
    seen = drawn[rows, columns]
    for start in range(0, len(seen), BAND):
        part = seen[start : start + BAND]
        colours = cv2.applyColorMap(levels[start : start + BAND], table)
        cv2.addWeighted(colours, style.opacity, part, 1.0 - style.opacity, 0.0, dst=part)
    return Picture(f"image/{style.format}", *size, encode(drawn, style.format))


def _part(pixels: NDArray[np.uint8], geometry: Geometry, rect: Rect) -> NDArray[np.uint8]:
    """The part of the model input that covers `rect`, to the nearest pixel, never empty."""
    slices = []
    for axis, length in ((1, pixels.shape[0]), (0, pixels.shape[1])):
        scale = length / geometry.window[axis + 2]
        start = min(round((rect[axis] - geometry.window[axis]) * scale), length - 1)
        slices.append(slice(start, start + max(1, round(rect[axis + 2] * scale))))
    return pixels[slices[0], slices[1]]


def channel_grid(maps: NDArray[np.float32], max_side: int = 2048) -> tuple[Picture, int]:
    """Draw every channel of a layer as a tile: black its least value, white its greatest.

    `maps` is (C, h, w); each channel is scaled for itself, a constant one is black. A vector, (C,)
    or (C, 1, 1), is one tile per channel, scaled together. Small maps are enlarged by a whole
    number. Returns a grey PNG, no side over `max_side` pixels, and how many channels, the last
    ones, found no place in it. Raises ValueError if there is no channel or a value is not finite.
    """
    if maps.size == 0 or maps.ndim not in (1, 3) or not np.isfinite(maps).all():
        raise ValueError(f"finite maps (C, h, w) or a vector (C,) are needed, not {maps.shape}")
    maps = maps.reshape(len(maps), *(maps.shape[1:] or (1, 1)))
    maps = _bounded(maps, max_side)
    count, height, width = maps.shape
    sheet = sheet_of((count, height, width), max_side)
    tiles = _normalised(maps[: sheet.shown], together=height * width == 1)
    tiles = tiles.repeat(sheet.factor, axis=1).repeat(sheet.factor, axis=2)
    drawn = _laid_out(tiles, sheet.rows, sheet.columns)
    return Picture(
        "image/png", drawn.shape[1], drawn.shape[0], level_png(drawn, None)
    ), count - sheet.shown


@dataclass(frozen=True, slots=True)
class Sheet:
    """How a channel grid is laid out: `shown` tiles of (height, width) cells, each enlarged."""

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


def sheet_of(shape: tuple[int, int, int], max_side: int = 2048) -> Sheet:
    """The channel grid of maps (C, h, w)."""
    count, height, width = shape
    width, height = preview_size((width, height), max(1, max_side - 2 * GAP))
    most_columns = max(1, (max_side - GAP) // (width + GAP))
    most_rows = max(1, (max_side - GAP) // (height + GAP))
    columns = min(most_columns, max(math.ceil(math.sqrt(count)), math.ceil(count / most_rows)))
    rows = min(most_rows, math.ceil(count / columns))
    factor = _enlargement((height, width), (rows, columns), min(max_side, GRID_SIDE))
    return Sheet((height, width), rows, columns, min(count, rows * columns), factor)


def _bounded(maps: NDArray[np.float32], max_side: int) -> NDArray[np.float32]:
    """Maps that would not fit even alone are scaled down to fit."""
    height, width = maps.shape[1:]
    size = preview_size((width, height), max(1, max_side - 2 * GAP))
    if size == (width, height):
        return maps
    return np.stack([cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in maps])


def _normalised(maps: NDArray[np.float32], *, together: bool) -> NDArray[np.uint8]:
    axes = None if together else (1, 2)
    values = maps.astype(np.float64)
    least = values.min(axis=axes, keepdims=True)
    extent = values.max(axis=axes, keepdims=True) - least
    extent[extent == 0.0] = 1.0
    scaled: NDArray[np.uint8] = np.rint((values - least) / extent * 255.0).astype(np.uint8)
    return scaled


def _enlargement(tile: tuple[int, int], grid: tuple[int, int], side: int) -> int:
    """The greatest whole factor that keeps the grid within `side` and a tile within TILE_SIDE."""
    room = [(side - GAP) // cells - GAP for cells in grid]
    return max(1, min(min(TILE_SIDE, room[axis]) // tile[axis] for axis in (0, 1)))


def _laid_out(tiles: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    count, height, width = tiles.shape
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP)
    sheet = np.full(shape, GAP_GREY, dtype=np.uint8)
    for index in range(count):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = tiles[index]
    return sheet
