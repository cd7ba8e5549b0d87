"""Grey models and models of many channels: what they see, what people see, what is refused."""

from __future__ import annotations

import io

import numpy as np
import pictures
import pytest
from PIL import Image

from service.errors import CorruptImage, EmptyImage, ImageTooLarge, UnsupportedImage
from service.images.decode import Preprocessing
from service.images.upload import (
    Hiding,
    decode_channels,
    for_model,
    for_people,
    open_upload,
)

pytestmark = pytest.mark.timeout(10)

TEN = Preprocessing(32, (32, 32), (0.5,) * 10, (0.25,) * 10)
GREY = Preprocessing(32, (32, 32), (0.5,), (0.25,))


def tiff(pages: list[Image.Image], **options: object) -> bytes:
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], **options)
    return buffer.getvalue()


def levels(count: int, size: tuple[int, int] = (40, 30), mode: str = "L") -> list[Image.Image]:
    """Pages of one value each: 10, 20, 30 …; 257 times that in 16 bits."""
    step = 2570 if mode == "I;16" else 10
    kind = np.uint16 if mode == "I;16" else np.uint8
    return [
        Image.fromarray(np.full((size[1], size[0]), step * (page + 1), dtype=kind))
        for page in range(count)
    ]


@pytest.mark.parametrize("mode", ["L", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_each_page_is_one_channel(mode: str, compression: str | None) -> None:
    data = tiff(levels(10, mode=mode), compression=compression)
    source = decode_channels(data, 10, max_pixels=9999)
    assert source.pixels.shape == (30, 40, 10)
    assert source.pixels[3, 4].tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert (source.width, source.height, source.format) == (40, 30, "TIFF")


def test_the_orientation_holds_for_every_page() -> None:
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    pages = levels(4)
    for page in pages:
        page.putpixel((0, 0), 255)
    source = decode_channels(tiff(pages, exif=exif), 4, max_pixels=9999)
    assert source.pixels.shape == (40, 30, 4)
    assert source.pixels[0, 29].tolist() == [255] * 4


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", EmptyImage, "no bytes"),
        (pictures.png(), UnsupportedImage, "TIFF of 10 pages"),
        (tiff(levels(9)), UnsupportedImage, "has 9 pages, and this model takes 10"),
        (tiff(levels(1)), UnsupportedImage, "has 1 page, and"),
        (tiff(levels(11)), UnsupportedImage, "more than 10 pages"),
        (tiff([*levels(9), *levels(1, (8, 8))]), CorruptImage, "Page 10"),
        (tiff(levels(10, (200, 200))), ImageTooLarge, "200 x 200"),
        (tiff(levels(10))[:2000], CorruptImage, "truncated"),
        (b"II*\0" + b"\xff" * 64, CorruptImage, "truncated"),
    ],
)
def test_what_is_no_stack_of_ten_is_refused(data: bytes, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        decode_channels(data, 10, max_pixels=10_000)


def test_a_grey_model_sees_luma_and_people_see_the_colours() -> None:
    data = pictures.png()
    source = decode_channels(data, 1, max_pixels=10_000)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert np.array_equal(for_model(source, 1).pixels[:, :, 0], expected)
    assert for_people(source) is source
    upload = open_upload(data, GREY, "crop", max_pixels=10_000, preview_side=64)
    assert upload.model_input.pixels.shape == (1, 32, 32)
    assert upload.preview is not None
    assert upload.preview.shape[2] == 3


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_a_stack_is_fitted_masked_and_shown_by_its_first_page(fit: str) -> None:
    data = tiff(levels(10))
    upload = open_upload(
        data,
        TEN,
        fit,
        max_pixels=10_000,
        preview_side=64,
        hiding=Hiding(boxes=[(0, 0, 40, 15)], fill="blur"),
    )
    assert upload.model_input.pixels.shape == (10, 32, 32)
    assert upload.model_input.pixels[:, 16, 16].tolist() == [10 * (n + 1) for n in range(10)]
    assert upload.preview is not None
    assert upload.preview[5, 5].tolist() == [10, 10, 10]
    assert upload.masked is not None
    assert upload.masked.model_input.pixels.shape == (10, 32, 32)
