"""regions: run lengths are those of pycocotools, and what is not a mask is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from pycocotools import mask as coco

from service.images.run_lengths import RLE, rle_decode, rle_encode

# pycocotools answers with an array class from before numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

masks = arrays.arrays(
    np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), fill=st.booleans()
)


def assert_as_coco(mask: NDArray[np.bool_]) -> None:
    ours = rle_encode(mask)
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert ours.size == mask.shape == tuple(theirs["size"])
    assert ours.counts == theirs["counts"].decode("ascii")
    read = coco.decode({"size": list(ours.size), "counts": ours.counts.encode("ascii")})
    assert np.array_equal(read, mask)
    assert np.array_equal(rle_decode(ours.size, ours.counts), mask)


@given(masks)
def test_run_lengths_are_those_of_pycocotools(mask: NDArray[np.bool_]) -> None:
    assert_as_coco(mask)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (480, 640), (1000, 701)])
def test_run_lengths_of_empty_full_and_one_pixel_masks(size: tuple[int, int]) -> None:
    assert_as_coco(np.zeros(size, dtype=bool))
    assert_as_coco(np.ones(size, dtype=bool))
    for place in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3)):
        mask = np.zeros(size, dtype=bool)
        mask[place] = True
        assert_as_coco(mask)


def test_run_lengths_by_hand() -> None:
    """Columns 0 1, 1 0, 0 0: one zero, two ones, three zeros, and 48 makes each a digit."""
    mask = np.array([[0, 1, 0], [1, 0, 0]], dtype=bool)
    assert rle_encode(mask) == RLE((2, 3), "123")


@given(masks)
def test_run_lengths_may_be_a_list_of_numbers(mask: NDArray[np.bool_]) -> None:
    groups = itertools.groupby(mask.ravel(order="F").tolist())
    runs = [len(list(group)) for _, group in groups]
    runs = [0, *runs] if mask[0, 0] else runs
    assert np.array_equal(rle_decode((mask.shape[0], mask.shape[1]), runs), mask)


def test_runs_of_no_length_are_read() -> None:
    assert rle_decode((1, 4), [1, 0, 1, 1, 1]).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(
    "counts",
    ["", "1", "12", "1234", "1Q", "é", "1 2", "~", "ooooooooooooooo0", "O",
     [], [7], [1, 2], [3, -1, 4], [1 << 70], [[6]], [1 << 62, 1 << 62], ["a"], None],
)  # fmt: skip
def test_run_lengths_that_are_no_mask_of_the_size_are_refused(counts: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        rle_decode((2, 3), counts)  # type: ignore[arg-type]


def test_run_lengths_of_a_picture_without_pixels_are_refused() -> None:
    for size in ((0, 3), (3, 0), (-2, -3)):
        with pytest.raises(ValueError, match="not a mask"):
            rle_decode(size, [0])


@given(st.text(alphabet=[chr(code) for code in range(48, 112)], max_size=60))
def test_whatever_string_comes_the_answer_is_a_mask_or_a_value_error(counts: str) -> None:
    try:
        mask = rle_decode((5, 4), counts)
    except ValueError:
        return
    assert mask.shape == (5, 4)
    read = coco.decode({"size": [5, 4], "counts": counts.encode("ascii")})
    assert np.array_equal(read, mask)
