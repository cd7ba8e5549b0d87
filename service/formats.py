"""Which format a picture's first bytes promise, and whether that format is read here."""

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


_STANDARD = bytes.maketrans(b"-_", b"+/")


def format_of(data: bytes) -> str | None:
    """JPEG, PNG, WEBP, GIF, BMP or TIFF by the first bytes alone, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for name, start in _STARTS if data.startswith(start)), None)


def check_format(data: bytes, formats: Sequence[str]) -> None:
    """Refuse what does not begin as one of `formats`, before any reader sees it.

    Raises EmptyImage, UnsupportedImage.
    """
    if not data:
        raise EmptyImage("The image has no bytes; send the content of the picture file.")
    found = format_of(data)
    if found not in formats:
        said = f"{found} is not read here" if found else "The bytes are not a picture that is read"
        if inside := _format_in_base64(data):
            raise UnsupportedImage(
                f"The bytes are base64 text of a {inside} file; send the file itself, or its "
                'base64 once in JSON: {"images": [{"data": "<base64>"}]}.'
            )
        raise UnsupportedImage(f"{said}; send one of {', '.join(formats)}.")


def _format_in_base64(data: bytes) -> str | None:
    """The format of a file that came as base64 text, or as a data: URI."""
    text = data[:200].lstrip(b' \t\r\n"')
    if text[:5].lower() == b"data:":
        text = text.partition(b",")[2]
    try:
        return format_of(binascii.a2b_base64(text[:16].translate(_STANDARD), strict_mode=True))
    except ValueError:
        return None
