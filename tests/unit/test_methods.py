"""Class activation maps as functions of tensors; an image has the same map in a batch as alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from service.cam.formulas import LAYER_METHODS, eigencam, over_input, scale

SIDE = 8
"""Images of a batch, rows and columns alike, so that a dimension in the wrong place still fits."""


def tensors(channels: int) -> tuple[Tensor, Tensor]:
    """Activations and gradients (SIDE, channels, SIDE, SIDE) whose signs are mixed."""
    generator = torch.Generator().manual_seed(channels)
    shape = (2, SIDE, channels, SIDE, SIDE)
    activation, gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    return activation + 0.2, gradient


@pytest.mark.parametrize("channels", [3, SIDE, 100])
@pytest.mark.parametrize("method", sorted(LAYER_METHODS.keys() - {"cam"}))
def test_an_image_has_the_same_map_in_a_batch_as_alone(method: str, channels: int) -> None:
    activation, gradient = tensors(channels)
    cam = LAYER_METHODS[method]
    together = cam(activation, gradient)
    alone = [cam(a[None], g[None])[0] for a, g in zip(activation, gradient, strict=True)]
    assert together.shape == (SIDE, SIDE, SIDE)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [3, 100])
def test_eigencam_marks_what_the_mean_activation_agrees_with_image_by_image(channels: int) -> None:
    """Whatever sign an eigenvector comes with, and whatever signs the others of the batch have."""
    activation, _ = tensors(channels)
    # The first component is a bright or a dark half, and the mean over the channels follows it.
    half = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    half[: SIDE // 2] = 10
    activation[::2] += half
    activation[1::2] += 10 - half
    maps = eigencam(activation, activation)
    upper, lower = maps[:, : SIDE // 2].sum(dim=(1, 2)), maps[:, SIDE // 2 :].sum(dim=(1, 2))
    assert (upper > lower).tolist() == [number % 2 == 0 for number in range(SIDE)]


def test_scaling_keeps_zero_and_divides_by_the_largest_absolute_value() -> None:
    scaled = scale(torch.tensor([[-4.0, 0.0], [1.0, 2.0]]))
    assert scaled.grid.tolist() == [[-1.0, 0.0], [0.25, 0.5]]
    assert (scaled.low, scaled.high) == (-4.0, 2.0)
    nothing = scale(torch.zeros(2, 2))
    assert nothing.grid.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert (nothing.low, nothing.high) == (0.0, 0.0)


def test_a_map_lies_over_the_part_of_the_input_that_its_cells_cover() -> None:
    maps = torch.ones(2, 2, 2)
    spread = over_input(maps, (10, 20), (0.25, 0.5, 0.5, 0.5))
    assert spread.shape == (2, 10, 20)
    inside = torch.zeros_like(spread)
    inside[:, 5:, 5:15] = 1
    torch.testing.assert_close(spread, inside)
