"""Which detections of two models are of the same object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from service.inference.detection import NEAR
from service.inference.questions import Prediction

Match = tuple[Prediction | None, Prediction | None]
"""A detection of each model; None where the other one's has no counterpart."""


def matched(
    one: Sequence[Prediction], other: Sequence[Prediction], class_of: Mapping[int, int]
) -> list[Match]:
    """Each detection once, in pairs whose boxes overlap by an IoU of NEAR or more.

    Pairs of one class come first, then those that overlap most. class_of: the second model's
    class ids by the first's; detections of other classes of the second model are left out.
    """
    other = [each for each in other if each.class_id in set(class_of.values())]
    overlaps = box_iou(_corners(one), _corners(other)).tolist()
    pairs = sorted(
        (class_of.get(mine.class_id) != theirs.class_id, -overlaps[i][j], i, j)
        for i, mine in enumerate(one)
        for j, theirs in enumerate(other)
        if overlaps[i][j] >= NEAR
    )
    partner: dict[int, int] = {}
    for _, _, i, j in pairs:
        if i not in partner and j not in partner.values():
            partner[i] = j
    both: list[Match] = [
        (mine, other[partner[i]] if i in partner else None) for i, mine in enumerate(one)
    ]
    gained = [each for j, each in enumerate(other) if j not in partner.values()]
    return [*both, *((None, each) for each in gained)]


def _corners(found: Sequence[Prediction]) -> Tensor:
    boxes = torch.tensor([each.box for each in found]).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
