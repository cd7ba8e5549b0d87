"""heatmap: what is drawn lies where the model saw it, and the PNG's values are the map's."""

from __future__ import annotations

import io
import math

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from service.cam.encoding import EncodedImage
from service.cam.heatmap import (
    COLORMAPS,
    DIVERGING,
    Style,
    render_heatmap,
    render_overlay,
    resample,
)
from service.cam.tiles import GAP, GAP_GREY, channel_grid
from service.errors import RenderFailed
from service.images.decode import (
    Fit,
    Geometry,
    ModelInput,
    Preprocessing,
    Source,
    fit_to_model,
    preview,
)

FITS: tuple[Fit, ...] = ("crop", "squash", "pad")
SIZES = [(640, 480), (300, 700), (320, 320), (641, 479), (1, 7), (1, 1), (3, 2), (2000, 40)]


def random_cam(height: int = 7, width: int = 7, seed: int = 0) -> NDArray[np.float32]:
    cam = np.random.default_rng(seed).random((height, width), dtype=np.float32)
    scaled: NDArray[np.float32] = cam / cam.max()
    return scaled


def photo(width: int, height: int) -> Source:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Source(pixels, "PNG", "")


def fitted(width: int, height: int, fit: Fit = "crop") -> tuple[Source, ModelInput]:
    source = photo(width, height)
    return source, fit_to_model(source, Preprocessing(), fit)


def rows(model_input: ModelInput) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = model_input.pixels.permute(1, 2, 0).numpy()
    return pixels


def overlay(
    source: Source, model_input: ModelInput, cam: NDArray[np.float32], style: Style
) -> EncodedImage:
    return render_overlay(
        cam, model_input.geometry, style, preview(source, 2048), rows(model_input)
    )


def opened(picture: EncodedImage) -> Image.Image:
    image = Image.open(io.BytesIO(picture.data))
    assert image.size == (picture.width, picture.height)
    assert Image.MIME[str(image.format)] == picture.media_type
    return image


def colours(picture: EncodedImage) -> NDArray[np.int64]:
    return np.asarray(opened(picture).convert("RGB")).astype(np.int64)


def whole(width: int, height: int) -> Geometry:
    """A model input that covers the source exactly."""
    return Geometry((width, height), (224, 224), (0.0, 0.0, float(width), float(height)))


# ---- resample


@pytest.mark.parametrize("grid", [(7, 7), (5, 9), (1, 1), (1, 6), (14, 14)])
@pytest.mark.parametrize("size", [(640, 480), (97, 131), (14, 14), (40, 15)])
def test_resample_is_torchs_bilinear(grid: tuple[int, int], size: tuple[int, int]) -> None:
    """Half-pixel centres, edges clamped: align_corners=False."""
    cam = random_cam(*grid) - 0.5
    expected = interpolate(
        torch.from_numpy(cam)[None, None], size=size[::-1], mode="bilinear", align_corners=False
    )[0, 0]
    got = resample(cam, whole(*size), size, (0.0, 0.0, *size))
    assert got.dtype == np.float32
    assert got.shape == size[::-1]
    assert np.abs(got - expected.numpy()).max() < 1e-5


def test_a_raster_coarser_than_the_map_is_antialiased() -> None:
    """A map of the input's size on a small picture loses no single-pixel peak."""
    cam = random_cam(224, 224)
    expected = interpolate(
        torch.from_numpy(cam)[None, None], size=(20, 30), mode="bilinear", antialias=True
    )[0, 0]
    got = resample(cam, whole(30, 20), (30, 20), (0.0, 0.0, 30.0, 20.0))
    assert np.abs(got - expected.numpy()).max() < 1e-4


def test_resample_of_a_part_is_the_part_of_resample() -> None:
    """`rect` chooses what is drawn, not where the map lies."""
    cam, geometry = random_cam(), whole(640, 480)
    everything = resample(cam, geometry, (640, 480), (0.0, 0.0, 640.0, 480.0))
    part = resample(cam, geometry, (200, 100), (50.0, 80.0, 200.0, 100.0))
    assert np.abs(part - everything[80:180, 50:250]).max() < 1e-5


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", SIZES)
def test_a_map_of_ones_is_one_where_the_model_saw_and_zero_elsewhere(
    size: tuple[int, int], fit: Fit
) -> None:
    """The border of `seen` falls between pixel centres."""
    geometry = fitted(*size, fit)[1].geometry
    x, y, w, h = geometry.seen
    drawn = resample(
        np.ones((7, 7), np.float32), geometry, size, (0.0, 0.0, float(size[0]), float(size[1]))
    )
    across = np.abs(np.arange(size[0]) + 0.5 - (x + w / 2)) <= w / 2 + 1e-6
    down = np.abs(np.arange(size[1]) + 0.5 - (y + h / 2)) <= h / 2 + 1e-6
    assert np.abs(drawn - np.outer(down, across)).max() < 1e-6


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(640, 480), (300, 700), (320, 320), (30, 20)])
@pytest.mark.parametrize("cell", [(3, 3), (2, 4), (4, 2)])
def test_a_cells_peak_lies_on_its_centre(
    size: tuple[int, int], fit: Fit, cell: tuple[int, int]
) -> None:
    """Drawn finely over the source, the maximum is at the centre of the cell that is 1."""
    geometry = fitted(*size, fit)[1].geometry
    cam = np.zeros((7, 7), np.float32)
    cam[cell] = 1.0
    fine = (size[0] * 4, size[1] * 4)
    drawn = resample(cam, geometry, fine, (0.0, 0.0, float(size[0]), float(size[1])))
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    x, y, w, h = geometry.window
    assert drawn.max() > 0.9
    assert (column + 0.5) / 4 == pytest.approx(x + (cell[1] + 0.5) / 7 * w, abs=0.26)
    assert (row + 0.5) / 4 == pytest.approx(y + (cell[0] + 0.5) / 7 * h, abs=0.26)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_the_callers_mistake(value: float) -> None:
    """A NaN would be drawn as some colour."""
    cam = random_cam()
    cam[2, 2] = value
    source, model_input = fitted(64, 48)
    with pytest.raises(ValueError, match="finite"):
        render_heatmap(cam, model_input.geometry, Style(), 2048)
    with pytest.raises(ValueError, match="finite"):
        overlay(source, model_input, cam, Style())
    with pytest.raises(ValueError, match="two dimensions"):
        render_heatmap(cam[0], model_input.geometry, Style(), 2048)


# ---- render_heatmap


@pytest.mark.parametrize("colormap", sorted(COLORMAPS.keys() - DIVERGING))
def test_the_png_is_the_map_and_its_palette_the_colormap(colormap: str) -> None:
    """Whoever reads it back has round(255 * |cam|), exactly."""
    geometry = fitted(640, 480)[1].geometry
    cam = random_cam() * np.where(np.indices((7, 7)).sum(0) % 2, 1, -1).astype(np.float32)
    picture = render_heatmap(cam, geometry, Style(size="native", colormap=colormap), 2048)
    image = opened(picture)
    assert image.mode == "P"
    assert (np.asarray(image) == np.rint(255 * np.abs(cam))).all()
    palette = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3)
    assert (palette == COLORMAPS[colormap]).all()


def test_a_diverging_colormap_keeps_the_sign() -> None:
    """From blue, −1, over white, 0, to red, 1, as matplotlib's bwr; outside it is white."""
    geometry = fitted(640, 480)[1].geometry
    cam = np.array([[-1.0, -0.5, 0.0, 0.5, 1.0]], dtype=np.float32)
    image = opened(render_heatmap(cam, geometry, Style(size="native", colormap="bwr"), 2048))
    assert np.asarray(image).tolist() == [[0, 64, 128, 191, 255]]
    palette = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3)
    x = np.arange(256) / 255
    ramp = np.minimum(1, 2 * np.stack([np.minimum(x, 0.5), np.minimum(x, 1 - x), 1 - x], axis=1))
    ramp[x > 0.5, 0], ramp[x <= 0.5, 2] = 1, 1
    assert (palette == np.rint(255 * ramp)).all()
    whole = opened(render_heatmap(cam, geometry, Style(colormap="bwr"), 2048))
    assert (np.asarray(whole)[:, :108] == 128).all()


def test_neighbours_of_opposite_sign_do_not_cancel_in_a_diverging_colormap() -> None:
    geometry = fitted(320, 320)[1].geometry
    signs = np.where(np.indices((320, 320)).sum(0) % 2, 1, -1).astype(np.float32)
    drawn = opened(render_heatmap(signs, geometry, Style(colormap="bwr"), 80))
    assert set(np.unique(np.asarray(drawn)[10:70, 10:70])) <= {0, 255}


def test_an_overlay_in_a_diverging_colormap_is_blue_against_and_red_for() -> None:
    source, model_input = fitted(320, 320)
    cam = np.array([[-1.0, 1.0]], dtype=np.float32)
    style = Style(colormap="bwr", format="png", opacity=1.0)
    pixels = np.asarray(opened(overlay(source, model_input, cam, style)))
    left, top, width, height = (int(edge) for edge in model_input.geometry.seen)
    middle = top + height // 2
    assert pixels[middle, left + 1].tolist() == [0, 0, 255]
    assert pixels[middle, left + width - 2].tolist() == [255, 0, 0]


def test_at_source_size_the_values_are_the_resampled_map() -> None:
    """640 x 480 of a 7 x 7 map; strict readers accept the file."""
    geometry = fitted(640, 480)[1].geometry
    cam = random_cam()
    picture = render_heatmap(cam, geometry, Style(), 2048)
    drawn = resample(cam, geometry, (640, 480), (0.0, 0.0, 640.0, 480.0))
    values = np.asarray(opened(picture))
    assert (values == np.rint(drawn * 255)).all()
    assert (values[:, :108] == 0).all()
    with Image.open(io.BytesIO(picture.data)) as image:
        image.verify()
    decoded = cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert (decoded[..., ::-1] == COLORMAPS["turbo"][values]).all()


def test_neighbours_of_opposite_sign_do_not_cancel() -> None:
    """Signed maps: the strength is drawn."""
    cam = np.array([[1.0, -1.0]], np.float32)
    picture = render_heatmap(cam, whole(20, 10), Style(), 2048)
    assert (np.asarray(opened(picture)) == 255).all()


@pytest.mark.parametrize(
    ("size", "fit", "style_size", "expected"),
    [
        ((640, 480), "crop", "source", (640, 480)),
        ((4000, 1000), "crop", "source", (2048, 512)),
        ((1000, 4001), "pad", "source", (512, 2048)),
        ((640, 480), "crop", "model", (224, 224)),
        ((640, 480), "squash", "model", (224, 224)),
        ((640, 480), "pad", "model", (224, 168)),
        ((300, 900), "pad", "model", (75, 224)),
        ((640, 480), "pad", "native", (7, 5)),
        ((1, 1), "crop", "source", (1, 1)),
        ((2000, 3), "pad", "model", (224, 1)),
    ],
)
def test_sizes(size: tuple[int, int], fit: Fit, style_size: str, expected: tuple[int, int]) -> None:
    """Heatmap and overlay agree: the bounded source, what was seen of the input, or the cells."""
    source, model_input = fitted(*size, fit)
    cam = random_cam(5, 7)
    style = Style(size=style_size)  # type: ignore[arg-type]
    picture = render_heatmap(cam, model_input.geometry, style, 2048)
    assert opened(picture).size == expected
    assert opened(overlay(source, model_input, cam, style)).size == expected


# ---- render_overlay


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", SIZES)
def test_outside_seen_the_overlay_is_the_photo(size: tuple[int, int], fit: Fit) -> None:
    """And inside, at opacity 1, the pure colour of every value of the heatmap."""
    source, model_input = fitted(*size, fit)
    geometry, cam = model_input.geometry, random_cam()
    style = Style(format="png", opacity=1.0, colormap="viridis")
    drawn = colours(overlay(source, model_input, cam, style))
    values = np.asarray(opened(render_heatmap(cam, geometry, style, 2048)))
    inside = resample(np.ones((7, 7), np.float32), geometry, size, (0, 0, *size)) > 0.5
    assert (drawn[~inside] == source.pixels[~inside]).all()
    assert (drawn[inside] == COLORMAPS["viridis"][values][inside]).all()


@pytest.mark.parametrize("size", ["source", "model"])
def test_opacity_0_is_the_photo_and_a_half_is_between(size: str) -> None:
    """(1 - opacity) * photo + opacity * colour."""
    source, model_input = fitted(640, 480)
    base = source.pixels if size == "source" else rows(model_input)
    cam = random_cam()

    def drawn(opacity: float) -> NDArray[np.int64]:
        style = Style(size=size, format="png", opacity=opacity)  # type: ignore[arg-type]
        return colours(overlay(source, model_input, cam, style))

    assert (drawn(0.0) == base).all()
    assert np.abs(drawn(0.5) * 2 - drawn(0.0) - drawn(1.0)).max() <= 1
    assert np.abs(drawn(0.25) * 4 - drawn(0.0) * 3 - drawn(1.0)).max() <= 2


def test_drawing_leaves_its_inputs_alone() -> None:
    """The preview may be the source's own array."""
    source, model_input = fitted(64, 48)
    before, cam = source.pixels.copy(), random_cam()
    kept = cam.copy()
    overlay(source, model_input, cam, Style(opacity=1.0))
    assert (source.pixels == before).all()
    assert (cam == kept).all()


@pytest.mark.parametrize("shade", [0, 255])
def test_a_box_is_outlined_so_that_it_is_seen_on_black_and_on_white(shade: int) -> None:
    """The edges of x 10..30 and y 12..24 of 60 x 40; its inside and what is far away stay."""
    source = Source(np.full((40, 60, 3), shade, np.uint8), "PNG", "")
    shown = fit_to_model(source, Preprocessing())
    style = Style(format="png", opacity=0.0)
    drawn = colours(
        render_overlay(
            random_cam(), shown.geometry, style, source.pixels, rows(shown), box=(10, 12, 20, 12)
        )
    )
    assert (drawn[12, 10:31] == 255).all()
    assert (drawn[12:25, 30] == 255).all()
    assert {*drawn[18, 7:14, 0].tolist()} == {0, 255}
    changed = (drawn != shade).any(axis=2)
    assert not changed[:10].any()
    assert not changed[27:].any()
    assert not changed[15:22, 13:28].any()
    native = Style(size="native", format="png", opacity=0.0)
    plain, boxed = (
        render_overlay(random_cam(), shown.geometry, native, source.pixels, rows(shown), box=box)
        for box in (None, (10, 12, 20, 12))
    )
    assert plain == boxed


def test_the_model_overlay_of_a_padded_picture_shows_no_padding() -> None:
    """`model` is the part of the input that is picture."""
    source, model_input = fitted(640, 480, "pad")
    style = Style(size="model", format="png", opacity=0.0)
    drawn = colours(overlay(source, model_input, random_cam(), style))
    assert (drawn == rows(model_input)[28:196]).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_each_format_shows_the_same_picture(kind: str) -> None:
    """Red is red (no swapped channels), within the format's loss."""
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 200
    source = Source(red, "PNG", "")
    model_input = fit_to_model(source, Preprocessing())
    style = Style(format=kind, opacity=0.0)  # type: ignore[arg-type]
    picture = overlay(source, model_input, random_cam(), style)
    assert picture.media_type == f"image/{kind}"
    assert np.abs(colours(picture) - [200, 0, 0]).max() <= 8


def test_a_small_jpeg_keeps_the_colour_of_every_pixel() -> None:
    """A native overlay has as few pixels as the map has cells: no shared chroma."""
    source, model_input = fitted(640, 480)
    cam = (np.indices((7, 7)).sum(0) % 2).astype(np.float32)
    style = Style(size="native", opacity=1.0)
    drawn = colours(overlay(source, model_input, cam, style))
    assert np.abs(drawn - COLORMAPS["turbo"][(cam * 255).astype(int)]).mean() < 12


def test_what_a_format_cannot_hold_says_so() -> None:
    """WebP ends at 16,383 pixels a side."""
    source, model_input = fitted(17_000, 20, "squash")
    with pytest.raises(RenderFailed, match="ask for png"):
        render_overlay(
            random_cam(),
            model_input.geometry,
            Style(format="webp"),
            source.pixels,
            rows(model_input),
        )


@pytest.mark.parametrize("name", sorted(COLORMAPS))
def test_a_colormap_is_256_colours_nobody_can_change(name: str) -> None:
    """OpenCV's tables, as RGB; gray is the identity."""
    table = COLORMAPS[name]
    assert table.shape == (256, 3)
    assert table.dtype == np.uint8
    assert not table.flags.writeable
    assert len(np.unique(table, axis=0)) > 100
    if name == "gray":
        assert (table == np.arange(256)[:, None]).all()
    if name == "jet":
        assert table[0, 2] > table[0, 0]
        assert table[255, 0] > table[255, 2]


# ---- channel_grid


def tiles(picture: EncodedImage, shape: tuple[int, int], columns: int) -> list[NDArray[np.uint8]]:
    """Cut a grid of tiles of `shape` out of the picture, row by row."""
    image = opened(picture)
    assert image.mode == "L"
    sheet = np.asarray(image)
    down, across = shape[0] + GAP, shape[1] + GAP
    return [
        sheet[top : top + shape[0], left : left + shape[1]]
        for top in range(GAP, sheet.shape[0] - shape[0], down)
        for left in range(GAP, GAP + columns * across, across)
    ]


def test_every_channel_is_scaled_for_itself() -> None:
    """Black its least value, white its greatest; a constant one is black; empty places are grey."""
    maps = np.random.default_rng(0).normal(size=(5, 60, 80)).astype(np.float32)
    maps *= np.array([1e-6, 1.0, 1e6, 1.0, 1.0], np.float32)[:, None, None]
    maps[3] = 4.0
    picture, left_out = channel_grid(maps)
    assert left_out == 0
    cut = tiles(picture, (60, 80), 3)
    assert len(cut) == 6
    for channel in (0, 1, 2, 4):
        values = maps[channel].astype(np.float64)
        expected = np.rint(255 * (values - values.min()) / (values.max() - values.min()))
        assert (cut[channel] == expected).all()
    assert (cut[3] == 0).all()
    assert (cut[5] == GAP_GREY).all()


def test_small_maps_are_enlarged_by_a_whole_number() -> None:
    """512 maps of 7 x 7 can be seen: every value is a square."""
    maps = np.random.default_rng(0).random((512, 7, 7), dtype=np.float32)
    picture, left_out = channel_grid(maps)
    assert left_out == 0
    assert picture.width == picture.height
    assert 900 < picture.width <= 1024
    factor = ((picture.width - GAP) // 23 - GAP) // 7
    first = tiles(picture, (7 * factor, 7 * factor), 23)[0]
    squares = first.reshape(7, factor, 7, factor)
    assert factor >= 5
    assert (squares == squares[:, :1, :, :1]).all()
    assert squares.min() == 0
    assert squares.max() == 255


@pytest.mark.parametrize("shape", [(10,), (10, 1, 1)])
def test_a_vector_is_a_tile_per_channel_scaled_together(shape: tuple[int, ...]) -> None:
    """A pooled layer: each alone would be constant."""
    vector = np.arange(10, dtype=np.float32)
    picture, left_out = channel_grid(vector.reshape(shape))
    assert left_out == 0
    side = (picture.width - GAP) // 4 - GAP
    cut = tiles(picture, (side, side), 4)
    assert side > 50
    assert [int(tile[0, 0]) for tile in cut[:10]] == np.rint(vector / 9 * 255).tolist()
    assert all((tile == tile[0, 0]).all() for tile in cut)


@pytest.mark.parametrize(
    ("shape", "max_side", "left_out"),
    [
        ((2048, 7, 7), 2048, 0),
        ((64, 112, 112), 2048, 0),
        ((64, 500, 500), 2048, 48),
        ((100, 10, 300), 2048, 0),
        ((100, 300, 10), 2048, 0),
        ((9, 100, 100), 150, 8),
        ((3, 400, 200), 100, 2),
    ],
)
def test_the_grid_is_bounded_and_says_what_it_left_out(
    shape: tuple[int, int, int], max_side: int, left_out: int
) -> None:
    """Channels that find no place are counted; one that would not fit alone is scaled down."""
    maps = np.random.default_rng(0).random(shape, dtype=np.float32)
    picture, missing = channel_grid(maps, max_side)
    assert missing == left_out
    assert max(opened(picture).size) <= max_side
    assert math.sqrt(picture.width * picture.height) > max_side / 5


@pytest.mark.parametrize(
    "maps", [np.zeros((0, 7, 7)), np.zeros((3, 4)), np.full((2, 3, 3), np.nan), np.array([np.inf])]
)
def test_a_grid_of_nothing_or_of_nan_is_the_callers_mistake(maps: NDArray[np.float64]) -> None:
    """Nothing is drawn that is not there."""
    with pytest.raises(ValueError, match="finite maps"):
        channel_grid(maps.astype(np.float32))
