"""The format of an image by its first bytes, and whether it is accepted."""

from __future__ import annotations

import binascii
from collections.abc import Sequence

from service.errors import EmptyImage, UnsupportedImage

_STARTS = (
    ("JPEG", b"\xff\xd8\xff"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("GIF", b"GIF8"),
    ("BMP", b"BM"),
    ("TIFF", b"II*\0"),
    ("TIFF", b"MM\0*"),
    ("TIFF", b"II+\0"),
    ("TIFF", b"MM\0+"),
)

_ELSE = (
    ("gzip data (declare it by Content-Encoding: gzip)", b"\x1f\x8b"),
    ("a multipart form (its content type is multipart/form-data with its boundary)", b"--"),
    ("JSON (its content type is application/json)", b"{"),
    ("JPEG 2000", b"\0\0\0\x0cjP  "),
    ("JPEG XL", b"\0\0\0\x0cJXL "),
    ("JPEG XL", b"\xff\x0a"),
    ("an icon (ICO)", b"\0\0\1\0"),
    ("a Photoshop document", b"8BPS"),
    ("a PDF document", b"%PDF"),
    ("a ZIP archive", b"PK\3\4"),
    ("SVG, HTML or other XML", b"<"),
)
"""Other data that is sent instead of an image, with its first bytes."""

_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}

_STANDARD = bytes.maketrans(b"-_", b"+/")


def format_of(data: bytes) -> str | None:
    """JPEG, PNG, WEBP, GIF, BMP or TIFF by the first bytes alone, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for name, start in _STARTS if data.startswith(start)), None)


def check_format(data: bytes, formats: Sequence[str]) -> None:
    """Refuse data that does not start like one of `formats`, before any decoder runs.

    Raises EmptyImage, UnsupportedImage.
    """
    if not data:
        raise EmptyImage("The image has no bytes; send the content of the image file.")
    name = format_of(data)
    if name not in formats:
        kind = f"{name} is not accepted by this service" if name else unsupported_format(data)
        raise UnsupportedImage(f"{kind}; send one of {', '.join(formats)}.")


def unsupported_format(data: bytes) -> str:
    """Describe bytes of an unsupported format, as far as the first ones show what they are."""
    kind = _else_of(data)
    return f"The bytes are {kind and f'{kind}, '}not a supported image format"


def _else_of(data: bytes) -> str:
    if inside := _format_in_base64(data):
        return f"base64 text of a {inside} file (send the file itself, or its base64 once in JSON)"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "a video")
    start = data[:200].lstrip()
    return next((name for name, first in _ELSE if start.startswith(first)), "")


def _format_in_base64(data: bytes) -> str | None:
    """The format of a file that was sent as base64 text or as a data: URI."""
    text = data[:200].lstrip(b' \t\r\n"')
    if text[:5].lower() == b"data:":
        text = text.partition(b",")[2]
    try:
        return format_of(binascii.a2b_base64(text[:16].translate(_STANDARD), strict_mode=True))
    except ValueError:
        return None
