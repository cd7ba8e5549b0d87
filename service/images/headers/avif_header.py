"""AVIF: its boxes (ISO 14496-12), the properties of its image, and the AV1 frames in it.

A file may declare a small image and contain frames of any size and number, which cost the decoder
time and memory; so each frame's size is read from the AV1 stream (its specification, §5.5), too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from service.images.headers.header import Header, Span, check_parts, corrupt, unsupported

_PIXEL_BYTES, _ALPHA_BYTES, _CODED_BYTES = 8, 14, 8
"""Bytes per pixel of the image, of one with alpha, and of each pixel of an AV1 frame: planes of 16
bits without subsampling, the decoder's edges, and the conversion to RGB."""

_MAX_ITEMS = 64
_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6
_ORIENTATIONS = {None: (1, 8, 3, 6), 0: (4, 5, 2, 7), 1: (2, 7, 4, 5)}
"""EXIF orientations by the axis of a mirror, and by quarter turns counterclockwise."""


@dataclass(frozen=True, slots=True)
class AvifHeader(Header):
    """alpha: whether it may be transparent."""

    alpha: bool = False


@dataclass(slots=True)
class _Meta:
    """The items of the file. spans: of each item's data. properties: of each, as boxes."""

    primary: int = 0
    kinds: dict[int, bytes] = field(default_factory=dict)
    spans: dict[int, list[Span]] = field(default_factory=dict)
    properties: dict[int, list[tuple[bytes, Span]]] = field(default_factory=dict)


def read(data: bytes) -> AvifHeader:
    """Read the header of an AVIF. Raises CorruptImage, UnsupportedImage, ImageTooLarge."""
    if data[8:12] == b"avis":
        raise unsupported("an animated AVIF")
    try:
        meta = _meta(data)
        kind = meta.kinds[meta.primary]
        if kind != b"av01":
            raise unsupported("an AVIF of several tiles" if kind == b"grid" else "another HEIF")
        found = dict(reversed(meta.properties[meta.primary]))
        (width, height) = struct.unpack_from(">II", data, found[b"ispe"][0] + 4)
        items = [number for number, each in meta.kinds.items() if each == b"av01"]
        coded = sum(_coded_pixels(data, meta.spans[number]) for number in items)
    except (struct.error, KeyError, IndexError) as error:
        raise corrupt() from error
    return AvifHeader(
        format="AVIF",
        width=width,
        height=height,
        orientation=_orientation(data, found),
        pixel_bytes=_ALPHA_BYTES if len(items) > 1 else _PIXEL_BYTES,
        fixed_bytes=len(data) + _CODED_BYTES * coded,
        alpha=len(items) > 1,
    )


def _meta(data: bytes) -> _Meta:
    meta = _Meta()
    (start, end) = next(span for name, span in _boxes(data, (0, len(data))) if name == b"meta")
    boxes = dict(_boxes(data, (start + 4, end)))
    version = data[boxes[b"pitm"][0]]
    meta.primary = _uint(data, boxes[b"pitm"][0] + 4, 4 if version else 2)
    meta.kinds = dict(_kinds(data, boxes[b"iinf"]))
    if len(meta.kinds) > _MAX_ITEMS:
        raise unsupported(f"an AVIF of more than {_MAX_ITEMS} items")
    idat = boxes.get(b"idat", (0, 0))
    meta.spans = dict(_locations(data, boxes[b"iloc"], idat))
    parts = dict(_boxes(data, boxes[b"iprp"]))
    properties = list(_boxes(data, parts[b"ipco"]))
    meta.properties = {
        number: [properties[index - 1] for index in indices if index]
        for number, indices in _associations(data, parts[b"ipma"])
    }
    return meta


def _boxes(data: bytes, inside: Span) -> Iterator[tuple[bytes, Span]]:
    """The boxes in a part of the file: their names and contents."""
    at, end = inside
    count = 0
    while at + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            (length,), start = struct.unpack_from(">Q", data, at + 8), at + 16
        stop = at + length if length else end
        if not start <= stop <= end:
            raise corrupt()
        yield name, (start, stop)
        at, count = stop, count + 1
        check_parts(count, 0, "AVIF boxes")


def _kinds(data: bytes, box: Span) -> Iterator[tuple[int, bytes]]:
    """The type of each item by its number."""
    entries = box[0] + (8 if data[box[0]] else 6)
    for name, (start, _) in _boxes(data, (entries, box[1])):
        if name == b"infe" and data[start] in (2, 3):
            size = 2 if data[start] == 2 else 4
            yield _uint(data, start + 4, size), data[start + 6 + size : start + 10 + size]


def _locations(data: bytes, box: Span, idat: Span) -> Iterator[tuple[int, list[Span]]]:
    """Where the data of each item is; all of it together is not longer than the file."""
    version, at = data[box[0]], box[0] + 6
    sizes = data[box[0] + 4] >> 4, data[box[0] + 4] & 15
    base_size, index_size = data[box[0] + 5] >> 4, (data[box[0] + 5] & 15) * (version > 0)
    wide = 4 if version == 2 else 2
    count, at, total = _uint(data, at, wide), at + wide, 0
    for _ in range(min(count, _MAX_ITEMS)):
        number, at = _uint(data, at, wide), at + wide
        method = _uint(data, at, 2) & 15 if version else 0
        at += 4 if version else 2
        base, at = _uint(data, at, base_size), at + base_size
        extents, at = _uint(data, at, 2), at + 2
        spans: list[Span] = []
        for _ in range(extents):
            at += index_size
            offset = base + _uint(data, at, sizes[0]) + (idat[0] if method else 0)
            length = _uint(data, at + sizes[0], sizes[1])
            at += sum(sizes)
            spans.append((offset, offset + length))
            total += length
            if total > len(data) or offset + length > len(data) or not (length and sum(sizes)):
                raise corrupt()
        yield number, spans


def _associations(data: bytes, box: Span) -> Iterator[tuple[int, list[int]]]:
    """The properties of each item, as their places in `ipco`, from 1."""
    version, wide = data[box[0]], 2 if data[box[0] + 3] & 1 else 1
    count, at = _uint(data, box[0] + 4, 4), box[0] + 8
    for _ in range(min(count, _MAX_ITEMS)):
        number, at = _uint(data, at, 4 if version else 2), at + (4 if version else 2)
        length, at = data[at], at + 1
        mask = 0x7FFF if wide == 2 else 0x7F
        yield number, [_uint(data, at + index * wide, wide) & mask for index in range(length)]
        at += length * wide


def _orientation(data: bytes, found: Mapping[bytes, Span]) -> int:
    turns = data[found[b"irot"][0]] & 3 if b"irot" in found else 0
    axis = data[found[b"imir"][0]] & 1 if b"imir" in found else None
    return _ORIENTATIONS[axis][turns]


def _coded_pixels(data: bytes, spans: list[Span]) -> int:
    """Pixels of the one frame of an item. Raises UnsupportedImage for more frames."""
    stream = b"".join(data[start:end] for start, end in spans)
    pixels = frames = 0
    for kind, (start, end) in _units(stream):
        if kind == _SEQUENCE_HEADER:
            pixels = max(pixels, _largest_frame(stream[start:end]))
        frames += kind in (_FRAME_HEADER, _FRAME)
    if not pixels:
        raise corrupt()
    if frames > 1:
        raise unsupported("an AVIF of several frames or layers")
    return pixels


def _units(stream: bytes) -> Iterator[tuple[int, Span]]:
    """The units (OBU) of an AV1 stream: their types and contents."""
    at = count = 0
    while at < len(stream):
        head = stream[at]
        at += 2 if head & 4 else 1
        size = len(stream) - at
        if head & 2:
            size, at = _leb128(stream, at)
        if at + size > len(stream):
            raise corrupt()
        yield head >> 3 & 15, (at, at + size)
        at, count = at + size, count + 1
        check_parts(count, 0, "AV1 units")


def _leb128(stream: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        value |= (stream[at + index] & 0x7F) << 7 * index
        if not stream[at + index] & 0x80:
            return value, at + index + 1
    raise corrupt()


class _Bits:
    """Reads numbers of some bits, the highest first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data[:64], "big"), 8 * min(len(data), 64)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise corrupt()
        return self._value >> self._left & (1 << count) - 1


def _largest_frame(header: bytes) -> int:
    """Pixels of the largest frame that a sequence header allows."""
    bits = _Bits(header)
    bits.take(4)  # the profile, and whether it is a still picture
    reduced = bits.take(1)
    if reduced:
        bits.take(5)
    else:
        _skip_operating_points(bits)
    wide, high = bits.take(4) + 1, bits.take(4) + 1
    if not reduced:  # a frame may have another size, of as many bits
        return (1 << wide) * (1 << high)
    return (bits.take(wide) + 1) * (bits.take(high) + 1)


def _skip_operating_points(bits: _Bits) -> None:
    if bits.take(1):  # timing, which still images do not have
        raise unsupported("an AVIF with the timing of a video")
    delayed = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if delayed and bits.take(1):
            bits.take(4)


def _uint(data: bytes, at: int, size: int) -> int:
    if at + size > len(data):
        raise corrupt()
    return int.from_bytes(data[at : at + size], "big")
