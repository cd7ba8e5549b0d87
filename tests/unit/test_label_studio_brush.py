"""Maps as Label Studio's brush: run lengths that a decoder written from its description reads."""

from __future__ import annotations

import numpy as np
import pytest

from service.cam.heatmap import resample
from service.images.decode import Geometry
from service.integrations.label_studio.brush import STEPS, alpha_of, encode_rle

WHOLE = Geometry((40, 30), (8, 6), (0.0, 0.0, 40.0, 30.0))


def decoded(data: list[int]) -> list[int]:
    """thi.ng's rle-pack, bit by bit."""
    bits = "".join(f"{byte:08b}" for byte in data)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        repeated = read(1)
        count = read(sizes[read(2)]) + 1
        values += [read(word)] * count if repeated else [read(word) for _ in range(count)]
    assert len(values) == total
    assert len(bits) - place < 8
    return values


def pictures() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0)
    stripes = np.zeros((1, 4 * 16_384 + 5), np.uint8)
    stripes[0, ::7] = 255
    return {
        "one pixel": np.full((1, 1), 7, np.uint8),
        "nothing": np.zeros((300, 301), np.uint8),  # runs longer than 65,536 values
        "just the longest run": np.full((128, 128), 3, np.uint8),
        "one more": np.full((1, 128 * 128 + 1), 3, np.uint8),
        "noise": noise.integers(0, 3, (37, 41), dtype=np.uint8),
        "every value": np.arange(256, dtype=np.uint8).reshape(16, 16),
        "every size of run": np.repeat(
            np.arange(8, dtype=np.uint8), [1, 2, 3, 4, 5, 64, 65, 20_000]
        )[None],
        "stripes": stripes,
    }


@pytest.mark.parametrize("name", pictures())
def test_what_is_encoded_is_decoded(name: str) -> None:
    alpha = pictures()[name]
    assert decoded(encode_rle(alpha)) == np.repeat(alpha.ravel(), 4).tolist()


def test_the_head_is_the_one_of_label_studios_own_files() -> None:
    """Values in 32 bits, word size 8, run sizes 3, 4, 8, 16."""
    assert encode_rle(np.zeros((1, 1), np.uint8))[:7] == [0, 0, 0, 4, 0x39, 0x1B, 0xFC]


def test_the_alpha_is_the_map_to_half_a_step() -> None:
    grid = np.random.default_rng(1).random((6, 8), dtype=np.float32)
    alpha = alpha_of(grid, WHOLE, max_side=2048)
    exact = 255 * resample(grid, WHOLE, (40, 30), (0.0, 0.0, 40.0, 30.0))
    assert alpha.shape == (30, 40)
    assert np.abs(alpha - exact).max() <= 255 / STEPS / 2 + 0.5
    assert len(np.unique(alpha)) <= STEPS + 1


def test_no_evidence_is_transparent_and_the_most_is_opaque() -> None:
    grid = np.zeros((6, 8), np.float32)
    grid[:3] = -1.0  # evidence against counts as much
    alpha = alpha_of(grid, WHOLE, max_side=2048)
    assert (alpha[:10] == 255).all()
    assert (alpha[-10:] == 0).all()


def test_outside_of_what_the_model_saw_there_is_nothing() -> None:
    middle = Geometry((40, 30), (8, 8), (5.0, 0.0, 30.0, 30.0))
    alpha = alpha_of(np.ones((8, 8), np.float32), middle, max_side=2048)
    assert (alpha[:, :5] == 0).all()
    assert (alpha[:, 5:35] == 255).all()
    assert (alpha[:, 35:] == 0).all()


def test_a_large_picture_gets_larger_pixels_in_its_own_size() -> None:
    grid = np.random.default_rng(2).random((6, 8), dtype=np.float32)
    coarse = alpha_of(grid, WHOLE, max_side=20)
    assert coarse.shape == (30, 40)
    assert (coarse.reshape(15, 2, 20, 2) == coarse[::2, ::2][:, None, :, None]).all()
