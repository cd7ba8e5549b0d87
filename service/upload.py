"""One uploaded image, opened once: what the model needs and what the pictures need."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service.cam.masking import Fill, boxes_mask, hide
from service.cam.regions import rle_decode
from service.channels import decode_channels, for_model, for_people
from service.errors import ImageTooLarge, InvalidOption
from service.images import (
    TOO_LARGE,
    Fit,
    ModelInput,
    Preprocessing,
    Rect,
    Source,
    fit_to_model,
    preview,
)

SPARE = 2
"""A JPEG that is scaled down while it is decoded keeps this many times the pixels a side that the
model resizes it to, so that most of the scaling is still the antialiased resize."""

SHARPNESS = 0.9
"""A photo to draw on may be enlarged from this share of its side: nobody sees it, and the commonest
camera's 4,000 pixels are decoded at 2,000 for a side of 2,048."""

Sent = bytes | NDArray[np.uint8]
"""A picture as it came: a file, or its pixels (height, width, channels)."""


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """An opened image; its full-size pixels are gone.

    width, height, format, sha256: of the upright source.
    model_input: what the model sees, and the geometry back to source pixels.
    photo:       uint8 (h, w, 3), the source scaled to at most the render side; None if not wanted.
    masked:      the upload with a part hidden; None if not wanted.
    """

    width: int
    height: int
    format: str
    sha256: str
    model_input: ModelInput
    photo: NDArray[np.uint8] | None
    masked: Upload | None = None


@dataclass(frozen=True, slots=True)
class Hiding:
    """What to hide of a source: boxes (x, y, w, h) or COCO run lengths, in source pixels."""

    boxes: Sequence[Rect] | None = None
    rle: tuple[tuple[int, int], str | Sequence[int]] | None = None
    fill: Fill = "mean"
    rest: bool = False

    def mask(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Bool (height, width) of a source of `size` (w, h). Raises InvalidOption."""
        try:
            if self.rle is None:
                mask = boxes_mask(self.boxes or (), size)
            elif self.rle[0] == (size[1], size[0]):
                mask = rle_decode(*self.rle)
            else:
                raise InvalidOption(
                    f"`mask` is for a picture of [height, width] {list(self.rle[0])}, and this one "
                    f"is {[size[1], size[0]]}; give it in upright source pixels."
                )
        except ValueError as error:
            raise InvalidOption(f"`mask` cannot be read: {error}.") from error
        if not mask.any():
            raise InvalidOption(
                "`mask` covers no pixel of this picture; give it in upright source pixels, 0, 0 at "
                "the upper left."
            )
        return ~mask if self.rest else mask


def open_upload(
    data: Sent,
    preprocessing: Preprocessing,
    fit: Fit,
    *,
    max_pixels: int,
    photo_side: int | None,
    hiding: Hiding | None = None,
) -> Upload:
    """Decode, fit to the model, and keep a photo of at most `photo_side` pixels (None: no photo).

    Pixels at the model's input size are the model input, whatever `fit` is.
    Raises the ImageErrors of `decode`, and InvalidOption where `hiding` does not fit the picture.
    """
    if isinstance(data, bytes):
        keep = None if hiding is not None else _needed(preprocessing, photo_side)
        source = decode_channels(data, preprocessing.channels, max_pixels=max_pixels, keep=keep)
    else:
        source = _of_pixels(data, max_pixels)
        fit = "squash" if data.shape[:2] == preprocessing.crop else fit
    masked = None
    if hiding is not None:
        mask = hiding.mask((source.width, source.height))
        hidden = replace(source, pixels=hide(source.pixels, mask, hiding.fill))
        masked = _opened(hidden, preprocessing, fit, photo_side)
    return replace(_opened(source, preprocessing, fit, photo_side), masked=masked)


def _needed(preprocessing: Preprocessing, photo_side: int | None) -> tuple[int, int] | None:
    """How many pixels of a photo's (shorter, longer) side its decoding must leave; None: all."""
    if preprocessing.interpolation == "nearest":  # takes single pixels, which scaling would mix
        return None
    shorter = SPARE * max(preprocessing.resize, *preprocessing.crop)
    return shorter, max(shorter, math.ceil(SHARPNESS * (photo_side or 0)))


def _of_pixels(pixels: NDArray[np.uint8], max_pixels: int) -> Source:
    height, width, channels = pixels.shape
    if height * width * channels > 3 * max_pixels:
        raise ImageTooLarge(
            f"The picture has {width} x {height} pixels. {TOO_LARGE.format(max_pixels)}"
        )
    return Source(pixels, "RAW", hashlib.sha256(pixels.tobytes()).hexdigest())


def _opened(
    source: Source, preprocessing: Preprocessing, fit: Fit, photo_side: int | None
) -> Upload:
    return Upload(
        width=source.width,
        height=source.height,
        format=source.format,
        sha256=source.sha256,
        model_input=fit_to_model(for_model(source, preprocessing.channels), preprocessing, fit),
        photo=None if photo_side is None else preview(for_people(source), photo_side),
    )
