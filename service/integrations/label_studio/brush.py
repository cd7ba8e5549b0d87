"""Maps as Label Studio's brush regions: run lengths of RGBA pixels whose alpha is the map.

Label Studio keeps the alpha of a brush and paints it in the colour of its label, so a graded alpha
is shown as a graded overlay. The coding is that of thi.ng's rle-pack: a head (number of values in
32 bits, word size less one in 5, four run sizes less one in 4 each), then for each run a bit (1:
repeated), two bits for the size of its length, the length less one, and the value.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from service.cam.heatmap import resample
from service.images.decode import Geometry, preview_size

STEPS = 11
"""Steps of alpha above 0: twelve levels. JSON grows with the number of levels: 256 take 12 times
the bytes of 12."""

_WORD = 8
_SIZES = (3, 4, 8, 16)
_LONGEST = 1 << _SIZES[-1]


def alpha_of(grid: NDArray[np.float32], geometry: Geometry, max_side: int) -> NDArray[np.uint8]:
    """The map's absolute value over the upright source, in steps of 255/STEPS: uint8 (h, w).

    Where the longer side is over `max_side`, pixels of a raster of that size are made larger.
    """
    width, height = geometry.source_size
    raster = preview_size(geometry.source_size, max_side)
    rect = (0.0, 0.0, float(width), float(height))
    strength = resample(np.abs(grid), geometry, raster, rect)
    table = np.round(np.arange(STEPS + 1) * (255 / STEPS)).astype(np.uint8)
    levels = table[np.rint(np.clip(strength, 0, 1) * STEPS).astype(np.uint8)]
    if raster == geometry.source_size:
        return levels
    larger = cv2.resize(levels, geometry.source_size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(larger, dtype=np.uint8)


def encode_rle(alpha: NDArray[np.uint8]) -> list[int]:
    """Bytes of the run lengths of an image whose four channels are all `alpha`, uint8 (h, w)."""
    flat = alpha.ravel()
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    lengths = 4 * np.diff(np.append(starts, flat.size))
    values = flat[starts]
    pieces = -(-lengths // _LONGEST)
    values = np.repeat(values, pieces)
    pieces_length = np.full(len(values), _LONGEST, dtype=np.int64)
    pieces_length[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * _LONGEST
    return _packed(pieces_length - 1, values, 4 * flat.size)


def _packed(counts: NDArray[np.int64], values: NDArray[np.uint8], total: int) -> list[int]:
    """Each run as bits at the right of a row of a table; those that are used, one after another."""
    sizes = np.asarray(_SIZES)
    kind = np.searchsorted(1 << sizes, counts, side="right")
    size = sizes[kind]
    code = (((1 << 2 | kind) << size | counts) << _WORD) | values
    widths = 3 + size + _WORD
    widest = 3 + _SIZES[-1] + _WORD
    positions = np.arange(widest - 1, -1, -1)
    bits = ((code[:, None] >> positions) & 1).astype(np.uint8)
    body = bits[positions < widths[:, None]]
    head = f"{total:032b}{_WORD - 1:05b}" + "".join(f"{width - 1:04b}" for width in _SIZES)
    start = np.frombuffer(head.encode("ascii"), dtype=np.uint8) - ord("0")
    packed: list[int] = np.packbits(np.concatenate((start, body))).tolist()
    return packed
