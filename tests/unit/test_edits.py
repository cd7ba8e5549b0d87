"""Edits of pixels, and where their controls lie."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from service.inference.pixel_edits import (
    bounds,
    flipped,
    grey,
    laid,
    laid_mask,
    moved,
    other_places,
    scaled,
    stretched,
    swapped,
    turned,
    window,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
ONE = np.full((1, 1, 3), 9, np.uint8)


def test_what_sticks_out_is_cut_and_the_rest_stays() -> None:
    made = laid(PIXELS, (-3, 2), np.zeros_like(PIXELS))
    assert (made[2:, :5] == PIXELS[:4, 3:]).all()
    assert not made[:2].any()
    assert not made[:, 5:].any()
    assert (laid(PIXELS, (8, 0), PIXELS) == PIXELS).all()
    assert (laid(ONE, (7, 5), PIXELS)[5, 7] == 9).all()


def test_a_mask_of_another_size_is_laid_over_an_image() -> None:
    mask = laid_mask(np.ones((2, 2), bool), (7, -1), (8, 6))
    assert mask.shape == (6, 8)
    assert np.argwhere(mask).tolist() == [[0, 7]]


@pytest.mark.parametrize("factor", [0.05, 0.5, 1, 2, 20])
def test_a_scaled_image_keeps_its_size_and_its_middle(factor: float) -> None:
    image = np.full((40, 60, 3), 50, np.uint8)
    image[18:22, 28:32] = 200
    made = scaled(image, factor, np.zeros_like(image))
    assert made.shape == image.shape
    assert made[19:21, 28:32].max() > 50
    around = {0.05: 0, 0.5: 0, 1: 50, 2: 50, 20: 200}[factor]
    assert (made[0, 0] == around).all()


def test_an_image_of_one_channel_keeps_its_dimension_when_it_is_stretched() -> None:
    assert stretched(PIXELS[:, :, :1].copy(), (4, 3)).shape == (3, 4, 1)


def test_flips_and_swaps_done_twice_give_the_image_back() -> None:
    for axis in ("horizontal", "vertical"):
        assert (flipped(flipped(PIXELS, axis), axis) == PIXELS).all()
    assert (flipped(PIXELS, "horizontal")[:, 0] == PIXELS[:, -1]).all()
    assert (swapped(swapped(PIXELS, "gbr"), "brg") == PIXELS).all()
    assert (swapped(PIXELS, "gbr")[:, :, 0] == PIXELS[:, :, 1]).all()


def test_hues_turn_and_grey_has_none() -> None:
    red = np.array([[[200, 0, 0]]], np.uint8)
    assert turned(red, 120).tolist() == [[[0, 200, 0]]]
    assert turned(red, -120).tolist() == [[[0, 0, 200]]]
    assert (turned(PIXELS, 360) == PIXELS).all()
    assert (turned(grey(PIXELS), 77) == grey(PIXELS)).all()
    assert grey(red).tolist() == [[[60, 60, 60]]]


def test_the_bounds_are_tight() -> None:
    mask = np.zeros((6, 8), bool)
    assert bounds(mask) is None
    mask[2, 3] = mask[4, 1] = True
    assert bounds(mask) == (1, 2, 3, 3)


def test_a_pixel_is_seen_if_its_middle_is() -> None:
    assert window((0.4, 0.6, 2.1, 3.0), (8, 6)) == (0, 1, 2, 3)
    assert window((-3.0, -1.0, 100.0, 100.0), (8, 6)) == (0, 0, 8, 6)


def test_other_places_are_inside_different_and_never_the_own_one() -> None:
    area = (2, 1, 3, 2)
    every = other_places(area, (8, 6), 100, 0)
    assert len(every) == len(set(every)) == 6 * 5 - 1
    assert (0, 0) not in every
    for x, y in every:
        assert 0 <= area[0] + x <= 8 - 3
        assert 0 <= area[1] + y <= 6 - 2


def test_each_other_place_is_as_likely_as_any_other() -> None:
    drawn = Counter(other_places((0, 0, 2, 2), (4, 4), 1, seed)[0] for seed in range(8000))
    assert len(drawn) == 8
    assert max(drawn.values()) < 1.2 * min(drawn.values())


def test_an_area_without_a_place_beside_itself_goes_around_the_edges() -> None:
    every = other_places((0, 0, 5, 4), (8, 6), 100, 0)
    assert len(set(every)) == 8 * 6 - 1
    beside = other_places((0, 0, 8, 3), (8, 6), 100, 0)
    assert set(beside) == {(0, 1), (0, 2), (0, 3)}
    assert other_places(None, (8, 6), 8, 0) == ()
    assert other_places((0, 0, 1, 1), (1, 1), 8, 0) == []


def test_what_is_moved_keeps_its_count_and_stays_in_the_area() -> None:
    values = np.zeros((6, 8), np.uint8)
    values[1:3, 6:8] = 1
    made = moved(values, (1, 0), (2, 0, 6, 6))
    assert made.sum() == 4
    assert np.argwhere(made).tolist() == [[1, 2], [1, 7], [2, 2], [2, 7]]
