"""What all formats' headers have in common, and the bounds that hold for each of them."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import CorruptImage, ImageTooLarge, UnsupportedImage

MAX_PARTS = 65_536
"""Segments, chunks or blocks of one file that are walked over. Encoders write a few hundred; the
most is one image in PNG chunks of 512 bytes each."""

MAX_METADATA_BYTES = 24 << 20
"""Bytes of texts, profiles, EXIF and XMP in one file. The largest that cameras write, depth maps in
XMP, take a few million."""


Span = tuple[int, int]
"""Where a part of a file begins and ends, in bytes."""


SPARE_BYTES = 6 << 20
"""What decoding and scaling take besides, whatever the image: bands of rows, tables."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its first image before a pixel is decoded.

    format:        "JPEG", "PNG", "WEBP", "GIF", "BMP" or "TIFF".
    width, height: as stored, in pixels, before the orientation.
    orientation:   1 to 8, as EXIF numbers it.
    pixel_bytes:   memory that the decoder takes for a pixel, beside the RGB that it makes.
    fixed_bytes:   memory that it takes besides, whatever the size: a strip, a copy of the file.
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
        """Width and height of what the decoder has to hold."""
        return self.width, self.height

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height after the orientation."""
        turned = self.orientation in (5, 6, 7, 8)
        return (self.height, self.width) if turned else (self.width, self.height)

    def pillow_bytes(self, data: bytes) -> bytes:
        """The file for Pillow's reader, without metadata: it reads some in quadratic time."""
        return data


def corrupt() -> CorruptImage:
    """The error for a file that ends too early, or contradicts itself."""
    return CorruptImage("The image is truncated or corrupt; send the complete file again.")


def unsupported(kind: str) -> UnsupportedImage:
    """The error for a whole file of a kind that is not read. kind: "a BMP of 2 bits"."""
    return UnsupportedImage(
        f"The image is {kind}, which is not supported; save it as an 8-bit RGB PNG or JPEG and "
        "send it again."
    )


def check_parts(parts: int, metadata: int, names: str) -> None:
    """Refuse a file of more parts or metadata bytes than are read. names: "JPEG segments"."""
    if parts > MAX_PARTS:
        raise ImageTooLarge(
            f"The image has more than {MAX_PARTS:,} {names}; save it again without metadata."
        )
    if metadata > MAX_METADATA_BYTES:
        raise ImageTooLarge(
            f"The image has {metadata:,} bytes of metadata in its {names}, and the limit is "
            f"{MAX_METADATA_BYTES:,}; save it again without metadata."
        )
