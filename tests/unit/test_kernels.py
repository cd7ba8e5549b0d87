"""kernels: every weight of a layer is where it belongs in the picture, scaled kernel by kernel."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny import PaperNet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from service.cam.tiles import GAP, GAP_GREY, KernelGrid, draw_kernels, has_rgb_input, kernel_weight
from service.errors import RenderFailed

ALEXNET = [(64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3)]


def drawn(layer: nn.Module, max_side: int = 2048) -> KernelGrid:
    weight = kernel_weight(layer)
    assert weight is not None
    return draw_kernels(weight, colour=has_rgb_input(layer), max_side=max_side)


def pixels(grid: KernelGrid) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(grid.image.data))
    assert (image.format, grid.image.media_type) == ("PNG", "image/png")
    assert image.size == (grid.image.width, grid.image.height)
    return np.asarray(image)


def tiles(
    grid: KernelGrid, size: tuple[int, int], columns: int, factor: int
) -> list[NDArray[np.uint8]]:
    """Cut the picture at its lines, which must be grey, and undo the enlargement."""
    sheet, (height, width) = pixels(grid), (size[0] * factor + GAP, size[1] * factor + GAP)
    assert (sheet.shape[0] - GAP) % height == (sheet.shape[1] - GAP) % width == 0
    assert (sheet.shape[1] - GAP) // width == columns
    found = []
    for index in range(grid.kernels - grid.left_out):
        top, left = index // columns * height, index % columns * width
        assert (sheet[top : top + GAP, left : left + width] == GAP_GREY).all()
        assert (sheet[top : top + height, left : left + GAP] == GAP_GREY).all()
        tile = sheet[top + GAP : top + height, left + GAP : left + width]
        assert np.array_equal(tile, tile[::factor, ::factor].repeat(factor, 0).repeat(factor, 1))
        found.append(tile[::factor, ::factor])
    return found


def levels(kernel: Tensor) -> NDArray[np.uint8]:
    low, high = kernel.min(), kernel.max()
    return ((kernel - low) / (high - low) * 255).round().to(torch.uint8).numpy()


def assert_tiles(
    grid: KernelGrid, kernels: list[Tensor], size: tuple[int, int], columns: int, factor: int
) -> None:
    assert grid.kernels == len(kernels)
    for tile, kernel in zip(tiles(grid, size, columns, factor), kernels, strict=False):
        assert np.abs(tile.astype(int) - levels(kernel)).max() <= 1


def seeded(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


# ---- convolutions


def test_a_layer_over_three_channels_is_in_colour() -> None:
    layer = seeded(nn.Conv2d(3, 10, (4, 5)))
    grid = drawn(layer)
    kernels = [kernel.permute(1, 2, 0) for kernel in layer.weight.detach()]
    assert pixels(grid).shape[2] == 3
    assert_tiles(grid, kernels, (4, 5), columns=4, factor=25)


def test_red_is_red() -> None:
    """PaperNet's kernels of one number: one looks at red alone, one at green."""
    red, green = tiles(drawn(PaperNet().maps), (1, 1), columns=2, factor=128)
    assert red.tolist() == [[[255, 0, 0]]]
    assert green.tolist() == [[[0, 255, 0]]]


def test_other_layers_have_a_grey_tile_for_each_pair_of_channels() -> None:
    layer = seeded(nn.Conv2d(2, 5, 3))
    kernels = list(layer.weight.detach().reshape(10, 3, 3))
    assert pixels(drawn(layer)).ndim == 2
    assert_tiles(drawn(layer), kernels, (3, 3), columns=4, factor=42)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 4, 3, groups=2)])
def test_three_channels_of_a_group_are_no_colours(layer: nn.Module) -> None:
    grid = drawn(seeded(layer))
    assert grid.kernels == layer.weight.shape[0] * 3
    assert pixels(grid).ndim == 2


def test_a_depthwise_convolution_has_a_tile_for_each_channel() -> None:
    layer = seeded(nn.Conv2d(9, 9, 3, groups=9))
    assert_tiles(drawn(layer), list(layer.weight.detach()[:, 0]), (3, 3), columns=3, factor=42)


def test_kernels_of_one_dimension_are_rows() -> None:
    layer = seeded(nn.Conv1d(3, 4, 6))
    kernels = list(layer.weight.detach().reshape(12, 1, 6))
    assert_tiles(drawn(layer), kernels, (1, 6), columns=4, factor=21)


def test_of_three_dimensions_the_slices_stand_side_by_side() -> None:
    grey, coloured = seeded(nn.Conv3d(2, 2, (3, 4, 5))), seeded(nn.Conv3d(3, 2, (2, 4, 5)))
    kernels = [torch.cat(list(kernel), 1) for kernel in grey.weight.detach().flatten(0, 1)]
    assert_tiles(drawn(grey), kernels, (4, 15), columns=2, factor=8)
    kernels = [torch.cat(list(k.permute(1, 2, 3, 0)), 1) for k in coloured.weight.detach()]
    assert_tiles(drawn(coloured), kernels, (4, 10), columns=2, factor=12)


def test_a_transposed_convolution_has_a_tile_for_each_pair_too() -> None:
    assert drawn(seeded(nn.ConvTranspose2d(3, 4, 2))).kernels == 12


@pytest.mark.parametrize("shape", ALEXNET)
def test_the_layers_of_alexnet_fit(shape: tuple[int, ...]) -> None:
    """Case 5 of the hook tutorials: each kernel for itself, the root of their number in a row."""
    layer = nn.Conv2d(shape[1], shape[0], shape[2:])
    grid = drawn(layer)
    assert (grid.kernels, grid.left_out) == (shape[0] * (1 if shape[1] == 3 else shape[1]), 0)
    columns = math.ceil(math.sqrt(grid.kernels))
    assert (grid.image.width - GAP) % columns == 0
    assert max(pixels(grid).shape) <= 2048


@pytest.mark.parametrize("max_side", [16, 64, 100, 2048])
def test_kernels_that_do_not_fit_are_left_out_and_counted(max_side: int) -> None:
    layer = seeded(nn.Conv2d(32, 40, 5))
    grid = drawn(layer, max_side)
    across = (max_side - GAP) // (5 + GAP)
    assert grid.kernels == 40 * 32
    assert grid.left_out == max(0, 40 * 32 - across**2)
    assert max(pixels(grid).shape) <= max_side
    kernels = list(layer.weight.detach().flatten(0, 1))
    columns = min(36, across)
    assert_tiles(grid, kernels, (5, 5), columns, factor=5 if max_side == 2048 else 1)


def test_a_kernel_larger_than_the_picture_is_scaled_down() -> None:
    grid = drawn(seeded(nn.Conv1d(1, 2, 5000)), 300)
    assert pixels(grid).shape == (2 * 1 + 3 * GAP, 300)
    assert (grid.kernels, grid.left_out) == (2, 0)


def test_a_constant_kernel_is_black_and_its_neighbours_are_not() -> None:
    weight = torch.tensor([0.0, 7.0])[:, None, None, None].repeat(1, 1, 3, 3)
    weight[1, 0, 1, 1] = 8.0
    constant, other = tiles(draw_kernels(weight, colour=False), (3, 3), columns=2, factor=42)
    assert not constant.any()
    assert other[1, 1] == 255
    assert other.sum() == 255


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_are_drawn(dtype: torch.dtype) -> None:
    layer = seeded(nn.Conv2d(3, 4, 3)).to(dtype)
    assert np.array_equal(pixels(drawn(layer)), pixels(drawn(layer.float())))


def test_the_largest_floats_are_drawn_and_what_is_not_finite_is_refused() -> None:
    weight = torch.zeros(1, 1, 2, 2)
    weight[0, 0, 0, 0], weight[0, 0, 1, 1] = torch.finfo().min, torch.finfo().max
    (tile,) = tiles(draw_kernels(weight, colour=False), (2, 2), columns=1, factor=64)
    assert tile.tolist() == [[0, 128], [128, 255]]
    weight[0, 0, 0, 1] = torch.nan
    with pytest.raises(RenderFailed, match="not all finite"):
        draw_kernels(weight, colour=False)


# ---- matrices


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv2d(7, 5, 1), nn.Conv1d(7, 5, 1)])
def test_a_matrix_is_one_grey_picture_with_a_row_for_each_output(layer: nn.Module) -> None:
    matrix = seeded(layer).weight.detach().reshape(5, 7)
    grid = drawn(layer)
    assert (grid.kernels, grid.left_out) == (5, 0)
    factor = (1024 - 2 * GAP) // 7
    assert pixels(grid).shape == (5 * factor + 2 * GAP, 7 * factor + 2 * GAP)
    shown = pixels(grid)[GAP:-GAP:factor, GAP:-GAP:factor]
    assert np.abs(shown.astype(int) - levels(matrix)).max() <= 1


def test_a_matrix_larger_than_the_picture_is_scaled_down() -> None:
    """In each direction by itself: two outputs of a thousand inputs stay two rows."""
    weight = torch.zeros(2, 4000)
    weight[1] = 1
    sheet = pixels(draw_kernels(weight, colour=False, max_side=500))
    assert sheet.shape == (2 + 2 * GAP, 500)
    assert (sheet[GAP, GAP:-GAP] == 0).all()
    assert (sheet[GAP + 1, GAP:-GAP] == 255).all()


# ---- which layers have kernels


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.PReLU(4), nn.Sequential(nn.Linear(2, 2)),
     nn.MultiheadAttention(4, 2), nn.InstanceNorm2d(4)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_layers_without_a_weight_of_two_dimensions_have_no_kernels(layer: nn.Module) -> None:
    assert kernel_weight(layer) is None


def test_a_weight_that_is_computed_is_drawn_as_it_is_used() -> None:
    layer = weight_norm(nn.Conv2d(3, 4, 3))
    weight = kernel_weight(layer)
    assert weight is not None
    assert not weight.requires_grad
    assert torch.equal(weight, layer.weight)
    assert has_rgb_input(layer)
