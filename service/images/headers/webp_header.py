"""WebP: its chunks, and the bitstream of the first frame."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from service.images.headers.exif import orientation_of
from service.images.headers.header import Header, Span, check_parts, corrupt

_PIXEL_BYTES = {(False, False): 4.5, (False, True): 8, (True, False): 6, (True, True): 9}
"""By whether an image is lossless and whether it has alpha: measured, with libwebp and OpenCV."""

_LOSSY, _LOSSLESS = b"VP8 ", b"VP8L"


@dataclass(frozen=True, slots=True)
class WebpHeader(Header):
    """`size`, `corner`: (width, height) and (x, y) of the first frame on the canvas.

    alpha: whether it may be transparent. image: the spans of its alpha chunk and bitstream.
    """

    size: tuple[int, int] = (0, 0)
    corner: tuple[int, int] = (0, 0)
    alpha: bool = False
    image: tuple[Span, ...] = ()

    def still(self, data: bytes) -> bytes:
        """The first frame as a file of its own, without metadata."""
        parts = [data[start:end] + b"\0" * ((end - start) & 1) for start, end in self.image]
        chunks = b"".join(parts)
        if len(self.image) > 1:  # alpha with a lossy bitstream needs the extended format
            width, height = (struct.pack("<I", side - 1)[:3] for side in self.size)
            chunks = b"VP8X" + struct.pack("<II", 10, 0x10) + width + height + chunks
        return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


@dataclass(slots=True)
class _Chunks:
    canvas: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)
    frame: tuple[int, int] | None = None
    alpha: Span | None = None
    image: Span | None = None
    exif: bytes = b""
    xmp: bytes = b""
    metadata: int = 0


def read(data: bytes) -> WebpHeader:
    """Read the header of a WebP. Raises CorruptImage, ImageTooLarge."""
    chunks, offset, parts = _Chunks(), 12, 0
    while offset + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, offset)
        start, offset = offset, offset + 8 + length + (length & 1)
        if start + 8 + length > len(data) and name != b"ANMF":
            break
        parts += 1
        if name == b"ANMF" and chunks.image is None:
            _take_frame(chunks, data, start)
        else:
            _take(chunks, data, name, (start, start + 8 + length))
        check_parts(parts, chunks.metadata, "WebP chunks")
    return _header(chunks, data)


def _take_frame(chunks: _Chunks, data: bytes, start: int) -> None:
    """The chunks of the first frame of an animation."""
    (length,) = struct.unpack_from("<I", data, start + 4)
    if length < 16 or start + 24 > len(data):
        raise corrupt()
    x, y, width, height = (_uint24(data, at) for at in range(start + 8, start + 20, 3))
    chunks.corner, chunks.frame = (2 * x, 2 * y), (width + 1, height + 1)
    offset, end = start + 24, start + 8 + length
    for _ in range(4):  # alpha, the bitstream, and perhaps unknown chunks
        if chunks.image is not None or offset + 8 > min(end, len(data)):
            break
        name, size = struct.unpack_from("<4sI", data, offset)
        if offset + 8 + size > min(end, len(data)):
            break
        _take(chunks, data, name, (offset, offset + 8 + size))
        offset += 8 + size + (size & 1)


def _take(chunks: _Chunks, data: bytes, name: bytes, span: Span) -> None:
    start, end = span
    if name in (_LOSSY, _LOSSLESS) and chunks.image is None:
        chunks.image = span
    elif name == b"ALPH" and chunks.image is None:
        chunks.alpha = span
    elif name == b"VP8X" and end - start >= 18 and chunks.canvas is None:
        chunks.canvas = _uint24(data, start + 12) + 1, _uint24(data, start + 15) + 1
    elif name not in (b"ANMF", b"ANIM"):
        chunks.metadata += end - start
        if name == b"EXIF":
            chunks.exif = chunks.exif or data[start + 8 : end]
        elif name == b"XMP ":
            chunks.xmp = chunks.xmp or data[start + 8 : end]


def _header(chunks: _Chunks, data: bytes) -> WebpHeader:
    if chunks.image is None:
        raise corrupt()
    start, _ = chunks.image
    lossless = data[start : start + 4] == _LOSSLESS
    size, alpha = _lossless(data, start) if lossless else _lossy(data, start)
    spans = [chunks.image]
    if not lossless and chunks.alpha is not None:
        spans, alpha = [chunks.alpha, chunks.image], True
    canvas = chunks.canvas or size
    sides = [at + side for at, side in zip(chunks.corner, size, strict=True)]
    if chunks.frame not in (None, size) or sides[0] > canvas[0] or sides[1] > canvas[1]:
        raise corrupt()
    return WebpHeader(
        format="WEBP",
        width=canvas[0],
        height=canvas[1],
        orientation=orientation_of(chunks.exif, chunks.xmp),
        pixel_bytes=_PIXEL_BYTES[lossless, alpha],
        fixed_bytes=len(data),
        size=size,
        corner=chunks.corner,
        alpha=alpha,
        image=tuple(spans),
    )


def _uint24(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 3], "little")


def _lossy(data: bytes, start: int) -> tuple[tuple[int, int], bool]:
    if data[start + 11 : start + 14] != b"\x9d\x01\x2a" or len(data) < start + 18:
        raise corrupt()
    width, height = struct.unpack_from("<HH", data, start + 14)
    return (width & 0x3FFF, height & 0x3FFF), False


def _lossless(data: bytes, start: int) -> tuple[tuple[int, int], bool]:
    if data[start + 8 : start + 9] != b"\x2f" or len(data) < start + 13:
        raise corrupt()
    (bits,) = struct.unpack_from("<I", data, start + 9)
    return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), bool(bits >> 28 & 1)
