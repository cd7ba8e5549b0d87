"""Decode JPEG files into an array, upright, and scaled down while they are decoded.

    header = read_header(data)                                    # 4000 x 3000
    stored = decode_jpeg(header, data, keep=(512, 512))           # (750, 1000, 3)
    pixels = upright(stored, header.orientation)

Pillow and simplejpeg both use libjpeg-turbo, and the pixels are bit-equal, full size and scaled.
But Pillow decodes into four bytes per pixel and copies three times on the way to an array: for 12
million pixels this takes longer than decoding. Files for which simplejpeg has a warning are decoded
by Pillow, so that only one decoder decides which files are corrupt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from service.images.headers.jpeg_header import JpegHeader

Pixels = NDArray[np.uint8]

# Every scan of a progressive JPEG processes all pixels, and a scan can be 59 bytes long: without a
# limit, 10 MB of scans occupy a core for many minutes. Encoders write about ten.
MAX_JPEG_SCANS = 500

# The scales with vector code in libjpeg-turbo; 5/8 takes longer than the whole image.
SCALES = (8, 4, 2)

MIN_PIXELS = 1_000_000
"""Smaller images are never scaled down, because they are fast to decode."""

MAX_ASPECT = 20
"""Images with a greater aspect ratio are not scaled down: the crop needs only the middle."""

_TURNS: Mapping[int, Callable[[Pixels], cv2.typing.MatLike]] = MappingProxyType(
    {
        2: lambda stored: cv2.flip(stored, 1),
        3: lambda stored: cv2.rotate(stored, cv2.ROTATE_180),
        4: lambda stored: cv2.flip(stored, 0),
        5: cv2.transpose,
        6: lambda stored: cv2.rotate(stored, cv2.ROTATE_90_CLOCKWISE),
        7: lambda stored: cv2.flip(cv2.transpose(stored), -1),
        8: lambda stored: cv2.rotate(stored, cv2.ROTATE_90_COUNTERCLOCKWISE),
    }
)
"""The operation for each EXIF orientation; from 5 on width and height are swapped."""


def scans(data: bytes) -> int:
    """The number of scan markers. Unlike `data.count` it releases the GIL."""
    even = np.frombuffer(data, "<u2", len(data) // 2)
    odd = np.frombuffer(data, "<u2", (len(data) - 1) // 2, offset=1)
    return sum(int(np.count_nonzero(pairs == 0xDAFF)) for pairs in (even, odd))


def scale_of(size: tuple[int, int], keep: tuple[int, int] | None) -> int:
    """The divisor of the sides of an image of `size` while it is decoded: 1, 2, 4 or 8.

    keep: the required pixels of the (shorter, longer) side; None: all.
    """
    shorter, longer = sorted(size)
    if keep is None or shorter * longer < MIN_PIXELS or longer > MAX_ASPECT * shorter:
        return 1
    enough = (scale for scale in SCALES if shorter >= scale * keep[0] and longer >= scale * keep[1])
    return next(enough, 1)


def decode_jpeg(header: JpegHeader, data: bytes, keep: tuple[int, int] | None) -> Pixels | None:
    """Decode a JPEG with a known header.

    Returns uint8 (height, width, 3), RGB, before the orientation, scaled down by `scale_of`; None
    if the file is corrupt or unusual. Allocates no more pixels than the header declares.
    """
    size = header.width, header.height
    return _stored(data, size, scale_of(size, keep))


def upright(stored: Pixels, orientation: int) -> Pixels:
    """The pixels after an EXIF orientation, 1 to 8."""
    turn = _TURNS.get(orientation)
    return stored if turn is None else np.asarray(turn(stored), dtype=np.uint8)


def _stored(data: bytes, size: tuple[int, int], scale: int) -> Pixels | None:
    width, height = (-(-side // scale) for side in size)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    least_height, least_width = (height, width) if scale > 1 else (0, 0)
    try:
        decoded = simplejpeg.decode_jpeg(
            data, "RGB", min_height=least_height, min_width=least_width, buffer=pixels
        )
    except ValueError:
        return None
    return pixels if decoded.shape == pixels.shape else None
