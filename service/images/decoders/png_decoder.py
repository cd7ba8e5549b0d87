"""PNGs of 16 bits per sample, of which Pillow keeps only the upper bytes of colours."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.images.decoders.samples import Pixels, bands, levels, load, over_white
from service.images.headers.png_header import GREY, GREY_ALPHA, RGBA, PngHeader

_Values = Callable[[slice], NDArray[np.uint16]]
"""A function that returns the values (rows, width, samples) of a band of rows."""

_WHITE = 0xFFFF


def decode_png16(header: PngHeader, data: bytes) -> Pixels:
    """uint8 (height, width, 3). Raises the exceptions of Pillow's decoder."""
    file = header.opaque_bytes(data)
    if header.colour == GREY:
        stored = _loaded(file)
        return _to_rgb(header, lambda rows: _band(stored, rows)[:, :, None])
    if header.colour == GREY_ALPHA:
        four = _loaded(_as_four_bytes(file))
        return _to_rgb(header, lambda rows: _band(four, rows).view(">u2").astype(np.uint16))
    return np.ascontiguousarray(_colour(header, file))


def _colour(header: PngHeader, file: bytes) -> Pixels:
    """Decode twice: the upper bytes as Pillow does, the lower bytes in the other byte order."""
    mode = "RGBA" if header.colour == RGBA else "RGB"
    upper = np.empty((header.height, header.width, len(mode)), np.uint8)
    image = _loaded(file, f"{mode};16B")
    for rows in bands(header.width, header.height):
        upper[rows] = _band(image, rows)
    del image
    lower = _loaded(file, f"{mode};16L")
    return _to_rgb(header, lambda rows: upper[rows] * np.uint16(256) + _band(lower, rows), upper)


def _loaded(file: bytes, raw: str | None = None) -> Image.Image:
    """raw: Pillow's raw mode, which selects bytes of the file; None: its default."""
    image = Image.open(io.BytesIO(file), formats=("PNG",))
    if raw is not None:
        image.tile = [tile._replace(args=raw) for tile in image.tile]
    load(image)
    return image


def _as_four_bytes(file: bytes) -> bytes:
    """A file of grey and alpha, 16 bits each, as one of four samples of 8 bits: the same bytes."""
    head = file[12:24] + struct.pack(">BB", 8, RGBA) + file[26:29]
    return file[:12] + head + struct.pack(">I", zlib.crc32(head)) + file[33:]


def _band(image: Image.Image, rows: slice) -> NDArray[Any]:
    band: NDArray[Any] = np.asarray(image.crop((0, rows.start, image.width, rows.stop)))
    return band


def _to_rgb(header: PngHeader, values: _Values, pixels: Pixels | None = None) -> Pixels:
    """pixels: what the result is written into, where `values` no longer needs it."""
    has_alpha = header.colour in (GREY_ALPHA, RGBA)
    colour_white, alpha_white = _whites(header, values, has_alpha=has_alpha)
    level, alpha_level = levels(16, colour_white), levels(16, alpha_white)
    transparent = np.frombuffer(header.transparent, ">u2") if not has_alpha else np.empty(0)
    if pixels is None:
        pixels = np.empty((header.height, header.width, 3), np.uint8)
    for rows in bands(header.width, header.height):
        stored = values(rows)
        colour = level[stored[:, :, :-1] if has_alpha else stored]
        if has_alpha:
            colour = over_white(colour, alpha_level[stored[:, :, -1]])
        elif len(transparent) == stored.shape[2]:
            colour[(stored == transparent).all(axis=2)] = 255
        pixels[rows, :, :3] = colour
    return pixels[:, :, :3]


def _whites(header: PngHeader, values: _Values, *, has_alpha: bool) -> tuple[int, int]:
    """The values of white and of opaque: 65,535, or less where the chunk sBIT says so.

    A writer of 12 bits ought to scale them to 16, so that the lowest are zeros or a copy of the
    highest; many leave them as they are.
    """
    least = (1 << header.significant) - 1
    if least == _WHITE:
        return _WHITE, _WHITE
    spare = np.uint16(_WHITE // (least + 1))
    beyond, low = np.zeros(2, bool), np.zeros(2, bool)
    for rows in bands(header.width, header.height):
        stored = values(rows)
        parts = (stored[:, :, :-1], stored[:, :, -1:]) if has_alpha else (stored, stored)
        beyond |= [bool((part > least).any()) for part in parts]
        low |= [bool((part & spare).any()) for part in parts]
    whites = np.where(~beyond & low, least, _WHITE)
    return int(whites[0]), int(whites[1])
