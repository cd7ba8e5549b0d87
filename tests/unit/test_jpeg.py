"""jpeg: simplejpeg gives Pillow's bits, and a photo scaled down on the way stays the same photo."""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from service.errors import CorruptImage, ImageError, ImageTooLarge, UnsupportedImage
from service.images.decode import Preprocessing, decode, fit_to_model
from service.images.decoders.jpeg_decoder import decode_jpeg, scale_of, scans
from service.images.headers import jpeg_header
from service.images.upload import Hiding, open_upload

LIMIT = 20_000_000
ORIENTATION = 0x0112


@functools.cache
def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Detail of every size, most of it coarse, as in photographs."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for side in (3, 12, 48, 192):
        rough = rng.normal(0, 40, (side, side, 3)).astype(np.float32)
        layers = [
            Image.fromarray(rough[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            for channel in range(3)
        ]
        picture += np.stack([np.asarray(layer) for layer in layers], axis=2)
    grain = rng.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.clip(picture + grain + 128, 0, 255).astype(np.uint8))


@functools.cache
def large(orientation: int = 1, mode: str = "RGB", size: tuple[int, int] = (2599, 2100)) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(photograph(*size).convert(mode), quality=90, exif=exif)


def encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(data: bytes, scale: int = 1) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (image.width // scale, image.height // scale))
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


# ---- the same bits


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (17, 31), (640, 480), (1001, 999)])
@pytest.mark.parametrize(
    "options",
    [
        *({"subsampling": kind} for kind in ("4:4:4", "4:2:2", "4:2:0")),
        {"progressive": True, "quality": 95},
        {"quality": 5, "restart_marker_blocks": 1},
        {"keep_rgb": True},
    ],
    ids=str,
)
def test_a_small_jpeg_has_pillows_pixels(size: tuple[int, int], options: dict[str, object]) -> None:
    """Every bit, whatever is allowed to be lost."""
    data = encode(photograph(*size), **options)
    source = decode(data, max_pixels=LIMIT, keep=(1, 1) if size[0] < 1000 else None)
    assert (source.pixels == by_pillow(data)).all()
    assert source.full_size is None
    assert source.size == size
    assert source.pixels.flags.writeable


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.timeout(20)
def test_a_scaled_jpeg_has_the_pixels_of_pillows_draft(mode: str, scale: int) -> None:
    """Sides that are no multiple of 8: rounded up, as libjpeg does."""
    data = large(mode=mode)
    source = decode(data, max_pixels=LIMIT, keep=(2100 // scale, 2599 // scale))
    assert source.pixels.shape == (-(-2100 // scale), -(-2599 // scale), 3)
    assert (source.pixels == by_pillow(data, scale)).all()
    assert source.size == (2599, 2100)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.timeout(20)
def test_a_scaled_jpeg_is_turned_as_pillow_turns_it(orientation: int) -> None:
    """And its size is that of the upright picture, also where scaling made it a square."""
    data = large(orientation, size=(1001, 1000))
    source = decode(data, max_pixels=LIMIT, keep=(450, 450))
    assert (source.pixels == by_pillow(data, 2)).all()
    assert source.size == ((1001, 1000) if orientation < 5 else (1000, 1001))


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.new("CMYK", (64, 48), (0, 255, 255, 0))),
        encode(photograph(64, 48)) + b"\0 what some phones append",
        encode(photograph(64, 48), exif=b"Exif\0\0II*\0\xff\xff\0\0junk"),
    ],
    ids=["cmyk", "trailer", "broken-exif"],
)
def test_unusual_files_are_what_they_were(data: bytes) -> None:
    """Read by Pillow where simplejpeg does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (decode(data, max_pixels=LIMIT).pixels == by_pillow(data)).all()


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_broken_jpeg_is_read_or_refused_as_pillow_does(data: st.DataObject) -> None:
    """Bytes changed or cut off anywhere: the same pixels, or an error where Pillow has one."""
    changed = bytearray(encode(photograph(40, 32), progressive=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(2, len(changed) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(changed[: data.draw(st.integers(20, len(changed)))])
    try:
        expected = by_pillow(broken)
    except Exception:  # noqa: BLE001 - whatever its readers raise
        with pytest.raises(ImageError):
            decode(broken, max_pixels=LIMIT)
        return
    try:
        assert (decode(broken, max_pixels=LIMIT).pixels == expected).all()
    except ImageTooLarge:
        assert expected.shape[0] * expected.shape[1] > LIMIT
    except UnsupportedImage:  # Pillow tries other codings, and makes noise of them
        assert b"\xff\xc0" not in broken
        assert b"\xff\xc2" not in broken


@pytest.mark.timeout(20)
def test_a_large_jpeg_cut_short_is_corrupt() -> None:
    """Never half a picture, though half the rows would be enough."""
    for length in (len(large()) // 2, len(large()) - 3000):
        with pytest.raises(CorruptImage, match="truncated or corrupt"):
            decode(large()[:length], max_pixels=LIMIT, keep=(512, 512))


def test_a_file_that_says_another_size_than_its_header_takes_no_memory_for_it() -> None:
    """What is decoded into is of the size that was checked against the bound."""
    data = encode(photograph(64, 48))
    header = replace(jpeg_header.read(data), width=32, height=24)
    assert decode_jpeg(header, data, None) is None


def test_ordinary_jpegs_do_not_pass_through_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the time for 12 million pixels."""

    def must_not_run(*_: object) -> None:
        raise AssertionError("loaded by Pillow")

    monkeypatch.setattr(ImageFile.ImageFile, "load", must_not_run)
    for mode in ("L", "RGB"):
        assert decode(encode(photograph(64, 48).convert(mode)), max_pixels=LIMIT).width == 64


@pytest.mark.parametrize("data", [b"\xff", b"\xff\xda", b"x\xff\xda", b"\xff\xff\xda\xda\xff"])
def test_scans_are_counted_at_even_and_odd_places(data: bytes) -> None:
    """As `bytes.count` does, which holds up every other thread."""
    assert scans(data) == data.count(b"\xff\xda")
    assert scans(data * 7) == (data * 7).count(b"\xff\xda")


# ---- how far a photo is scaled down


@pytest.mark.parametrize(
    ("size", "keep", "scale"),
    [
        ((4000, 3000), (512, 512), 4),
        ((3000, 4000), (512, 512), 4),
        ((4000, 3000), (512, 2048), 1),
        ((8192, 6144), (512, 2048), 4),
        ((4000, 3000), (375, 375), 8),
        ((4000, 3000), (376, 376), 4),
        ((4000, 3000), None, 1),
        ((1280, 960), (512, 512), 1),
        ((1600, 1024), (512, 512), 2),
        ((1249, 800), (64, 64), 1),
        ((1250, 800), (64, 64), 8),
        ((42_100, 2100), (512, 512), 1),
    ],
)
def test_scale(size: tuple[int, int], keep: tuple[int, int] | None, scale: int) -> None:
    """The most that leaves both sides enough; 1 below a million pixels and for long strips."""
    assert scale_of(size, keep) == scale


def opened(data: bytes, how: Preprocessing | None = None, **options: object) -> object:
    wanted: dict[str, object] = {"preview_side": None, "max_pixels": LIMIT, **options}
    return open_upload(data, how or Preprocessing(), "crop", **wanted)  # type: ignore[arg-type]


@pytest.mark.timeout(30)
def test_only_what_is_asked_for_needs_the_whole_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo to draw on, a part to hide and a model that picks single pixels get all they need."""
    kept: list[tuple[int, int] | None] = []
    scale = scale_of

    def watch(size: tuple[int, int], keep: tuple[int, int] | None) -> int:
        kept.append(keep)
        return scale(size, keep)

    monkeypatch.setattr("service.images.decoders.jpeg_decoder.scale_of", watch)
    data = large()
    assert opened(data).preview is None
    assert opened(data, preview_side=2048).preview.shape == (1655, 2048, 3)
    assert opened(data, preview_side=600).preview.shape == (485, 600, 3)
    opened(data, hiding=Hiding(boxes=[(0, 0, 500, 500)]))
    opened(data, Preprocessing(interpolation="nearest"))
    opened(data, Preprocessing(resize=518, crop=(600, 560)))
    expected = [(512, 512), (512, 1844), (512, 540), None, None, (1200, 1200)]
    assert kept == expected


@pytest.mark.timeout(30)
@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_scaling_moves_no_coordinate(fit: str, orientation: int) -> None:
    """Width, height and geometry are those of the full decode, exactly: 2599 is no multiple."""
    full = decode(large(orientation), max_pixels=LIMIT)
    scaled = decode(large(orientation), max_pixels=LIMIT, keep=(512, 512))
    assert scaled.pixels.shape[0] < full.pixels.shape[0] / 2
    assert (scaled.width, scaled.height) == (full.width, full.height)
    how = Preprocessing()
    ours = fit_to_model(scaled, how, fit)  # type: ignore[arg-type]
    theirs = fit_to_model(full, how, fit)  # type: ignore[arg-type]
    assert ours.geometry == theirs.geometry
    assert ours.pixels.shape == theirs.pixels.shape


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("size", "keep", "mean", "most"),
    [
        ((2600, 2100), (512, 512), 0.7, 6),
        ((2600, 2100), (1050, 1050), 0.4, 4),
        # The last column of the scaled picture reaches over the edge: the rest moves by up to half
        # a pixel of the model input.
        ((2599, 2100), (512, 512), 1.6, 16),
    ],
)
def test_the_model_sees_nearly_the_same(
    size: tuple[int, int], keep: tuple[int, int], mean: float, most: int
) -> None:
    """In levels of 255; photographs have less detail than this and move less."""
    data = large(size=size)
    full, scaled = (
        fit_to_model(decode(data, max_pixels=LIMIT, keep=each), Preprocessing())
        for each in (None, keep)
    )
    difference = (full.pixels.int() - scaled.pixels.int()).abs().double()
    assert difference.mean() < mean
    assert difference.max() <= most
