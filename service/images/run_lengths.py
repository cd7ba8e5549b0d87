"""Encode and decode masks as COCO run lengths.

rle = rle_encode(mask)
rle_decode(rle.size, rle.counts)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DIGITS = 7
"""Maximum characters of one COCO run length: 34 bits and a sign, more pixels than any image."""


@dataclass(frozen=True, slots=True)
class RLE:
    """A mask as COCO's compressed run lengths: column by column, first a run of zeros.

    `size` is (height, width); `counts` the string that pycocotools reads and writes.
    """

    size: tuple[int, int]
    counts: str


def rle_encode(mask: NDArray[np.bool_]) -> RLE:
    """Write a mask, bool (h, w), the way pycocotools does."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], changes, [flat.size])))
    if flat.size and flat[0]:
        runs = np.concatenate(([0], runs))
    height, width = mask.shape
    return RLE((height, width), _packed(runs))


def rle_decode(size: tuple[int, int], counts: str | Sequence[int]) -> NDArray[np.bool_]:
    """Read COCO run lengths, compressed or as a list of numbers, into bool (h, w).

    Allocates height x width bytes, so compare an untrusted `size` with the image first. Raises
    ValueError if `counts` is not a mask of exactly that size.
    """
    height, width = size
    try:
        runs = _unpacked(counts) if isinstance(counts, str) else np.array(counts, dtype=np.int64)
    except (OverflowError, TypeError, UnicodeEncodeError) as error:
        raise ValueError("run lengths are whole numbers, or COCO's string of them") from error
    pixels = height * width
    if min(height, width) < 1 or runs.ndim != 1 or (runs < 0).any() or (runs > pixels).any():
        raise ValueError(f"these run lengths are not a mask of {width} x {height} pixels")
    if runs.sum() != pixels:
        raise ValueError(
            f"the run lengths sum to {runs.sum()}, a mask of {width} x {height} pixels has {pixels}"
        )
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def _packed(runs: NDArray[np.int64]) -> str:
    """Run lengths in 5-bit digits, from the third on as the difference from the last but one.

    The least significant digit is first; 32 is added to all but the last, and 48 to each.
    """
    values = runs.copy()
    values[3:] -= runs[1:-2]
    characters = np.zeros((len(values), _DIGITS), dtype=np.uint8)
    open_ = np.ones(len(values), dtype=bool)
    for digit_index in range(_DIGITS):
        digit = values & 31
        values >>= 5
        more = np.where(digit & 16, values != -1, values != 0)
        characters[:, digit_index] = np.where(open_, digit + 32 * more + 48, 0)
        open_ &= more
    return characters[characters > 0].tobytes().decode("ascii")


def _unpacked(counts: str) -> NDArray[np.int64]:
    digits = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("this is not a COCO string of run lengths, or only a part of one")
    ends = np.flatnonzero(digits < 32) + 1
    starts = np.concatenate(([0], ends[:-1]))
    lengths = ends - starts
    if lengths.max() > _DIGITS:
        raise ValueError("a run length in this string is longer than any image")
    digit_index = np.arange(digits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * digit_index), starts)
    values -= np.where(digits[ends - 1] & 16, 1 << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
