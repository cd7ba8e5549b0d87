"""Tensors of pictures, as clients of serving protocols send them, to uint8 pixels.

`values` says what the numbers are: `byte` 0–255, `unit` 0–1, `normalized` what the model itself
takes, (unit − mean) / std per channel. Whole numbers are `byte` and fractions `unit` unless it is
said; what does not fit is refused, never guessed. Pixels are 8 bits: other values are rounded.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidImageData, InvalidOption
from service.images.decode import Preprocessing

Values = Literal["byte", "unit", "normalized"]
Layout = Literal["NHWC", "NCHW"]

_BAND = 256
"""Rows of an image that are converted at once."""

_SLACK = 1.0
"""Levels of 255 by which values may lie outside: bicubic resizing overshoots a little."""


def images_of(
    tensor: NDArray[Any],
    preprocessing: Preprocessing,
    values: Any = None,
    layout: Any = None,
) -> list[NDArray[np.uint8]]:
    """The pictures (height, width, channels) of a batch: (n, h, w, c), (n, c, h, w) or (n, h, w).

    Raises InvalidImageData where shape or values do not fit, InvalidOption for other words.
    """
    for name, word, words in (("values", values, Values), ("layout", layout, Layout)):
        if word is not None and word not in get_args(words):
            raise InvalidOption(f"`{name}` is one of {', '.join(get_args(words))}.")
    batch = _channels_last(tensor, preprocessing.channels, layout)
    if 0 in batch.shape[1:]:
        raise InvalidImageData(f"A picture of shape {list(batch.shape[1:])} has no pixels.")
    return [_bytes(image, preprocessing, values) for image in batch]


def _channels_last(tensor: NDArray[Any], channels: int, layout: Layout | None) -> NDArray[Any]:
    if tensor.ndim == 3 and channels == 1:
        return tensor[..., None]
    wanted = (
        f"This model takes (n, height, width, {channels}) or (n, {channels}, height, width), not "
        f"{list(tensor.shape)}."
    )
    if tensor.ndim != 4:
        raise InvalidImageData(wanted)
    last, first = tensor.shape[3] == channels, tensor.shape[1] == channels
    if last and first and layout is None:
        raise InvalidOption(
            f"The shape {list(tensor.shape)} can be read in two ways; say `layout`: NHWC or NCHW."
        )
    if last and layout != "NCHW":
        return tensor
    if first and layout != "NHWC":
        return tensor.transpose(0, 2, 3, 1)
    raise InvalidImageData(wanted)


def _bytes(
    image: NDArray[Any], preprocessing: Preprocessing, values: Values | None
) -> NDArray[np.uint8]:
    """One image of a batch."""
    if image.dtype == np.uint8 and values in (None, "byte"):
        return np.array(image, order="C")  # a copy: what came with the body cannot be written
    kind = values or ("unit" if image.dtype.kind == "f" else "byte")
    pixels = np.empty(image.shape, np.uint8)
    for start in range(0, len(image), _BAND):  # so that no float copy of the whole is made
        levels = _levels(image[start : start + _BAND], preprocessing, kind)
        if levels.size and not (levels.min() >= -_SLACK and levels.max() <= 255 + _SLACK):
            raise InvalidImageData(
                f"Values from {image.min():g} to {image.max():g} are not `{kind}`. Say `values`: "
                "byte (0 to 255), unit (0 to 1), or normalized (as the model itself takes them)."
            )
        pixels[start : start + _BAND] = np.rint(levels).clip(0, 255)
    return pixels


def _levels(band: NDArray[Any], preprocessing: Preprocessing, kind: Values) -> NDArray[np.float32]:
    """Rows of an image as levels of 255, float32."""
    levels = band.astype(np.float32)
    if kind == "normalized":
        mean, std = (
            np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std)
        )
        levels = levels * std + mean
    return levels if kind == "byte" else levels * np.float32(255)
