"""Scenes with known objects: boxes, masks and labels are those of what was pasted."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torchvision.ops import masks_to_boxes

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent.parent / "tools" / "flower_scenes")
    import flower_networks
    import scenes
    import train_heads
    from scenes import Photos


def photos() -> Photos:
    """Three plain images whose colour is their class."""
    return Photos(
        [torch.full((3, 130, 170), 40 + 80 * n, dtype=torch.uint8) for n in range(3)],
        torch.arange(3),
    )


def test_the_same_seed_draws_the_same_scenes_and_another_seed_does_not() -> None:
    first, again, other = (next(scenes.scenes(photos(), 1, seed)) for seed in (3, 3, 4))
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.boxes, again.boxes)
    assert not torch.equal(first.boxes, other.boxes)


@pytest.mark.parametrize("seed", range(4))
def test_masks_fill_their_boxes_and_keep_their_distance(seed: int) -> None:
    for scene in scenes.scenes(photos(), 3, seed):
        assert 1 <= len(scene.boxes) <= scenes.MOST
        edges = masks_to_boxes(scene.masks) + torch.tensor([0, 0, 1, 1])
        assert torch.equal(edges, scene.boxes)
        assert int(scene.masks.sum(dim=0).max()) == 1
        for box, mask in zip(scene.boxes.tolist(), scene.masks, strict=True):
            share = float(mask.sum()) / ((box[2] - box[0]) * (box[3] - box[1]))
            assert share == 1 or abs(share - math.pi / 4) < 0.02


def test_the_pixels_of_a_mask_are_those_of_a_photograph_of_its_class() -> None:
    for scene in scenes.scenes(photos(), 3, seed=0):
        for label, mask in zip(scene.labels.tolist(), scene.masks, strict=True):
            assert set(scene.pixels[:, mask].flatten().tolist()) == {40 + 80 * label}
            assert set(scene.classes()[mask].tolist()) == {label + 1}
        assert not scene.classes()[~scene.masks.any(dim=0)].any()


@pytest.mark.timeout(60)
def test_the_committed_heads_find_the_flowers_of_a_scene(shared_data: Path) -> None:
    """Held-out photographs: of three scenes, the detector is right about most flowers."""
    drawn = scenes.validation(shared_data / "flowers128.tar", 3)
    said = train_heads.report_detector(flower_networks.faster_rcnn(), drawn)
    recall = float(re.findall(r"recall ([\d.]+)", said)[0])
    assert recall > 0.5, said
    said = train_heads.report_segmenter(flower_networks.lraspp(), drawn)
    assert float(said.removeprefix("mean IoU ")) > 0.3, said
