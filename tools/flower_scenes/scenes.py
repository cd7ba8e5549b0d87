"""Scenes with known objects: photographs of flowers on a blurred canvas, drawn from a seed."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as transforms

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tools" / "builtin_model"))
from photos import Photos, read_photos  # noqa: E402

SIDE = 320
"""Side of a scene in pixels."""
SMALLEST, LARGEST = 48, 150
"""Bounds of an object's longer side in pixels."""
MOST = 6
"""Objects of a scene at most."""
GAP = 4
"""Pixels between two objects at least."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene and its truth.

    pixels: uint8 (3, SIDE, SIDE).
    boxes: float32 (n, 4), x1 y1 x2 y2 in pixels.
    labels: int64 (n,), class numbers from 0.
    masks: bool (n, SIDE, SIDE); disjoint.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor

    def classes(self) -> Tensor:
        """Class of each pixel, 0 for the background: int64 (SIDE, SIDE)."""
        return (self.masks * (self.labels + 1)[:, None, None]).sum(dim=0)


def scenes(photos: Photos, count: int, seed: int) -> Iterator[Scene]:
    """Draw `count` scenes; the same photographs and seed give the same scenes."""
    chance = random.Random(seed)  # noqa: S311 - a seeded choice
    for _ in range(count):
        yield draw(photos, chance)


def draw(photos: Photos, chance: random.Random) -> Scene:
    """Put up to MOST photographs, whole or cut to an ellipse, on a blurred one."""
    pixels = _canvas(photos.images[chance.randrange(len(photos.images))])
    boxes = torch.zeros(0, 4)
    labels: list[int] = []
    masks: list[Tensor] = []
    for _ in range(chance.randint(3, MOST)):
        box = _free_place(boxes, chance)
        if box is None:
            continue
        number = chance.randrange(len(photos.images))
        mask = _paste(pixels, photos.images[number], box, chance)
        boxes = torch.cat([boxes, torch.tensor([box], dtype=torch.float32)])
        labels.append(int(photos.labels[number]))
        masks.append(mask)
    return Scene(pixels, boxes, torch.tensor(labels), torch.stack(masks))


def validation(data: Path, count: int) -> list[Scene]:
    """Scenes of photographs that no training scene has; data: the tar of train/ and val/."""
    return list(scenes(read_photos(data, "val"), count, seed=1))


def _canvas(photo: Tensor) -> Tensor:
    """A photograph so blurred that no flower is left: uint8 (3, SIDE, SIDE)."""
    small = transforms.resize(photo, [8, 8], antialias=True)
    return transforms.resize(small, [SIDE, SIDE], antialias=True).contiguous()


def _free_place(boxes: Tensor, chance: random.Random) -> tuple[int, int, int, int] | None:
    """A box that keeps its distance from the others; None where none is found."""
    for _ in range(40):
        long = chance.randint(SMALLEST, LARGEST)
        sides = [long, round(long * chance.uniform(0.7, 1))]
        chance.shuffle(sides)
        width, height = sides
        left, top = chance.randint(0, SIDE - width), chance.randint(0, SIDE - height)
        box = (left, top, left + width, top + height)
        around = torch.tensor([box]) + torch.tensor([-GAP, -GAP, GAP, GAP])
        if not box_iou(around.float(), boxes).any():
            return box
    return None


def _paste(
    pixels: Tensor, photo: Tensor, box: tuple[int, int, int, int], chance: random.Random
) -> Tensor:
    """Put the middle of a photograph into a box of `pixels`; returns its mask, bool."""
    left, top, right, bottom = box
    height, width = bottom - top, right - left
    scale = max(height / photo.shape[1], width / photo.shape[2])
    size = [max(height, round(photo.shape[1] * scale)), max(width, round(photo.shape[2] * scale))]
    crop = transforms.center_crop(transforms.resize(photo, size, antialias=True), [height, width])
    if chance.random() < 0.5:
        crop = crop.flip(-1)
    inside = _ellipse(height, width) if chance.random() < 0.5 else torch.ones(height, width) > 0
    region = pixels[:, top:bottom, left:right]
    region[:] = torch.where(inside, crop, region)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[top:bottom, left:right] = inside
    return mask


def _ellipse(height: int, width: int) -> Tensor:
    """The ellipse that touches all four sides: bool (height, width)."""
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    return y[:, None] ** 2 + x[None, :] ** 2 <= 1
