"""TIFF: its directories, and the supported kinds of samples."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from service.errors import ImageTooLarge
from service.images.headers.header import Header, check_parts, corrupt, unsupported

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
OFFSETS, ORIENTATION, SAMPLES, STRIP_ROWS, COUNTS = 273, 274, 277, 278, 279
LARGEST, PLANAR, PREDICTOR, COLOUR_MAP = 281, 284, 317, 320
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 322, 323, 324, 325
EXTRA, FORMAT, JPEG_TABLES, SUBSAMPLING = 338, 339, 347, 530
_FAX_OPTIONS, _FAX4_OPTIONS, _INK_SET = 292, 293, 332
_YCBCR_COEFFICIENTS, _YCBCR_POSITIONING, _BLACK_WHITE = 529, 531, 532

_TAGS = frozenset(
    {
        *(WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, OFFSETS, ORIENTATION, SAMPLES),
        *(STRIP_ROWS, COUNTS, LARGEST, PLANAR, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT),
        *(TILE_OFFSETS, TILE_COUNTS, EXTRA, FORMAT, JPEG_TABLES, SUBSAMPLING, _FAX_OPTIONS),
        *(_FAX4_OPTIONS, _INK_SET, _YCBCR_COEFFICIENTS, _YCBCR_POSITIONING, _BLACK_WHITE),
    }
)
"""Tags that determine the pixels; the values of other tags are not read."""

_KINDS = {
    1: "B",
    2: "B",
    3: "H",
    4: "I",
    5: "II",
    6: "b",
    7: "B",
    8: "h",
    9: "i",
    10: "ii",
    11: "f",
}
_KINDS |= {12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q"}

_LONG_KINDS = frozenset({13, 16, 17, 18})
_NUMPY = {"B": "u1", "H": "u2", "I": "u4", "Q": "u8", "b": "i1", "h": "i2", "i": "i4", "q": "i8"}
_NUMPY |= {"f": "f4", "d": "f8"}

GROUP_BYTES = 1 << 20
"""Maximum bytes of segments that are unpacked together."""

MAX_ENTRIES = 1_024
"""Maximum entries of one directory; files have a few dozen."""

MAX_VALUES = 1_000_000
"""Maximum values of one tag: offsets of strips or tiles. 64 million pixels have 250,000 tiles of
16 x 16."""

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
_PHOTOMETRICS = {0: "white is zero", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK"}
_PHOTOMETRICS |= {6: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "colour filter array"}
_PHOTOMETRICS |= {32844: "LogL", 32845: "LogLuv", 34892: "linear raw"}
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
_FORMATS = {
    1: "unsigned",
    2: "signed",
    3: "floating-point",
    4: "untyped",
    5: "complex",
    6: "complex",
}
_COMPRESSIONS = {1: "uncompressed", 2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", 6: "old JPEG"}
_COMPRESSIONS |= {7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate", 34925: "LZMA"}
_COMPRESSIONS |= {50000: "Zstandard", 50001: "WebP", 34712: "JPEG 2000", 50002: "JPEG XL"}

UNCOMPRESSED, JPEG = 1, 7
PACKED = frozenset({UNCOMPRESSED, 5, 8, 32773, 32946, 34925, 50000})
"""Compressions of bytes, independent of their meaning."""
_PREDICTED = PACKED - {UNCOMPRESSED, 32773}
_FAX = frozenset({2, 3, 4})

_PREDICTORS = {UNSIGNED: (1, 2), SIGNED: (1, 2), FLOAT: (1, 2, 3)}

UNASSOCIATED, ASSOCIATED = 2, 1
_ALPHA = {1: ASSOCIATED, 2: UNASSOCIATED, 999: UNASSOCIATED}  # 999: what Corel Draw writes


@dataclass(frozen=True, slots=True)
class Directory:
    """The tags that determine the pixels of one image.

    order: "<" or ">". next: offset of the next directory.
    tags: by number, the kind of the values and the values; offsets and counts are arrays.
    """

    order: str
    tags: Mapping[int, tuple[int, tuple[float, ...] | NDArray[np.int64]]]
    next: int

    def ints(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The values of a tag."""
        return tuple(map(int, self.tags[tag][1])) if tag in self.tags else default

    def first(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        return self.ints(tag, (default,))[0]

    def array(self, tag: int) -> NDArray[np.int64]:
        """The values of offsets or counts."""
        return np.asarray(self.tags[tag][1] if tag in self.tags else (), np.int64)


@dataclass(frozen=True, slots=True)
class TiffHeader(Header):
    """One image of a TIFF. Its pixels are in segments: strips, or tiles from left to right.

    bits, samples:  of a sample, of a pixel. sample_format: UNSIGNED, SIGNED or FLOAT.
    planar:         whether each sample has segments of its own.
    alpha:          which sample is alpha; None: none. associated: colours are premultiplied.
    largest:        the value of white, if it is less than the bits allow.
    segment:        (width, height) of a strip or tile, in pixels.
    packed:         whether `decoders.tiff_decoder` decodes the segments; otherwise Pillow does.
    """

    directory: Directory = Directory("<", {}, 0)
    bits: int = 8
    samples: int = 1
    sample_format: int = UNSIGNED
    planar: bool = False
    photometric: int = BLACK_IS_ZERO
    compression: int = UNCOMPRESSED
    alpha: int | None = None
    associated: bool = False
    largest: int | None = None
    segment: tuple[int, int] = (0, 0)
    packed: bool = True

    @property
    def extent(self) -> tuple[int, int]:
        """Tiles are decoded completely, even if the image needs only a part."""
        if not self.tiled:
            return self.width, self.height
        return max(self.width, self.segment[0]), max(self.height, self.segment[1])

    @property
    def tiled(self) -> bool:
        """Whether segments are tiles, which may extend beyond the image."""
        return TILE_WIDTH in self.directory.tags

    @property
    def reversed_bits(self) -> bool:
        """Whether the lowest bit of a stored byte comes first."""
        return self.directory.first(FILL_ORDER, 1) == 2

    @property
    def across(self) -> int:
        """Segments side by side."""
        return -(-self.width // max(self.segment[0], 1))

    @property
    def down(self) -> int:
        """Segments one below the other."""
        return -(-self.height // max(self.segment[1], 1))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a segment."""
        samples = 1 if self.planar else self.samples
        return (self.segment[0] * samples * self.bits + 7) // 8

    @property
    def segment_bytes(self) -> int:
        """Bytes of a row of segments, of all samples."""
        planes = self.samples if self.planar else 1
        return self.row_bytes * self.segment[1] * self.across * planes

    def pillow_bytes(self, data: bytes) -> bytes:
        """The file with a directory of only the tags that determine the pixels."""
        directory = self.directory
        dropped = (ORIENTATION, LARGEST)
        kept = {tag: field for tag, field in directory.tags.items() if tag not in dropped}
        return write(directory.order, kept, data[8:])


def directories(data: bytes) -> Iterator[Directory]:
    """The directories of a TIFF, in order. Raises CorruptImage, ImageTooLarge."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    seen = set[int]()
    try:
        (offset,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
        while offset and offset not in seen:
            seen.add(offset)
            check_parts(len(seen), 0, "TIFF directories")
            directory = _directory(data, order, offset, big=big)
            yield directory
            offset = directory.next
    except struct.error as error:
        raise corrupt() from error


def read(data: bytes) -> TiffHeader:
    """Read the header of a TIFF's first image.

    Raises CorruptImage, UnsupportedImage, ImageTooLarge.
    """
    first = next(directories(data), None)
    if first is None:
        raise corrupt()
    return header_of(first, data)


def header_of(directory: Directory, data: bytes) -> TiffHeader:
    """The header of the image of one directory. Raises CorruptImage, UnsupportedImage."""
    width, height = directory.first(WIDTH, 0), directory.first(HEIGHT, 0)
    samples = directory.first(SAMPLES, 1)
    bits, formats = directory.ints(BITS, (1,)), directory.ints(FORMAT, (UNSIGNED,))
    extra = directory.ints(EXTRA)
    photometric = directory.first(PHOTOMETRIC, -1)
    base = {RGB: 3, YCBCR: 3, LAB: 3, CMYK: 4}.get(photometric, 1)
    if not extra and (photometric, samples) == (RGB, 4):
        extra = (UNASSOCIATED,)  # as most decoders do
    tiled = TILE_WIDTH in directory.tags
    rows = min(directory.first(STRIP_ROWS, height), height)
    segment = (width, rows)
    if tiled:
        segment = directory.first(TILE_WIDTH, 0), directory.first(TILE_HEIGHT, 0)
    alpha = base if samples > base and extra[:1] and extra[0] in _ALPHA else None
    header = TiffHeader(
        format="TIFF",
        width=width,
        height=height,
        orientation=o if (o := directory.first(ORIENTATION, 1)) in range(1, 9) else 1,
        directory=directory,
        bits=bits[0],
        samples=samples,
        sample_format=formats[0],
        planar=directory.first(PLANAR, 1) == 2 and samples > 1,
        photometric=photometric,
        compression=directory.first(COMPRESSION, UNCOMPRESSED),
        alpha=alpha,
        associated=alpha is not None and _ALPHA[extra[0]] == ASSOCIATED,
        largest=_largest(directory, bits[0]),
        segment=segment,
    )
    one_kind = len({*bits}) == 1 and len({*formats}) == 1 and len(bits) in (1, samples)
    if not one_kind or samples < base or (samples > base and not extra) or not _is_read(header):
        raise unsupported(_kind(header, bits))
    return _priced(header, data)


def write(order: str, fields: Mapping[int, tuple[int, ArrayLike]], content: bytes) -> bytes:
    """A TIFF of one directory behind `content`, which begins at byte 8.

    fields: by tag, the kind of its values and the values. Offsets of more than 32 bits fit no file
    that is held in memory here.
    """
    content += b"\0" * (len(content) & 1)
    entries, outside = [], b""
    offset = 8 + len(content)
    after = offset + 2 + 12 * len(fields) + 4
    for tag, (kind, values) in sorted(fields.items()):
        narrow = 4 if kind in _LONG_KINDS else kind
        form = _KINDS[narrow]
        raw = np.asarray(values).astype(f"{order}{_NUMPY[form[0]]}").tobytes()
        count = np.size(values) // len(form)
        if len(raw) > 4:
            raw += b"\0" * (len(raw) & 1)
            raw, outside = struct.pack(f"{order}I", after + len(outside)), outside + raw
        entries.append(struct.pack(f"{order}HHI", tag, narrow, count) + raw.ljust(4, b"\0"))
    start = b"II*\0" if order == "<" else b"MM\0*"
    head = start + struct.pack(f"{order}I", offset)
    number = struct.pack(f"{order}H", len(entries))
    return b"".join([head, content, number, *entries, bytes(4), outside])


def _directory(data: bytes, order: str, offset: int, *, big: bool) -> Directory:
    counting, entry, step = ("Q", "HHQ", 20) if big else ("H", "HHI", 12)
    (count,) = struct.unpack_from(f"{order}{counting}", data, offset)
    if offset + step * count > len(data):
        raise corrupt()
    if count > MAX_ENTRIES:
        raise ImageTooLarge(
            f"A directory of the TIFF has {count:,} entries, and at most {MAX_ENTRIES:,} are read; "
            "save it again without metadata."
        )
    offset += struct.calcsize(counting)
    tags = {}
    for at in range(offset, offset + step * count, step):
        tag, kind, values = struct.unpack_from(f"{order}{entry}", data, at)
        if tag in _TAGS and kind in _KINDS and values:
            inside = at + struct.calcsize(f"={entry}")
            tags[tag] = kind, _values(data, f"{order}{'Q' if big else 'I'}", inside, kind, values)
    (following,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, offset + step * count)
    return Directory(order, tags, following)


def _values(
    data: bytes, offset_format: str, offset: int, kind: int, count: int
) -> tuple[float, ...] | NDArray[np.int64]:
    form = _KINDS[kind]
    dtype = np.dtype(f"{offset_format[0]}{_NUMPY[form[0]]}")
    count *= len(form)
    if count * dtype.itemsize > struct.calcsize(f"={offset_format[1]}"):
        (offset,) = struct.unpack_from(offset_format, data, offset)
    if offset + count * dtype.itemsize > len(data):
        raise corrupt()
    if count > MAX_VALUES:
        raise ImageTooLarge(
            f"The TIFF has {count:,} strips or tiles, and the limit is {MAX_VALUES:,}; save it "
            "in larger ones and send it again."
        )
    values = np.frombuffer(data, dtype, count, offset)
    return tuple(values.tolist()) if count <= 1024 else values.astype(np.int64)


def _largest(directory: Directory, bits: int) -> int | None:
    """What MaxSampleValue says of the depth: one less than a power of two that has fewer bits.

    Other values are the largest in the image, which says nothing of white.
    """
    values = directory.ints(LARGEST)
    largest = max(values, default=0)
    is_depth = largest > 255 and largest & (largest + 1) == 0
    return largest if is_depth and bits > 8 and largest < (1 << bits) - 1 else None


def _is_read(header: TiffHeader) -> bool:
    if header.compression in PACKED:
        if header.photometric in (YCBCR, LAB):
            return _by_pillow(header)
        return _is_packed(header)
    if header.compression == JPEG:
        return _by_pillow(header)
    fax = header.compression in _FAX and header.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)
    return fax and (header.bits, header.samples, header.sample_format) == (1, 1, UNSIGNED)


def _is_packed(header: TiffHeader) -> bool:
    depths = {
        UNSIGNED: (*range(1, 17), 32),
        SIGNED: (32,),
        FLOAT: (16, 32, 64),
    }
    if header.photometric in (PALETTE, CMYK):
        depths = {UNSIGNED: (1, 2, 4, 8, 16) if header.photometric == PALETTE else (8, 16)}
    elif header.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        return False
    if header.bits not in depths.get(header.sample_format, ()) or header.samples > 64:
        return False
    if header.photometric == PALETTE and COLOUR_MAP not in header.directory.tags:
        return False
    if header.directory.first(_INK_SET, 1) != 1:
        return False
    return predictor_of(header) in _PREDICTORS.get(header.sample_format, (1,)) and (
        predictor_of(header) == 1 or header.bits in (8, 16, 32, 64)
    )


def predictor_of(header: TiffHeader) -> int:
    """How samples differ from their neighbours: 1 not at all, 2 as integers, 3 as float bytes."""
    return header.directory.first(PREDICTOR, 1) if header.compression in _PREDICTED else 1


def _by_pillow(header: TiffHeader) -> bool:
    """YCbCr, CIELab and JPEG, of 8 bits, with the samples of a pixel side by side."""
    kind = (header.bits, header.sample_format, header.planar)
    samples = {BLACK_IS_ZERO: 1, RGB: 3, YCBCR: 3, LAB: 3}.get(header.photometric)
    if kind != (8, UNSIGNED, False) or header.samples != samples:
        return False
    if header.photometric == YCBCR and header.compression != JPEG:
        return header.directory.ints(SUBSAMPLING, (2, 2)) == (1, 1)
    return header.photometric != LAB or header.compression != JPEG


def _kind(header: TiffHeader, bits: tuple[int, ...]) -> str:
    """The kind of a TIFF in words, for an error."""
    depth = str(bits[0]) if len({*bits}) == 1 else "/".join(map(str, bits[:8]))
    samples = f"{header.samples} sample{'s' if header.samples != 1 else ''}"
    form = _FORMATS.get(header.sample_format, f"sample format {header.sample_format}")
    photometric = _PHOTOMETRICS.get(header.photometric, "no known photometric interpretation")
    compression = _COMPRESSIONS.get(header.compression, f"compression {header.compression}")
    layout = ["planar"] if header.planar else []
    parts = [f"a TIFF of {depth} bits ({form})", samples, *layout, photometric, compression]
    return ", ".join(parts)


def _group_bytes(header: TiffHeader, length: int) -> int:
    """What unpacking a group of segments takes: them as stored, in libtiff, and as a result."""
    counts = header.directory.array(TILE_COUNTS if header.tiled else COUNTS)
    together = max(1, GROUP_BYTES // max(header.segment_bytes, 1)) * header.across
    stored = min(length, int(counts.max(initial=0)) * together)
    held = max(header.segment_bytes, GROUP_BYTES)
    if header.compression == UNCOMPRESSED:
        return 2 * held
    return 3 * stored + (3 if header.tiled else 2) * held


def _priced(header: TiffHeader, data: bytes) -> TiffHeader:
    """The header with what decoding takes. Raises CorruptImage."""
    if header.pixels and 0 in header.segment:
        raise corrupt()
    packed = header.compression in PACKED and header.photometric not in (YCBCR, LAB)
    if packed:
        return replace(header, pixel_bytes=0, fixed_bytes=_group_bytes(header, len(data)))
    # libtiff makes RGBA of a segment; a progressive JPEG keeps 16 bits a sample.
    held = header.segment[0] * header.segment[1] * (4 + 2 * header.samples)
    return replace(header, packed=False, pixel_bytes=4, fixed_bytes=2 * len(data) + held)
