"""headers: what is beside the pixels is passed in linear time, bounded, and never decoded."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pictures
import pytest
import tiffs
from PIL import Image

from service.errors import CorruptImage, ImageError, ImageTooLarge
from service.images.decode import decode, read_header
from service.images.headers import exif, header

LIMIT = 1_000_000
PARTS, BYTES = header.MAX_PARTS, header.MAX_METADATA_BYTES


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def riff(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) & 1)


JPEG, PNG = pictures.file(pictures.noise(), "JPEG"), pictures.png()
WEBP = pictures.file(pictures.noise(), "WEBP", lossless=True)
GIF = pictures.file(pictures.noise(), "GIF")
GIF_START = 13 + (3 << (GIF[10] & 7) + 1)


def in_jpeg(more: bytes) -> bytes:
    return JPEG[:2] + more + JPEG[2:]


def in_png(more: bytes) -> bytes:
    return PNG[:33] + more + PNG[33:]


def in_webp(more: bytes) -> bytes:
    body = WEBP[12:] + more
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def in_gif(more: bytes) -> bytes:
    return GIF[:GIF_START] + more + GIF[GIF_START:]


def comment(blocks: int, size: int = 255) -> bytes:
    return b"\x21\xfe" + (bytes([size]) + b"x" * size) * blocks + b"\0"


def directories(count: int) -> bytes:
    """A TIFF of one image whose directory is followed by so many empty ones."""
    file = tiffs.tiff(np.zeros((4, 4, 1)))
    (place,) = struct.unpack_from("<I", file, 4)
    (entries,) = struct.unpack_from("<H", file, place)
    link = place + 2 + 12 * entries
    first = len(file) + len(file) % 2
    places = [first + 6 * each for each in range(count)]
    chain = b"".join(struct.pack("<HI", 0, each) for each in [*places[1:], 0])
    return file[:link] + struct.pack("<I", first) + file[link + 4 :].ljust(first - link - 4) + chain


ENDLESS = {
    "EXIF": (lambda: in_jpeg(segment(0xE1, b"Exif\0\0") * (PARTS + 1)), "65,536 JPEG segments"),
    "JPEG comments": (lambda: in_jpeg(segment(0xFE, b"") * (PARTS + 1)), "65,536 JPEG segments"),
    "profile": (
        lambda: in_jpeg(segment(0xE2, bytes(65_000)) * 400),
        "bytes of metadata in its JPEG",
    ),
    "JPEG padding": (lambda: in_jpeg(b"\xff" * (BYTES + 1)), "bytes of metadata in its JPEG"),
    "PNG texts": (lambda: in_png(chunk(b"tEXt", b"a\0b") * (PARTS + 1)), "65,536 PNG chunks"),
    "PNG data": (lambda: in_png(chunk(b"IDAT", b"") * (PARTS + 1)), "65,536 PNG chunks"),
    "PNG text": (lambda: in_png(chunk(b"iTXt", bytes(BYTES + 1))), "bytes of metadata in its PNG"),
    "PNG profiles": (
        lambda: in_png(chunk(b"iCCP", bytes(BYTES // 2)) * 3),
        "bytes of metadata in its PNG",
    ),
    "WebP chunks": (lambda: in_webp(riff(b"abcd", b"") * (PARTS + 1)), "65,536 WebP chunks"),
    "WebP XMP": (lambda: in_webp(riff(b"XMP ", bytes(BYTES + 1))), "bytes of metadata in its WebP"),
    "GIF comment": (lambda: in_gif(comment(PARTS + 1)), "65,536 GIF blocks"),
    "GIF comments": (lambda: in_gif(comment(1, 1) * (PARTS // 2 + 1)), "65,536 GIF blocks"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_file_of_endless_metadata_is_refused_with_what_was_found(name: str) -> None:
    """100,000 EXIF segments cost Pillow seconds, and ten times as many minutes."""
    build, words = ENDLESS[name]
    data = build()
    with pytest.raises(ImageTooLarge, match=r"save it again without metadata") as caught:
        decode(data, max_pixels=LIMIT)
    assert words in caught.value.detail


def test_a_tiff_of_endless_entries_or_directories_is_refused_or_not_walked() -> None:
    """The first directory alone is read; where pages are wanted, no more than they are."""
    tags = {tag: (3, [1]) for tag in range(40_000, 41_100)}
    with pytest.raises(ImageTooLarge, match=r"1,1[0-9]+ entries"):
        decode(tiffs.tiff(np.zeros((4, 4, 1)), more=tags), max_pixels=LIMIT)
    assert decode(directories(50_000), max_pixels=LIMIT).width == 4


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (in_jpeg, segment(0xE1, b"Exif\0\0")),
        (in_jpeg, segment(0xED, b"Photoshop")),
        (in_jpeg, b"\xff"),
        (in_png, chunk(b"tEXt", b"a\0b")),
        (in_png, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(99)))),
        (in_webp, riff(b"abcd", b"")),
        (in_gif, comment(1, 3)),
    ],
    ids=["EXIF", "Photoshop", "padding", "PNG text", "raw EXIF", "WebP", "GIF"],
)
def test_metadata_are_walked_in_linear_time(
    build: Any, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: as many steps as there are parts, a constant aside."""
    steps = 0

    def count(*arguments: Any) -> None:
        nonlocal steps
        steps += 1

    for module in ("jpeg", "png", "webp", "gif"):
        monkeypatch.setattr(f"service.images.headers.{module}_header.check_parts", count)
    counted = []
    for times in (1_000, 2_000, 4_000):
        steps = 0
        read_header(build(part * times))
        counted.append(steps)
    assert counted[2] - counted[1] <= 2 * (counted[1] - counted[0])
    assert counted[2] <= 4_000 * 2 + 100


def camera_jpeg() -> bytes:
    """What phones and raw converters write: a maker note, a profile, depth in XMP, a gain map."""
    camera = Image.Exif()
    camera[pictures.ORIENTATION] = 6
    camera.get_ifd(0x8769)[0x927C] = bytes(60_000)
    tags = b"Exif\0\0" + camera.tobytes()[6:]
    more = segment(0xE1, tags)
    more += segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>")
    extended = b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000)
    more += segment(0xE1, extended) * 90
    more += b"".join(
        segment(0xE2, b"ICC_PROFILE\0" + bytes([n, 40]) + bytes(65_000)) for n in range(40)
    )
    more += segment(0xED, b"Photoshop 3.0\0" + bytes(40_000)) + segment(0xE2, b"MPF\0" + bytes(80))
    more += segment(0xEB, b"JP" + bytes(64_000)) * 20 + segment(0xFE, b"a comment")
    return in_jpeg(more)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [in_png, in_webp, in_gif, camera_jpeg])
def test_the_metadata_of_an_ordinary_file_pass(build: Any) -> None:
    ordinary = {
        in_png: chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000)))
        + chunk(b"eXIf", b"II*\0" + bytes(60_000))
        + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bytes(5_000_000)),
        in_webp: riff(b"ICCP", bytes(3_000_000)) + riff(b"EXIF", bytes(60_000)),
        in_gif: comment(4_000),
    }
    data = build(ordinary[build]) if build in ordinary else build()
    assert len(data) > 60_000
    size = decode(data, max_pixels=LIMIT).size
    assert size == ((60, 80) if build is camera_jpeg else (80, 60))


@pytest.mark.parametrize("build", [in_png, in_webp, in_gif, camera_jpeg])
def test_no_decoder_sees_the_metadata(build: Any) -> None:
    """What it does not see costs it nothing, whatever it makes of them."""
    more = {
        in_png: chunk(b"iTXt", bytes(500_000)) * 3,
        in_webp: riff(b"XMP ", bytes(500_000)),
        in_gif: comment(2_000),
    }
    data = build(more[build]) if build in more else build()
    found = read_header(data)
    seen = found.still(data) if build is in_webp else found.pillow_bytes(data)
    assert len(seen) < len(data) // 5
    tiff = tiffs.tiff(
        np.zeros((4, 4, 3)), 8, 6, more={700: (7, list(bytes(50_000))), 530: (3, [1, 1])}
    )
    assert b"\xbc\x02" not in read_header(tiff).pillow_bytes(tiff)[-400:]


# ---- the orientation


EXIF_6 = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + bytes(4)
XMP_6 = b'<rdf:Description tiff:Orientation="6"/>'


@pytest.mark.parametrize(
    "data",
    [
        in_jpeg(segment(0xE1, b"Exif\0\0" + EXIF_6)),
        in_jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP_6)),
        in_png(chunk(b"eXIf", EXIF_6)),
        PNG[:-12] + chunk(b"eXIf", EXIF_6) + PNG[-12:],
        in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_6)),
        in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP_6))),
        in_png(
            chunk(
                b"zTXt",
                b"Raw profile type exif\0\0"
                + zlib.compress(b"\nexif\n 32\n" + (b"Exif\0\0" + EXIF_6).hex().encode() + b"\n"),
            )
        ),
        in_webp(riff(b"EXIF", EXIF_6)),
        in_webp(riff(b"EXIF", b"Exif\0\0" + EXIF_6)),
        in_webp(riff(b"XMP ", b"<tiff:Orientation>6</tiff:Orientation>")),
        tiffs.tiff(np.zeros((60, 80, 3)), 8, 2, more={274: (3, [6])}),
    ],
    ids=range(11),
)
def test_the_orientation_is_found_wherever_a_file_may_have_it(data: bytes) -> None:
    assert decode(data, max_pixels=LIMIT).size == (60, 80)


@pytest.mark.parametrize(
    ("tags", "xmp", "orientation"),
    [
        (b"", b"", 1),
        (EXIF_6, b'tiff:Orientation="3"', 6),
        (EXIF_6[:12], b"tiff:Orientation='3'", 3),
        (b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x112, 3, 1, 8, 0), b"", 8),
        (b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x112, 4, 1, 5), b"", 5),
        (EXIF_6.replace(b"\x06\0", b"\x09\0"), b"", 1),
        (b"II*\0\xff\xff\xff\xff", b"", 1),
        (b"junk", b"tiff:Orientation", 1),
    ],
    ids=range(8),
)
def test_an_orientation_that_cannot_be_read_is_none(
    tags: bytes, xmp: bytes, orientation: int
) -> None:
    assert exif.orientation_of(tags, xmp) == orientation


# ---- broken headers


@pytest.mark.parametrize(
    "data",
    [JPEG, PNG, WEBP, GIF, pictures.file(pictures.noise(), "BMP")],
    ids=["JPEG", "PNG", "WEBP", "GIF", "BMP"],
)
def test_a_header_cut_anywhere_is_corrupt(data: bytes) -> None:
    for length in range(8, 60):
        with pytest.raises(ImageError):
            decode(data[:length], max_pixels=LIMIT)


@pytest.mark.parametrize(("named", "described"), [(3, 2), (1, 0), (0, 0)])
def test_a_jpeg_that_describes_fewer_components_than_it_names_or_none_is_corrupt(
    named: int, described: int
) -> None:
    frame = struct.pack(">BHHB", 8, 4, 4, named) + b"\x01\x11\0" * described
    data = b"\xff\xd8" + segment(0xC0, frame) + segment(0xDA, b"\x01\x01\0\0\x3f\0")
    with pytest.raises(CorruptImage, match="truncated"):
        read_header(data)


def test_the_smallest_header_of_a_bmp_is_whole_at_26_bytes() -> None:
    """That of OS/2. Its pixels are missing, not its size."""
    start = b"BM" + struct.pack("<IHHI", 26, 0, 0, 26)
    data = start + struct.pack("<IHHHH", 12, 4, 3, 1, 24)
    assert len(data) == 26
    assert read_header(data).upright == (4, 3)
    with pytest.raises(CorruptImage, match="truncated"):
        read_header(data[:25])


def test_a_tiff_whose_values_lie_beyond_its_end_is_corrupt() -> None:
    data = tiffs.tiff(np.zeros((40, 4, 1)), rows=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in range(10, len(data) - 1, 7):
            with pytest.raises(CorruptImage):
                decode(data[:length], max_pixels=LIMIT)


def test_a_tiff_of_a_million_tiles_is_too_large() -> None:
    """Each of them costs a step, however few pixels it has."""
    tags = {324: (4, [8] * 1_000_001), 325: (4, [1]), 322: (4, [1]), 323: (4, [1])}
    with pytest.raises(ImageTooLarge, match=r"1,000,001 strips or tiles"):
        decode(tiffs.tiff(np.zeros((4, 4, 1)), more=tags), max_pixels=LIMIT)


def test_a_tile_wider_than_decoders_take_in_one_band_is_too_large() -> None:
    data = tiffs.tiff(np.zeros((4, 4, 1), np.uint8), tile=(65_536, 2))
    with pytest.raises(ImageTooLarge, match="the limit of a side is 65,535"):
        decode(data, max_pixels=LIMIT)


def test_a_tiff_directory_that_points_to_itself_ends() -> None:
    data = bytearray(tiffs.tiff(np.zeros((4, 4, 1))))
    (place,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, place)
    struct.pack_into("<I", data, place + 2 + 12 * count, place)
    assert len(list(read_directories(bytes(data)))) == 1


def read_directories(data: bytes) -> Any:
    from service.images.headers.tiff_header import directories  # noqa: PLC0415 - shadows the builder above

    return directories(data)


def test_jpeg_scans_are_bounded_in_a_tiff_too() -> None:
    """Each strip has its own; what counts is how often all pixels are passed over."""
    file = io.BytesIO()
    Image.fromarray(pictures.noise(160, 1200)).save(file, "TIFF", compression="jpeg")
    assert decode(file.getvalue(), max_pixels=LIMIT).height == 1200
    with pytest.raises(ImageError, match="scans"):
        decode(file.getvalue() + b"\xff\xda" * 40_000, max_pixels=LIMIT)


# ---- what a decoder is given, and what it takes


def test_libtiff_is_given_every_tag_of_a_ycbcr_image() -> None:
    more = {530: (3, [1, 1]), 531: (3, [2]), 532: (4, [0, 255, 128, 255, 128, 255])}
    data = tiffs.tiff(np.zeros((4, 4, 3)), 8, 6, more=more)
    with Image.open(io.BytesIO(read_header(data).pillow_bytes(data))) as image:
        kept = {tag: image.tag_v2[tag] for tag in more}
    assert kept == {530: (1, 1), 531: 2, 532: (0, 255, 128, 255, 128, 255)}


def test_a_segment_that_libtiff_decodes_is_counted_as_rgba_and_as_coefficients() -> None:
    """Four bytes a pixel, and two bytes a sample; and the file twice."""
    data = tiffs.tiff(np.zeros((6, 5, 3)), 8, 6, rows=2, more={530: (3, [1, 1])})
    assert read_header(data).fixed_bytes == 2 * len(data) + 5 * 2 * (4 + 2 * 3)


def test_a_row_of_tiles_is_counted_with_all_its_tiles() -> None:
    """Here 16 of 64 kB, as stored thrice, and three times as they are unpacked."""
    data = tiffs.tiff(np.zeros((256, 4096, 1)), tile=(256, 256), compression=tiffs.DEFLATE)
    stored = 16 * len(zlib.compress(bytes(256 * 256)))
    assert read_header(data).fixed_bytes == 3 * stored + 3 * 4096 * 256
