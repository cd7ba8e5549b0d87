"""AVIF to RGB, by libavif in OpenCV. Pillow's decoder holds the GIL."""

from __future__ import annotations

import cv2
import numpy as np

from service.images.decoders.samples import Pixels, bands, over_white
from service.images.headers.avif_header import AvifHeader
from service.images.headers.header import corrupt, unsupported


def decode_avif(header: AvifHeader, data: bytes) -> Pixels:
    """The image before its orientation, uint8 (height, width, 3).

    Raises CorruptImage, and UnsupportedImage for alpha of more than 8 bits.
    """
    wanted = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    if header.alpha:
        wanted = cv2.IMREAD_UNCHANGED
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), wanted)
    if decoded is None or decoded.shape[:2] != (header.height, header.width):
        raise corrupt()
    if decoded.dtype != np.uint8:
        raise unsupported("an AVIF with transparency and more than 8 bits")
    image = np.asarray(decoded, np.uint8)
    if image.ndim == 3 and image.shape[2] == 3:
        return image if not header.alpha else np.ascontiguousarray(image[..., ::-1])
    if image.ndim == 2 or image.shape[2] != 4:
        raise corrupt()
    pixels = np.empty((header.height, header.width, 3), np.uint8)
    for band in bands(header.width, header.height):
        pixels[band] = over_white(image[band, :, 2::-1], image[band, :, 3])
    return pixels
