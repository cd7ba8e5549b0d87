"""The detections and regions of an answer, each with its evidence, as the exports need them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from api_schemas.answers import Rect
from api_schemas.client.results import Explanation, Prediction, Result, decode_mask


class Found(NamedTuple):
    """One detection of a detector, or one class's region of a segmenter.

    box:      x, y, w, h in pixels of the upright image; of a region, the smallest around it.
    mask:     booleans (height, width) of the image; None for a detection without one.
    evidence: its first explanation; None if it was not explained.
    """

    prediction: Prediction
    box: Rect
    mask: NDArray[np.bool_] | None
    evidence: Explanation | None


def found_in(result: Result) -> Iterator[Found]:
    """Yield what a detector or a segmenter found, in the order of the predictions.

    Nothing for a classifier's answer. A region without a pixel is left out.
    """
    for prediction in result.predictions:
        mask = None if prediction.mask is None else decode_mask(prediction.mask)
        box = prediction.box
        if box is None and mask is not None and mask.any():
            box = box_of(mask)
        if box is not None:
            yield Found(prediction, box, mask, _evidence(prediction, result))


def box_of(mask: NDArray[np.bool_]) -> Rect:
    """Return the smallest box around the pixels of a mask that has some."""
    columns, rows = (np.flatnonzero(mask.any(axis=axis)).tolist() for axis in (0, 1))
    x, y = columns[0], rows[0]
    return x, y, columns[-1] + 1 - x, rows[-1] + 1 - y


def _evidence(prediction: Prediction, result: Result) -> Explanation | None:
    for explanation in result.explanations:
        same_class = explanation.class_id == prediction.class_id
        if same_class and explanation.detection == prediction.detection:
            return explanation
    return None


def outlines_of(mask: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """Return the outer outline of each part of a mask, clockwise along pixel edges: corners (x, y).

    Pixels that touch at a corner are one part. Holes are filled.
    """
    following = _edges(mask)
    loops = []
    while following:
        start = min(following)
        at, before, loop = start, (0, 0), []
        while True:
            ends = following[at]
            # Of two edges at a corner that pixels share, the one that turns left joins them.
            turns = [before[0] * (y - at[1]) - before[1] * (x - at[0]) for x, y in ends]
            x, y = ends.pop(turns.index(min(turns)))
            if not ends:
                del following[at]
            step = (x - at[0], y - at[1])
            if step != before:
                loop.append(at)
            at, before = (x, y), step
            if at == start:
                break
        if _is_clockwise(loop):
            loops.append(loop)
    return loops


def _edges(mask: NDArray[np.bool_]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return the ends of the unit edges around the pixels by their starts, pixels on the right."""
    padded = np.pad(mask, 1).astype(np.int8)
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, x in np.argwhere(down := np.diff(padded, axis=0)[:, 1:-1]).tolist():
        ends = ((x, y), (x + 1, y)) if down[y, x] > 0 else ((x + 1, y), (x, y))
        found.setdefault(ends[0], []).append(ends[1])
    for y, x in np.argwhere(right := np.diff(padded, axis=1)[1:-1]).tolist():
        ends = ((x, y + 1), (x, y)) if right[y, x] > 0 else ((x, y), (x, y + 1))
        found.setdefault(ends[0], []).append(ends[1])
    return found


def _is_clockwise(loop: list[tuple[int, int]]) -> bool:
    """Whether an outline has its inside on the right; y points down."""
    following = [*loop[1:], loop[0]]
    return sum(x * b - a * y for (x, y), (a, b) in zip(loop, following, strict=True)) > 0
