"""What an image file says of itself, read in linear time before a decoder sees the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from service.errors import UnsupportedImage
from service.images.formats import format_of, no_format
from service.images.headers import bmp, gif, jpeg, png, tiff, webp
from service.images.headers.header import Header

_READERS: Mapping[str, Callable[[bytes], Header]] = MappingProxyType(
    {
        "JPEG": jpeg.read,
        "PNG": png.read,
        "WEBP": webp.read,
        "GIF": gif.read,
        "BMP": bmp.read,
        "TIFF": tiff.read,
    }
)


def read_header(data: bytes) -> Header:
    """The header of a JPEG, PNG, WebP, GIF, BMP or TIFF.

    Raises UnsupportedImage for other bytes and for kinds that are not read, CorruptImage where the
    header is cut short, ImageTooLarge over the bounds of `headers.header`.
    """
    name = format_of(data)
    if name is None or (name == "BMP" and data[15:18] != b"\0\0\0"):
        raise UnsupportedImage(f"{no_format(data)}; send JPEG, PNG, WebP, GIF, BMP or TIFF.")
    return _READERS[name](data)
