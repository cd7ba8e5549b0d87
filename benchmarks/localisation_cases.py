"""The images of `localisation.py`: off-centre views, whole views and 2×2 grids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from service.images.decode import Rect, Source, decode, fit_to_model
from service.models.pool import Replica

Mask = NDArray[np.bool_]

# What the demo images show, as ImageNet has it, and the values of their masks. The owl, the
# pets and the sunflower are of no class that can be named with certainty. The crow of
# `bird_segmentation` counts as right where the answer is a bird, as COCO's birds do.
DEMO: Mapping[str, tuple[frozenset[int], int | None]] = {
    "bird.jpg": (frozenset({19}), None),
    "cat_720p.jpg": (frozenset({281, 282, 285}), None),
    "dragonfly.jpg": (frozenset({319}), None),
    "hot_dog.jpg": (frozenset({934}), None),
    "parrot.jpg": (frozenset({88}), None),
    "dog_segmentation_256.jpg": (frozenset({258}), 0),
    "bird_segmentation.jpg": (frozenset(), 3),
}

SIDES = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Sides of the square windows that are tried, as shares of an image's shorter side."""

PLACES = 7
"""Positions that are tried along each axis."""

WINDOWS_TRIED, WINDOWS_KEPT = 8, 2
"""Windows of one image and kind that the model is asked about, and that are kept."""

AREA = (0.04, 0.5)
"""How large, as a share of the window, the box of an off-centre object may be."""


@dataclass(frozen=True, slots=True, eq=False)
class Photo:
    """An image and one kind of object in it.

    classes: the ImageNet classes that are a right answer; empty: the birds of COCO's matches.
    boxes:   of every object of the kind, in source pixels. mask: of all of them; None: unknown.
    """

    name: str
    source: Source
    classes: frozenset[int]
    boxes: tuple[Rect, ...]
    mask: Mask | None


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A model input that is classified right.

    image:      the image it is from; views of one image are one cluster.
    boxes:      left, top, right, bottom in input pixels; empty where the object is not off-centre.
    """

    photo: str
    pixels: Tensor
    target: int
    boxes: tuple[Rect, ...]
    mask: Mask | None


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Four whole views of four classes side by side: uint8 (3, 2h, 2w), row by row."""

    photos: tuple[str, ...]
    pixels: Tensor
    targets: tuple[int, ...]


def photos(data: Path) -> list[Photo]:
    """Every image with every kind of object that ImageNet has a class for."""
    found: list[Photo] = []
    birds: set[int] = set()
    for each in json.loads((data / "coco_free" / "annotations.json").read_text()):
        source = _read(data / "coco_free" / "images" / each["file"])
        stem = Path(each["file"]).stem
        values = np.asarray(Image.open(data / "coco_free" / "masks" / f"{stem}.png"))
        for kind, classes in each["imagenet_classes"].items():
            birds |= set(classes) if kind == "bird" else set()
            boxes = tuple(
                (float(x), float(y), float(w), float(h))
                for name, x, y, w, h in each["boxes"]
                if name == kind
            )
            mask = values == each["mask_values"][kind]
            found.append(Photo(stem, source, frozenset(classes), boxes, mask))
    for name, (known, value) in DEMO.items():
        source = _read(data / "demo_images" / name)
        drawn = None
        if value is not None:
            path = data / "demo_images" / name.replace("segmentation", "segmentation_mask")
            drawn = np.asarray(Image.open(path.with_suffix(".png"))) == value
        found.append(Photo(Path(name).stem, source, known or frozenset(birds), (), drawn))
    return found


def views(found: Sequence[Photo], replica: Replica, seed: int) -> tuple[list[View], list[View]]:
    """The whole views, and all views with the first of every image before any second one.

    A whole view is the service's own centre crop. A view with an off-centre object is a square
    window of the image that holds the largest object of a kind while its centre lies in no box
    of that kind. Only those that the model classifies right are kept.
    """
    chance = random.Random(seed)  # noqa: S311 (a seed makes the run repeatable)
    shuffled = list(found)
    chance.shuffle(shuffled)
    whole: list[View] = []
    ranked: list[tuple[int, View]] = []
    for photo in shuffled:
        candidates = list(_windows(photo))
        chance.shuffle(candidates)
        tried = (_view(photo, rect, replica) for rect in candidates[:WINDOWS_TRIED])
        kept = list(islice((view for view in tried if view is not None), WINDOWS_KEPT))
        plain = _view(photo, None, replica)
        if plain is not None:
            whole.append(plain)
            kept.insert(1, plain)
        ranked += enumerate(kept)
    return whole, [view for _, view in sorted(ranked, key=lambda pair: pair[0])]


def grids(whole: Sequence[View], count: int, seed: int) -> list[Grid]:
    """Seeded 2×2 grids of whole views; the four are of different classes and images."""
    chance = random.Random(seed)  # noqa: S311
    made: list[Grid] = []
    while len(made) < count:
        four = chance.sample(list(whole), 4)
        if len({view.target for view in four}) < 4 or len({view.photo for view in four}) < 4:
            continue
        tiles = [view.pixels for view in four]
        pixels = torch.cat([torch.cat(tiles[:2], 2), torch.cat(tiles[2:], 2)], 1)
        names = tuple(view.photo for view in four)
        made.append(Grid(names, pixels, tuple(view.target for view in four)))
    return made


def quarter(index: int, shape: tuple[int, int]) -> Mask:
    """The quarter of a grid, row by row, as a mask."""
    mask = np.zeros(shape, dtype=bool)
    (row, column), (height, width) = divmod(index, 2), (shape[0] // 2, shape[1] // 2)
    mask[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
    return mask


def _read(path: Path) -> Source:
    return decode(path.read_bytes(), max_pixels=50_000_000)


def _windows(photo: Photo) -> Iterator[Rect]:
    """Square windows that hold the largest object, off-centre; in whole source pixels."""
    if not photo.boxes:
        return
    width, height = photo.source.width, photo.source.height
    x, y, w, h = max(photo.boxes, key=lambda box: box[2] * box[3])
    for share, row, column in product(SIDES, range(PLACES), range(PLACES)):
        side = int(share * min(width, height))
        left = (width - side) * column // (PLACES - 1)
        top = (height - side) * row // (PLACES - 1)
        middle = (left + side / 2, top + side / 2)
        holds = left <= x and top <= y and x + w <= left + side and y + h <= top + side
        hit = any(_within(box, middle) for box in photo.boxes)
        if holds and not hit and AREA[0] <= w * h / side**2 <= AREA[1]:
            yield float(left), float(top), float(side), float(side)


def _within(box: Rect, point: tuple[float, float]) -> bool:
    x, y, w, h = box
    return x <= point[0] <= x + w and y <= point[1] <= y + h


def _view(photo: Photo, rect: Rect | None, replica: Replica) -> View | None:
    """The window (None: the service's own crop) as model input, or None if it is not recognised."""
    source = photo.source
    if rect is None:
        fitted = fit_to_model(source, replica.model.preprocessing)
        window = fitted.geometry.window
    else:
        left, top, width, height = (int(value) for value in rect)
        part = np.ascontiguousarray(source.pixels[top : top + height, left : left + width])
        fitted = fit_to_model(replace(source, pixels=part), replica.model.preprocessing, "squash")
        window = rect
    with torch.no_grad():
        target = int(replica.module(replica.model.normalised(fitted.pixels[None])).argmax())
    if target not in photo.classes:
        return None
    size = (int(fitted.pixels.shape[1]), int(fitted.pixels.shape[2]))
    mask = None if photo.mask is None else _seen(photo.mask, window, size)
    if mask is not None and not mask.any():
        mask = None
    boxes = () if rect is None else tuple(_in_view(box, window, size) for box in photo.boxes)
    return View(photo.name, fitted.pixels, target, boxes, mask)


def _seen(mask: Mask, window: Rect, size: tuple[int, int]) -> Mask:
    """A mask of the source read at the centres of the input's pixels."""
    x, y, w, h = window
    rows = np.floor(y + (np.arange(size[0]) + 0.5) * h / size[0]).astype(int)
    columns = np.floor(x + (np.arange(size[1]) + 0.5) * w / size[1]).astype(int)
    seen: Mask = mask[rows.clip(0, mask.shape[0] - 1)][:, columns.clip(0, mask.shape[1] - 1)]
    return seen


def _in_view(box: Rect, window: Rect, size: tuple[int, int]) -> Rect:
    (x, y, w, h), (left, top, width, height) = box, window
    across, down = size[1] / width, size[0] / height
    return (
        (x - left) * across,
        (y - top) * down,
        (x + w - left) * across,
        (y + h - top) * down,
    )
