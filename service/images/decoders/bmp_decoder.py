"""BMP to RGB. Pillow reads a black and white palette as one bit per pixel, for any depth."""

from __future__ import annotations

import cv2
import numpy as np

from service.images.decoders.samples import Pixels, bands, levels, over_white, unpacked
from service.images.headers.bmp_header import PLAIN, BmpHeader
from service.images.headers.header import corrupt


def decode_bmp(header: BmpHeader, data: bytes) -> Pixels:
    """uint8 (height, width, 3). Needs one band of rows in addition. Raises CorruptImage."""
    if header.offset + header.stored_bytes > len(data):
        raise corrupt()
    if header.compression != PLAIN:
        return _decode_run_lengths(header, data)
    height, width = header.height, header.width
    stored = np.frombuffer(data, np.uint8, header.stored_bytes, header.offset)
    rows = stored.reshape(height, -1)
    if not header.top_down:
        rows = rows[::-1]
    palette = _palette(header)
    pixels = np.empty((height, width, 3), np.uint8)
    for band in bands(width, height):
        if header.bits <= 8:
            pixels[band] = palette[unpacked(rows[band], header.bits, width)]
        elif header.bits == 24:
            pixels[band] = rows[band, : 3 * width].reshape(-1, width, 3)[:, :, ::-1]
        else:
            pixels[band] = _by_masks(header, rows[band])
    return pixels


def _palette(header: BmpHeader) -> Pixels:
    """uint8 (256, 3), RGB; colours beyond the palette are black."""
    palette = np.zeros((256, 3), np.uint8)
    named = np.frombuffer(header.palette, np.uint8).reshape(-1, 3)
    palette[: len(named)] = named[:, ::-1]
    return palette


def _by_masks(header: BmpHeader, rows: Pixels) -> Pixels:
    kind = "<u2" if header.bits == 16 else "<u4"
    values = np.ascontiguousarray(rows).view(kind)[:, : header.width]
    channels = []
    for mask in filter(None, header.masks):
        low = (mask & -mask).bit_length() - 1
        channels.append(levels((mask >> low).bit_length())[(values & mask) >> low])
    colour = np.stack(channels[:3], axis=2)
    return over_white(colour, channels[3]) if header.masks[3] else colour


def _decode_run_lengths(header: BmpHeader, data: bytes) -> Pixels:
    """By OpenCV: Pillow does it in Python, byte by byte."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if pixels is None or pixels.shape != (header.height, header.width, 3):
        raise corrupt()
    return np.asarray(pixels, np.uint8)
