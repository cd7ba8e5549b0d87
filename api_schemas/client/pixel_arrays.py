"""Arrays and tensors as 8-bit images, without importing the library that they are of.

client.explain(tensor)                       # torch, CHW, float 0..1 or uint8
client.explain(pixels(batch[0], -1.0, 1.0))  # floats of another range
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from api_schemas.client.errors import UnreadableImage

_CHANNELS = (1, 3, 4)


class Pixels(Protocol):
    """An array or tensor: numpy, torch (on any device, with or without a gradient), and others."""

    def __array__(self) -> NDArray[Any]: ...


def pixels(image: Pixels, low: float = 0.0, high: float = 1.0) -> NDArray[np.uint8]:
    """Return floats in low..high as uint8 (height, width[, channels]): low is black, high white.

    image: (height, width), (height, width, channels) or (channels, height, width) with 1 (grey),
    3 (RGB) or 4 (RGBA) channels. Where both are possible, a tensor is read with its channels
    first, any other array with its channels last. Raises UnreadableImage for values outside of the
    range, and for other shapes and types.
    """
    values = _channels_last(image)
    if not np.issubdtype(values.dtype, np.floating):
        raise UnreadableImage(
            f"A range of {low:g} to {high:g} is for floats, and the pixels are {values.dtype}; "
            "give uint8 pixels as they are."
        )
    values = values.astype(np.float32)
    least, most = float(values.min()), float(values.max())
    if not (low <= least and most <= high):  # so that NaN is refused too
        raise UnreadableImage(
            f"The pixels are floats from {least:g} to {most:g}, and the accepted range is {low:g} "
            f"to {high:g}; undo a normalization, or state the range: "
            "api_schemas.client.pixels(image, low, high)."
        )
    return np.rint((values - low) * (255 / (high - low))).astype(np.uint8)


def to_uint8(image: Pixels) -> NDArray[np.uint8]:
    """Return uint8 pixels as they are, floats as `pixels` reads the range 0 to 1.

    Raises UnreadableImage.
    """
    values = _channels_last(image)
    if values.dtype == np.uint8:
        return values
    if np.issubdtype(values.dtype, np.floating):
        return pixels(values)
    raise UnreadableImage(
        f"The pixels are {values.dtype}; give uint8 from 0 to 255, or floats from 0 to 1."
    )


def _channels_last(image: Pixels) -> NDArray[Any]:
    """The pixels as (height, width, 3 or 4), or (height, width) for grey."""
    values = _array(image)
    shape, is_tensor = values.shape, hasattr(image, "detach")
    last = values.ndim == 3 and shape[-1] in _CHANNELS
    first = values.ndim == 3 and shape[0] in _CHANNELS
    if not values.size or not (values.ndim == 2 or last or first):
        batch = "; give the images of a batch as a list, list(batch)" if values.ndim == 4 else ""
        raise UnreadableImage(
            f"Pixels of the shape {shape} are not an image; give (height, width, 3), (3, height, "
            f"width) or (height, width){batch}."
        )
    if first and (is_tensor or not last):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    return np.ascontiguousarray(values)


def _array(image: Any) -> NDArray[Any]:
    """A numpy array of an array or tensor; torch's bfloat16, which numpy lacks, as float32."""
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    return np.asarray(image)
