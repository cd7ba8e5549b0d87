"""PNGs of 16 bits a sample: Pillow keeps the upper bytes of colours alone."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from service.decoders.samples import Pixels, bands, levels, over_white
from service.headers.header import cut_short
from service.headers.png import PngHeader


def decode_png16(header: PngHeader, data: bytes) -> Pixels:
    """uint8 (height, width, 3). Raises CorruptImage."""
    if not header.whole:
        raise cut_short()
    file = np.frombuffer(header.opaque_bytes(data), np.uint8)
    found = cv2.imdecode(file, cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16:
        raise cut_short()
    if found.shape[:2] != (header.height, header.width):
        raise cut_short()
    stored = np.asarray(found, np.uint16).reshape(header.height, header.width, -1)
    return _to_rgb(header, stored)


def _to_rgb(header: PngHeader, stored: NDArray[np.uint16]) -> Pixels:
    """stored: (h, w, 1, 3 or 4), blue first, alpha last."""
    height, width, samples = stored.shape
    has_alpha = samples == 4
    level = levels(16, _largest(header, stored[:, :, :3]))
    alpha = levels(16, _largest(header, stored[:, :, 3:])) if has_alpha else level
    transparent = np.frombuffer(header.transparent, ">u2")[::-1] if not has_alpha else None
    pixels = np.empty((height, width, 3), np.uint8)
    for band in bands(width, height):
        values = stored[band]
        colour = level[values[:, :, 2::-1]]
        if has_alpha:
            colour = over_white(colour, alpha[values[:, :, 3]])
        elif transparent is not None and len(transparent) == samples:
            colour[(values == transparent).all(axis=2)] = 255
        pixels[band] = colour
    return pixels


def _largest(header: PngHeader, stored: NDArray[np.uint16]) -> int:
    """The value of white: 65,535, or less where a file holds few bits without scaling them up.

    A writer of 12 bits ought to scale them to 16, so that the lowest are zeros or a copy of the
    highest; many leave them as they are.
    """
    whole, least = (1 << 16) - 1, (1 << header.significant) - 1
    if least == whole or stored.max(initial=0) > least:
        return whole
    spare = np.uint16(whole // (least + 1))
    rows = bands(stored.shape[1], len(stored))
    scaled_up = all(not (stored[band] & spare).any() for band in rows)
    return whole if scaled_up else least
