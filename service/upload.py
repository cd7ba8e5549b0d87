"""One uploaded image, opened once: what the model needs and what the pictures need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.images import Fit, ModelInput, Preprocessing, decode, fit_to_model, preview


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """An opened image; its full-size pixels are gone.

    width, height, format, sha256: of the upright source.
    model_input: what the model sees, and the geometry back to source pixels.
    photo:       uint8 (h, w, 3), the source scaled to at most the render side; None if not wanted.
    """

    width: int
    height: int
    format: str
    sha256: str
    model_input: ModelInput
    photo: NDArray[np.uint8] | None


def open_upload(
    data: bytes,
    preprocessing: Preprocessing,
    fit: Fit,
    *,
    max_pixels: int,
    photo_side: int | None,
) -> Upload:
    """Decode, fit to the model, and keep a photo of at most `photo_side` pixels (None: no photo).

    Raises the ImageErrors of `decode`.
    """
    source = decode(data, max_pixels=max_pixels)
    return Upload(
        width=source.width,
        height=source.height,
        format=source.format,
        sha256=source.sha256,
        model_input=fit_to_model(source, preprocessing, fit),
        photo=None if photo_side is None else preview(source, photo_side),
    )
