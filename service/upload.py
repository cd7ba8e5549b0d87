"""One uploaded image, opened once: what the model needs and what the pictures need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service.cam.masking import Fill, boxes_mask, hide
from service.cam.regions import rle_decode
from service.channels import decode_channels, for_model, for_people
from service.errors import InvalidOption
from service.images import (
    Fit,
    ModelInput,
    Preprocessing,
    Rect,
    Source,
    fit_to_model,
    preview,
)


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
    data: bytes,
    preprocessing: Preprocessing,
    fit: Fit,
    *,
    max_pixels: int,
    photo_side: int | None,
    hiding: Hiding | None = None,
) -> Upload:
    """Decode, fit to the model, and keep a photo of at most `photo_side` pixels (None: no photo).

    Raises the ImageErrors of `decode`, and InvalidOption where `hiding` does not fit the picture.
    """
    source = decode_channels(data, preprocessing.channels, max_pixels=max_pixels)
    masked = None
    if hiding is not None:
        mask = hiding.mask((source.width, source.height))
        hidden = replace(source, pixels=hide(source.pixels, mask, hiding.fill))
        masked = _opened(hidden, preprocessing, fit, photo_side)
    return replace(_opened(source, preprocessing, fit, photo_side), masked=masked)


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
