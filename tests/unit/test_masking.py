"""masking: the masked pixels are replaced, every other one is untouched."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.images.masks import Fill, boxes_mask, hide, overlaid

FILLS: tuple[Fill, ...] = get_args(Fill)
SIZES = [(640, 480), (64, 200), (1, 1), (3, 2), (1, 70_000), (70_000, 1), (900, 40)]


def noise(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def left_half(width: int, height: int) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), dtype=bool)
    mask[:, : (width + 1) // 2] = True
    return mask


# ---- hide


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("size", SIZES)
def test_only_masked_pixels_change(fill: Fill, size: tuple[int, int]) -> None:
    pixels, mask = noise(*size), left_half(*size)
    before = pixels.copy()
    hidden = hide(pixels, mask, fill)
    assert hidden.dtype == np.uint8
    assert hidden.shape == pixels.shape
    assert np.array_equal(hidden[~mask], before[~mask])
    assert np.array_equal(pixels, before)
    assert not np.shares_memory(hidden, pixels)


@pytest.mark.parametrize("fill", FILLS)
def test_an_empty_mask_hides_nothing(fill: Fill) -> None:
    pixels = noise(30, 20)
    assert np.array_equal(hide(pixels, np.zeros((20, 30), bool), fill), pixels)


def test_grey_is_128() -> None:
    assert (hide(noise(30, 20), np.ones((20, 30), bool), "grey") == 128).all()


def test_the_mean_is_of_the_whole_picture() -> None:
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[:, 5:] = (100, 200, 31)
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = True
    assert hide(pixels, mask, "mean")[0, 0].tolist() == [50, 100, 16]


@pytest.mark.parametrize("size", [(64, 48), (640, 480), (2000, 1500)])
def test_blur_takes_the_detail_and_leaves_the_colours_in_place(size: tuple[int, int]) -> None:
    width, height = size
    pixels = noise(width, height) // 4
    pixels[:, width // 2 :, 0] += 180
    blurred = hide(pixels, np.ones((height, width), bool), "blur").astype(float)
    assert np.abs(np.diff(blurred, axis=1)).max() <= 18
    assert blurred[:, : width // 4, 0].mean() == pytest.approx(32, abs=6)
    assert blurred[:, -width // 4 :, 0].mean() == pytest.approx(212, abs=6)


@pytest.mark.parametrize("side", [100, 500, 1500])
def test_blur_has_a_tenth_of_the_shorter_side_as_standard_deviation(side: int) -> None:
    """A step becomes the normal distribution: 16 % one deviation before it, 84 % behind."""
    pixels = np.zeros((side, side * 2, 3), np.uint8)
    pixels[:, side:] = 255
    row = hide(pixels, np.ones(pixels.shape[:2], bool), "blur")[side // 2, :, 1] / 255
    assert row[side - side // 10] == pytest.approx(0.16, abs=0.03)
    assert row[side + side // 10] == pytest.approx(0.84, abs=0.03)


@pytest.mark.parametrize("fill", FILLS)
def test_one_colour_is_blurred_and_averaged_to_itself(fill: Fill) -> None:
    pixels = np.full((90, 333, 3), (7, 128, 250), np.uint8)
    hidden = hide(pixels, np.ones((90, 333), bool), fill)
    assert fill == "grey" or np.array_equal(hidden, pixels)


def test_a_mask_stored_by_columns_is_as_good() -> None:
    pixels, mask = noise(40, 30), left_half(40, 30)
    assert np.array_equal(hide(pixels, np.asfortranarray(mask)), hide(pixels, mask))


def test_what_cannot_be_hidden_is_refused() -> None:
    pixels = noise(4, 3)
    with pytest.raises(ValueError, match="does not lie on"):
        hide(pixels, np.ones((4, 3), bool))
    with pytest.raises(ValueError, match="'mean', 'blur' or 'grey'"):
        hide(pixels, np.ones((3, 4), bool), "red")  # type: ignore[arg-type]


# ---- boxes_mask


def test_a_pixel_counts_when_its_middle_is_inside() -> None:
    assert boxes_mask([(1, 0, 2, 1)], (5, 2)).astype(int).tolist() == [[0, 1, 1, 0, 0], [0] * 5]
    assert boxes_mask([(0.5, 0.5, 1.0, 1.0)], (3, 2)).astype(int).tolist() == [[1, 0, 0], [0, 0, 0]]
    assert not boxes_mask([(0.6, 0.6, 0.8, 0.8)], (3, 3)).any()


def test_boxes_add_up_and_what_sticks_out_is_cut() -> None:
    mask = boxes_mask([(-5, -5, 6, 6), (2, 1, 1e300, 1e300), (9, 9, 5, 5)], (4, 3))
    assert mask.astype(int).tolist() == [[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("boxes", [[], [(1, 1, 0, 5)], [(2, 2, -2, -2)], [(10, 0, 4, 4)]])
def test_boxes_without_area_in_the_picture_mask_nothing(
    boxes: list[tuple[float, float, float, float]],
) -> None:
    assert not boxes_mask(boxes, (4, 3)).any()


edges = st.floats(-10, 40)


@given(edges, edges, edges, edges)
def test_boxes_are_the_pixels_whose_middles_they_hold(
    x: float, y: float, w: float, h: float
) -> None:
    mask = boxes_mask([(x, y, w, h)], (17, 11))
    xs, ys = np.arange(17) + 0.5, np.arange(11) + 0.5
    inside_x, inside_y = (x <= xs) & (xs < x + w), (y <= ys) & (ys < y + h)
    clear = all(abs(value % 1 - 0.5) > 1e-9 for value in (x, y, x + w, y + h))
    assert not clear or np.array_equal(mask, inside_y[:, None] & inside_x)


@given(edges)
def test_two_boxes_side_by_side_share_no_pixel_and_leave_no_gap(cut: float) -> None:
    first = boxes_mask([(0, 0, cut, 11)], (17, 11))
    second = boxes_mask([(cut, 0, 60, 11)], (17, 11))
    assert not (first & second).any()
    assert (first | second).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_box_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        boxes_mask([(0, 0, value, 1)], (3, 3))


def test_many_boxes_cover_what_each_of_them_covers() -> None:
    rng = np.random.default_rng(0)
    for size in ((1, 1), (3, 2), (40, 30)):
        boxes = [tuple(rng.uniform(-20, 50, 2)) + tuple(rng.uniform(-5, 30, 2)) for _ in range(60)]
        for chosen in (boxes[:0], boxes[:1], boxes[:5], boxes):
            expected = np.zeros(size[::-1], dtype=bool)
            for x, y, w, h in chosen:
                inside_x = (np.arange(size[0]) + 0.5 >= x) & (np.arange(size[0]) + 0.5 < x + w)
                inside_y = (np.arange(size[1]) + 0.5 >= y) & (np.arange(size[1]) + 0.5 < y + h)
                expected |= inside_y[:, None] & inside_x
            np.testing.assert_array_equal(boxes_mask(chosen, size), expected)


class Counted(np.ndarray):
    """An array that counts the elements written to it by index."""

    written = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        Counted.written += np.asarray(self[key]).size
        super().__setitem__(key, value)


def test_a_thousand_boxes_take_one_pass_over_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each filled the whole image: 64 gigapixels for a thousand boxes of 64 megapixels."""
    zeros = np.zeros
    monkeypatch.setattr(np, "zeros", lambda *a, **k: zeros(*a, **k).view(Counted))
    Counted.written = 0
    mask = boxes_mask([(0.0, 0.0, 2000.0, 1000.0)] * 1000, (2000, 1000))
    assert mask.all()
    assert 0 < Counted.written < mask.size


@pytest.mark.parametrize("covered", ["nothing", "a few", "a box", "all"])
@pytest.mark.parametrize("channels", [1, 3, 10])
def test_one_image_is_written_over_another_where_the_mask_is(covered: str, channels: int) -> None:
    random = np.random.default_rng(0)
    under, over = random.integers(0, 256, (2, 700, 301, channels), dtype=np.uint8)
    mask = np.zeros((700, 301), bool)
    if covered == "a few":
        mask[random.integers(0, 700, 9), random.integers(0, 301, 9)] = True
    mask[{"a box": slice(20, 650), "all": slice(None)}.get(covered, slice(0)), 5:300] = True
    if covered == "all":
        mask[:] = True
    expected = np.where(mask[:, :, None], over, under)
    kept = over.copy()
    made = overlaid(under, mask, over)
    assert made is under
    assert (made == expected).all()
    assert (over == kept).all()
    with pytest.raises(ValueError, match="does not lie"):
        overlaid(under, mask[1:], over)
