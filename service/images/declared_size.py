"""The size of an image by the first bytes of its file: a hint, before any decoder runs.

Reads a few hundred bytes of a file of any length, so that it is cheap in any thread. The decoded
image may have another size; a caller that relies on it must compare.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

Size = tuple[int, int]
"""Width and height in pixels, as stored: an EXIF orientation may turn them."""

MAX_SEGMENTS = 64
"""Segments of a JPEG before its frame header, or entries of a TIFF's first directory."""

AVIF_SEARCHED = 4096
"""First bytes of an AVIF among which its size is searched."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WIDTH, _HEIGHT, _SHORT, _LONG = 256, 257, 3, 4


def size_of(data: bytes) -> Size | None:
    """The size that a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF declares; None if it is not found."""
    try:
        size = _declared(data)
    except (struct.error, IndexError):  # the file ends too early
        return None
    return size if size is not None and min(size) > 0 else None


def _declared(data: bytes) -> Size | None:
    for start, read in _READERS.items():
        if data.startswith(start):
            return read(data)
    return _avif(data) if data[4:8] == b"ftyp" else None


def _avif(data: bytes) -> Size | None:
    """The first size among the properties, which is the image's or that of a part of it."""
    at = data.find(b"ispe", 0, AVIF_SEARCHED)
    return None if at < 0 else _unpacked(">II", data, at + 8)


def _png(data: bytes) -> Size:
    return _unpacked(">II", data, 16)


def _gif(data: bytes) -> Size:
    return _unpacked("<HH", data, 6)


def _bmp(data: bytes) -> Size:
    width, height = _unpacked("<ii" if data[14] > 12 else "<HH", data, 18)
    return abs(width), abs(height)


def _unpacked(form: str, data: bytes, at: int) -> Size:
    first, second = struct.unpack_from(form, data, at)
    return first, second


def _jpeg(data: bytes) -> Size | None:
    at = 2
    for _ in range(MAX_SEGMENTS):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = _unpacked(">HH", data, at + 5)
            return width, height
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def _webp(data: bytes) -> Size | None:
    kind = data[8:16]
    if kind == b"WEBPVP8 ":
        width, height = _unpacked("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"WEBPVP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"WEBPVP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return width + 1, height + 1
    return None


def _tiff(data: bytes) -> Size | None:
    order = "<" if data.startswith(b"II") else ">"
    directory = struct.unpack_from(f"{order}I", data, 4)[0]
    count = min(MAX_SEGMENTS, struct.unpack_from(f"{order}H", data, directory)[0])
    sides: dict[int, int] = {}
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, _ = struct.unpack_from(f"{order}HHI", data, entry)
        if tag in {_WIDTH, _HEIGHT} and kind in {_SHORT, _LONG}:
            form = f"{order}{'H' if kind == _SHORT else 'I'}"
            sides[tag] = struct.unpack_from(form, data, entry + 8)[0]
    return (sides[_WIDTH], sides[_HEIGHT]) if len(sides) == 2 else None


_READERS: Mapping[bytes, Callable[[bytes], Size | None]] = MappingProxyType(
    {
        b"\xff\xd8": _jpeg,
        b"\x89PNG\r\n\x1a\n": _png,
        b"GIF8": _gif,
        b"BM": _bmp,
        b"RIFF": _webp,
        b"II*\0": _tiff,
        b"MM\0*": _tiff,
    }
)
