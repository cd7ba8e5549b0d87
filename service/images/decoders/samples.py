"""Samples of any depth to 8 bits, a band of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

BAND_PIXELS = 1 << 16
"""Pixels per conversion, to need little memory besides the result."""

TOUCH_BYTES = 16 << 20
"""Bytes that Pillow may clear at once without a noticeable delay of other threads."""

Pixels = NDArray[np.uint8]


def load(image: Image.Image) -> None:
    """Let Pillow decode an open image. Raises the exceptions of its decoders.

    Pillow clears an image's memory while it holds the GIL, and new pages are mapped one by one:
    256 MB stopped the event loop for 130 ms. So memory of that size is touched before, without the
    GIL, and returned to the allocator, which keeps it.
    """
    size = image.width * image.height * (1 if image.mode in {"1", "L", "P"} else 4)
    if size > TOUCH_BYTES:
        torch.empty(size, dtype=torch.uint8).zero_()
    image.load()


def bands(width: int, height: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of rows of about BAND_PIXELS each, in multiples of `multiple` rows."""
    rows = max(1, BAND_PIXELS // (max(width, 1) * multiple)) * multiple
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def unpacked(rows: Pixels, bits: int, count: int) -> NDArray[np.uint32] | Pixels:
    """The first `count` samples of each row, packed with the highest bit first; 1 to 32 bits."""
    if bits == 8:
        return rows[:, :count]
    single = np.unpackbits(rows, axis=1, count=bits * count)
    if bits == 1:
        return single
    weights = np.left_shift(np.uint32(1), np.arange(bits - 1, -1, -1, dtype=np.uint32))
    samples = np.zeros((len(rows), count), np.uint32)
    for bit, weight in enumerate(weights):
        samples += single[:, bit::bits] * weight
    return samples


def levels(bits: int, largest: int | None = None) -> Pixels:
    """The 8-bit level of each value of `bits` bits, 16 at most: 255 for `largest`, and above."""
    values = np.arange(1 << bits, dtype=np.float64)
    scaled = np.rint(values * 255 / (largest or (1 << bits) - 1))
    return np.minimum(scaled, 255).astype(np.uint8)


def over_white(colour: Pixels, alpha: Pixels) -> Pixels:
    """Colours (h, w, c) over white by their `alpha` (h, w)."""
    share = alpha[:, :, None].astype(np.uint16)
    return np.asarray((colour * share + 255 * (255 - share) + 127) // 255, np.uint8)
