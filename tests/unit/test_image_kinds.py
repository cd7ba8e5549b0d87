"""Kinds of images: each is read to its reference value, or refused by its name."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import tiffs
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tiffs import DEFLATE, LZW, NONE, PACKBITS

from service.errors import CorruptImage, ImageTooLarge, UnsupportedImage
from service.images.decode import decode
from service.images.headers import avif_header
from service.images.upload import decode_channels

LIMIT = 1_000_000
SIZE = 11, 37
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO, GREY, RGB, PALETTE, CMYK = 0, 1, 2, 3, 5


def read(data: bytes) -> NDArray[np.int64]:
    return decode(data, max_pixels=LIMIT).pixels.astype(np.int64)


def refusal(data: bytes) -> str:
    with pytest.raises(UnsupportedImage) as caught:
        decode(data, max_pixels=LIMIT)
    return caught.value.detail


def values(samples: int, bits: int, form: int, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    shape = (*SIZE, samples)
    if form == FLOAT:
        return rng.random(shape).astype(f"f{bits // 8}")
    return rng.integers(0, 65536 if form == SIGNED else 1 << bits, shape)


def expected(
    stored: NDArray[Any], bits: int, photometric: int, form: int, extra: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    """What the format's specification says, computed in floats."""
    largest = {FLOAT: 1, SIGNED: 65535}.get(form, (1 << bits) - 1)
    level = np.rint(stored.astype(np.float64) * 255 / largest)
    base = {RGB: 3, CMYK: 4}.get(photometric, 1)
    colour = level[..., :base]
    if photometric == WHITE_IS_ZERO:
        colour = 255 - colour
    if photometric == CMYK:
        colour = np.rint((255 - colour[..., :3]) * (255 - colour[..., 3:]) / 255)
    if extra[:1] == (2,):
        alpha = level[..., base : base + 1]
        colour = np.rint((colour * alpha + 255 * (255 - alpha)) / 255)
    if extra[:1] == (1,):
        colour = np.minimum(colour + 255 - level[..., base : base + 1], 255)
    return np.broadcast_to(colour, (*SIZE, 3))


# ---- TIFF: samples of any depth

DEPTHS = [
    *[(bits, UNSIGNED, kind) for bits in (*range(1, 17), 32) for kind in (0, 1, 2)],
    *[(bits, FLOAT, kind) for bits in (16, 32, 64) for kind in (0, 1, 2)],
    *[(bits, UNSIGNED, CMYK) for bits in (8, 16)],
    (32, SIGNED, GREY),
    (32, SIGNED, RGB),
]


@pytest.mark.parametrize(("bits", "form", "photometric"), DEPTHS)
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_a_tiff_of_any_depth_has_its_reference_values(
    bits: int, form: int, photometric: int, planar: bool, order: str
) -> None:
    """16-bit planar was garbled, 16-bit white-is-zero inverted, 32 bits clipped, floats refused."""
    stored = values({RGB: 3, CMYK: 4}.get(photometric, 1), bits, form)
    data = tiffs.tiff(stored, bits, photometric, form, planar=planar, order=order)
    wanted = expected(stored, bits, photometric, form)
    assert np.abs(read(data) - wanted).max() <= (photometric == CMYK)


LAYOUTS = [{}, {"rows": 1}, {"rows": 4}, {"tile": (16, 16)}, {"tile": (64, 32)}]


@pytest.mark.parametrize("compression", [NONE, LZW, DEFLATE, PACKBITS])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("bits", "form", "predictor"),
    [
        *[(bits, UNSIGNED, kind) for bits in (8, 16, 32) for kind in (1, 2)],
        *[(bits, FLOAT, kind) for bits in (16, 32, 64) for kind in (1, 3)],
        (12, UNSIGNED, 1),
    ],
)
def test_a_tiff_may_be_stored_in_any_way(
    compression: int, layout: dict[str, Any], bits: int, form: int, predictor: int
) -> None:
    """Strips, tiles, planes, compressions, predictors, both orders, big files, reversed bits."""
    if predictor > 1 and compression in (NONE, PACKBITS):
        predictor = 1
    stored = values(3, bits, form)
    wanted = expected(stored, bits, RGB, form)
    cases = [(False, "<", False, False), (True, ">", False, True), (True, "<", True, False)]
    for planar, order, big, reverse in cases:
        data = tiffs.tiff(
            stored,
            bits,
            RGB,
            form,
            planar=planar,
            order=order,
            big=big,
            reverse=reverse,
            compression=compression,
            predictor=predictor,
            **layout,
        )
        assert (read(data) == wanted).all()


@pytest.mark.parametrize("extra", [(0,), (1,), (2,), (999,), (0, 2), (2, 0, 0)])
@pytest.mark.parametrize(("bits", "form"), [(8, UNSIGNED), (16, UNSIGNED), (32, FLOAT)])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("photometric", [GREY, RGB])
def test_extra_samples_are_alpha_only_where_the_file_says_so(
    extra: tuple[int, ...], bits: int, form: int, planar: bool, photometric: int
) -> None:
    """Associated alpha is in the colours already; unspecified samples are left out."""
    stored = values((1 if photometric == GREY else 3) + len(extra), bits, form)
    data = tiffs.tiff(stored, bits, photometric, form, extra=extra, planar=planar)
    meant = tuple(2 if each == 999 else each for each in extra)
    assert np.abs(read(data) - expected(stored, bits, photometric, form, meant)).max() <= 1


@pytest.mark.parametrize("photometric", [GREY, RGB])
@pytest.mark.parametrize("compression", [NONE, LZW, DEFLATE, PACKBITS])
@pytest.mark.parametrize("bits", [8, 16])
def test_opencv_agrees(photometric: int, compression: int, bits: int) -> None:
    """An independent reader, for what both read."""
    stored = values(1 if photometric == GREY else 3, bits, UNSIGNED)
    data = tiffs.tiff(stored, bits, photometric, compression=compression, rows=3)
    by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert by_opencv is not None
    whole = by_opencv.reshape(*SIZE, -1)[:, :, ::-1]
    assert (read(data) == np.rint(whole * (255 / ((1 << bits) - 1)))).all()


def test_floats_above_one_are_levels_also_where_a_later_strip_has_them() -> None:
    stored = np.full((40, 8, 3), 0.5, np.float32)
    stored[-1, -1, 2] = 200
    for compression in (NONE, DEFLATE):
        pixels = read(tiffs.tiff(stored, 32, RGB, FLOAT, rows=4, compression=compression))
        assert pixels[0, 0, 0] == 0
        assert pixels[-1, -1, 2] == 200


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_floats_that_are_not_finite_are_corrupt(value: float, bits: int) -> None:
    stored = values(3, bits, FLOAT)
    stored[5, 5, 1] = value
    with pytest.raises(CorruptImage, match="NaN"):
        read(tiffs.tiff(stored, bits, RGB, FLOAT))


@pytest.mark.parametrize("largest", [4095, 1023, 16383])
@pytest.mark.parametrize("photometric", [GREY, WHITE_IS_ZERO, RGB])
def test_twelve_bits_in_sixteen_are_scaled_by_the_largest_value_that_the_file_names(
    largest: int, photometric: int
) -> None:
    samples = 3 if photometric == RGB else 1
    stored = np.random.default_rng(0).integers(0, largest + 1, (*SIZE, samples))
    data = tiffs.tiff(stored, 16, photometric, more={281: (3, [largest] * samples)})
    level = np.rint(stored * 255 / largest)
    assert (read(data) == (255 - level if photometric == WHITE_IS_ZERO else level)).all()


@pytest.mark.parametrize("largest", [3000, 40_000, 65_535])
def test_another_largest_value_is_of_this_image_and_not_white(largest: int) -> None:
    """The tag is a statistic (TIFF 6.0); only one less than a power of two says a depth."""
    stored = np.full((4, 4, 1), min(largest, 2570))
    data = tiffs.tiff(stored, 16, more={281: (3, [largest])})
    assert read(data)[0, 0, 0] == 10


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("compression", [NONE, DEFLATE])
def test_a_tiff_palette_has_its_colours(bits: int, deep: bool, compression: int) -> None:
    """16 bits a colour; some writers put 8 bits into them."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 65536 if deep else 256, (3, 1 << bits))
    stored = values(1, bits, UNSIGNED)
    more = {320: (3, colours.ravel().tolist())}
    data = tiffs.tiff(stored, bits, PALETTE, more=more, compression=compression)
    table = np.rint(colours / 257) if deep else colours
    assert (read(data) == table.T[stored[:, :, 0]]).all()


def test_signed_values_out_of_range_are_refused_with_the_values() -> None:
    for low, high in ((-5, 10), (0, 70_000)):
        stored = np.array([[[low], [high]]])
        said = refusal(tiffs.tiff(stored, 32, GREY, SIGNED))
        assert f"from {low} to {high}" in said


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"bits": 24, "photometric": RGB}, "24 bits (unsigned), 3 samples, RGB"),
        ({"bits": 64, "photometric": GREY}, "64 bits (unsigned), 1 sample, grey"),
        ({"bits": 8, "form": SIGNED}, "8 bits (signed)"),
        (
            {"bits": 16, "form": SIGNED, "photometric": RGB, "planar": True},
            "3 samples, planar, RGB",
        ),
        ({"bits": 64, "form": SIGNED}, "64 bits (signed)"),
        ({"bits": 16, "form": 4}, "16 bits (untyped)"),
        ({"photometric": 9, "samples": 3}, "ICCLab"),
        ({"photometric": 32803, "bits": 16}, "colour filter array"),
        ({"photometric": 34892, "samples": 3}, "linear raw"),
        ({"photometric": 4, "bits": 1}, "mask"),
        ({"photometric": 7}, "no known photometric"),
        ({"photometric": CMYK, "samples": 4, "bits": 32}, "32 bits (unsigned), 4 samples, CMYK"),
        ({"photometric": CMYK, "samples": 4, "more": {332: (3, [2])}}, "CMYK"),
        ({"photometric": 6, "samples": 3}, "YCbCr, uncompressed"),
        ({"photometric": RGB, "samples": 2}, "2 samples, RGB"),
        ({"photometric": GREY, "samples": 2}, "2 samples, grey"),
        ({"photometric": RGB, "more": {258: (3, [5, 6, 5])}}, "5/6/5 bits"),
        ({"photometric": RGB, "more": {339: (3, [1, 1, 3])}}, "8 bits"),
        ({"photometric": RGB, "more": {259: (3, [6])}}, "old JPEG"),
        ({"photometric": RGB, "more": {259: (3, [34712])}}, "JPEG 2000"),
        ({"photometric": RGB, "more": {259: (3, [50001])}}, "WebP"),
        ({"photometric": RGB, "more": {259: (3, [12345])}}, "compression 12345"),
        ({"photometric": RGB, "planar": True, "more": {259: (3, [7])}}, "planar, RGB, JPEG"),
        ({"photometric": RGB, "compression": DEFLATE, "more": {317: (3, [34892])}}, "deflate"),
    ],
)
def test_a_whole_tiff_of_another_kind_is_refused_by_its_name(
    options: dict[str, Any], name: str
) -> None:
    """Never "truncated": the file is whole."""
    given = {"photometric": GREY, "bits": 8, "form": UNSIGNED, **options}
    samples = given.pop("samples", 3 if given["photometric"] == RGB else 1)
    form = given["form"]
    stored = np.zeros((4, 4, samples))
    said = (
        refusal(tiffs.tiff(stored, **{**given, "form": UNSIGNED if form == 4 else form}))
        if form != 4
        else refusal(tiffs.tiff(stored, given["bits"], more={339: (3, [4])}))
    )
    assert name in said
    assert "a TIFF of" in said
    assert "truncated" not in said


@pytest.mark.parametrize("photometric", [GREY, RGB])
@pytest.mark.parametrize("compression", [NONE, LZW, DEFLATE, PACKBITS])
@pytest.mark.parametrize("planar", [False, True])
def test_a_tiff_without_its_last_strip_is_cut_short(
    photometric: int, compression: int, planar: bool
) -> None:
    stored = values(3 if photometric == RGB else 1, 16, UNSIGNED)
    data = tiffs.tiff(stored, 16, photometric, compression=compression, planar=planar, rows=4)
    (place,) = struct.unpack_from("<I", data, 4)
    head = struct.pack("<I", 8 + place % 2)
    broken = data[:4] + head + bytes(place % 2) + data[place:]  # the directory alone
    with pytest.raises(CorruptImage, match="truncated"):
        read(broken)


# ---- TIFF: what Pillow decodes


def saved(image: Image.Image, name: str = "TIFF", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def smooth(mode: str = "RGB", size: tuple[int, int] = (65, 47)) -> Image.Image:
    rough = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    ("mode", "compression"),
    [
        *[("1", each) for each in ("group3", "group4", "tiff_ccitt")],
        *[(mode, "jpeg") for mode in ("L", "RGB", "YCbCr")],
        *[("YCbCr", each) for each in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")],
    ],
)
def test_opencv_agrees_about_jpeg_fax_and_ycbcr_in_a_tiff(
    mode: str, compression: str | None
) -> None:
    data = saved(smooth(mode), compression=compression)
    by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert by_opencv is not None
    assert np.abs(read(data) - by_opencv).max() <= 1


def cielab(rgb: tuple[int, int, int]) -> list[int]:
    """L, a, b of 8 bits, for the white of D50; the matrix is Lindbloom's, adapted by Bradford."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255
    ]
    matrix = [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
    x, y, z = np.cbrt(np.array(matrix) @ linear / [0.96422, 1, 0.82521])
    lab = (116 * y - 16) * 2.55, 500 * (x - y), 200 * (y - z)
    return [round(each) % 256 for each in lab]


@pytest.mark.parametrize("rgb", [(128, 128, 128), (200, 120, 90), (90, 170, 110), (80, 100, 190)])
def test_cielab_is_read_by_the_white_of_d50(rgb: tuple[int, int, int]) -> None:
    data = tiffs.tiff(np.tile(np.array(cielab(rgb)), (4, 4, 1)), 8, 8)
    assert np.abs(read(data)[0, 0] - rgb).max() <= 3


def test_pages_follow_the_same_rules() -> None:
    """A stack of 16-bit pages, white-is-zero among them, and one of a kind that is not read."""
    pages = [np.full((6, 8, 1), 257 * level, np.int64) for level in (10, 20, 30, 40)]
    files = [tiffs.tiff(page, 16, kind) for page, kind in zip(pages, (0, 1, 0, 1), strict=True)]
    data = tiffs.joined(files)
    source = decode_channels(data, 4, max_pixels=LIMIT)
    assert source.pixels[3, 3].tolist() == [245, 20, 225, 40]
    broken = tiffs.joined([*files[:3], tiffs.tiff(pages[3], 24)])
    with pytest.raises(UnsupportedImage, match="a TIFF of 24 bits"):
        decode_channels(broken, 4, max_pixels=LIMIT)


# ---- PNG


def png(
    size: tuple[int, int], depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    between = b"".join(chunk(*each) for each in chunks)
    tail = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + between + tail


def png_rows(stored: NDArray[Any], bits: int) -> bytes:
    if bits == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in stored)
    packed = []
    for row in stored:
        text = "".join(f"{int(value):0{bits}b}" for value in row.ravel())
        text += "0" * (-len(text) % 8)
        packed.append(bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8)))
    return b"".join(b"\0" + row for row in packed)


@pytest.mark.parametrize(
    ("colour", "bits"),
    [*[(0, bits) for bits in (1, 2, 4, 8, 16)], (2, 8), (2, 16), (4, 8), (4, 16), (6, 8), (6, 16)],
)
def test_a_png_of_each_kind_has_its_reference_values(colour: int, bits: int) -> None:
    """16-bit colours are divided by 257 and rounded, as grey ones are."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    stored = values(samples, bits, UNSIGNED)
    data = png((SIZE[1], SIZE[0]), bits, colour, png_rows(stored, bits))
    photometric, extra = (GREY, RGB)[colour in (2, 6)], (2,) if colour >= 4 else ()
    wanted = expected(stored, bits, photometric, UNSIGNED, extra)
    assert np.abs(read(data) - wanted).max() <= (1 if extra else 0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_png_palette_has_its_colours_over_white(bits: int) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (1 << bits, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, 1 << bits, dtype=np.uint8)
    stored = values(1, bits, UNSIGNED)
    chunks = (b"PLTE", colours.tobytes()), (b"tRNS", alpha.tobytes())
    data = png((SIZE[1], SIZE[0]), bits, 3, png_rows(stored, bits), *chunks)
    share = alpha[:, None] / 255
    table = np.rint(colours * share + 255 * (1 - share))
    assert np.abs(read(data) - table[stored[:, :, 0]]).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white_at_each_depth(bits: int) -> None:
    """Pillow compares it, unscaled, with pixels that it has scaled."""
    largest = (1 << bits) - 1
    transparent = largest // 3
    stored = np.array([[[0], [transparent], [largest]]])
    chunk = b"tRNS", struct.pack(">H", transparent)
    data = png((3, 1), bits, 0, png_rows(stored, bits), chunk)
    assert read(data)[0, :, 0].tolist() == [255 if transparent == 0 else 0, 255, 255]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_an_interlaced_png_is_as_good(mode: str) -> None:
    """Made by OpenCV, which agrees about 16 bits."""
    samples = len(mode)
    stored = np.random.default_rng(0).integers(0, 65536, (21, 33, samples)).astype(np.uint16)
    done, file = cv2.imencode(".png", stored.squeeze())
    assert done
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[samples]
    level = np.rint(stored[:, :, order] / 257)
    if samples == 4:
        alpha = level[:, :, 3:] / 255
        level = np.rint(level[:, :, :3] * alpha + 255 * (1 - alpha))
    assert np.abs(read(file.tobytes()) - level).max() <= (samples == 4)


@pytest.mark.parametrize("significant", [10, 12, 14])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_significant_bits_of_a_png_scale_values_that_were_left_small(
    significant: int, colour: int
) -> None:
    """Where values were scaled up, as the specification wants, the chunk sBIT changes nothing."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    largest = (1 << significant) - 1
    small = np.random.default_rng(0).integers(0, largest + 1, (*SIZE, samples))
    if colour >= 4:
        small[:, :, -1] = largest  # opaque
    chunk = b"sBIT", bytes([significant] * samples)
    level = np.rint(small[:, :, : 1 if colour in (0, 4) else 3] * 255 / largest)
    size = SIZE[1], SIZE[0]
    assert (read(png(size, 16, colour, png_rows(small, 16), chunk)) == level).all()
    shifted = small << (16 - significant)
    copied = shifted | small >> (2 * significant - 16)
    for large in (shifted, copied):
        if colour >= 4:
            large[:, :, -1] = 65535
        got = read(png(size, 16, colour, png_rows(large, 16), chunk))
        assert np.abs(got - level).max() <= 1


# ---- BMP


def bmp(
    size: tuple[int, int],
    bits: int,
    rows: bytes,
    *,
    compression: int = 0,
    palette: NDArray[np.uint8] | None = None,
    masks: tuple[int, ...] = (),
    header: int = 40,
) -> bytes:
    """`size` is (width, height), negative heights from the top; `palette` (n, 3) RGB."""
    colours = b"".join(bytes([*row[::-1], 0]) for row in palette) if palette is not None else b""
    count = 0 if palette is None else len(palette)
    head = struct.pack(
        "<IiiHHIIiiII", header, *size, 1, bits, compression, len(rows), 0, 0, count, 0
    )
    named = struct.pack(f"<{len(masks)}I", *masks)
    head += named.ljust(header - 40, b"\0") if header > 40 else named
    offset = 14 + len(head) + len(colours)
    start = b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset)
    return start + head + colours + rows


def packed_rows(numbers: NDArray[Any], bits: int) -> bytes:
    """Rows of whole pixels, the lower row first, each of a multiple of four bytes."""
    rows = []
    for row in numbers[::-1]:
        if bits >= 8:
            raw = b"".join(int(value).to_bytes(bits // 8, "little") for value in row)
        else:
            text = "".join(f"{int(value):0{bits}b}" for value in row)
            text += "0" * (-len(text) % 8)
            raw = bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))
        rows.append(raw + bytes(-len(raw) % 4))
    return b"".join(rows)


BLACK_AND_WHITE = np.array([[0, 0, 0], [255, 255, 255]], np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colours", ["any", "black and white", "grey by number"])
def test_a_bmp_palette_has_its_colours(bits: int, colours: str) -> None:
    """Pillow takes two colours for one bit a pixel, and greys by number for eight."""
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (1 << bits, 3), dtype=np.uint8)
    if colours == "black and white":
        palette = BLACK_AND_WHITE
    elif colours == "grey by number":
        palette = np.repeat(np.arange(1 << bits, dtype=np.uint8)[:, None], 3, axis=1)
    numbers = rng.integers(0, len(palette), SIZE)
    data = bmp((SIZE[1], SIZE[0]), bits, packed_rows(numbers, bits), palette=palette)
    assert (read(data) == palette[numbers]).all()


@pytest.mark.parametrize(
    ("bits", "masks", "header", "compression"),
    [
        (16, (), 40, 0),
        (16, (0x7C00, 0x3E0, 0x1F), 40, 3),
        (16, (0xF800, 0x7E0, 0x1F), 40, 3),
        (16, (0xF00, 0xF0, 0xF), 40, 3),
        (16, (0xF00, 0xF0, 0xF, 0xF000), 124, 3),
        (24, (), 40, 0),
        (32, (), 40, 0),
        (32, (0xFF0000, 0xFF00, 0xFF), 40, 3),
        (32, (0xFF, 0xFF00, 0xFF0000), 40, 3),
        (32, (0x3FF00000, 0xFFC00, 0x3FF), 40, 3),
        (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000), 40, 6),
        (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000), 108, 3),
    ],
)
def test_a_bmp_without_palette_has_its_colours(
    bits: int, masks: tuple[int, ...], header: int, compression: int
) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << bits, SIZE)
    rows = packed_rows(numbers, bits)
    data = bmp((SIZE[1], SIZE[0]), bits, rows, masks=masks, header=header, compression=compression)
    meant = masks or {16: (0x7C00, 0x3E0, 0x1F)}.get(bits, (0xFF0000, 0xFF00, 0xFF))
    level = np.stack(
        [
            np.rint((numbers & mask) // (mask & -mask) * 255 / (mask // (mask & -mask)))
            for mask in meant
        ],
        axis=2,
    )
    wanted = level[:, :, :3]
    if len(meant) == 4:
        alpha = level[:, :, 3:]
        wanted = np.rint((wanted * alpha + 255 * (255 - alpha)) / 255)
    assert np.abs(read(data) - wanted).max() <= (len(meant) == 4)
    top_down = bmp(
        (SIZE[1], -SIZE[0]), bits, rows, masks=masks, header=header, compression=compression
    )
    assert (read(top_down) == read(data)[::-1]).all()


def test_run_lengths_of_a_bmp_may_jump() -> None:
    """Pillow misreads the jumps, and what begins at an odd byte."""
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    runs = bytes([3, 5, 0, 2, 1, 2, 4, 7, 0, 0, 8, 9, 0, 1])
    data = bmp((8, 6), 8, runs, palette=palette, compression=1)
    wanted = np.zeros((6, 8), int)
    wanted[5, :3], wanted[3, 4:], wanted[2] = 5, 7, 9
    assert (read(data)[:, :, 0] == wanted).all()
    with pytest.raises(CorruptImage, match="truncated"):
        read(data[:-3])


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (bmp((4, 4), 3, bytes(64)), "a BMP of 3 bits"),
        (bmp((4, 4), 64, bytes(256)), "a BMP of 64 bits"),
        (bmp((4, 4), 24, bytes(64), compression=4), "JPEG-compressed BMP"),
        (bmp((4, 4), 24, bytes(64), compression=1), "a BMP of 24 bits a pixel in compression 1"),
        (bmp((4, 4), 32, bytes(64), compression=3, masks=(0xF0F, 0xF0, 0xF000)), "masks 00000f0f"),
        (bmp((4, 4), 32, bytes(64), compression=3, masks=(0xFF, 0xFF, 0xFF)), "colour masks"),
        (bmp((4, 4), 24, bytes(64), header=44), "a header of 44 bytes"),
    ],
)
def test_a_bmp_of_another_kind_is_refused_by_its_name(data: bytes, name: str) -> None:
    assert name in refusal(data)


# ---- JPEG, GIF and WebP


@pytest.mark.parametrize(
    ("place", "value", "name"),
    [
        (1, 0xC3, "lossless coding"),
        (1, 0xC9, "arithmetic-coded coding"),
        (1, 0xCB, "hierarchical coding"),
        (4, 12, "12 bits a sample"),
    ],
)
def test_a_jpeg_of_another_kind_is_refused_by_its_name(place: int, value: int, name: str) -> None:
    data = bytearray(saved(smooth(), "JPEG"))
    data[data.index(b"\xff\xc0") + place] = value
    assert name in refusal(bytes(data))


def test_the_first_frame_of_a_webp_lies_where_it_says() -> None:
    """On white; of an animation whose first frame is smaller than its canvas."""
    red = saved(Image.new("RGB", (8, 6), "red"), "WEBP", lossless=True)[12:]
    half = saved(Image.new("RGBA", (8, 6), (255, 0, 0, 128)), "WEBP", quality=90)
    alpha = half.index(b"ALPH")
    for chunks, colour in ((red, [255, 0, 0]), (half[alpha:], [255, 127, 127])):
        frame = b"".join(struct.pack("<I", each)[:3] for each in (2, 1, 7, 5, 0)) + b"\0" + chunks
        canvas = (
            struct.pack("<II", 10, 0x12) + struct.pack("<I", 19)[:3] + struct.pack("<I", 15)[:3]
        )
        body = b"VP8X" + canvas + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
        body += b"ANMF" + struct.pack("<I", len(frame)) + frame
        pixels = read(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body)
        assert pixels.shape == (16, 20, 3)
        assert (pixels[:2] == 255).all()
        assert (pixels[:, 12:] == 255).all()
        assert np.abs(pixels[2:8, 4:12] - colour).max() <= 4


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_webp_has_pillows_pixels(mode: str, options: dict[str, Any]) -> None:
    image = smooth()
    if mode == "RGBA":
        image.putalpha(smooth("L"))
    data = saved(image, "WEBP", **options)
    opened = Image.open(io.BytesIO(data)).convert("RGBA")
    wanted = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened).convert("RGB")
    assert np.abs(read(data) - np.asarray(wanted)).max() <= (mode == "RGBA")


def test_a_gif_may_have_its_first_image_beside_its_screen() -> None:
    """The canvas grows, and what no image covers is of the background."""
    data = bytearray(saved(Image.new("P", (8, 6), 3), "GIF"))
    place = data.index(b"\x2c")
    struct.pack_into("<HH", data, place + 1, 4, 2)
    assert read(bytes(data)).shape == (8, 12, 3)
    with pytest.raises(ImageTooLarge, match="12 x 8"):
        decode(bytes(data), max_pixels=95)


# ---- AVIF

COLOURS = {
    "red": (255, 0, 0),
    "olive": (128, 128, 0),
    "white": (255, 255, 255),
    "navy": (0, 0, 128),
}


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("name", COLOURS)
def test_an_avif_of_one_colour_has_it_to_two_levels(name: str, subsampling: str) -> None:
    data = saved(Image.new("RGB", (40, 30), name), "AVIF", quality=100, subsampling=subsampling)
    assert read(data).shape == (30, 40, 3)
    assert np.abs(read(data) - COLOURS[name]).max() <= 2


@pytest.mark.parametrize("depth", [8, 10, 12])
def test_an_avif_of_more_bits_is_scaled_to_eight(depth: int) -> None:
    ramp = np.repeat(np.arange(16) * 17, 8)[None, :].repeat(32, 0)
    stored = (ramp * ((1 << depth) - 1) // 255).astype(np.uint16 if depth > 8 else np.uint8)
    flags = [cv2.IMWRITE_AVIF_DEPTH, depth, cv2.IMWRITE_AVIF_QUALITY, 100]
    found = read(cv2.imencode(".avif", np.dstack([stored] * 3), flags)[1].tobytes())
    assert np.abs(found - ramp[..., None]).max() <= 2


def test_a_transparent_avif_is_over_white() -> None:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    found = read(saved(image, "AVIF", quality=100, subsampling="4:4:4"))
    assert np.abs(found - [255, 127, 127]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_as_pillow_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(smooth(), "AVIF", exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        wanted = np.asarray(ImageOps.exif_transpose(opened).convert("RGB")).astype(int)
    assert read(data).shape == wanted.shape
    assert np.abs(read(data) - wanted).max() <= 1


def test_an_animated_avif_is_refused_by_its_name() -> None:
    image = smooth()
    assert "an animated AVIF" in refusal(
        saved(image, "AVIF", save_all=True, append_images=[image.transpose(0)])
    )


def stream_of(data: bytes) -> bytes:
    """The AV1 stream of a file with one item."""
    return data[data.index(b"mdat") + 4 :]


def test_several_frames_in_an_avif_are_refused_before_one_is_decoded() -> None:
    stream = stream_of(saved(smooth(), "AVIF"))
    with pytest.raises(UnsupportedImage, match="several frames or layers"):
        avif_header._coded_pixels(stream * 3, [(0, 3 * len(stream))])


def test_an_avif_is_counted_by_its_frames_and_not_by_what_it_claims() -> None:
    data = saved(Image.new("RGB", (320, 240)), "AVIF")
    claims = data.replace(struct.pack(">II", 320, 240), struct.pack(">II", 3, 2), 1)
    header = avif_header.read(claims)
    assert (header.width, header.height) == (3, 2)
    assert header.fixed_bytes >= 8 * 320 * 240
    huge = data.replace(struct.pack(">II", 320, 240), struct.pack(">II", 50_000, 50_000), 1)
    with pytest.raises(ImageTooLarge, match="50000 x 50000"):
        decode(huge, max_pixels=LIMIT)


def test_extents_that_repeat_the_file_are_refused() -> None:
    data = bytearray(saved(smooth(), "AVIF"))
    at = data.index(b"iloc") + 4
    struct.pack_into(">I", data, len(data) and at + 4 + 2 + 2 + 2 + 2 + 2 + 4, len(data))
    with pytest.raises(CorruptImage):
        decode(bytes(data), max_pixels=LIMIT)


@pytest.mark.parametrize("seed", range(40))
def test_a_broken_avif_is_one_of_the_four_errors_or_an_image(seed: int) -> None:
    rng, data = np.random.default_rng(seed), bytearray(saved(smooth(), "AVIF"))
    for _ in range(3):
        data[int(rng.integers(12, min(len(data), 400)))] = int(rng.integers(256))
    try:
        pixels = decode(bytes(data), max_pixels=LIMIT).pixels
    except (CorruptImage, ImageTooLarge, UnsupportedImage):
        return
    assert pixels.dtype == np.uint8
