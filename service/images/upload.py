"""One uploaded image, opened once: the model input, and a preview for drawing.

A model with one channel gets greyscale (ITU-R 601, as Pillow's mode "L"). A model with another
number than 1 and 3 needs a TIFF with that many pages of one size, each page one channel.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from service.errors import CorruptImage, ImageTooLarge, InvalidOption, UnsupportedImage
from service.images.budget import DecodeBudget
from service.images.decode import (
    TOO_LARGE,
    Fit,
    ModelInput,
    NotPlain,
    Preprocessing,
    Rect,
    Source,
    check_bounds,
    decode,
    decode_stored,
    decoded_pixels,
    decoding_bytes,
    fit_to_model,
    for_pillow,
    image_errors,
    open_header,
    preview,
    preview_size,
)
from service.images.decoders.jpeg_decoder import upright
from service.images.decoders.samples import bands
from service.images.headers.header import SPARE_BYTES, Header, corrupt
from service.images.headers.tiff_header import STARTS, directories, header_of
from service.images.masks import Fill, boxes_mask, hide
from service.images.run_lengths import rle_decode

SPARE = 2
"""A JPEG that is scaled down while it is decoded keeps this many times the side that the model
resizes it to, so that most of the scaling is still the antialiased resize."""

SHARPNESS = 0.9
"""A preview may be enlarged from this share of its side: the difference is not visible, and the
common 4,000 pixels are decoded at 2,000 for a side of 2,048."""

_SCALING = 2 if "AVX" in torch.backends.cpu.get_cpu_capability() else 14
"""Bytes per pixel for scaling RGB: without AVX torch uses floats."""

Sent = bytes | NDArray[np.uint8]
"""An image as it was sent: a file, or its pixels (height, width, channels)."""


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """A decoded image, by default without its full-size pixels.

    width, height, format, sha256: of the upright source.
    model_input: the model input, with the geometry back to source pixels.
    preview:     uint8 (h, w, 3), the source scaled to at most the render side; None if not needed.
    masked:      the upload with a part hidden; None if not requested.
    source:      the decoded image with all its pixels; None if not requested.
    """

    width: int
    height: int
    format: str
    sha256: str
    model_input: ModelInput
    preview: NDArray[np.uint8] | None
    masked: Upload | None = None
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class Hiding:
    """The part of a source to hide: boxes (x, y, w, h) or COCO run lengths, in source pixels."""

    boxes: Sequence[Rect] | None = None
    rle: tuple[tuple[int, int], str | Sequence[int]] | None = None
    fill: Fill = "mean"
    rest: bool = False

    def mask(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Bool (height, width) of a source of `size` (w, h). Raises InvalidOption."""
        mask = area_mask(size, self.boxes, self.rle)
        if not mask.any():
            raise InvalidOption(
                "`mask` covers no pixel of this image; send it in upright source pixels, with 0, 0 "
                "at the upper left."
            )
        return ~mask if self.rest else mask


def area_mask(
    size: tuple[int, int],
    boxes: Sequence[Rect] | None,
    rle: tuple[tuple[int, int], str | Sequence[int]] | None,
    option: str = "mask",
) -> NDArray[np.bool_]:
    """The mask of boxes or COCO run lengths on a source of `size` (w, h): bool (height, width).

    option: its name in the error. Raises InvalidOption.
    """
    try:
        if rle is None:
            return boxes_mask(boxes or (), size)
        if rle[0] == (size[1], size[0]):
            return rle_decode(*rle)
    except ValueError as error:
        raise InvalidOption(f"`{option}` cannot be read: {error}.") from error
    raise InvalidOption(
        f"`{option}` is for an image of [height, width] {list(rle[0])}, and this one is "
        f"{[size[1], size[0]]}; send it in upright source pixels."
    )


def open_upload(  # noqa: PLR0913 - each is a limit, or something to keep
    data: Sent,
    preprocessing: Preprocessing,
    fit: Fit | None,
    *,
    max_pixels: int,
    preview_side: int | None,
    hiding: Hiding | None = None,
    keeps_source: bool = False,
    budget: DecodeBudget | None = None,
    deadline: float | None = None,
) -> Upload:
    """Decode, fit to the model, and keep a preview of at most `preview_side` pixels (None: none).

    Pixels at the model's input size are used as they are, for any `fit`.

    keeps_source: whether the decoded image is kept, to be edited.
    budget:   the memory budget for decoding; None: no limit.
    deadline: until when to wait for the budget, on `time.monotonic()`'s clock; None: no limit.

    Raises the ImageErrors of `decode`, InvalidOption if `hiding` does not fit the image, and
    DeadlineExceeded.
    """
    request = _Request(preprocessing, fit, preview_side, hiding, keeps_source)
    available = _Memory(budget, deadline)
    if not isinstance(data, bytes):
        _check_pixels(data, max_pixels)
        if data.shape[:2] == preprocessing.crop:
            request = replace(request, fit="squash")
        height, width = data.shape[:2]
        with available.take(request.bytes_for((width, height), width * height)):
            return request.opened(_of_pixels(data))
    whole = keeps_source or hiding is not None
    keep = None if whole else _needed(preprocessing, preview_side)
    headers = open_headers(data, preprocessing.channels, max_pixels)
    for _ in range(2):
        fitting = request.bytes_for(headers[0].upright, decoded_pixels(headers[0], keep))
        with (
            contextlib.suppress(NotPlain),
            available.take(max(channel_bytes(headers, keep), fitting)),
        ):
            source = decode_channels(
                data, preprocessing.channels, max_pixels=max_pixels, keep=keep, headers=headers
            )
            return request.opened(source)
        headers = tuple(map(for_pillow, headers))
    raise corrupt()


@dataclass(frozen=True, slots=True)
class _Memory:
    """The memory budget of an upload, and the deadline of waiting for it."""

    budget: DecodeBudget | None
    deadline: float | None

    def take(self, amount: int) -> contextlib.AbstractContextManager[None]:
        if self.budget is None:
            return contextlib.nullcontext()
        return self.budget.take(amount, self.deadline)


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments of `open_upload`, which turn a source into an upload."""

    preprocessing: Preprocessing
    fit: Fit | None
    preview_side: int | None
    hiding: Hiding | None
    keeps_source: bool

    def bytes_for(self, size: tuple[int, int], decoded: int) -> int:
        """Bytes to process an image of `size` with `decoded` pixels.

        torch scales RGB as bytes, other numbers of channels as floats. A mask needs its inverse.
        """
        channels = self.preprocessing.channels
        width = max(3, channels)
        scaling = _SCALING if channels == 3 else 5 * channels
        hidden = 0 if self.hiding is None else math.prod(size) * (width + 3)
        side = self.preview_side
        drawn = 0 if side is None else 6 * math.prod(preview_size(size, side))
        return decoded * (width + scaling) + hidden + drawn + SPARE_BYTES

    def opened(self, source: Source) -> Upload:
        masked = None
        if self.hiding is not None:
            mask = self.hiding.mask((source.width, source.height))
            hidden = replace(source, pixels=hide(source.pixels, mask, self.hiding.fill))
            masked = self._fitted(hidden)
            del hidden, mask
        upload, kept = self._fitted(source), source if self.keeps_source else None
        is_more = masked is not None or kept is not None
        return replace(upload, masked=masked, source=kept) if is_more else upload

    def _fitted(self, source: Source) -> Upload:
        shown, side = None, self.preview_side
        if side is not None:
            shown = preview(for_people(source), side)
        seen = for_model(source, self.preprocessing.channels)
        return Upload(
            width=source.width,
            height=source.height,
            format=source.format,
            sha256=source.sha256,
            model_input=fit_to_model(seen, self.preprocessing, self.fit),
            preview=shown,
        )


def _needed(preprocessing: Preprocessing, preview_side: int | None) -> tuple[int, int] | None:
    """The pixels of the (shorter, longer) side that decoding must keep; None: all."""
    if preprocessing.interpolation == "nearest":  # samples single pixels, which scaling would mix
        return None
    if preprocessing.whole:
        return None
    shorter = SPARE * preprocessing.longest
    return shorter, max(shorter, math.ceil(SHARPNESS * (preview_side or 0)))


def _check_pixels(pixels: NDArray[np.uint8], max_pixels: int) -> None:
    height, width, channels = pixels.shape
    if height * width * channels > 3 * max_pixels:
        raise ImageTooLarge(
            f"The image has {width} x {height} pixels. {TOO_LARGE.format(max_pixels)}"
        )


def _of_pixels(pixels: NDArray[np.uint8]) -> Source:
    return Source(pixels, "RAW", hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest())


def open_headers(data: bytes, channels: int, max_pixels: int) -> tuple[Header, ...]:
    """The header of an upload for a model with this number of channels; for pages one each.

    Pages are limited together to the bytes of an RGB image of `max_pixels`. Raises the ImageErrors
    of `decode`, and UnsupportedImage for another format or number of pages if the model needs
    pages.
    """
    if channels in (1, 3) or not data:
        return (open_header(data, max_pixels),)
    if not data.startswith(STARTS):
        raise UnsupportedImage(
            f"This model takes {channels} channels: send a TIFF of {channels} pages, each page one "
            "channel."
        )
    with image_errors(max_pixels):
        pages = list(islice(directories(data), channels + 1))
        _check_count(len(pages), channels)
        headers = tuple(header_of(directory, data) for directory in pages)
        for page, header in enumerate(headers):
            check_bounds(header, data, 3 * max_pixels // channels)
            if header.upright != headers[0].upright:
                raise CorruptImage(
                    f"Page {page + 1} of the TIFF has another size than the first page; all pages "
                    "must have the same size."
                )
    return headers


def decode_channels(
    data: bytes,
    channels: int,
    *,
    max_pixels: int,
    keep: tuple[int, int] | None = None,
    headers: tuple[Header, ...] = (),
) -> Source:
    """Decode an upload for a model with this number of channels: RGB, or the pages of a TIFF.

    keep: as in `decode`. headers: those of the file, if they were read before. Raises the errors of
    `open_headers`, and NotPlain as `decode`.
    """
    if channels in (1, 3) or not data:
        header = headers[0] if headers else None
        return decode(data, max_pixels=max_pixels, keep=keep, header=header)
    headers = headers or open_headers(data, channels, max_pixels)
    width, height = headers[0].upright
    pages = np.empty((height, width, channels), np.uint8)
    with image_errors(max_pixels):
        for page, header in enumerate(headers):
            stored = decode_stored(header, data)
            pages[:, :, page] = _grey(upright(stored, header.orientation))
    return Source(pages, "TIFF", hashlib.sha256(data).hexdigest())


def channel_bytes(headers: tuple[Header, ...], keep: tuple[int, int] | None = None) -> int:
    """Maximum memory of `decode_channels`, in bytes, without the file itself."""
    decoding = max(decoding_bytes(header, keep) for header in headers)
    if len(headers) == 1:
        return decoding
    return decoding + headers[0].pixels * (len(headers) + 1)


def for_model(source: Source, channels: int) -> Source:
    """The source as the model sees it: greyscale for one channel, otherwise unchanged."""
    if channels != 1 or source.pixels.shape[2] == 1:
        return source
    return replace(source, pixels=_grey(source.pixels)[:, :, None])


def for_people(source: Source) -> Source:
    """The source in RGB; for a stack of pages the first page in greyscale."""
    if source.pixels.shape[2] == 3:
        return source
    first = np.repeat(source.pixels[:, :, :1], 3, axis=2)
    return replace(source, pixels=first)


def _check_count(pages: int, channels: int) -> None:
    if pages == channels:
        return
    has = f"{pages} page{'s' if pages > 1 else ''}, and this model takes {channels}"
    if pages > channels:
        has = f"more than {channels} pages, and this model takes exactly {channels}"
    raise UnsupportedImage(f"The TIFF has {has}, each page one channel.")


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (height, width) of RGB pixels, in bands."""
    grey = np.empty(pixels.shape[:2], np.uint8)
    for rows in bands(pixels.shape[1], pixels.shape[0]):
        grey[rows] = np.asarray(Image.fromarray(pixels[rows]).convert("L"))
    return grey
