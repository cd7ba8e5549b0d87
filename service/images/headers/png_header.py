"""PNG: its chunks."""

from __future__ import annotations

import binascii
import contextlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.images.headers.exif import orientation_of
from service.images.headers.header import Header, Span, check_parts, corrupt

SIGNATURE = b"\x89PNG\r\n\x1a\n"

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
_SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
_DEPTHS = {
    GREY: (1, 2, 4, 8, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GREY_ALPHA: (8, 16),
    RGBA: (8, 16),
}

_XMP = b"XML:com.adobe.xmp\0"
_RAW_EXIF = b"Raw profile type exif\0"
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})

_TEXT_BYTES = 1 << 20
"""Of a text that may hold the orientation, once it is inflated."""


@dataclass(frozen=True, slots=True)
class PngHeader(Header):
    """`depth`: bits a sample; `colour`: the PNG's colour type.

    transparent: the content of the chunk tRNS.
    significant: bits a sample that the chunk sBIT says there are; `depth` without one.
    head, tail:  where the chunks that make the pixels are, before the pixel data and from there on.
    """

    depth: int = 8
    colour: int = RGB
    transparent: bytes = b""
    significant: int = 8
    head: tuple[Span, ...] = ()
    transparency: tuple[Span, ...] = ()
    tail: tuple[Span, ...] = ()

    def pillow_bytes(self, data: bytes) -> bytes:
        return self._joined(data, (*self.head, *self.transparency, *self.tail))

    def opaque_bytes(self, data: bytes) -> bytes:
        """As `pillow_bytes`, and without the chunk tRNS."""
        return self._joined(data, (*self.head, *self.tail))

    @staticmethod
    def _joined(data: bytes, spans: Sequence[Span]) -> bytes:
        return b"".join([SIGNATURE, *(data[start:end] for start, end in spans)])


def read(data: bytes) -> PngHeader:
    """Read the header of a PNG. Raises CorruptImage, ImageTooLarge."""
    head: list[Span] = []
    tail: list[Span] = []
    others: dict[bytes, Span] = {}
    offset, parts, metadata, name = len(SIGNATURE), 0, 0, b""
    while name != b"IEND" and offset + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, offset)
        start, offset = offset, offset + 12 + length
        if name in (b"IDAT", b"IEND"):
            tail.append((start, offset))
        elif name in (b"IHDR", b"PLTE"):
            head.append((start, offset))
        else:
            metadata += length
            if offset <= len(data):
                others.setdefault(_key(data, name, start), (start, offset))
        parts += 1
        check_parts(parts, metadata, "PNG chunks")
    return _header(data, head, tail, others)


def _key(data: bytes, name: bytes, start: int) -> bytes:
    """A chunk's name, or the keyword of a text that may hold the orientation."""
    if name in _TEXTS:
        return next(
            (keyword for keyword in (_XMP, _RAW_EXIF) if data.startswith(keyword, start + 8)), name
        )
    return name


def _header(
    data: bytes, head: Sequence[Span], tail: Sequence[Span], others: Mapping[bytes, Span]
) -> PngHeader:
    if len(data) < 33 or not head or head[0] != (8, 33) or data[12:16] != b"IHDR":
        raise corrupt()
    width, height, depth, colour, *rest = struct.unpack_from(">IIBBBBB", data, 16)
    if depth not in _DEPTHS.get(colour, ()) or rest[:2] != [0, 0] or rest[2] > 1:
        raise corrupt()

    significant = max(_content(data, others, b"sBIT")[: _SAMPLES[colour]], default=depth)
    return PngHeader(
        format="PNG",
        width=width,
        height=height,
        orientation=_orientation(data, others),
        pixel_bytes=_stored(colour, depth),
        fixed_bytes=len(data),
        depth=depth,
        colour=colour,
        transparent=_content(data, others, b"tRNS"),
        significant=significant if 0 < significant < depth else depth,
        head=tuple(head),
        transparency=tuple(span for name, span in others.items() if name == b"tRNS"),
        tail=tuple(tail),
    )


def _orientation(data: bytes, others: Mapping[bytes, Span]) -> int:
    exif = _content(data, others, b"eXIf")
    if not exif and _RAW_EXIF in others:
        # ImageMagick's: a name, a length, and hexadecimal digits, in lines.
        lines = _text(data, others[_RAW_EXIF]).split(b"\n")[3:]
        with contextlib.suppress(binascii.Error):
            exif = binascii.unhexlify(b"".join(lines))
    xmp = _text(data, others[_XMP]) if _XMP in others else b""
    return orientation_of(exif, xmp)


def _content(data: bytes, others: Mapping[bytes, Span], name: bytes) -> bytes:
    start, end = others.get(name, (0, 0))
    return data[start + 8 : end - 4] if end else b""


def _text(data: bytes, span: Span) -> bytes:
    """The text of a tEXt, zTXt or iTXt chunk, at most _TEXT_BYTES of it."""
    start, end = span
    name = data[start + 4 : start + 8]
    _, _, content = data[start + 8 : end - 4].partition(b"\0")
    packed = name == b"zTXt"
    if name == b"iTXt":
        packed = content[:1] == b"\1"
        content = content[:2] + content[2:].split(b"\0", 2)[-1]
    if packed:
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj().decompress(
                content[2 if name == b"iTXt" else 1 :], _TEXT_BYTES
            )
        return b""
    return content[2:] if name == b"iTXt" else content


def _stored(colour: int, depth: int) -> int:
    """Bytes a pixel of Pillow's modes; of RGBA in 16 bits the upper bytes are kept besides."""
    if depth == 16:
        return {GREY: 2, RGBA: 5}.get(colour, 4)
    return 1 if colour in (GREY, PALETTE) else 4
