"""From a map to regions: a mask, boxes, polygons, the peak and run lengths, in source pixels.

    regions = find_regions(cam, model_input.geometry, threshold=0.5)
    regions.boxes[0]                        # x, y, w, h of the largest region

Measured on |cam| as the heatmap shows it: resampled over the upright source, or, if its longer side
is over `max_side`, over a raster of that size whose pixels are then enlarged.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from service.cam.heatmap import resample
from service.images.decode import Geometry, preview_size
from service.images.run_lengths import RLE, rle_encode

Box = tuple[int, int, int, int]
Point = tuple[float, float]

MIN_AREA = 4.0
"""Source pixels that a region needs to be listed; smaller ones are in the mask alone."""

# Values this close are equal: the same cell, resampled in float32, differs in the last bits.
ROUNDING = 1e-6

# How far a polygon may leave the outline: one pixel, or this share of the outline's length.
TOLERANCE, TOLERANCE_SHARE = 1.0, 0.001


@dataclass(frozen=True, slots=True)
class Regions:
    """Where a map is at least `threshold`, in pixels of the upright source.

    The wire's form is `api_schemas.answers.Regions`.

    peak:     the middle of the map's highest pixel; None where the map is 0 throughout. Of equally
              high pixels it is the one nearest to the centroid of them all, then the first by rows.
    boxes:    x, y, w, h of each 8-connected region, tight, the largest region first.
    polygons: the outline of each region in the order of `boxes`, at least three points (x, y), not
              closed; holes are not cut out. A region under MIN_AREA has neither box nor polygon.
    rle:      the mask itself, all regions and holes of it.
    """

    threshold: float
    peak: Point | None
    boxes: list[Box]
    polygons: list[list[Point]]
    rle: RLE


def find_regions(
    grid: NDArray[np.float32], geometry: Geometry, threshold: float, max_side: int = 2048
) -> Regions:
    """The regions of a map at `threshold` (0..1); where the map is 0 there is none, even at 0.

    Raises ValueError if the map is not finite and two-dimensional or the threshold is not in 0..1.
    """
    strength = _strength(grid, geometry, max_side)
    mask = _reached(strength, threshold)
    parts = _components(mask, geometry.source_size)
    return Regions(
        threshold=threshold,
        peak=_peak(strength, geometry.source_size),
        boxes=[box for box, _ in parts],
        polygons=[polygon for _, polygon in parts],
        rle=rle_encode(_at_source(mask, geometry.source_size)),
    )


def component(mask: NDArray[np.bool_], at: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """One 8-connected region of a mask (h, w): that at a (row, column), else the largest one."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if at is not None:
        return np.asarray(labels == labels[at], dtype=np.bool_)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    return np.asarray(labels == largest, dtype=np.bool_)


def mask_rle(mask: NDArray[np.bool_], geometry: Geometry) -> tuple[RLE, int]:
    """A mask (h, w) over the model input as run lengths of the source, and its area there."""
    found = source_mask(mask, geometry)
    return rle_encode(found), int(np.count_nonzero(found))


def mask_polygons(mask: NDArray[np.bool_], geometry: Geometry) -> list[list[Point]]:
    """The outlines of a mask (h, w) over the model input, as those of `Regions`."""
    found = source_mask(mask, geometry)
    return [polygon for _, polygon in _components(found, geometry.source_size)]


def source_mask(mask: NDArray[np.bool_], geometry: Geometry) -> NDArray[np.bool_]:
    """A mask (h, w) over the model input as one over the upright source.

    Each source pixel has the value of the input's pixel that its centre lies in.
    """
    left, top, width, height = geometry.window
    columns, rows = (
        ((np.arange(length) + 0.5 - start) / extent * cells).astype(np.int64).clip(0, cells - 1)
        for length, start, extent, cells in zip(
            geometry.source_size, (left, top), (width, height), mask.shape[::-1], strict=True
        )
    )
    return np.asarray(mask.T[columns][:, rows].T, dtype=np.bool_)


def _strength(grid: NDArray[np.float32], geometry: Geometry, max_side: int) -> NDArray[np.float32]:
    """|grid| over the source, float32 (h, w), no side over `max_side`; 0 outside `seen`."""
    width, height = geometry.source_size
    size = preview_size(geometry.source_size, max_side)
    return resample(np.abs(grid), geometry, size, (0.0, 0.0, float(width), float(height)))


def _reached(strength: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"the threshold is between 0 and 1, not {threshold}")
    return (strength > 0.0) & (strength >= threshold - ROUNDING)


def _peak(strength: NDArray[np.float32], source_size: tuple[int, int]) -> Point | None:
    highest = strength.max()
    if highest <= 0.0:
        return None
    tied = np.argwhere(strength >= highest * (1.0 - ROUNDING))
    nearest = np.square(tied - tied.mean(axis=0)).sum(axis=1).argmin()
    row, column = tied[nearest]
    scale_x, scale_y = _scale(strength.shape, source_size)
    return float((column + 0.5) * scale_x), float((row + 0.5) * scale_y)


def _scale(shape: tuple[int, ...], source_size: tuple[int, int]) -> tuple[float, float]:
    """Width and height of a raster pixel in source pixels."""
    return source_size[0] / shape[1], source_size[1] / shape[0]


def _edges(length: int, source_length: int) -> NDArray[np.int64]:
    """The first source pixel of each of `length` raster pixels, and the end of the last.

    A source pixel belongs to the raster pixel that its middle lies in.
    """
    doubled = 2 * np.arange(length + 1, dtype=np.int64) * source_length
    return -((length - doubled) // (2 * length))


def _at_source(mask: NDArray[np.bool_], source_size: tuple[int, int]) -> NDArray[np.bool_]:
    """Enlarge a mask to the size of the source; stored by columns, as RLE is."""
    columns, rows = (
        np.diff(_edges(length, whole))
        for length, whole in zip(mask.shape[::-1], source_size, strict=True)
    )
    return np.repeat(np.repeat(mask.T, columns, axis=0), rows, axis=1).T


def _components(
    mask: NDArray[np.bool_], source_size: tuple[int, int]
) -> list[tuple[Box, list[Point]]]:
    """Box and outline of each region of a mask that is large enough, the largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    scale_x, scale_y = _scale(mask.shape, source_size)
    areas = stats[:, cv2.CC_STAT_AREA] * (scale_x * scale_y)
    columns, rows = (
        _edges(length, whole) for length, whole in zip(mask.shape[::-1], source_size, strict=True)
    )
    components = []
    for index in sorted(range(1, count), key=lambda label: -areas[label]):
        if areas[index] < MIN_AREA:
            break
        x, y, w, h = (int(value) for value in stats[index, :4])
        left, top = int(columns[x]), int(rows[y])
        box = (left, top, int(columns[x + w]) - left, int(rows[y + h]) - top)
        outline = _outline(labels[y : y + h, x : x + w] == index).tolist()
        polygon = [(round((x + u) * scale_x, 2), round((y + v) * scale_y, 2)) for u, v in outline]
        components.append((box, polygon))
    return components


def _outline(part: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Follow the outer edges of the pixels of one region: points (x, y), (n, 2), n at least 3.

    OpenCV's contours run through the centres of pixels, half a pixel inside. So the contour is that
    of the corners and centres of pixels and edges, on a lattice of twice the resolution.
    """
    lattice = np.zeros((2 * part.shape[0] + 1, 2 * part.shape[1] + 1), dtype=np.uint8)
    lattice[1::2, 1::2] = part
    lattice = np.asarray(cv2.dilate(lattice, np.ones((3, 3), np.uint8)), dtype=np.uint8)
    (contour,), _ = cv2.findContours(lattice, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    tolerance = max(2 * TOLERANCE, TOLERANCE_SHARE * cv2.arcLength(contour, closed=True))
    simple = cv2.approxPolyDP(contour, tolerance, closed=True)
    chosen = np.asarray(simple if len(simple) >= 3 else contour, dtype=np.float64)
    return chosen.reshape(-1, 2) / 2.0
