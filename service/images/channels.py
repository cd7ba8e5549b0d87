"""Pictures for models that do not see in RGB: grey ones, and stacks of TIFF pages.

A model of one channel sees grey (ITU-R 601, as Pillow's mode "L"). A model of any other number than
1 and 3 takes a TIFF with that many pages, all of one size, each page one channel.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import CorruptImage, UnsupportedImage
from service.images.decode import (
    Source,
    check_bounds,
    decode,
    decode_stored,
    decoding_bytes,
    image_errors,
    open_header,
)
from service.images.decoders.samples import bands
from service.images.headers.header import Header
from service.images.headers.tiff import STARTS, directories, header_of
from service.images.jpeg import upright


def open_headers(data: bytes, channels: int, max_pixels: int) -> tuple[Header, ...]:
    """The header of an upload for a model of so many channels; of pages one each.

    Pages are bounded together: as many bytes as an RGB image of `max_pixels`. Raises the
    ImageErrors of `decode`, and UnsupportedImage for another file than a TIFF or another number of
    pages where pages are wanted.
    """
    if channels in (1, 3) or not data:
        return (open_header(data, max_pixels),)
    if not data.startswith(STARTS):
        raise UnsupportedImage(
            f"This model takes {channels} channels: send a TIFF of {channels} pages, each page one "
            "channel."
        )
    with image_errors(max_pixels):
        found = list(islice(directories(data), channels + 1))
        _check_count(len(found), channels)
        headers = tuple(header_of(directory, data) for directory in found)
        for page, header in enumerate(headers):
            check_bounds(header, data, 3 * max_pixels // channels)
            if header.upright != headers[0].upright:
                raise CorruptImage(
                    f"Page {page + 1} of the TIFF has another size than the first one; all must "
                    "have one size."
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
    """Decode an upload for a model of so many channels: RGB pixels, or the pages of a TIFF.

    keep: as in `decode`. headers: the file's own, where they were read before. Raises as
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
    """Memory that `decode_channels` takes at most, the file itself aside."""
    decoding = max(decoding_bytes(header, keep) for header in headers)
    if len(headers) == 1:
        return decoding
    return decoding + headers[0].pixels * (len(headers) + 1)


def for_model(source: Source, channels: int) -> Source:
    """The source as the model sees it: grey for one channel, else as it is."""
    if channels != 1 or source.pixels.shape[2] == 1:
        return source
    return replace(source, pixels=_grey(source.pixels)[:, :, None])


def for_people(source: Source) -> Source:
    """The source in RGB: of a stack of pages the first one, in grey."""
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
