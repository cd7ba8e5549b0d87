"""What is drawn of noise takes at most the bytes that were reckoned before, and not much less."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image

from service.cam.encoding import encode
from service.cam.file_sizes import (
    base64_bytes,
    brush_bytes,
    heatmap_bytes,
    image_bytes,
    mask_bytes,
    region_bytes,
    tile_grid_bytes,
)
from service.cam.heatmap import Style, render_heatmap
from service.cam.regions import find_regions, mask_rle
from service.cam.tiles import channel_grid, channel_tiles
from service.images.declared_size import size_of
from service.images.decode import Geometry
from service.integrations.label_studio.brush import alpha_of, encode_rle

SIZES = [(1, 1), (7, 7), (8, 300), (300, 8), (64, 64), (128, 96), (224, 224), (255, 255)]
SIZES += [(256, 256), (640, 480)]


def noises(width: int, height: int) -> Any:
    """Patterns that compress badly: bytes, black and white, blocks of a chroma pixel's size."""
    random = np.random.default_rng(0)
    for side in (1, 2, 3):
        for levels in (2, 3, 256):
            few = random.integers(0, levels, (-(-height // side), -(-width // side), 3))
            few = (few * (255 // (levels - 1))).astype(np.uint8)
            yield few.repeat(side, 0).repeat(side, 1)[:height, :width].copy()
    grey = random.integers(0, 2, (height, width, 1)) * 255
    colour = random.integers(0, 2, (height // 2 + 1, width // 2 + 1, 3)) * 255
    colour = colour.repeat(2, 0).repeat(2, 1)[:height, :width]
    for share in (0.3, 0.5, 0.7):
        yield (share * grey + (1 - share) * colour).astype(np.uint8)


def grids(rows: int, columns: int) -> Any:
    random = np.random.default_rng(1)
    values = random.random((rows, columns)).astype(np.float32)
    yield values
    yield random.integers(0, 2, (rows, columns)).astype(np.float32)
    board = np.add.outer(np.arange(rows), np.arange(columns)) % 2
    yield board.astype(np.float32)
    yield values**4


def geometry(width: int, height: int) -> Geometry:
    return Geometry((width, height), (224, 224), (0.0, 0.0, float(width), float(height)))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("size", SIZES)
def test_a_photograph_of_noise_is_within_its_bound(size: tuple[int, int], kind: Any) -> None:
    largest = max(len(encode(pixels, kind)) for pixels in noises(*size))
    assert largest <= image_bytes(size, kind)
    if min(size) >= 64:
        assert image_bytes(size, kind) < 2.6 * largest, "so loose that good requests are refused"


CELLS = [(7, 7), (14, 14), (56, 56), (224, 224), (3, 20)]


@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("size", [(7, 7), (100, 80), (224, 224), (640, 480), (9, 900)])
def test_a_heatmap_of_noise_is_within_its_bound(
    size: tuple[int, int], cells: tuple[int, int]
) -> None:
    drawn = [render_heatmap(grid, geometry(*size), Style(), 2048) for grid in grids(*cells)]
    assert max(len(picture.data) for picture in drawn) <= heatmap_bytes(size, cells)


def test_a_default_heatmap_is_reckoned_small() -> None:
    """32 of them at the largest size are what many send, and stay far below 64 MiB."""
    assert 32 * base64_bytes(heatmap_bytes((2048, 2048), (7, 7))) < 16 << 20


SHAPES = [(64, 112, 112), (128, 28, 28), (512, 7, 7), (2048, 1, 1), (1000, 1, 1), (3, 224, 224)]
SHAPES += [(1, 1, 1), (5, 3, 40), (1, 768, 197), (30, 300, 300)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_channel_grid_of_noise_is_within_its_bound(shape: tuple[int, int, int]) -> None:
    maps = np.random.default_rng(2).random(shape, dtype=np.float32)
    picture, left_out = channel_grid(maps)
    sheet = channel_tiles(shape)
    assert (picture.width, picture.height) == sheet.size
    assert left_out == shape[0] - sheet.shown
    assert len(picture.data) <= tile_grid_bytes(sheet)


@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("size", [(7, 7), (90, 200), (500, 400), (2600, 700)])
def test_regions_and_brushes_of_noise_are_within_their_bounds(
    size: tuple[int, int], cells: tuple[int, int]
) -> None:
    for grid in grids(*cells):
        for threshold in (0.5, 0.8):
            found = find_regions(grid, geometry(*size), threshold, 2048)
            parts = {"b": found.boxes, "p": found.polygons, "r": found.rle.counts}
            assert len(orjson.dumps(parts)) <= region_bytes(size, cells, 2048)
        brush = encode_rle(alpha_of(grid, geometry(*size), 2048))
        assert len(orjson.dumps(brush)) <= brush_bytes(size, cells)


@pytest.mark.parametrize("classes", [2, 5, 60])
@pytest.mark.parametrize("size", [(7, 7), (90, 200), (500, 400), (2600, 700)])
def test_masks_of_noise_that_share_an_image_are_within_twice_the_bound_of_one(
    size: tuple[int, int], classes: int
) -> None:
    random = np.random.default_rng(2)
    where = random.integers(0, classes, (224, 224))
    masks = [mask_rle(where == each, geometry(*size))[0].counts for each in range(classes)]
    assert len(orjson.dumps(masks)) <= 2 * mask_bytes(size, 224)
    assert len(orjson.dumps(masks[0])) <= mask_bytes(size, 224)


# ---- sizes by the first bytes

FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_s_size_is_read_from_its_head(kind: str, mode: str) -> None:
    if (kind, mode) == ("JPEG", "RGBA"):
        pytest.skip("a JPEG has no alpha")
    file = io.BytesIO()
    Image.new(mode, (300, 70), 0).save(file, kind)
    assert size_of(file.getvalue()) == (300, 70)


def test_a_lossless_webp_and_a_jpeg_with_metadata_too() -> None:
    webp, jpeg = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (301, 71)).save(webp, "WEBP", lossless=True)
    exif = Image.Exif()
    exif[0x010E] = "x" * 5000
    Image.new("RGB", (301, 71)).save(jpeg, "JPEG", exif=exif, progressive=True)
    assert size_of(webp.getvalue()) == size_of(jpeg.getvalue()) == (301, 71)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_broken_head_has_no_size_and_raises_nothing(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 70)).save(file, kind)
    data = file.getvalue()
    for end in range(40):
        assert size_of(data[:end]) in {None, (300, 70)}
    for place in range(min(len(data), 200)):
        spoilt = bytearray(data)
        spoilt[place] ^= 0xFF
        found = size_of(bytes(spoilt))
        assert found is None or min(found) > 0


def test_a_head_without_end_is_left_after_a_few_segments() -> None:
    class Counting(bytes):
        looks = 0

        def __getitem__(self, at: Any) -> Any:
            Counting.looks += 1
            return super().__getitem__(at)

    data = Counting(b"\xff\xd8" + b"\xff\xe1\x00\x02" * 100_000)
    assert size_of(data) is None
    assert Counting.looks < 200
    assert size_of(b"") is None
    assert size_of(b"\x00" * 100) is None
