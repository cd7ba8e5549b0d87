"""Draw a class activation map: as a heatmap, or as an overlay on the image.

A `cam` is float32 (gh, gw), -1..1, laid over the whole model input, that is, over
`geometry.window` of the source, or over the part of it that the model looks at
(`Geometry.of_map`). Its absolute value is drawn: 0 is "no evidence" and the first colour of the
colormap, 1 the last one. A colormap of DIVERGING shows the sign as well: −1 is its first colour, 0
the middle, 1 the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.cam.encoding import EncodedImage, encode, level_png
from service.images.decode import Geometry, Rect, preview_size

_NAMES = "turbo jet viridis inferno magma plasma cividis hot cool bone parula twilight"

# Rows that are drawn at once: few enough for what they need to stay in the processor's cache. Fewer
# take longer: each band calls torch and OpenCV, and takes the GIL again after each call.
BAND = 128

LINES = 600
"""The longer side of an image by the thickness of a line on it."""


def _tables() -> dict[str, NDArray[np.uint8]]:
    ramp = np.arange(256, dtype=np.uint8).reshape(256, 1)
    tables = {"gray": ramp.repeat(3, axis=1)}
    for name in _NAMES.split():
        bgr = np.asarray(cv2.applyColorMap(ramp, getattr(cv2, f"COLORMAP_{name.upper()}")))
        tables[name] = bgr.reshape(256, 3)[:, ::-1].astype(np.uint8, order="C")
    towards_white = 2 * np.minimum(ramp, 255 - ramp)
    sides = np.where(ramp > 127, (255, 0, 0), (0, 0, 255))
    tables["bwr"] = np.maximum(towards_white, sides).astype(np.uint8)
    for table in tables.values():
        table.setflags(write=False)
    return tables


COLORMAPS: Mapping[str, NDArray[np.uint8]] = MappingProxyType(_tables())
"""Name to colours: uint8 (256, 3), RGB, from no evidence to the most."""

DIVERGING = frozenset({"bwr"})
"""The colormaps from evidence against the class to evidence for it; as matplotlib's `bwr`."""


@dataclass(frozen=True, slots=True)
class Style:
    """How to draw.

    size      "source": the upright image, bounded by max_side; "model": the part that the model
              sees, at the scale of its input; "native": one pixel per cell of the map
    colormap  a name in COLORMAPS
    format    of the overlay; a heatmap is always an indexed PNG
    opacity   of the colours in the overlay, 0 (the image alone) to 1 (the colours alone)
    """

    size: Literal["source", "model", "native"] = "source"
    colormap: str = "turbo"
    format: Literal["jpeg", "png", "webp"] = "jpeg"
    opacity: float = 0.5


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
    across = _weights(cam.shape[1], size[0], rect, geometry, axis=0).T
    down = _weights(cam.shape[0], size[1], rect, geometry, axis=1)
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


def _inside(centres: NDArray[np.float64], geometry: Geometry, axis: int) -> slice:
    """Which of those middles lie in `geometry.seen`."""
    seen, tolerance = geometry.seen, 1e-9 * geometry.source_size[axis]
    edges = (seen[axis] - tolerance, seen[axis] + seen[axis + 2] + tolerance)
    first, last = centres.searchsorted(edges)
    return slice(int(first), int(last))


@lru_cache(maxsize=8)
def _weights(cells: int, length: int, rect: Rect, geometry: Geometry, axis: int) -> Tensor:
    """How much of each cell is in each pixel of an axis: (length, cells), rows sum to 1 or 0.

    Kept for the next image of the same size; not to be written to.
    """
    start, extent = geometry.window[axis], geometry.window[axis + 2]
    centres = _centres(length, rect, axis)
    position = (centres - start) * (cells / extent) - 0.5
    reach = max(1.0, rect[axis + 2] / length * cells / extent)
    weights = np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(cells)) / reach)
    inside = _inside(centres, geometry, axis)
    weights[inside] /= weights[inside].sum(axis=1, keepdims=True)
    weights[: inside.start] = weights[inside.stop :] = 0.0
    return torch.from_numpy(weights.astype(np.float32))


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
    cam: NDArray[np.float32], geometry: Geometry, size: tuple[int, int], rect: Rect, colormap: str
) -> NDArray[np.uint8]:
    levels = np.empty(size[::-1], dtype=np.uint8)
    # The absolute value first: neighbours of opposite sign are evidence, and must not cancel.
    for rows, strength in _bands(np.abs(cam), geometry, size, rect):
        cv2.convertScaleAbs(strength, levels[rows], 255.0)  # rounds, and stops at 255
    if colormap in DIVERGING:
        for rows, signed in _bands(cam, geometry, size, rect):
            half = levels[rows] // 2 + levels[rows] % 2
            levels[rows] = np.where(signed < 0, 128 - half, 127 + np.maximum(half, 1))
    return levels


def render_heatmap(
    cam: NDArray[np.float32], geometry: Geometry, style: Style, max_side: int
) -> EncodedImage:
    """Draw the map alone: an indexed PNG whose pixel values are round(255 * |cam|).

    The palette is the colormap; outside `geometry.seen` the value is 0. With a colormap of
    DIVERGING the values are 0 for −1, 128 for 0, also outside, and 255 for 1. `max_side` (pixels)
    bounds the size "source". Raises ValueError if the map is not finite.
    """
    geometry = geometry.of_map(cam.shape)
    size, rect = _raster(cam, geometry, style, max_side)
    levels = _levels(cam, geometry, size, rect, style.colormap)
    data = level_png(levels, COLORMAPS[style.colormap])
    return EncodedImage("image/png", *size, data)


def render_overlay(
    cam: NDArray[np.float32],
    geometry: Geometry,
    style: Style,
    source_pixels: NDArray[np.uint8],
    model_pixels: NDArray[np.uint8],
    *,
    box: Rect | None = None,
) -> EncodedImage:
    """Draw the coloured map over the image; outside `geometry.seen` the image is unchanged.

    `box` is outlined, x, y, w, h in source pixels, but for the size "native".

    `source_pixels` is `decode.preview` of the source, drawn on for the size "source";
    `model_pixels` the model input, drawn on for "model" and "native"; both uint8 (h, w, 3), RGB.
    Raises ValueError if the map is not finite, RenderFailed if the image cannot be encoded.
    """
    whole, geometry = geometry, geometry.of_map(cam.shape)
    size, rect = _raster(cam, geometry, style, max(source_pixels.shape[:2]))
    base = source_pixels if style.size == "source" else _part(model_pixels, whole, rect)
    if size != (base.shape[1], base.shape[0]):
        base = np.asarray(cv2.resize(base, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    rows, columns = (_inside(_centres(size[axis], rect, axis), geometry, axis) for axis in (1, 0))
    levels = _levels(cam, geometry, size, rect, style.colormap)[rows, columns]
    table = COLORMAPS[style.colormap].reshape(256, 1, 3).copy()
    drawn = base.copy()
    seen = drawn[rows, columns]
    for start in range(0, len(seen), BAND):
        part = seen[start : start + BAND]
        colours = cv2.applyColorMap(levels[start : start + BAND], table)
        cv2.addWeighted(colours, style.opacity, part, 1.0 - style.opacity, 0.0, dst=part)
    if box is not None and style.size != "native":
        _outline(drawn, rect, box)
    return EncodedImage(f"image/{style.format}", *size, encode(drawn, style.format))


def _outline(drawn: NDArray[np.uint8], rect: Rect, box: Rect) -> None:
    """Draw a thin line around a box: white between two black ones, to be seen on any image."""
    height, width = drawn.shape[:2]
    across, down = width / rect[2], height / rect[3]
    corners = [
        (round((x - rect[0]) * across), round((y - rect[1]) * down))
        for x, y in ((box[0], box[1]), (box[0] + box[2], box[1] + box[3]))
    ]
    line = max(1, round(max(width, height) / LINES))
    for color, thickness in (((0, 0, 0), 3 * line), ((255, 255, 255), line)):
        cv2.rectangle(drawn, corners[0], corners[1], color, thickness)


def _part(pixels: NDArray[np.uint8], geometry: Geometry, rect: Rect) -> NDArray[np.uint8]:
    """The part of the model input that covers `rect`, to the nearest pixel, never empty."""
    slices = []
    for axis, length in ((1, pixels.shape[0]), (0, pixels.shape[1])):
        scale = length / geometry.window[axis + 2]
        start = min(round((rect[axis] - geometry.window[axis]) * scale), length - 1)
        slices.append(slice(start, start + max(1, round(rect[axis + 2] * scale))))
    return pixels[slices[0], slices[1]]
