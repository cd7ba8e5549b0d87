"""Which format a picture's first bytes promise, and whether that format is read here."""

from __future__ import annotations

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
        raise UnsupportedImage(f"{said}; send one of {', '.join(formats)}.")
