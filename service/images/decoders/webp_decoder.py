"""WebP to RGB. Pillow's decoder needs two canvases and two more copies."""

from __future__ import annotations

import cv2
import numpy as np

from service.images.decoders.samples import Pixels, bands, over_white
from service.images.headers.header import corrupt
from service.images.headers.webp_header import WebpHeader


def decode_webp(header: WebpHeader, data: bytes) -> Pixels:
    """The first frame on its canvas, uint8 (height, width, 3). Raises CorruptImage."""
    wanted = cv2.IMREAD_UNCHANGED if header.alpha else cv2.IMREAD_COLOR_RGB
    decoded = cv2.imdecode(np.frombuffer(header.still(data), np.uint8), wanted)
    if decoded is None or decoded.shape[:2] != header.size[::-1]:
        raise corrupt()
    frame = np.asarray(decoded, np.uint8)
    if frame.shape == (header.height, header.width, 3):
        return frame
    width, height = header.size
    left, top = header.corner
    pixels = np.full((header.height, header.width, 3), 255, np.uint8)
    target = pixels[top : top + height, left : left + width]
    for band in bands(width, height):
        if frame.shape[2] == 4:
            target[band] = over_white(frame[band, :, 2::-1], frame[band, :, 3])
        else:
            target[band] = frame[band]
    return pixels
