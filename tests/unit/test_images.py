"""images: bytes become a bounded upright picture, and every input pixel is traced to the source."""

from __future__ import annotations

import functools
import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import functional as transforms

from service.errors import CorruptImage, EmptyImage, ImageError, ImageTooLarge, UnsupportedImage
from service.images.decode import (
    MAX_JPEG_SCANS,
    MAX_SIDE,
    Fit,
    Preprocessing,
    Source,
    decode,
    fit_to_model,
    preview,
    preview_size,
)

LIMIT = 1_000_000
ORIENTATION = 0x0112
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


def encode(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def source(width: int, height: int) -> Source:
    return Source(noise(width, height), "PNG", "")


def decoded(image: Image.Image, name: str = "PNG", **options: object) -> NDArray[np.uint8]:
    return decode(encode(image, name, **options), max_pixels=LIMIT).pixels


def png(
    size: tuple[int, int], depth: int, colour: int, rows: bytes, transparent: bytes = b""
) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    extra = chunk(b"tRNS", transparent) if transparent else b""
    content = header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


# ---- decode: formats, orientation, modes


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read_and_named(name: str) -> None:
    """The bytes say the format; pixels are uint8 RGB; the digest is of the upload."""
    data = encode(Image.fromarray(noise(20, 10)), name)
    result = decode(data, max_pixels=LIMIT)
    assert (result.format, result.width, result.height) == (name, 20, 10)
    assert result.pixels.dtype == np.uint8
    assert result.pixels.shape == (10, 20, 3)
    assert result.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_value(name: str) -> None:
    """Decoding RGB is the identity."""
    assert (decoded(Image.fromarray(noise(13, 7)), name) == noise(13, 7)).all()


def test_an_mpo_is_a_jpeg_of_its_first_frame() -> None:
    """Phones and stereo cameras write MPO; to the client it is a JPEG."""
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    data = encode(red, "MPO", save_all=True, append_images=[blue])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    result = decode(data, max_pixels=LIMIT)
    assert result.format == "JPEG"
    assert result.pixels[8, 8].tolist() == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(name: str) -> None:
    """Later frames are not looked at."""
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    pixels = decoded(red, name, save_all=True, append_images=[blue])
    assert pixels[8, 8].tolist() == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_exactly_once(name: str, orientation: int) -> None:
    """Whatever the tag, the red quarter comes out upper left and the blue one lower right."""
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 24, 16))
    upright.paste("blue", (24, 16, 48, 32))
    turn = Image.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = decoded(stored, name, exif=exif)
    assert pixels.shape == (32, 48, 3)
    assert pixels[8, 12].tolist() == pytest.approx([255, 0, 0], abs=8)
    assert pixels[24, 36].tolist() == pytest.approx([0, 0, 255], abs=8)


def test_broken_exif_does_not_refuse_the_picture() -> None:
    """The pixels are what matters; an orientation that cannot be read is none."""
    data = encode(Image.new("RGB", (8, 4), "red"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\0\0junk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(data, max_pixels=LIMIT).width == 8


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *[(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
        *[("RGB", "BMP"), ("L", "GIF"), ("L", "JPEG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG")],
        *[(mode, "TIFF") for mode in ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK")],
        *[(mode, "TIFF") for mode in ("YCbCr", "LAB", "I;16", "I;16B")],
    ],
)
def test_every_mode_gives_mid_grey_for_mid_grey(mode: str, name: str) -> None:
    """A grey of 128 stays 128 (give or take the format's rounding); 1-bit dithers to 0 and 255."""
    if mode.startswith("I;16"):
        values = np.full((8, 8), 128 * 257, dtype=">u2" if mode.endswith("B") else "<u2")
        grey = Image.fromarray(values)
    elif mode == "LAB":
        grey = Image.merge("LAB", [Image.new("L", (8, 8), value) for value in (137, 128, 128)])
    elif mode in ("P", "PA"):
        grey = Image.new("P", (8, 8), 1)
        grey.putpalette([0, 0, 0, 128, 128, 128])
        grey = grey.convert(mode)
    else:
        grey = Image.new("L", (8, 8), 128).convert("RGB").convert(mode)
    pixels = decoded(grey, name)
    with Image.open(io.BytesIO(encode(grey, name))) as stored:
        assert stored.mode in (mode, "RGB", "RGBA", "P")
    if mode == "1":
        assert set(np.unique(pixels)) <= {0, 255}
        return
    assert np.abs(pixels.astype(int) - 128).max() <= 2


def test_16_bits_are_scaled_not_clipped() -> None:
    """Value / 257, rounded, for PNG and both byte orders of TIFF."""
    values = np.array([[0, 128, 129, 256, 257, 32767, 40000, 65535]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    assert (decoded(Image.fromarray(values))[..., 0] == expected).all()
    assert (decoded(Image.fromarray(values), "TIFF")[..., 0] == expected).all()
    big = Image.fromarray(values.astype(">u2"))
    assert (decoded(big, "TIFF")[..., 1] == expected).all()
    signed = Image.fromarray(values.astype(np.int32))
    assert (decoded(signed, "TIFF")[..., 2] == expected).all()


def test_floats_are_0_to_1_or_0_to_255() -> None:
    """The largest value decides; what is outside 0..255 is clipped."""
    unit = np.array([[0.0, 0.25, 1.0]], dtype=np.float32)
    assert decoded(Image.fromarray(unit), "TIFF")[0, :, 0].tolist() == [0, 64, 255]
    byte = np.array([[-4.0, 99.6, 300.0]], dtype=np.float32)
    assert decoded(Image.fromarray(byte), "TIFF")[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_float_picture_that_is_not_finite_is_corrupt(value: float) -> None:
    """There is no brightness to show for NaN."""
    data = encode(Image.fromarray(np.array([[0.5, value]], dtype=np.float32)), "TIFF")
    with pytest.raises(CorruptImage):
        decode(data, max_pixels=LIMIT)


def test_transparency_is_laid_over_white() -> None:
    """Alpha channels, palette transparency, and the transparent colour of a PNG."""
    half_red = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert decoded(half_red)[0, 0].tolist() == [255, 127, 127]
    assert decoded(half_red, "TIFF")[0, 0].tolist() == [255, 127, 127]
    assert decoded(half_red, "WEBP", lossless=True)[0, 0].tolist() == [255, 127, 127]
    assert decoded(Image.new("LA", (2, 2), (0, 0)))[0, 0].tolist() == [255] * 3
    assert decoded(Image.new("LA", (2, 2), (0, 0)), "TIFF")[0, 0].tolist() == [255] * 3
    # The tag ExtraSamples, from "alpha" to "premultiplied alpha": Pillow's modes La and RGBa.
    for mode, colour in (("LA", (64, 128)), ("RGBA", (64, 64, 64, 128))):
        tiff = encode(Image.new(mode, (2, 2), colour), "TIFF")
        tag = struct.pack("<HHIH", 338, 3, 1, 2)
        assert tiff.count(tag) == 1
        premultiplied = tiff.replace(tag, struct.pack("<HHIH", 338, 3, 1, 1))
        assert decode(premultiplied, max_pixels=LIMIT).pixels[0, 0, 0] == pytest.approx(191, abs=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert decoded(palette)[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    for name in ("PNG", "GIF"):
        assert decoded(palette, name, transparency=0)[0].tolist() == [[255] * 3, [0, 0, 255]]
    half = decoded(palette, transparency=bytes([128, 255]))
    assert half[0].tolist() == [[255, 127, 127], [0, 0, 255]]


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "transparent", "expected"),
    [
        (1, 0, b"\0\x40", b"\0\0", [255, 255]),
        (8, 0, b"\0\x05\x06", b"\0\x05", [255, 6]),
        (16, 0, b"\0\x05\x05\x06\x06", b"\x05\x05", [255, 6]),
        (8, 2, b"\0\5\5\5\6\6\6", b"\0\5\0\5\0\5", [255, 6]),
        (16, 2, b"\0" + b"\5\7" * 3 + b"\6\6" * 3, b"\5\7" * 3, [255, 6]),
    ],
)
def test_the_transparent_colour_of_a_png_is_white(
    depth: int, colour: int, rows: bytes, transparent: bytes, expected: list[int]
) -> None:
    """The tRNS chunk, for grey and colour of 1, 8 and 16 bits."""
    data = png((2, 1), depth, colour, rows, transparent)
    assert decode(data, max_pixels=LIMIT).pixels[0, :, 0].tolist() == expected


def test_an_adobe_cmyk_jpeg_keeps_its_colours() -> None:
    """Adobe writes CMYK inverted; red must not come out cyan."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encode(red, "JPEG")
    assert b"Adobe" in data
    assert decode(data, max_pixels=LIMIT).pixels[8, 8].tolist() == pytest.approx([255, 0, 0], abs=4)


# ---- decode: refusals


def test_no_bytes_is_an_empty_image() -> None:
    """Not "unsupported": the client forgot the file."""
    with pytest.raises(EmptyImage):
        decode(b"", max_pixels=LIMIT)


@pytest.mark.parametrize(
    "data",
    [b"x", b"BMW drives", b"%PDF-1.7", b"<svg/>", b"\0" * 100, b"RIFF\0\0\0\0WAVE", b"\xff\xd8"],
)
def test_what_is_not_a_picture_is_unsupported(data: bytes) -> None:
    """The answer names the formats that are read."""
    with pytest.raises(UnsupportedImage, match="send JPEG, PNG"):
        decode(data, max_pixels=LIMIT)


@pytest.mark.parametrize("name", ["ICO", "PPM", "JPEG2000", "TGA"])
def test_formats_beyond_the_seven_are_unsupported(name: str) -> None:
    """Pillow could read more; every reader is attack surface."""
    with pytest.raises(UnsupportedImage):
        decode(encode(Image.new("RGB", (32, 32)), name), max_pixels=LIMIT)


@pytest.mark.parametrize("name", FORMATS)
def test_the_bound_is_checked_before_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel over the limit is refused from the header; exactly the limit is read."""
    data = encode(Image.new("RGB", (30, 20)), name)
    assert decode(data, max_pixels=600).width == 30

    def must_not_run(*_: object) -> None:
        raise AssertionError("decoded before the check")

    monkeypatch.setattr(ImageFile.ImageFile, "load", must_not_run)
    with pytest.raises(ImageTooLarge, match=r"30 x 20.*at most 599"):
        decode(data, max_pixels=599)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_too_large(side: int) -> None:
    """60,000 x 60,000 pixels in a few bytes: over ours and over Pillow's bound."""
    with pytest.raises(ImageTooLarge):
        decode(png((side, side), 8, 2, b""), max_pixels=LIMIT)


def test_a_tiff_tile_larger_than_the_limit_is_too_large() -> None:
    """A tile is decoded whole, even if the picture is one pixel of it."""
    tags = {322: 16_000, 323: 16_000}
    entries = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, **tags, 324: 8, 325: 1}
    ifd = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + ifd + b"\0" * 8
    with pytest.raises(ImageTooLarge, match="16000 x 16000"):
        decode(data, max_pixels=LIMIT)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    """A scan is 59 bytes and passes over all pixels: the bound is on scans, too."""
    data = encode(Image.new("RGB", (64, 64), "grey"), "JPEG", progressive=True)
    start = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    end = data.index(b"\xff\xc4", start)
    bomb = data[:end] + data[start:end] * MAX_JPEG_SCANS + data[end:]
    assert decode(data, max_pixels=LIMIT).width == 64
    with pytest.raises(UnsupportedImage, match="baseline"):
        decode(bomb, max_pixels=LIMIT)


@functools.cache
def sample(name: str, options: tuple[tuple[str, object], ...] = ()) -> tuple[bytes, bytes]:
    smooth = Image.fromarray(noise(6, 5)).resize((48, 40))
    data = encode(smooth, name, **dict(options))
    return data, decode(data, max_pixels=LIMIT).pixels.tobytes()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, ()) for name in FORMATS],
        ("JPEG", (("progressive", True),)),
        ("TIFF", (("compression", "tiff_lzw"),)),
        ("WEBP", (("lossless", True),)),
    ],
)
def test_a_truncated_picture_is_refused_never_filled_with_grey(
    name: str, options: tuple[tuple[str, object], ...]
) -> None:
    """Cut anywhere: refused, or (where only a trailer is lost) every pixel is right."""
    data, pixels = sample(name, options)
    for length in range(1, len(data), max(1, len(data) // 150)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                got = decode(data[:length], max_pixels=LIMIT).pixels.tobytes()
            except ImageError:
                continue
        assert got == pixels, f"{name} cut at {length} of {len(data)}"


def test_half_a_jpeg_is_corrupt() -> None:
    """The commonest broken upload is told from "not a picture"."""
    data, _ = sample("JPEG")
    for part in (data[:20], data[: len(data) // 2], data[:-40]):
        with pytest.raises(CorruptImage, match="truncated or corrupt"):
            decode(part, max_pixels=LIMIT)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=250, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_only_image_errors_leave_decode(name: str, data: st.DataObject) -> None:
    """Any bytes after any magic, and any change to a good file: a picture or one of four errors."""
    good, _ = sample(name)
    if data.draw(st.booleans()):
        broken = good[: data.draw(st.integers(2, 40))] + data.draw(st.binary(max_size=80))
    else:
        changed = bytearray(good)
        for _ in range(data.draw(st.integers(1, 6))):
            near_header = data.draw(st.integers(0, min(120, len(good) - 1)))
            anywhere = data.draw(st.integers(0, len(good) - 1))
            place = data.draw(st.sampled_from([near_header, anywhere]))
            changed[place] = data.draw(st.integers(0, 255))
        broken = bytes(changed)
    try:
        result = decode(broken, max_pixels=LIMIT)
    except ImageError:
        return
    assert result.pixels.dtype == np.uint8
    assert result.pixels.ndim == 3
    assert 0 < result.width * result.height <= LIMIT


@pytest.mark.parametrize(
    "error",
    [
        *(OSError, SyntaxError, ValueError, struct.error, EOFError, ZeroDivisionError, zlib.error),
        *(TypeError, IndexError, KeyError, OverflowError, RecursionError, AttributeError),
    ],
    ids=str,
)
def test_whatever_pillow_raises_becomes_corrupt(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its readers are many; none of their exceptions reaches the route."""

    def fail(*_: object) -> None:
        raise error("from a reader")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(CorruptImage):
        decode(encode(Image.new("RGB", (4, 4))), max_pixels=LIMIT)


def test_running_out_of_memory_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client can act on that: send fewer pixels."""

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageTooLarge):
        decode(encode(Image.new("RGB", (4, 4))), max_pixels=LIMIT)


# ---- fit_to_model

SIZES = [(640, 480), (480, 640), (300, 300), (641, 479), (1000, 77), (77, 1000), (256, 256)]
TINY = [(1, 1), (1, 7), (7, 1), (3, 2), (2, 3), (1, 20)]


def torchvision_crop(picture: Source, how: Preprocessing) -> torch.Tensor:
    """What torchvision.transforms._presets.ImageClassification does before floats."""
    image = torch.from_numpy(picture.pixels).permute(2, 0, 1).contiguous()
    mode = InterpolationMode(how.interpolation)
    image = transforms.resize(image, [how.resize], interpolation=mode, antialias=True)
    cropped: torch.Tensor = transforms.center_crop(image, list(how.crop))
    return cropped


@pytest.mark.parametrize("size", SIZES + TINY)
@pytest.mark.parametrize(
    "how",
    [
        Preprocessing(),
        Preprocessing(interpolation="bicubic"),
        Preprocessing(interpolation="nearest"),
        Preprocessing(resize=232, crop=(223, 225)),
        Preprocessing(resize=64, crop=(96, 81)),
        Preprocessing(resize=224, crop=(224, 224)),
    ],
)
def test_crop_is_bit_equal_to_torchvision(size: tuple[int, int], how: Preprocessing) -> None:
    """Wide, tall, odd, tiny, and crops larger than the picture (zero-padded)."""
    picture = source(*size)
    result = fit_to_model(picture, how, "crop")
    assert result.pixels.dtype == torch.uint8
    assert result.pixels.is_contiguous()
    assert torch.equal(result.pixels, torchvision_crop(picture, how))
    assert result.geometry.source_size == size
    assert result.geometry.input_size == (how.crop[1], how.crop[0])


@pytest.mark.parametrize("as_tensor", [True, False])
def test_crop_is_within_one_level_of_torchvisions_preset(as_tensor: bool) -> None:
    """The weights entry's transform still runs torchvision's older resize: other rounding."""
    how, picture = Preprocessing(), source(640, 427)
    preset = ImageClassification(crop_size=224, mean=(0.0,) * 3, std=(1.0,) * 3)
    tensor = torch.from_numpy(picture.pixels).permute(2, 0, 1)
    expected = preset(tensor if as_tensor else Image.fromarray(picture.pixels)) * 255
    difference = (fit_to_model(picture, how).pixels - expected).abs()
    assert difference.max() <= 1.001
    assert difference.mean() < 0.2


def test_seen_of_640x480_is_the_central_420() -> None:
    """256/480 makes 341 x 256; 58 and 16 are cut off: x = 58 * 640/341, y = 16 * 480/256."""
    geometry = fit_to_model(source(640, 480), Preprocessing()).geometry
    scale = 640 / 341
    assert geometry.window == pytest.approx((58 * scale, 30.0, 224 * scale, 420.0), abs=1e-9)
    assert geometry.seen == pytest.approx(geometry.window)
    assert geometry.seen == pytest.approx((110, 30, 420, 420), abs=2)


def test_half_a_pixel_is_rounded_as_torchvision_does() -> None:
    """343 - 224 leaves 59.5 a side: 60, the even neighbour, as Python rounds; 341 leaves 58."""
    how = Preprocessing()
    assert fit_to_model(source(343, 256), how).geometry.window == (60.0, 16.0, 224.0, 224.0)
    assert fit_to_model(source(256, 341), how).geometry.window == (16.0, 58.0, 224.0, 224.0)


def test_seen_never_leaves_the_picture() -> None:
    """Where the window sticks out (pad, crop over resize), only the picture counts."""
    padded = fit_to_model(source(100, 50), Preprocessing(), "pad").geometry
    assert padded.window == pytest.approx((0.0, -25.0, 100.0, 100.0))
    assert padded.seen == pytest.approx((0.0, 0.0, 100.0, 50.0))
    larger = fit_to_model(source(50, 50), Preprocessing(resize=50, crop=(60, 70)), "crop").geometry
    assert larger.window == pytest.approx((-10.0, -5.0, 70.0, 60.0))
    assert larger.seen == pytest.approx((0.0, 0.0, 50.0, 50.0))


def test_pad_fills_with_the_mean_colour_and_keeps_proportions() -> None:
    """400 x 200 becomes 224 x 112 between two bands of round(255 * mean)."""
    pixels = fit_to_model(source(400, 200), Preprocessing(), "pad").pixels
    assert pixels[:, 0, 0].tolist() == [124, 116, 104]
    assert (pixels[:, :56] == pixels[:, :1, :1]).all()
    assert (pixels[:, 168:] == pixels[:, :1, :1]).all()
    assert (pixels[:, 56:168].float().std(dim=(1, 2)) > 10).all()


@pytest.mark.parametrize("fit", ["squash", "pad"])
@pytest.mark.parametrize("size", SIZES + TINY)
def test_squash_and_pad_see_the_whole_picture(size: tuple[int, int], fit: Fit) -> None:
    """Nothing of the picture is cut off."""
    result = fit_to_model(source(*size), Preprocessing(crop=(96, 160)), fit)
    assert result.pixels.shape == (3, 96, 160)
    assert result.pixels.is_contiguous()
    assert result.geometry.seen == pytest.approx((0, 0, *size))


def test_an_unknown_fit_is_refused() -> None:
    """Never silently a crop."""
    with pytest.raises(ValueError, match="'crop', 'squash' or 'pad'"):
        fit_to_model(source(4, 4), Preprocessing(), "fill")  # type: ignore[arg-type]


def test_the_model_input_does_not_share_memory_with_the_source() -> None:
    """Not even where nothing has to be resized."""
    picture = source(224, 224)
    for fit in ("crop", "squash", "pad"):
        fit_to_model(picture, Preprocessing(resize=224), fit).pixels.zero_()
    assert (picture.pixels == noise(224, 224)).all()


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize(
    "size", [(900, 400), (400, 900), (500, 500), (613, 431), (40, 30), (6000, 120), (90, 4000)]
)
def test_a_marker_is_found_where_the_geometry_says(size: tuple[int, int], fit: Fit) -> None:
    """The centroid of a white square, traced back, is its centre to under one input pixel."""
    width, height = size
    side = max(2, min(size) // 8)
    left, top = (width - side) // 2 + min(size) // 6, (height - side) // 2 - min(size) // 5
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[top : top + side, left : left + side] = 255
    how = Preprocessing(mean=(0.0, 0.0, 0.0))
    result = fit_to_model(Source(pixels, "PNG", ""), how, fit)
    weight = result.pixels[0].double().numpy()
    rows, columns = np.arange(224) + 0.5, np.arange(224) + 0.5
    u = (weight.sum(0) @ columns) / weight.sum() / 224
    v = (weight.sum(1) @ rows) / weight.sum() / 224
    x, y, w, h = result.geometry.window
    assert abs(x + u * w - (left + side / 2)) < 0.5 * max(1.0, w / 224)
    assert abs(y + v * h - (top + side / 2)) < 0.5 * max(1.0, h / 224)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 100), (30, 10_001)])
@pytest.mark.parametrize("how", [Preprocessing(), Preprocessing(resize=16, crop=(24, 24))])
def test_an_extreme_picture_is_cut_before_it_is_resized(
    size: tuple[int, int], how: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 x 60,000 would need 256 x 15,360,000: only the middle is resized, at the same scale."""
    sizes: list[int] = []
    resize = transforms.resize_image

    def watch(image: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        result: torch.Tensor = resize(image, *args, **options)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(transforms, "resize_image", watch)
    result = fit_to_model(source(*size), how)
    assert max(sizes) < 3 * 256 * 256 * 20
    x, y, w, h = result.geometry.window
    scale = min(size) / how.resize
    assert (w, h) == pytest.approx((how.crop[1] * scale, how.crop[0] * scale), rel=0.05)
    middle = (size[0] / 2, size[1] / 2)
    assert (x + w / 2, y + h / 2) == pytest.approx(middle, abs=max(1.0, 2 * scale))


def test_cutting_first_changes_nothing_that_the_crop_shows() -> None:
    """30 x 900, whose scale is a whole number, against torchvision on the whole picture."""
    picture, how = source(900, 30), Preprocessing(resize=15, crop=(14, 14))
    difference = fit_to_model(picture, how).pixels.int() - torchvision_crop(picture, how).int()
    assert difference.abs().max() <= 1


# ---- preview


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((640, 480), 640, (640, 480)),
        ((640, 480), 320, (320, 240)),
        ((1, 5000), 100, (1, 100)),
        ((333, 1000), 100, (33, 100)),
    ],
)
def test_preview_bounds_the_longer_side(
    size: tuple[int, int], max_side: int, expected: tuple[int, int]
) -> None:
    """Proportions are kept, and no side becomes zero."""
    assert preview_size(size, max_side) == expected
    assert preview(source(*size), max_side).shape == (expected[1], expected[0], 3)


def test_a_small_enough_preview_is_the_same_array() -> None:
    """No copy where nothing changes."""
    picture = source(64, 48)
    assert preview(picture, 64) is picture.pixels


def test_preview_is_antialiased() -> None:
    """A fine checkerboard becomes grey, not stripes."""
    board = (np.indices((200, 200)).sum(0) % 2 * 255).astype(np.uint8)
    small = preview(Source(np.stack([board] * 3, axis=2), "PNG", ""), 50)
    assert np.abs(small.astype(int) - 128).max() <= 16


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)])
def test_a_side_longer_than_decoders_take_in_one_band_is_refused(
    form: str, size: tuple[int, int]
) -> None:
    with pytest.raises(ImageTooLarge, match="the limit of a side is 65,535"):
        decode(encode(Image.new("L", size), form), max_pixels=LIMIT)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(MAX_SIDE, 1), (1, MAX_SIDE)])
def test_a_side_as_long_as_a_jpeg_may_have_is_read(form: str, size: tuple[int, int]) -> None:
    assert decode(encode(Image.new("L", size), form), max_pixels=LIMIT).size == size
