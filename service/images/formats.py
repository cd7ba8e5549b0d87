"""The format of an image by its first bytes, and whether it is accepted."""

from __future__ import annotations

import binascii
import re
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

_AS_IMAGE = "save it as JPEG or PNG"
_VIDEO = "a video (send one frame of it as JPEG or PNG)"
_ELSE = (
    ("gzip data (declare it by Content-Encoding: gzip)", b"\x1f\x8b", 0),
    ("a multipart form (its content type is multipart/form-data with its boundary)", b"--", 0),
    ("JSON (its content type is application/json)", b"{", 0),
    (f"JPEG 2000 ({_AS_IMAGE})", b"\0\0\0\x0cjP  ", 0),
    (f"JPEG XL ({_AS_IMAGE})", b"\0\0\0\x0cJXL ", 0),
    (f"JPEG XL ({_AS_IMAGE})", b"\xff\x0a", 0),
    (f"an icon (ICO; {_AS_IMAGE})", b"\0\0\1\0", 0),
    (f"a Photoshop document ({_AS_IMAGE})", b"8BPS", 0),
    ("a PDF document (export the page as PNG)", b"%PDF", 0),
    ("a PostScript document (export the page as PNG)", b"%!PS", 0),
    ("a DICOM file (export the frame as PNG)", b"DICM", 128),
    ("a ZIP archive (send the images in it one by one)", b"PK\3\4", 0),
    ("a NumPy array (send an image file, or use the Python client)", b"\x93NUMPY", 0),
    (f"a camera's raw file ({_AS_IMAGE})", b"FUJIFILMCCD-RAW", 0),
    (_VIDEO, b"\x1aE\xdf\xa3", 0),
    (_VIDEO, b"\0\0\1\xba", 0),
    (_VIDEO, b"FLV\1", 0),
    (_VIDEO, b"AVI ", 8),
    (_VIDEO, b"OggS", 0),
    ("HTML or other XML", b"<", 0),
)
"""Other data that is sent instead of an image, with bytes of it and where they are."""

_HEIC = f"HEIC, the format of iPhones ({_AS_IMAGE})"
_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), _HEIC),
    **dict.fromkeys((b"mif1", b"msf1"), f"HEIF ({_AS_IMAGE})"),
    b"crx ": f"a camera's raw file ({_AS_IMAGE})",
}
_AVIF = b"avif"

_NAME = re.compile(rb"(?i)[^\0-\x1f<>{}]{1,250}\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic)")
_ADDRESS = re.compile(rb"(?i)https?://[!-~]{1,500}")

_STANDARD = bytes.maketrans(b"-_", b"+/")


def format_of(data: bytes) -> str | None:
    """JPEG, PNG, WEBP, GIF, BMP, TIFF or AVIF by the first bytes alone, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and _AVIF in _brands(data):
        return "AVIF"
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


def _brands(data: bytes) -> list[bytes]:
    """The brands of an ISO base media file, the major one first; 30 at most."""
    length = min(int.from_bytes(data[:4], "big"), 128)
    return [data[8:12], *(data[at : at + 4] for at in range(16, length, 4))]


def _else_of(data: bytes) -> str:
    if inside := _format_in_base64(data):
        return f"base64 text of a {inside} file (send the file itself, or its base64 once in JSON)"
    if data[4:8] == b"ftyp":
        known = (_BRANDS[brand] for brand in _brands(data) if brand in _BRANDS)
        return next(known, _VIDEO)
    if b"<svg" in data[:1000].lower() and data.lstrip()[:1] == b"<":
        return "an SVG drawing (export it as PNG)"
    if name := reference_in(data):
        return f"the text {name!r} (curl sends a file if @ is before its name: image=@photo.jpg)"
    starts = data[:200], data[:200].lstrip()
    found = (kind for kind, mark, at in _ELSE if any(each.startswith(mark, at) for each in starts))
    return next(found, "")


def reference_in(data: bytes) -> str:
    """The file name or URL that was sent instead of an image, or ""."""
    text = data.strip() if len(data) < 1000 else b""
    is_reference = _NAME.fullmatch(text) or _ADDRESS.fullmatch(text)
    return text.decode(errors="replace") if is_reference else ""


def _format_in_base64(data: bytes) -> str | None:
    """The format of a file that was sent as base64 text or as a data: URI."""
    text = data[:200].lstrip(b' \t\r\n"')
    if text[:5].lower() == b"data:":
        text = text.partition(b",")[2]
    try:
        return format_of(binascii.a2b_base64(text[:16].translate(_STANDARD), strict_mode=True))
    except ValueError:
        return None
