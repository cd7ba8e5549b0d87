"""Edits of an image's pixels, uint8 (height, width, channels), and of a layer's output; controls.

Each returns a new array; what an edit does not touch keeps its values exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from service.images.decode import Rect
from service.images.decoders.samples import bands
from service.inference.questions import ChannelEdit, GradientEdit

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Area = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""


def laid(values: Pixels, at: tuple[int, int], under: Pixels) -> Pixels:
    """A copy of `under` with `values` on it, their upper left at (x, y); what sticks out is cut."""
    made = under.copy()
    x, y = at
    top, bottom = max(y, 0), min(y + values.shape[0], under.shape[0])
    left, right = max(x, 0), min(x + values.shape[1], under.shape[1])
    if top < bottom and left < right:
        made[top:bottom, left:right] = values[top - y : bottom - y, left - x : right - x]
    return made


def laid_mask(mask: Mask, at: tuple[int, int], size: tuple[int, int]) -> Mask:
    """A mask (h, w) laid over an image of `size` (w, h), its upper left at (x, y)."""
    empty = np.zeros((size[1], size[0]), np.uint8)
    return laid(mask.view(np.uint8), at, empty).view(np.bool_)


def stretched(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """An image resized to (width, height), whatever its proportions."""
    height, width = pixels.shape[:2]
    if size == (width, height):
        return pixels.copy()
    smaller = size[0] <= width and size[1] <= height
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    made = np.asarray(cv2.resize(pixels, size, interpolation=how), dtype=np.uint8)
    return made.reshape(size[1], size[0], pixels.shape[2])  # OpenCV drops a single channel


def scaled(pixels: Pixels, factor: float, under: Pixels) -> Pixels:
    """An image enlarged or reduced about its centre, over `under`, of the same size."""
    height, width = pixels.shape[:2]
    if factor == 1:
        return pixels.copy()
    if factor > 1:
        inner_width, inner_height = _share(width, 1 / factor), _share(height, 1 / factor)
        left, top = (width - inner_width) // 2, (height - inner_height) // 2
        inner = pixels[top : top + inner_height, left : left + inner_width]
        return stretched(np.ascontiguousarray(inner), (width, height))
    small = stretched(pixels, (_share(width, factor), _share(height, factor)))
    at = (width - small.shape[1]) // 2, (height - small.shape[0]) // 2
    return laid(small, at, under)


def _share(length: int, share: float) -> int:
    return max(1, round(length * share))


def flipped(pixels: Pixels, axis: str) -> Pixels:
    """An image mirrored: `horizontal` swaps left and right, `vertical` top and bottom."""
    return np.ascontiguousarray(pixels[:, ::-1] if axis == "horizontal" else pixels[::-1])


def grey(pixels: Pixels) -> Pixels:
    """An RGB image in grey (ITU-R 601), in three equal channels."""
    made = np.empty_like(pixels)
    for rows in bands(pixels.shape[1], pixels.shape[0]):
        made[rows] = np.asarray(Image.fromarray(pixels[rows]).convert("L"))[:, :, None]
    return made


def swapped(pixels: Pixels, order: str) -> Pixels:
    """An RGB image with its channels in another order, such as `bgr`."""
    return np.ascontiguousarray(pixels[:, :, ["rgb".index(letter) for letter in order]])


def turned(pixels: Pixels, degrees: float) -> Pixels:
    """An RGB image with its hues turned by so many degrees; saturation and value stay."""
    if degrees % 360 == 0:
        return pixels.copy()
    made = np.empty_like(pixels)
    for rows in bands(pixels.shape[1], pixels.shape[0]):
        colours = cv2.cvtColor(pixels[rows].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
        colours[:, :, 0] = (colours[:, :, 0] + degrees) % 360
        made[rows] = np.rint(cv2.cvtColor(colours, cv2.COLOR_HSV2RGB) * 255)
    return made


def window(seen: Rect, size: tuple[int, int]) -> Area:
    """The pixels of an image of `size` (w, h) whose middle lies in a part x, y, w, h of it."""
    left, right = _span(seen[0], seen[2], size[0])
    top, bottom = _span(seen[1], seen[3], size[1])
    return left, top, right - left, bottom - top


def _span(start: float, extent: float, length: int) -> tuple[int, int]:
    first, end = (min(max(math.ceil(edge - 0.5), 0), length) for edge in (start, start + extent))
    return first, end


def bounds(mask: Mask) -> Area | None:
    """The bounding box of what a mask covers; None where that is nothing."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1


def other_places(
    area: Area | None, size: tuple[int, int], count: int, seed: int
) -> Sequence[tuple[int, int]]:
    """By how much to move an area within `size` (w, h) for it to lie elsewhere: x, y of each.

    As many different places as there are, `count` at most, each as likely as any other. All of the
    area lies inside; one that has no place beside itself is moved around the edges instead: what
    leaves at one side comes in at the other.
    """
    if area is None:
        return ()
    left, top, width, height = area
    columns, rows = size[0] - width + 1, size[1] - height + 1
    across, down = max(left, size[0] - left - width), max(top, size[1] - top - height)
    if across < width and down < height:
        left, top, (columns, rows) = 0, 0, size
    own, others = top * columns + left, columns * rows - 1
    drawn = random.Random(seed).sample(range(others), min(count, others))  # noqa: S311 - places
    places = (place + (place >= own) for place in drawn)
    return [(place % columns - left, place // columns - top) for place in places]


def moved(values: Pixels, by: tuple[int, int], within: Area) -> Pixels:
    """A copy with the pixels of an area moved around its edges; zeros outside the area."""
    left, top, width, height = within
    rows, columns = slice(top, top + height), slice(left, left + width)
    made = np.zeros_like(values)
    made[rows, columns] = np.roll(values[rows, columns], (by[1], by[0]), axis=(0, 1))
    return made


def other_channels(
    chosen: Sequence[int], channels: int, count: int, seed: int
) -> list[tuple[int, ...]]:
    """As many channels as are chosen, drawn from all others: `count` different sets at most."""
    others = sorted(set(range(channels)).difference(chosen))
    possible = math.comb(len(others), len(chosen))
    drawn, generator = dict[tuple[int, ...], None](), random.Random(seed)  # noqa: S311 - channels
    while len(drawn) < min(count, possible):
        drawn[tuple(sorted(generator.sample(others, len(chosen))))] = None
    return list(drawn)


def changed_channels(values: Tensor, axis: int, edit: ChannelEdit, donor: Tensor | None) -> Tensor:
    """What every channel would be set to, in the shape of a layer's output (1, ...).

    axis: of the channels. donor: the layer's output for the image that is taken from.
    """
    if edit.to == "scale":
        return values * edit.factor
    if donor is not None:
        return donor
    if edit.to == "zero":
        return torch.zeros_like(values)
    places = [place for place in range(1, values.ndim) if place != axis]
    mean = values.mean(dim=places, keepdim=True).expand_as(values)
    if edit.to == "mean":
        return mean
    generator = torch.Generator().manual_seed(edit.seed)
    noise = torch.randn(values.shape, generator=generator).to(values)
    return mean + noise * values.std(dim=places, keepdim=True, correction=0)


def changed_gradient(gradient: Tensor, edit: GradientEdit) -> Tensor:
    """What a gradient becomes on its way back."""
    if edit.to == "zero":
        return torch.zeros_like(gradient)
    if edit.to == "scale":
        return gradient * edit.amount
    return gradient.clamp(-edit.amount, edit.amount)


def with_channels(
    values: Tensor, changed: Tensor, axis: int, sets: Sequence[Sequence[int]]
) -> Tensor:
    """A layer's output (1, ...) once for each set of channels, with these changed: (n, ...)."""
    made = values.repeat(len(sets), *[1] * (values.ndim - 1))
    for row, chosen in zip(made.movedim(axis, 1), sets, strict=True):
        row[list(chosen)] = changed.movedim(axis, 1)[0, list(chosen)]
    return made
