"""GIF: everything before the first image."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from service.images.headers.header import Header, Span, check_parts, corrupt

_EXTENSION, _IMAGE = 0x21, 0x2C
_GRAPHIC_CONTROL = 0xF9


@dataclass(frozen=True, slots=True)
class GifHeader(Header):
    """`kept`: where the parts for the decoder are; what follows the first image among them."""

    kept: tuple[Span, ...] = ()

    def pillow_bytes(self, data: bytes) -> bytes:
        return b"".join(data[start:end] for start, end in self.kept)


def read(data: bytes) -> GifHeader:
    """Read the header of a GIF. Raises CorruptImage, ImageTooLarge."""
    if len(data) < 13:
        raise corrupt()
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    table, control, parts, metadata = (0, place), (0, 0), 0, 0
    while data[place : place + 1] != bytes([_IMAGE]):
        if place + 2 > len(data):
            raise corrupt()
        start, place = place, place + 1
        if data[start] == _EXTENSION:
            place, blocks = _after_blocks(data, start + 2)
            parts += blocks
            if data[start + 1] == _GRAPHIC_CONTROL:
                control = start, place
        parts += 1
        metadata += place - start
        check_parts(parts, metadata, "GIF blocks")
    if place + 10 > len(data):
        raise corrupt()
    left, top, across, down = struct.unpack_from("<HHHH", data, place + 1)
    return GifHeader(
        format="GIF",
        width=max(width, left + across),
        height=max(height, top + down),
        pixel_bytes=2,
        fixed_bytes=len(data),
        kept=(table, control, (place, len(data))),
    )


def _after_blocks(data: bytes, place: int) -> tuple[int, int]:
    """Where an extension ends, and of how many blocks it is."""
    blocks = 0
    while place < len(data) and data[place]:
        place += 1 + data[place]
        blocks += 1
        check_parts(blocks, 0, "GIF blocks")
    return place + 1, blocks
