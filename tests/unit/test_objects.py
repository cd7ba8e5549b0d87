"""The outlines of masks, against OpenCV, and the boxes around them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from api_schemas.adapters.objects import box_of, outlines_of


@pytest.mark.parametrize("seed", range(20))
def test_outlines_filled_again_are_the_mask_without_its_holes(seed: int) -> None:
    """The corners are pixel edges; a pixel is in an outline if its middle is."""
    chance = np.random.default_rng(seed)
    mask = chance.random((chance.integers(1, 12), chance.integers(1, 12))) < chance.random()
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, -1)
    outlines = outlines_of(mask)
    assert len(outlines) == len(contours)
    drawn = np.zeros(mask.shape, dtype=bool)
    for outline in outlines:
        corners = np.array(outline, dtype=np.float32)
        for y, x in np.ndindex(mask.shape):
            inside = cv2.pointPolygonTest(corners, (x + 0.5, y + 0.5), measureDist=False) > 0
            drawn[y, x] |= inside
    np.testing.assert_array_equal(drawn, filled > 0)


def test_a_rectangle_has_four_corners_clockwise_from_the_top_left() -> None:
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:4, 2:7] = True
    assert outlines_of(mask) == [[(2, 1), (7, 1), (7, 4), (2, 4)]]
    assert box_of(mask) == (2, 1, 5, 3)


def test_an_empty_mask_has_no_outline() -> None:
    assert outlines_of(np.zeros((3, 4), dtype=bool)) == []
