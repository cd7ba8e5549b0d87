"""Image files that are small and cost their reader much: by their pixels, modes, or metadata.

Each is written by hand where no library writes it. None needs more than a GiB to be made.
"""

from __future__ import annotations

import functools
import io
import itertools
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

SIDE = 8000
"""Pixels a side of an image that has as many as the service allows by default."""

Pixels = np.typing.NDArray[np.uint8]


def noise(width: int, height: int, kind: str = "JPEG", **options: object) -> bytes:
    """An image that compresses badly, as do the pictures that are drawn over it."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return _saved(Image.fromarray(pixels), kind, **options)


def plain(mode: str, kind: str, width: int = SIDE, height: int = SIDE, **options: object) -> bytes:
    """An image of one colour, as Pillow writes it."""
    return _saved(Image.new(mode, (width, height)), kind, **options)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def tiff(
    bits: int,
    samples: int = 1,
    numbers: int = 1,
    photometric: int = 1,
    extra: int | None = None,
    *,
    side: int = SIDE,
    pages: int = 1,
) -> bytes:
    """A deflated TIFF of zeros.

    bits: of each of `samples`. numbers: 1 unsigned, 2 signed, 3 float. photometric, extra: the
    tags of that name.
    """
    rows = 16
    strip = zlib.compress(bytes(side * rows * samples * bits // 8), 9)
    count = side // rows
    parts, at = [b"II*\0"], 8
    data = strip * count
    directories, first = [], at + len(data)
    start = first
    for page in range(pages):
        arrays = [
            (273, 4, [at + number * len(strip) for number in range(count)]),
            (279, 4, [len(strip)] * count),
            (258, 3, [bits] * samples),
            (339, 3, [numbers] * samples),
        ]
        tags = [(256, 4, [side]), (257, 4, [side]), (259, 3, [8]), (262, 3, [photometric])]
        tags += [(277, 3, [samples]), (278, 4, [rows]), *arrays]
        if extra is not None:
            tags.append((338, 3, [extra]))
        directory = _directory(sorted(tags), start, is_last=page == pages - 1)
        directories.append(directory)
        start += len(directory)
    return b"".join([*parts, struct.pack("<I", first), data, *directories])


def _directory(tags: Sequence[tuple[int, int, list[int]]], start: int, *, is_last: bool) -> bytes:
    """An image file directory that begins at `start`, with the arrays that do not fit behind it."""
    size = 2 + 12 * len(tags) + 4
    entries, behind = [], b""
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'HI'[kind == 4]}", *values)
        if len(packed) > 4:
            place = struct.pack("<I", start + size + len(behind))
            behind += packed
        else:
            place = packed.ljust(4, b"\0")
        entries.append(struct.pack("<HHI", tag, kind, len(values)) + place)
    following = 0 if is_last else start + size + len(behind)
    head = struct.pack("<H", len(tags))
    return b"".join([head, *entries, struct.pack("<I", following), behind])


def tagged_tiff(count: int) -> bytes:
    """A small TIFF with that many tags of its own, at most 30,000."""
    at = 8 + 64 * 64
    known = [(256, 4, [64]), (257, 4, [64]), (258, 3, [8]), (259, 3, [1]), (262, 3, [1])]
    known += [(273, 4, [8]), (277, 3, [1]), (278, 4, [64]), (279, 4, [64 * 64])]
    tags = known + [(35_000 + number, 4, [number]) for number in range(count)]
    return b"II*\0" + struct.pack("<I", at) + bytes(64 * 64) + _directory(tags, at, is_last=True)


def chained_tiff(count: int) -> bytes:
    """A TIFF whose directories come one after the other, each of one tag."""
    following = [8 + (2 + 12 + 4) * number for number in range(1, count)] + [0]
    pieces = (struct.pack("<HHHIII", 1, 256, 4, 1, 64, place) for place in following)
    return b"II*\0" + struct.pack("<I", 8) + b"".join(pieces)


# ---- PNG

_MEBIBYTE = bytes(1 << 20)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def png(
    depth: int,
    colour: int,
    width: int = SIDE,
    height: int = SIDE,
    *,
    interlaced: bool = False,
    chunks: Iterable[bytes] = (),
) -> bytes:
    """A PNG of zeros. colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    palette = [chunk(b"PLTE", bytes(768))] if colour == 3 else []
    squeeze, packed = zlib.compressobj(6), []
    for across, down in _passes(width, height, interlaced=interlaced):
        left = down * (1 + -(-across * depth * _SAMPLES[colour] // 8))
        packed += [squeeze.compress(_MEBIBYTE) for _ in range(left >> 20)]
        packed.append(squeeze.compress(bytes(left % (1 << 20))))
    data = b"".join([*packed, squeeze.flush()])
    parts = [_SIGNATURE, chunk(b"IHDR", head), *palette, *chunks]
    return b"".join([*parts, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def _passes(width: int, height: int, *, interlaced: bool) -> list[tuple[int, int]]:
    if not interlaced:
        return [(width, height)]
    starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    return [
        (-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in (*starts, (0, 1, 1, 2))
    ]


def chunk(name: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def chunked_png(name: bytes, data: bytes, count: int) -> bytes:
    """A small PNG with the same chunk many times before its pixels."""
    return png(8, 2, 64, 64, chunks=[chunk(name, data) * count])


def bomb(size: int) -> bytes:
    """That many zeros, deflated."""
    squeeze = zlib.compressobj(9)
    packed = [squeeze.compress(_MEBIBYTE) for _ in range(size >> 20)]
    return b"".join([*packed, squeeze.flush()])


# ---- JPEG

_SMALL = 64


def marked_jpeg(marker: int, data: bytes, count: int) -> bytes:
    """A small JPEG with the same segment many times before its pixels."""
    base = _small("JPEG")
    segment = bytes((0xFF, marker)) + struct.pack(">H", 2 + len(data)) + data
    return base[:2] + segment * count + base[2:]


def filled_jpeg(count: int) -> bytes:
    """A small JPEG with fill bytes between two markers."""
    base = _small("JPEG")
    return base[:2] + b"\xff" * count + base[2:]


def scanned_jpeg(count: int, side: int = SIDE) -> bytes:
    """A progressive JPEG of one colour whose last scan comes many times: each visits all blocks."""
    base = plain("L", "JPEG", side, side, progressive=True)
    start = base.rindex(b"\xff\xda")
    return base[:start] + base[start:-2] * count + base[-2:]


@functools.cache
def _small(kind: str) -> bytes:
    return noise(_SMALL, _SMALL, kind)


# ---- GIF, WebP, BMP


def commented_gif(count: int, size: int = 1) -> bytes:
    """A small GIF with many comments before its pixels."""
    base = _small("GIF")
    start = _after_palette(base)
    block = b"\x21\xfe" + bytes((size,)) + b"c" * size + b"\0"
    return b"GIF89a" + base[6:start] + block * count + base[start:]


def extended_gif(code: int, data: bytes, count: int) -> bytes:
    """A small GIF with the same extension many times before its pixels."""
    base = _small("GIF")
    start = _after_palette(base)
    block = bytes((0x21, code)) + data
    return b"GIF89a" + base[6:start] + block * count + base[start:]


def framed_gif(count: int, side: int = 16) -> bytes:
    """A GIF of many frames."""
    base = plain("L", "GIF", side, side)
    start = _after_palette(base)
    return b"GIF89a" + base[6:start] + base[start:-1] * count + b";"


def _after_palette(base: bytes) -> int:
    return 13 + (3 << (base[10] & 7) + 1 if base[10] & 0x80 else 0)


def chunked_webp(name: bytes, data: bytes, count: int) -> bytes:
    """A small WebP with the same chunk many times behind its pixels."""
    base = plain("RGB", "WEBP", _SMALL, _SMALL, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
    one = name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    body = base[8:] + one * count
    return b"RIFF" + struct.pack("<I", len(body)) + body


def run_length_bmp(side: int = SIDE) -> bytes:
    """A BMP of 8 bits whose rows are runs."""
    row = b"".join(bytes((min(255, side - x), 0)) for x in range(0, side, 255)) + b"\0\0"
    data, palette = row * side + b"\0\1", bytes(1024)
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(data), 0, 0, 256, 0)
    at = 14 + 40 + len(palette)
    return b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at) + info + palette + data


def exif(entries: int) -> bytes:
    """An EXIF block with that many entries, each of which has to be read."""
    numbers = itertools.count(1)
    tags = [(0x0112, 3, [6])] + [(0x8000 + next(numbers), 4, [1, 2]) for _ in range(entries - 1)]
    return b"Exif\0\0II*\0\x08\0\0\0" + _directory(tags, 8, is_last=True)
