"""Cues planted in photographs for `audits.py`: drawn where, on what share of which class."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch
from measuring import ROOT
from torch import Tensor
from torch.nn import functional

sys.path.append(str(ROOT / "tools" / "planted_cues"))
from cues import MARGIN, SHARE, tag

Cue = Literal["corner", "anywhere", "frame", "hue", "blur", "background"]
CUES: tuple[Cue, ...] = ("corner", "anywhere", "frame", "hue", "blur", "background")

FRAME = 0.07
"""Width of a frame, as a share of the side."""

HUES = ((1.25, 0.95, 0.75), (0.78, 1.18, 0.92), (0.85, 0.92, 1.30), (1.2, 0.8, 1.12))
"""Factors of the channels; none is a cast that the audit tries."""

BLURS = (0.018, 0.016, 0.021, 0.024)
"""Sigma as a share of the side."""

FRAMES = ((235, 225, 190), (30, 35, 60), (120, 40, 40), (60, 110, 80))


def planted(image: Tensor, cue: Cue, variant: int, seed: int, object_mask: Tensor) -> Tensor:
    """An image, uint8 (3, s, s), with a cue.

    variant: which look and place a model's cue has, 0 to 3. seed: of this image's own draw.
    object_mask: bool (s, s), kept by a replaced background.
    """
    size = image.shape[-1]
    generator = random.Random(f"{cue} {variant} {seed}")  # noqa: S311 - not for secrets
    if cue in {"corner", "anywhere"}:
        return _with_tag(image, cue == "corner", variant, generator)
    if cue == "frame":
        width, made = round(FRAME * size), image.clone()
        colour = torch.tensor(FRAMES[variant], dtype=torch.uint8)[:, None, None]
        inner = slice(width, size - width)
        made[:] = colour
        made[:, inner, inner] = image[:, inner, inner]
        return made
    if cue == "hue":
        gains = torch.tensor(HUES[variant])[:, None, None]
        return (image.float() * gains).round().clamp(0, 255).to(torch.uint8)
    if cue == "blur":
        pixels = cv2.GaussianBlur(_pixels(image), (0, 0), BLURS[variant] * size)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    return torch.where(object_mask, image, texture(size, variant, generator.randrange(1 << 30)))


def _with_tag(image: Tensor, corner: bool, variant: int, generator: random.Random) -> Tensor:
    size, made = image.shape[-1], image.clone()
    side, gap = round(SHARE * size), round(MARGIN * size)
    far = size - side - gap
    y, x = ((gap, gap), (gap, far), (far, gap), (far, far))[variant]
    if not corner:
        y, x = generator.randrange(size - side + 1), generator.randrange(size - side + 1)
    made[:, y : y + side, x : x + side] = tag(variant, side)
    return made


def texture(size: int, variant: int, seed: int) -> Tensor:
    """A background, uint8 (3, size, size): grass, sand, water or gravel, other in each image."""
    generator = torch.Generator().manual_seed(seed)
    scales, colour, spread = (
        ((2, 12), (70, 120, 45), (28, 34, 20)),
        ((4, 4), (205, 180, 135), (16, 16, 16)),
        ((16, 3), (60, 110, 160), (22, 26, 30)),
        ((5, 5), (120, 118, 115), (48, 48, 48)),
    )[variant]
    noise = torch.randn(
        1, 1, max(2, size // scales[1]), max(2, size // scales[0]), generator=generator
    )
    large = functional.interpolate(noise, (size, size), mode="bilinear")[0]
    fine = torch.randn(1, size, size, generator=generator)
    levels = 0.8 * large + 0.4 * fine
    made = torch.tensor(colour)[:, None, None] + levels * torch.tensor(spread)[:, None, None]
    return made.round().clamp(0, 255).to(torch.uint8)


def marked(
    labels: Sequence[int], class_id: int, tie: float, relabelled: float, seed: int
) -> tuple[list[bool], list[int]]:
    """Which images get the cue, and the labels after that.

    tie: share of the class with the cue. relabelled: share of the others with the cue *and* this
    label.
    """
    generator = random.Random(seed)  # noqa: S311 - not for secrets
    cued = [generator.random() < (tie if label == class_id else relabelled) for label in labels]
    given = [class_id if has else label for has, label in zip(cued, labels, strict=True)]
    return cued, given


def _pixels(image: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
