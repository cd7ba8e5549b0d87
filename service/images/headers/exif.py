"""The orientation of an image, by its EXIF or XMP."""

from __future__ import annotations

import struct

_ORIENTATION = 0x0112
_LONG = 4
_XMP_NAME = b"tiff:Orientation"

_MOST_ENTRIES = 512


def orientation_of(exif: bytes = b"", xmp: bytes = b"") -> int:
    """The orientation, 1 to 8, in EXIF or XMP; 1 if it is missing or invalid.

    exif: with or without its leading name. Reads one directory without its references.
    """
    orientation = _in_exif(exif.removeprefix(b"Exif\0\0"))
    if orientation is None:
        orientation = _in_xmp(xmp)
    return orientation if orientation is not None and 1 <= orientation <= 8 else 1


def _in_exif(exif: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, directory)
        for entry in range(min(count, _MOST_ENTRIES)):
            at = directory + 2 + 12 * entry
            tag, kind = struct.unpack_from(f"{order}HH", exif, at)
            if tag == _ORIENTATION:
                form = f"{order}{'I' if kind == _LONG else 'H'}"
                return int(struct.unpack_from(form, exif, at + 8)[0])
    except struct.error:
        return None
    return None


def _in_xmp(xmp: bytes) -> int | None:
    start = xmp.find(_XMP_NAME)
    if start < 0:
        return None
    value = xmp[start + len(_XMP_NAME) :][:3].lstrip(b"=>\"'")[:1]
    return int(value) if value.isdigit() else None
