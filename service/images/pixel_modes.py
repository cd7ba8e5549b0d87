"""From Pillow's modes of 8 bits to RGB."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.images.decoders.samples import bands


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """A loaded image as uint8 (height, width, 3), transparency over white.

    It is converted in bands, so that it takes the result and little more.
    """
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows in bands(image.width, image.height):
        band = image.crop((0, rows.start, image.width, rows.stop))
        pixels[rows] = np.asarray(_as_rgb(band))
    return pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
