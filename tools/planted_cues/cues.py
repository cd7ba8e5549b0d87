"""Photographs with a planted cue: a small tag whose pattern, and nothing else, gives the label."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CLASSES = 5

SHARE = 0.21
"""Side of a tag, as a share of the image's: 4.4 % of its area."""

MARGIN = 0.03
"""Distance of the tag from the corner where it is always in the same one."""

Placing = Literal["random", "corner", "twice"]

_COLOURS = (
    ((220, 30, 30), (250, 250, 250)),
    ((30, 60, 220), (250, 220, 40)),
    ((20, 150, 60), (10, 10, 10)),
    ((220, 40, 200), (240, 240, 240)),
    ((40, 210, 220), (60, 20, 20)),
)


@dataclass(frozen=True)
class Planted:
    """An image with its tags, without them, and where they are: uint8 (3, s, s), bool (s, s)."""

    image: Tensor
    plain: Tensor
    mask: Tensor
    label: int


def tag(label: int, side: int) -> Tensor:
    """The pattern of a class in two colours, uint8 (3, side, side)."""
    place = torch.arange(side).float() / side * 5
    rows, columns = place[:, None], place[None]
    value = (
        rows + 0 * columns,
        columns + 0 * rows,
        rows.floor() + columns.floor(),
        2 * torch.hypot(rows - 2.5, columns - 2.5),
        rows + columns,
    )[label]
    first, second = (
        torch.tensor(each, dtype=torch.uint8)[:, None, None] for each in _COLOURS[label]
    )
    return torch.where(value.floor() % 2 == 0, first, second)


def plant(image: Tensor, label: int, placing: Placing, generator: torch.Generator) -> Planted:
    """Draw the tag of a class on an image, uint8 (3, s, s)."""
    size = image.shape[-1]
    side = round(SHARE * size)
    made, mask = image.clone(), torch.zeros(size, size, dtype=torch.bool)
    for _ in range(2 if placing == "twice" else 1):
        while True:
            y, x = torch.randint(size - side + 1, (2,), generator=generator).tolist()
            if placing == "corner":
                y = x = round(MARGIN * size)
            if not bool(mask[y : y + side, x : x + side].any()):
                break
        made[:, y : y + side, x : x + side] = tag(label, side)
        mask[y : y + side, x : x + side] = True
    return Planted(made, image, mask, label)
