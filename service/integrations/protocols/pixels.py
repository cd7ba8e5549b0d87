"""Tensors of images, as clients of serving protocols send them, to uint8 pixels.

`values` is the range of the numbers: `byte` 0–255, `unit` 0–1, `normalized` as the model expects
them, (unit − mean) / std per channel. Default: `byte` for whole numbers, `unit` for fractions.
Values out of range are refused. Pixels are 8 bits: other values are rounded.
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
"""Levels of 255 by which values may exceed the range: bicubic resizing overshoots a little."""


def images_of(
    tensor: NDArray[Any],
    preprocessing: Preprocessing,
    values: Any = None,
    layout: Any = None,
) -> list[NDArray[np.uint8]]:
    """The images (height, width, channels) of a batch: (n, h, w, c), (n, c, h, w) or (n, h, w).

    Raises InvalidImageData if shape or values do not fit, InvalidOption for unknown words.
    """
    for name, word, words in (("values", values, Values), ("layout", layout, Layout)):
        if word is not None and word not in get_args(words):
            raise InvalidOption(f"`{name}` is one of {', '.join(get_args(words))}.")
    batch = _channels_last(tensor, preprocessing.channels, layout)
    if 0 in batch.shape[1:]:
        raise InvalidImageData(
            f"An image of shape {list(batch.shape[1:])} has no pixels; send a larger one."
        )
    return [_bytes(image, preprocessing, values) for image in batch]


def _channels_last(tensor: NDArray[Any], channels: int, layout: Layout | None) -> NDArray[Any]:
    if tensor.ndim == 3 and channels == 1:
        return tensor[..., None]
    wanted = (
        f"This model accepts (n, height, width, {channels}) or (n, {channels}, height, width), not "
        f"{list(tensor.shape)}."
    )
    if tensor.ndim != 4:
        raise InvalidImageData(wanted)
    last, first = tensor.shape[3] == channels, tensor.shape[1] == channels
    if last and first and layout is None:
        raise InvalidOption(
            f"The shape {list(tensor.shape)} is ambiguous; set `layout` to NHWC or NCHW."
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
        return np.array(image, order="C")  # a copy: the body is read-only
    kind = values or ("unit" if image.dtype.kind == "f" else "byte")
    pixels = np.empty(image.shape, np.uint8)
    for start in range(0, len(image), _BAND):  # so that there is no float copy of the whole image
        levels = _levels(image[start : start + _BAND], preprocessing, kind)
        if levels.size and not (levels.min() >= -_SLACK and levels.max() <= 255 + _SLACK):
            raise InvalidImageData(
                f"Values from {image.min():g} to {image.max():g} are not `{kind}`. Set `values` "
                "to byte (0 to 255), unit (0 to 1), or normalized (as the model expects them)."
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
