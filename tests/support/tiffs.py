"""TIFFs written by hand, of every kind that the format has."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NONE, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_LETTERS = {1: "u", 2: "i", 3: "f"}


def packbits(data: bytes) -> bytes:
    """Every run as it is."""
    runs = [data[place : place + 128] for place in range(0, len(data), 128)]
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


def lzw(data: bytes) -> bytes:
    """Every byte as a code of nine bits, with a clear code before the codes become longer."""
    codes = []
    for place, byte in enumerate(data):
        if place % 250 == 0:
            codes.append(256)
        codes.append(byte)
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))


_COMPRESS: Mapping[int, Callable[[bytes], bytes]] = {
    NONE: bytes,
    LZW: lzw,
    DEFLATE: zlib.compress,
    PACKBITS: packbits,
}


def _row_bytes(row: NDArray[Any], bits: int, form: int, order: str, predictor: int) -> bytes:
    """One row (width, samples) of one segment as it is stored."""
    if bits not in (8, 16, 32, 64):
        text = "".join(f"{int(value):0{bits}b}" for value in row.ravel())
        text += "0" * (-len(text) % 8)
        return bytes(int(text[place : place + 8], 2) for place in range(0, len(text), 8))
    size = bits // 8
    stored = row.astype(f"{order}{_LETTERS[form]}{size}")
    if predictor == 2:
        whole = stored.astype(stored.dtype.newbyteorder("=")).view(f"u{size}").copy()
        whole[1:] -= whole[:-1].copy()
        stored = whole.astype(f"{order}u{size}")
    if predictor == 3:
        big = row.astype(f">f{size}").ravel()
        planes = (
            np.frombuffer(big.tobytes(), np.uint8)
            .reshape(-1, size)
            .T.copy()
            .reshape(-1, row.shape[1])
        )
        planes[1:] -= planes[:-1].copy()
        return planes.tobytes()
    return stored.tobytes()


@dataclass(frozen=True)
class Layout:
    """How a file holds its samples. `rows`: of a strip; `tile`: (width, height)."""

    order: str = "<"
    planar: bool = False
    compression: int = NONE
    predictor: int = 1
    rows: int | None = None
    tile: tuple[int, int] | None = None
    big: bool = False
    reverse: bool = False


def tiff(
    values: NDArray[Any],
    bits: int = 8,
    photometric: int = 1,
    form: int = 1,
    *,
    extra: Sequence[int] = (),
    more: Mapping[int, tuple[int, Sequence[float]]] | None = None,
    **layout: Any,
) -> bytes:
    """A TIFF of (h, w, samples) values; `layout` as in `Layout`, `more` holds further tags."""
    how = Layout(**layout)
    height, width, samples = values.shape
    planes = [values[:, :, each : each + 1] for each in range(samples)]
    segments = [
        segment
        for plane in (planes if how.planar else [values])
        for segment in _segments(plane, bits, form, how)
    ]
    sizes = [len(segment) for segment in segments]
    offsets = np.cumsum([16 if how.big else 8, *sizes[:-1]]).tolist()
    long = 16 if how.big else 4
    tags: dict[int, tuple[int, Sequence[float]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * samples),
        259: (3, [how.compression]),
        262: (3, [photometric]),
        266: (3, [2 if how.reverse else 1]),
        277: (3, [samples]),
        284: (3, [2 if how.planar else 1]),
        317: (3, [how.predictor]),
        339: (3, [form] * samples),
    }
    if how.tile:
        tags |= {322: (4, how.tile[:1]), 323: (4, how.tile[1:])}
        tags |= {324: (long, offsets), 325: (long, sizes)}
    else:
        tags |= {273: (long, offsets), 278: (4, [how.rows or height]), 279: (long, sizes)}
    if extra:
        tags[338] = 3, extra
    return write(how.order, tags | dict(more or {}), b"".join(segments), big=how.big)


def _segments(plane: NDArray[Any], bits: int, form: int, how: Layout) -> Iterator[bytes]:
    width, height = how.tile or (plane.shape[1], how.rows or plane.shape[0])
    for top in range(0, plane.shape[0], height):
        for left in range(0, plane.shape[1], width):
            part = plane[top : top + height, left : left + width]
            if how.tile:
                below, beside = height - part.shape[0], width - part.shape[1]
                part = np.pad(part, ((0, below), (0, beside), (0, 0)))
            raw = b"".join(_row_bytes(row, bits, form, how.order, how.predictor) for row in part)
            packed = _COMPRESS[how.compression](raw)
            yield packed.translate(_REVERSED) if how.reverse else packed


def write(
    order: str,
    tags: Mapping[int, tuple[int, Sequence[float]]],
    content: bytes,
    *,
    big: bool = False,
    following: int = 0,
) -> bytes:
    """A file of one directory behind its content."""
    letters = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B", 12: "d", 16: "Q"}
    inside, entry, word = (8, "HHQ", "Q") if big else (4, "HHI", "I")
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    place = (16 if big else 8) + len(content)
    start += struct.pack(f"{order}HHQ", 8, 0, place) if big else struct.pack(f"{order}I", place)
    count = struct.pack(f"{order}{'Q' if big else 'H'}", len(tags))
    after = place + len(count) + len(tags) * (struct.calcsize(f"={entry}") + inside) + inside
    entries, outside = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(numbers)}{letters[kind]}", *numbers)
        if len(raw) > inside:
            raw, outside = struct.pack(f"{order}{word}", after + len(outside)), outside + raw
        entries += struct.pack(f"{order}{entry}", tag, kind, len(numbers)) + raw.ljust(
            inside, b"\0"
        )
    return start + content + count + entries + struct.pack(f"{order}{word}", following) + outside


def joined(files: Sequence[bytes]) -> bytes:
    """Little-endian files of one directory each as the pages of one file."""
    data, link = b"II*\0" + bytes(4), 4
    for file in files:
        base = len(data) + len(data) % 2
        data = data.ljust(base, b"\0") + file
        (place,) = struct.unpack_from("<I", file, 4)
        (count,) = struct.unpack_from("<H", file, place)
        moved = bytearray(data)
        struct.pack_into("<I", moved, link, base + place)
        for entry in range(count):
            at = base + place + 2 + 12 * entry
            tag, kind, number, value = struct.unpack_from("<HHII", moved, at)
            is_outside = number * {3: 2, 4: 4}[kind] > 4
            if is_outside or tag == 273:
                struct.pack_into("<I", moved, at + 8, value + base)
            if is_outside and tag == 273:
                offsets = struct.unpack_from(f"<{number}I", moved, value + base)
                struct.pack_into(f"<{number}I", moved, value + base, *(o + base for o in offsets))
        link = base + place + 2 + 12 * count
        data = bytes(moved)
    return data
