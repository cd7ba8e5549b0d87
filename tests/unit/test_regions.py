"""regions: what a map marks lies where the evidence is, in source pixels."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from service.cam.heatmap import resample
from service.cam.regions import MIN_AREA, Regions, find_regions
from service.images.decode import Fit, Geometry, Preprocessing, Source, fit_to_model
from service.images.run_lengths import rle_decode, rle_encode

FITS: tuple[Fit, ...] = ("crop", "squash", "pad")
SIZES = [(640, 480), (300, 700), (320, 320), (641, 479), (1, 7), (1, 1), (3, 2), (2000, 40)]


def whole(width: int, height: int) -> Geometry:
    """A model input that covers the source exactly."""
    return Geometry((width, height), (224, 224), (0.0, 0.0, float(width), float(height)))


def fitted(width: int, height: int, fit: Fit) -> Geometry:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    return fit_to_model(Source(pixels, "PNG", ""), Preprocessing(), fit).geometry


def one_hot(row: int, column: int, cells: int = 7) -> NDArray[np.float32]:
    grid = np.zeros((cells, cells), dtype=np.float32)
    grid[row, column] = 1
    return grid


def blobs(width: int, height: int, count: int = 4, seed: int = 0) -> NDArray[np.float32]:
    """Discs on a map as large as its source, so that its mask is the discs."""
    random = np.random.default_rng(seed)
    grid = np.zeros((height, width), dtype=np.float32)
    for _ in range(count):
        centre = int(random.integers(0, width)), int(random.integers(0, height))
        cv2.circle(grid, centre, int(random.integers(20, min(width, height) // 4)), 1.0, -1)
    return grid


def filled(regions: Regions, size: tuple[int, int], scale: int = 8) -> NDArray[np.bool_]:
    """The pixels whose middles lie in a polygon, by OpenCV on a finer raster."""
    fine = np.zeros((size[1] * scale, size[0] * scale), dtype=np.uint8)
    for polygon in regions.polygons:
        cv2.fillPoly(fine, [np.rint(np.array(polygon) * scale - 0.5).astype(np.int32)], 1)
    return fine[scale // 2 :: scale, scale // 2 :: scale] > 0


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def decoded(regions: Regions) -> NDArray[np.bool_]:
    return rle_decode(regions.rle.size, regions.rle.counts)


# ---- mask


def test_the_mask_is_where_the_resampled_map_reaches_the_threshold() -> None:
    geometry = fitted(640, 480, "crop")
    grid = np.random.default_rng(0).random((7, 7), dtype=np.float32)
    drawn = resample(grid, geometry, (640, 480), (0.0, 0.0, 640.0, 480.0))
    mask = decoded(find_regions(grid, geometry, 0.6))
    assert mask.shape == (480, 640)
    assert np.array_equal(
        mask[np.abs(drawn - 0.6) > 1e-5], (drawn > 0.6)[np.abs(drawn - 0.6) > 1e-5]
    )


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_an_all_zero_map_marks_nothing(threshold: float) -> None:
    regions = find_regions(np.zeros((7, 7), np.float32), whole(64, 48), threshold)
    assert regions == Regions(threshold, None, [], [], rle_encode(np.zeros((48, 64), bool)))


def test_threshold_zero_marks_all_evidence_and_nothing_more() -> None:
    regions = find_regions(one_hot(3, 3), whole(70, 70), 0.0)
    assert tight(decoded(regions)) == (25, 25, 20, 20)


def test_a_map_that_is_one_everywhere_is_marked_whole_at_threshold_one() -> None:
    """Resampled in float32 it is 0.99999994 here and there."""
    regions = find_regions(np.ones((7, 7), np.float32), whole(641, 479), 1.0)
    assert decoded(regions).all()
    assert regions.boxes == [(0, 0, 641, 479)]
    assert regions.polygons == [[(0.0, 0.0), (0.0, 479.0), (641.0, 479.0), (641.0, 0.0)]]
    assert regions.peak == pytest.approx((320.5, 239.5), abs=0.51)


def test_evidence_against_counts_as_evidence() -> None:
    grid = one_hot(1, 5) - one_hot(5, 1)
    assert find_regions(grid, whole(70, 70), 0.5) == find_regions(abs(grid), whole(70, 70), 0.5)
    assert len(find_regions(grid, whole(70, 70), 0.5).boxes) == 2


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("max_side", [2048, 200])
def test_nothing_is_marked_outside_what_the_model_saw(
    size: tuple[int, int], fit: Fit, max_side: int
) -> None:
    geometry = fitted(*size, fit)
    regions = find_regions(np.ones((7, 7), np.float32), geometry, 0.0, max_side)
    x, y, w, h = geometry.seen
    pixel = max(1.0, max(size) / max_side)
    half = pixel / 2 + (pixel > 1) / 2  # of a pixel the middle is seen, the rest may stick out
    ys, xs = np.nonzero(decoded(regions))
    for low, high, values in ((x, x + w, xs), (y, y + h, ys)):
        assert values.min() >= low - half - 1e-6
        assert values.max() + 1 <= high + half + 1e-6
    for px, py in (point for polygon in regions.polygons for point in polygon):
        assert x - half - 0.01 <= px <= x + w + half + 0.01
        assert y - half - 0.01 <= py <= y + h + half + 0.01
    assert regions.peak is not None
    assert x <= regions.peak[0] <= x + w
    assert y <= regions.peak[1] <= y + h


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(640, 480), (300, 700), (320, 320), (900, 400), (60, 40)])
@pytest.mark.parametrize("max_side", [2048, 200])
@pytest.mark.parametrize("cell", [(3, 3), (3, 2), (2, 4), (4, 3)])
def test_a_single_cell_is_marked_where_it_lies_in_the_source(
    size: tuple[int, int], fit: Fit, max_side: int, cell: tuple[int, int]
) -> None:
    geometry = fitted(*size, fit)
    x, y, w, h = geometry.window
    centre = np.array([x + w * (cell[1] + 0.5) / 7, y + h * (cell[0] + 0.5) / 7])
    regions = find_regions(one_hot(*cell), geometry, 0.5, max_side)
    pixel = max(1.0, max(size) / max_side)
    assert regions.peak == pytest.approx(centre, abs=pixel)
    ys, xs = np.nonzero(decoded(regions))
    slack = 1.5 * pixel
    for values, middle, extent in ((xs, centre[0], w / 7), (ys, centre[1], h / 7)):
        assert values.min() + 0.5 >= middle - extent / 2 - slack
        assert values.max() + 0.5 <= middle + extent / 2 + slack
    assert regions.boxes == [tight(decoded(regions))]
    (polygon,) = regions.polygons
    assert (
        cv2.pointPolygonTest(np.array(polygon, np.float32), tuple(centre), measureDist=True)
        > -pixel
    )


# ---- peak


def test_the_peak_is_the_middle_of_the_highest_pixel() -> None:
    grid = np.random.default_rng(3).random((11, 13), dtype=np.float32)
    grid[7, 4] = 2.0
    assert find_regions(grid / 2, whole(13, 11), 0.5).peak == (4.5, 7.5)


def test_the_peak_of_a_plateau_is_its_middle() -> None:
    """The outermost cells reach to the edge: all of the corner's quarter cell is equally high."""
    x, y = find_regions(one_hot(0, 6), whole(700, 700), 0.5).peak or (0, 0)
    assert (x, y) == pytest.approx((675, 25), abs=1)


def test_of_two_equal_peaks_the_first_by_rows_is_given() -> None:
    grid = one_hot(1, 2, 5) + one_hot(3, 2, 5)
    assert find_regions(grid, whole(5, 5), 0.5).peak == (2.5, 1.5)


def test_the_peak_lies_in_the_picture_even_where_the_padding_is_hotter() -> None:
    geometry = fitted(400, 100, "pad")
    grid = one_hot(0, 3) + 0.25 * one_hot(3, 5)
    x, y = find_regions(grid, geometry, 0.1).peak or (-1, -1)
    assert 0 < y < 100
    assert x == pytest.approx(400 * 5.5 / 7, abs=1)


# ---- boxes and polygons


@pytest.mark.parametrize("seed", range(6))
def test_filled_polygons_are_the_mask(seed: int) -> None:
    geometry = whole(300, 220)
    regions = find_regions(blobs(300, 220, seed=seed), geometry, 0.5)
    assert overlap(filled(regions, (300, 220)), decoded(regions)) > 0.975


@pytest.mark.parametrize("size", [(640, 480), (300, 700), (900, 1300)])
def test_filled_polygons_of_a_smooth_map_are_the_mask(size: tuple[int, int]) -> None:
    grid = np.random.default_rng(5).random((7, 7), dtype=np.float32) ** 3
    regions = find_regions(grid / grid.max(), fitted(*size, "squash"), 0.3, max_side=640)
    assert overlap(filled(regions, size, scale=2), decoded(regions)) > 0.97
    assert sum(map(len, regions.polygons)) < 150


@given(
    arrays.arrays(
        np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), fill=st.booleans()
    )
)
def test_each_region_has_one_box_and_one_polygon_about_it(mask: NDArray[np.bool_]) -> None:
    height, width = mask.shape
    regions = find_regions(mask.astype(np.float32), whole(width, height), 0.5)
    assert np.array_equal(decoded(regions), mask)
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    large = [label for label in range(1, count) if (labels == label).sum() >= MIN_AREA]
    expected = sorted(tight(labels == label) for label in large)
    assert sorted(regions.boxes) == expected
    assert len(regions.polygons) == len(regions.boxes)
    for (x, y, w, h), polygon in zip(regions.boxes, regions.polygons, strict=True):
        assert len(polygon) >= 3
        xs, ys = zip(*polygon, strict=True)
        assert (min(xs), min(ys)) >= (x, y)
        assert max(xs) <= x + w
        assert max(ys) <= y + h


def tight(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1


def test_the_largest_region_comes_first() -> None:
    grid = np.zeros((60, 60), np.float32)
    grid[2:7, 2:7] = grid[10:40, 10:40] = grid[45:57, 45:57] = 1
    regions = find_regions(grid, whole(60, 60), 0.5)
    assert regions.boxes == [(10, 10, 30, 30), (45, 45, 12, 12), (2, 2, 5, 5)]
    assert [len(polygon) for polygon in regions.polygons] == [4, 4, 4]
    assert sorted(regions.polygons[2]) == [(2, 2), (2, 7), (7, 2), (7, 7)]


def test_a_region_inside_the_hole_of_another_has_its_own_polygon() -> None:
    grid = np.zeros((40, 40), np.float32)
    grid[5:35, 5:35] = 1
    grid[10:30, 10:30] = 0
    grid[17:23, 17:23] = 1
    regions = find_regions(grid, whole(40, 40), 0.5)
    assert regions.boxes == [(5, 5, 30, 30), (17, 17, 6, 6)]
    assert decoded(regions).sum() == 30 * 30 - 20 * 20 + 36


def test_pixels_that_touch_at_a_corner_are_one_region_and_specks_are_none() -> None:
    grid = np.zeros((20, 20), np.float32)
    grid[1, 1:4] = grid[10:12, 10:12] = grid[12:14, 12:14] = 1
    regions = find_regions(grid, whole(20, 20), 0.5)
    assert regions.boxes == [(10, 10, 4, 4)]
    assert decoded(regions).sum() == 11


# ---- pictures larger than the raster


@pytest.mark.parametrize("size", [(3000, 2000), (1000, 4001), (2049, 2048), (5000, 1500)])
def test_a_large_picture_is_measured_on_a_smaller_raster(size: tuple[int, int]) -> None:
    geometry = whole(*size)
    grid = np.random.default_rng(1).random((7, 7), dtype=np.float32) ** 2
    capped = find_regions(grid / grid.max(), geometry, 0.4, max_side=512)
    full = find_regions(grid / grid.max(), geometry, 0.4, max_side=5000)
    assert capped.rle.size == full.rle.size == size[::-1]
    assert overlap(decoded(capped), decoded(full)) > 0.97
    assert capped.peak == pytest.approx(full.peak, abs=max(size) / 512)
    assert np.array(capped.boxes) == pytest.approx(np.array(full.boxes), abs=max(size) / 256)


@pytest.mark.parametrize("size", [(3000, 2000), (700, 513), (5000, 3), (1, 9000)])
def test_boxes_of_a_large_picture_are_tight_about_its_mask(size: tuple[int, int]) -> None:
    grid = np.random.default_rng(1).random((7, 7), dtype=np.float32) ** 2
    regions = find_regions(grid / grid.max(), whole(*size), 0.4, max_side=512)
    mask = np.ascontiguousarray(decoded(regions), np.uint8)
    count, labels = cv2.connectedComponents(mask, connectivity=8)
    assert count > 1
    assert sorted(regions.boxes) == sorted(tight(labels == label) for label in range(1, count))


def test_64_megapixels_take_a_few_masks_of_memory() -> None:
    grid = np.random.default_rng(2).random((7, 7), dtype=np.float32)
    tracemalloc.start()
    try:
        regions = find_regions(grid, whole(8000, 8000), 0.5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert regions.rle.size == (8000, 8000)
    assert peak < 300e6


# ---- what is refused


def test_thresholds_outside_0_to_1_and_maps_that_are_not_finite_are_refused() -> None:
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            find_regions(one_hot(3, 3), whole(10, 10), threshold)
    with pytest.raises(ValueError, match="finite"):
        find_regions(np.full((7, 7), np.nan, np.float32), whole(10, 10), 0.5)
