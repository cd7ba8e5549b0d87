"""TIFFs of grey, colour, palette and ink samples of any depth to RGB.

Pillow only decompresses the bytes; the samples are interpreted here. Pillow itself supports few
kinds of 16 bits and floats, and decodes some of them wrongly.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from service.errors import CorruptImage, ImageTooLarge, UnsupportedImage
from service.images.decoders.samples import Pixels, bands, levels, load, over_white, unpacked
from service.images.headers import tiff_header
from service.images.headers.header import corrupt
from service.images.headers.tiff_header import TiffHeader

_Samples = NDArray[Any]
_Levels = Callable[[_Samples], Pixels]
_Rows = Callable[[slice], Pixels]

_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def decode_tiff(header: TiffHeader, data: bytes) -> Pixels:
    """uint8 (height, width, 3). Raises CorruptImage, ImageTooLarge, UnsupportedImage."""
    to_levels = _levels(header, data)
    palette = _palette(header) if header.photometric == tiff_header.PALETTE else None
    pixels = np.empty((header.height, header.width, 3), np.uint8)
    for rows, samples in _bands(header, data):
        if palette is not None:
            colour = palette[np.asarray(samples[:, :, 0], np.intp)]
        else:
            colour = _colour(header, to_levels(samples[:, :, : _base(header)]))
        if header.alpha is not None:
            alpha = to_levels(samples[:, :, header.alpha])
            colour = _over_white(colour, alpha, associated=header.associated)
        pixels[rows] = colour
    return pixels


def _base(header: TiffHeader) -> int:
    """The number of colour samples of a pixel."""
    return {tiff_header.RGB: 3, tiff_header.CMYK: 4}.get(header.photometric, 1)


def _bands(header: TiffHeader, data: bytes) -> Iterator[tuple[slice, _Samples]]:
    """Bands of rows with at least the needed samples (rows, width, samples)."""
    needed = {*range(_base(header)), *([] if header.alpha is None else [header.alpha])}
    planes = sorted(needed) if header.planar else [0]
    wide = max(1, header.samples * header.bits // 32)  # a band is bounded in bytes, not in pixels
    together = max(1, tiff_header.GROUP_BYTES // max(header.segment_bytes, 1))
    for first in range(0, header.down, together):
        last = min(first + together, header.down)
        top = first * header.segment[1]
        bottom = min(last * header.segment[1], header.height)
        groups = [_group(header, data, plane, first, last) for plane in planes]
        for band in bands(header.width * wide, bottom - top):
            parts = [_samples(header, rows(band)) for rows in groups]
            samples = parts[0]
            if header.planar:
                samples = np.zeros((*samples.shape[:2], planes[-1] + 1), samples.dtype)
                for plane, part in zip(planes, parts, strict=True):
                    samples[:, :, plane] = part[:, :, 0]
            yield slice(top + band.start, top + band.stop), samples
        del groups  # before the next ones are unpacked


def _group(header: TiffHeader, data: bytes, plane: int, first: int, last: int) -> _Rows:
    """A function from a band to the bytes (segments across, rows, bytes) of rows of segments."""
    height = header.segment[1]
    rows = (last - first) * height
    if not header.tiled:
        rows = min(rows, header.height - first * height)
    numbers = [
        (plane * header.down + row) * header.across + column
        for column in range(header.across)
        for row in range(first, last)
    ]
    shape = header.across, rows, header.row_bytes
    if header.compression == tiff_header.UNCOMPRESSED:
        stored = b"".join(_segments(header, data, numbers, height * header.row_bytes))
        if len(stored) < math.prod(shape):
            raise corrupt()
        held = np.frombuffer(stored, np.uint8, math.prod(shape)).reshape(shape)
        return lambda band: held[:, band]
    image = _unpack(header, _segments(header, data, numbers), rows * header.across)
    if header.across == 1:
        return lambda band: _bytes_of(image, band)[None]
    whole = np.empty((rows * header.across, header.row_bytes), np.uint8)
    for band in bands(header.row_bytes, len(whole)):
        whole[band] = _bytes_of(image, band)
    unpacked_tiles = whole.reshape(shape)
    return lambda band: unpacked_tiles[:, band]


def _segments(
    header: TiffHeader, data: bytes, numbers: Sequence[int], size: int | None = None
) -> list[bytes]:
    """The stored bytes of segments; `size`: of each, if the file need not contain it."""
    offsets = header.directory.array(
        tiff_header.TILE_OFFSETS if header.tiled else tiff_header.OFFSETS
    )
    counts = header.directory.array(tiff_header.TILE_COUNTS if header.tiled else tiff_header.COUNTS)
    if max(numbers) >= len(offsets) or (size is None and max(numbers) >= len(counts)):
        raise corrupt()
    segments = []
    for number in numbers:
        start = int(offsets[number])
        part = data[start : start + (int(counts[number]) if size is None else size)]
        segments.append(part.translate(_REVERSED) if header.reversed_bits else part)
    return segments


def _unpack(header: TiffHeader, segments: Sequence[bytes], rows: int) -> Image.Image:
    """Decompress with Pillow: as CMYK, which has four bytes per pixel, or as greyscale."""
    unit = 4 if header.row_bytes % 4 == 0 else 1
    width = header.row_bytes // unit
    if width * rows > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ImageTooLarge(
            f"The TIFF is compressed in strips of {header.segment_bytes:,} bytes; save it in "
            "strips or tiles of a few MB, and send it again."
        )
    sizes = [len(segment) for segment in segments]
    fields: dict[int, tuple[int, ArrayLike]] = {
        tiff_header.WIDTH: (4, [width]),
        tiff_header.HEIGHT: (4, [rows]),
        tiff_header.BITS: (3, [8] * unit),
        tiff_header.COMPRESSION: (3, [header.compression]),
        tiff_header.PHOTOMETRIC: (
            3,
            [tiff_header.CMYK if unit == 4 else tiff_header.BLACK_IS_ZERO],
        ),
        tiff_header.OFFSETS: (4, 8 + np.cumsum([0, *sizes[:-1]])),
        tiff_header.SAMPLES: (3, [unit]),
        tiff_header.STRIP_ROWS: (4, [header.segment[1]]),
        tiff_header.COUNTS: (4, sizes),
    }
    file = tiff_header.write("<", fields, b"".join(segments))
    image = Image.open(io.BytesIO(file), formats=("TIFF",))
    load(image)
    return image


def _bytes_of(image: Image.Image, rows: slice) -> Pixels:
    band = image.crop((0, rows.start, image.width, rows.stop))
    return np.asarray(band, np.uint8).reshape(band.height, -1)


def _samples(header: TiffHeader, stored: Pixels) -> _Samples:
    """stored: (segments across, rows, bytes); samples (rows, width, samples) in native order."""
    across, rows, _ = stored.shape
    width, samples = header.segment[0], 1 if header.planar else header.samples
    shape = across, rows, width, samples
    values: _Samples
    if header.bits not in (8, 16, 32, 64):
        flat = stored.reshape(across * rows, -1)
        values = unpacked(flat, header.bits, width * samples).reshape(shape)
    elif tiff_header.predictor_of(header) == 3:
        values = _floats(stored, header.bits // 8, shape)
    else:
        size = header.bits // 8
        values = np.ascontiguousarray(stored).view(f"{header.directory.order}u{size}")
        values = values.reshape(shape).astype(f"u{size}", copy=False)
        if tiff_header.predictor_of(header) == 2:
            values = np.cumsum(values, axis=2, dtype=values.dtype)
        letter = {tiff_header.UNSIGNED: "u", tiff_header.SIGNED: "i", tiff_header.FLOAT: "f"}[
            header.sample_format
        ]
        values = values.view(f"{letter}{size}")
    return values.transpose(1, 0, 2, 3).reshape(rows, across * width, samples)[:, : header.width]


def _floats(stored: Pixels, size: int, shape: tuple[int, int, int, int]) -> _Samples:
    """Undo the third predictor: differences of bytes, most significant bytes first."""
    across, rows, width, samples = shape
    bytewise = stored.reshape(across, rows, -1, samples)
    planes = np.cumsum(bytewise, axis=2, dtype=np.uint8)
    planes = planes.reshape(across, rows, size, width * samples)
    together = np.ascontiguousarray(planes.transpose(0, 1, 3, 2))
    return together.view(f">f{size}").reshape(shape).astype(f"f{size}")


def _levels(header: TiffHeader, data: bytes) -> _Levels:
    """A function from samples to 8-bit levels."""
    if header.sample_format == tiff_header.FLOAT:
        return _float_levels(header, data)
    if header.sample_format == tiff_header.SIGNED:
        return _signed_levels
    if header.bits > 16:
        factor = 255 / (header.largest or (1 << header.bits) - 1)
        return lambda samples: np.minimum(np.rint(samples * factor), 255).astype(np.uint8)
    level = levels(header.bits, header.largest)
    return lambda samples: level[samples]


def _float_levels(header: TiffHeader, data: bytes) -> _Levels:
    """Floats are 0..1 if none is above 1, otherwise 0..255; so all samples are read first."""
    largest = -np.inf
    for _, samples in _bands(header, data):
        if not np.isfinite(samples).all():
            raise CorruptImage(
                "The image contains NaN or infinity; replace them and send it again."
            )
        largest = max(largest, float(samples.max()))
    factor = 255.0 if largest <= 1 else 1.0
    kind = np.float64 if header.bits == 64 else np.float32

    def to_levels(samples: _Samples) -> Pixels:
        scaled = np.multiply(samples, factor, dtype=kind)
        return np.asarray(np.clip(np.rint(scaled), 0, 255), np.uint8)

    return to_levels


def _signed_levels(samples: _Samples) -> Pixels:
    """Signed integers with 16-bit values, as Pillow and others write them; white is 65,535."""
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > 0xFFFF:
        raise UnsupportedImage(
            f"The image is a TIFF of 32 bits (signed) with values from {low} to {high}; scale them "
            "to 0..65535, or save it in 8 or 16 bits, and send it again."
        )
    level: Pixels = levels(16)[samples]
    return level


def _palette(header: TiffHeader) -> Pixels:
    """uint8 (colours, 3). The file has 16 bits per colour; some writers use only 8."""
    stored = header.directory.array(tiff_header.COLOUR_MAP)
    count = 1 << header.bits
    if len(stored) != 3 * count:
        raise corrupt()
    level = levels(16) if stored.max() > 255 else np.arange(256, dtype=np.uint8)
    palette: Pixels = level[stored.reshape(3, count).T & 0xFFFF]
    return palette


def _colour(header: TiffHeader, level: Pixels) -> Pixels:
    if header.photometric == tiff_header.WHITE_IS_ZERO:
        return 255 - level
    if header.photometric != tiff_header.CMYK:
        return level
    ink, black = level[:, :, :3].astype(np.uint32), level[:, :, 3:].astype(np.uint32)
    return np.asarray(((255 - ink) * (255 - black) + 127) // 255, np.uint8)


def _over_white(colour: Pixels, alpha: Pixels, *, associated: bool) -> Pixels:
    if not associated:
        return over_white(colour, alpha)
    light = colour.astype(np.uint16) + (255 - alpha[:, :, None])
    return np.asarray(np.minimum(light, 255), np.uint8)
