"""JPEG: the segments before the first scan."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace

from service.images.headers.exif import orientation_of
from service.images.headers.header import Header, Span, check_parts, corrupt, unsupported

_MARKER = re.compile(rb"\xff[\x01-\xfe]")  # two bytes: no backtracking

_START_OF_SCAN = 0xDA
_END = 0xD9
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = 0xC2
_SUPPORTED_FRAMES = frozenset({0xC0, 0xC1, _PROGRESSIVE})
_FRAME_NAMES = {
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded",
}
_COMMENT, _JFIF, _EXIF, _ADOBE = 0xFE, 0xE0, 0xE1, 0xEE
_METADATA = frozenset({_COMMENT, *range(0xE0, 0xF0)}) - {_JFIF, _ADOBE}

_XMP_NAME = b"http://ns.adobe.com/xap/1.0/\0"


@dataclass(frozen=True, slots=True)
class JpegHeader(Header):
    """`components`: 1 grey, 3 colour, 4 CMYK. `kept`: the spans for the decoder.

    by_pillow: whether Pillow decodes it, which needs more memory and does not scale.
    """

    components: int = 3
    by_pillow: bool = False
    kept: tuple[Span, ...] = ()

    def for_pillow(self) -> JpegHeader:
        """The header for decoding by Pillow, which needs four bytes per pixel."""
        size = sum(end - start for start, end in self.kept)
        return replace(self, by_pillow=True, pixel_bytes=self.pixel_bytes + 4, fixed_bytes=size)

    def pillow_bytes(self, data: bytes) -> bytes:
        return b"".join([b"\xff\xd8", *(data[start:end] for start, end in self.kept)])


@dataclass(slots=True)
class _Segments:
    """The contents of the segments so far."""

    frame: tuple[int, bytes] | None = None
    exif: bytes = b""
    xmp: bytes = b""
    metadata: int = 0


def read(data: bytes) -> JpegHeader:
    """Read the header of a JPEG; raises CorruptImage, UnsupportedImage, ImageTooLarge."""
    kept: list[Span] = []
    segments, offset, parts = _Segments(), 2, 0
    while True:
        parts += 1
        at = _MARKER.search(data, offset)
        if at is None:
            raise corrupt()
        segments.metadata += at.start() - offset  # padding, which Pillow skips byte by byte
        check_parts(parts, segments.metadata, "JPEG segments")
        marker, offset = data[at.start() + 1], at.end()
        if marker in _ALONE:
            continue
        if marker == _END or offset + 2 > len(data):
            raise corrupt()
        start, offset = offset - 2, offset + _length(data, offset)
        if offset > len(data):
            raise corrupt()
        _take(segments, marker, data[start + 4 : offset])
        if marker == _START_OF_SCAN:
            kept.append((start, len(data)))
            return _header(segments, data[start + 4], tuple(kept))
        if marker not in _METADATA:
            kept.append((start, offset))


def _length(data: bytes, offset: int) -> int:
    (length,) = struct.unpack_from(">H", data, offset)
    if length < 2:
        raise corrupt()
    return int(length)


def _take(segments: _Segments, marker: int, segment: bytes) -> None:
    if marker in _FRAMES:
        if segments.frame is not None:
            raise corrupt()
        segments.frame = marker, segment
    elif marker in _METADATA:
        segments.metadata += len(segment)
        if marker == _EXIF and segment.startswith(b"Exif\0") and not segments.exif:
            segments.exif = segment
        elif marker == _EXIF and segment.startswith(_XMP_NAME) and not segments.xmp:
            segments.xmp = segment


def _header(segments: _Segments, in_first_scan: int, kept: tuple[Span, ...]) -> JpegHeader:
    if segments.frame is None or len(segments.frame[1]) < 6:
        raise corrupt()
    marker, frame = segments.frame
    bits, height, width, components = struct.unpack_from(">BHHB", frame)
    sampling = [
        frame[6 + 3 * offset + 1] for offset in range(components) if 7 + 3 * offset < len(frame)
    ]
    if len(sampling) != components or not components:
        raise corrupt()
    _check_kind(marker, bits, components)
    header = JpegHeader(
        format="JPEG",
        width=width,
        height=height,
        orientation=orientation_of(segments.exif, segments.xmp),
        pixel_bytes=_coefficients(sampling)
        * (marker == _PROGRESSIVE or in_first_scan < components),
        components=components,
        kept=kept,
    )
    return header.for_pillow() if components > 3 else header


def _check_kind(marker: int, bits: int, components: int) -> None:
    if marker not in _SUPPORTED_FRAMES:
        raise unsupported(f"a JPEG in {_FRAME_NAMES.get(marker, 'hierarchical')} coding")
    if bits != 8:
        raise unsupported(f"a JPEG of {bits} bits a sample")
    if components not in (1, 3, 4):
        raise unsupported(f"a JPEG of {components} components")


def _coefficients(sampling: list[int]) -> float:
    """Bytes a pixel that a decoder keeps between scans: 16 bits a sample."""
    across, down = [factors >> 4 for factors in sampling], [factors & 15 for factors in sampling]
    if 0 in across or 0 in down:
        raise corrupt()
    samples = sum(a * d for a, d in zip(across, down, strict=True))
    return 2.0 * samples / (max(across) * max(down))
