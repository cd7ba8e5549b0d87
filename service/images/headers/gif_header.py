"""GIF: the blocks before the first image."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from service.images.headers.header import Header, Span, check_parts, corrupt

_EXTENSION, _IMAGE = 0x21, 0x2C
_GRAPHIC_CONTROL = 0xF9


@dataclass(frozen=True, slots=True)
class GifHeader(Header):
    """`kept`: the spans for the decoder, including everything after the first image."""

    kept: tuple[Span, ...] = ()

    def pillow_bytes(self, data: bytes) -> bytes:
        return b"".join(data[start:end] for start, end in self.kept)


def read(data: bytes) -> GifHeader:
    """Read the header of a GIF. Raises CorruptImage, ImageTooLarge."""
    if len(data) < 13:
        raise corrupt()
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    offset = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    table, control, parts, metadata = (0, offset), (0, 0), 0, 0
    while data[offset : offset + 1] != bytes([_IMAGE]):
        if offset + 2 > len(data):
            raise corrupt()
        start, offset = offset, offset + 1
        if data[start] == _EXTENSION:
            offset, blocks = _after_blocks(data, start + 2)
            parts += blocks
            if data[start + 1] == _GRAPHIC_CONTROL:
                control = start, offset
        parts += 1
        metadata += offset - start
        check_parts(parts, metadata, "GIF blocks")
    if offset + 10 > len(data):
        raise corrupt()
    left, top, across, down = struct.unpack_from("<HHHH", data, offset + 1)
    return GifHeader(
        format="GIF",
        width=max(width, left + across),
        height=max(height, top + down),
        pixel_bytes=2,
        fixed_bytes=len(data),
        kept=(table, control, (offset, len(data))),
    )


def _after_blocks(data: bytes, offset: int) -> tuple[int, int]:
    """The end of an extension, and its number of blocks."""
    blocks = 0
    while offset < len(data) and data[offset]:
        offset += 1 + data[offset]
        blocks += 1
        check_parts(blocks, 0, "GIF blocks")
    return offset + 1, blocks
