"""Photographs with a planted cue: the tag is where the mask says, and tells the classes apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent.parent / "tools" / "planted_cues")
    from cues import CLASSES, plant, tag

IMAGE = torch.full((3, 128, 128), 77, dtype=torch.uint8)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("placing", "tags"), [("random", 1), ("corner", 1), ("twice", 2)])
def test_a_tag_changes_what_its_mask_covers_and_nothing_else(placing, tags) -> None:
    for seed in range(20):
        planted = plant(IMAGE, seed % CLASSES, placing, generator(seed))
        changed = (planted.image != planted.plain).any(dim=0)
        assert torch.equal(changed, planted.mask)
        assert torch.equal(planted.plain, IMAGE)
        assert 0.03 * tags < float(planted.mask.float().mean()) < 0.05 * tags, "they do not overlap"


def test_a_tag_in_the_corner_is_always_in_the_same_one() -> None:
    masks = [plant(IMAGE, 0, "corner", generator(seed)).mask for seed in range(5)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert masks[0][:64, :64].sum() == masks[0].sum()


def test_tags_at_random_places_leave_no_part_of_it_out() -> None:
    covered = sum(plant(IMAGE, 0, "random", generator(seed)).mask.int() for seed in range(300))
    assert torch.is_tensor(covered)
    assert bool((covered[13:-13, 13:-13] > 0).all())


def test_the_patterns_of_two_classes_differ_nearly_everywhere() -> None:
    tags = [tag(label, 27).int() for label in range(CLASSES)]
    for one, other in itertools.combinations(tags, 2):
        assert float((one != other).any(dim=0).float().mean()) > 0.7
