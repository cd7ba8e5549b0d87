"""From any of Pillow's modes to 8 bits RGB."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import CorruptImage


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture in RGB: transparency over white, 16 bits by dividing by 257, floats by rule.

    Raises CorruptImage for floats that are not finite.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # A 16-bit PNG: Pillow keeps the high bytes of the pixels, but both bytes of this colour.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise CorruptImage("The picture holds NaN or infinity; replace them and send it again.")
        scaled = values.astype(np.float64) * (255.0 if values.max() <= 1.0 else 1.0)
    else:
        scaled = values.astype(np.float64) / 257.0
    grey: NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return grey
