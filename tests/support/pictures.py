"""Pictures as bytes. None of them is red (`tiny.RED`) in its first pixel unless it says so."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

ORIENTATION = 0x0112


def noise(width: int = 80, height: int = 60, seed: int = 0) -> Pixels:
    """uint8 (height, width, 3), every value below 150."""
    return np.random.default_rng(seed).integers(0, 150, (height, width, 3), dtype=np.uint8)


def red(width: int = 80, height: int = 60) -> Pixels:
    """The image that the faulty models of `tiny` and `dirty` fail on."""
    return np.full((height, width, 3), (255, 0, 0), dtype=np.uint8)


def file(pixels: Pixels, kind: str = "PNG", **options: object) -> bytes:
    """The image as a file of that kind."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png(width: int = 80, height: int = 60, seed: int = 0) -> bytes:
    """A PNG file of noise."""
    return file(noise(width, height, seed))


def jpeg(width: int = 80, height: int = 60, seed: int = 0, orientation: int = 1) -> bytes:
    """A JPEG file of noise, with that EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return file(noise(width, height, seed), "JPEG", quality=95, exif=exif)


def opened(data: bytes) -> Image.Image:
    """A file as a loaded image."""
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


RED_PNG = file(red())
"""The file of the image that the faulty models fail on."""
