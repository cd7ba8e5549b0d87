"""The common part of all headers, and the limits of each."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import CorruptImage, ImageTooLarge, UnsupportedImage

MAX_PARTS = 65_536
"""Maximum number of segments, chunks or blocks of one file. Encoders write a few hundred; an image
in PNG chunks of 512 bytes has the most."""

MAX_METADATA_BYTES = 24 << 20
"""Maximum bytes of texts, profiles, EXIF and XMP in one file. Depth maps in XMP, the largest
metadata of cameras, have a few million."""


Span = tuple[int, int]
"""Start and end of a part of a file, in bytes."""


SPARE_BYTES = 6 << 20
"""Bytes that decoding and scaling need for any image: bands of rows, tables."""


@dataclass(frozen=True, slots=True)
class Header:
    """The properties of the first image of a file, known before decoding.

    format:        "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF" or "AVIF".
    width, height: as stored, in pixels, before the orientation.
    orientation:   1 to 8, as EXIF numbers it.
    pixel_bytes:   memory of the decoder per pixel, in addition to the RGB result.
    fixed_bytes:   memory of the decoder for any size: a strip, a copy of the file.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    pixel_bytes: float = 4.0
    fixed_bytes: int = 0

    @property
    def pixels(self) -> int:
        """Pixels to be decoded."""
        return self.width * self.height

    @property
    def extent(self) -> tuple[int, int]:
        """Width and height of the decoder's buffer."""
        return self.width, self.height

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height after the orientation."""
        turned = self.orientation in (5, 6, 7, 8)
        return (self.height, self.width) if turned else (self.width, self.height)

    def pillow_bytes(self, data: bytes) -> bytes:
        """The file for Pillow, without metadata, some of which it reads in quadratic time."""
        return data


def corrupt() -> CorruptImage:
    """The error for a truncated or inconsistent file."""
    return CorruptImage("The image is truncated or corrupt; send the complete file again.")


def unsupported(kind: str) -> UnsupportedImage:
    """The error for a valid file of an unsupported kind. kind: "a BMP of 2 bits"."""
    return UnsupportedImage(
        f"The image is {kind}, which is not supported; save it as an 8-bit RGB PNG or JPEG and "
        "send it again."
    )


def check_parts(parts: int, metadata: int, names: str) -> None:
    """Refuse a file with too many parts or metadata bytes. names: "JPEG segments"."""
    if parts > MAX_PARTS:
        raise ImageTooLarge(
            f"The image has more than {MAX_PARTS:,} {names}; save it again without metadata."
        )
    if metadata > MAX_METADATA_BYTES:
        raise ImageTooLarge(
            f"The image has {metadata:,} bytes of metadata in its {names}, and the limit is "
            f"{MAX_METADATA_BYTES:,}; save it again without metadata."
        )
