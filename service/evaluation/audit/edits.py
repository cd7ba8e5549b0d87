"""Edits that an audit makes: parts of a donor pasted in place, colour casts, matched sharpness.

All take and return uint8 (C, h, w), and leave what they do not touch exactly as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
import torch
from torch import Tensor

from service.inference.pixel_edits import bounds, moved, other_places

RING = 0.10
"""Width of the ring, as a share of the side."""

CORNER = 0.30
"""Side of a corner, as a share of the side."""

CASTS: Mapping[str, tuple[float, float, float]] = {
    "red": (1.30, 0.85, 0.85),
    "green": (0.85, 1.30, 0.85),
    "blue": (0.85, 0.85, 1.30),
    "cyan": (0.70, 1.15, 1.15),
    "magenta": (1.15, 0.70, 1.15),
    "yellow": (1.15, 1.15, 0.70),
}
"""Factors of the three channels."""

BLUR = 0.08
"""Sigma of the blur that hides a region, as a share of the longer side."""

LARGEST_SIGMA = 0.06
"""Of the blur that matches sharpness, as a share of the longer side."""


def places(height: int, width: int) -> dict[str, Tensor]:
    """The fixed places that are pasted from a donor: bool (h, w) by name, the smallest first."""
    ring = torch.ones(height, width, dtype=torch.bool)
    rows, columns = max(1, round(RING * height)), max(1, round(RING * width))
    ring[rows : height - rows, columns : width - columns] = False
    third = max(1, round(height / 3))
    down, across = max(1, round(CORNER * height)), max(1, round(CORNER * width))
    top, bottom = slice(0, down), slice(height - down, height)
    left, right = slice(0, across), slice(width - across, width)
    everything = slice(None)
    parts = {
        "top left corner": (top, left),
        "top right corner": (top, right),
        "bottom left corner": (bottom, left),
        "bottom right corner": (bottom, right),
    }
    thirds = {
        "top third": (slice(0, third), everything),
        "bottom third": (slice(height - third, height), everything),
    }
    corners = {name: _filled(height, width, part) for name, part in parts.items()}
    return {
        **corners,
        "ring": ring,
        **{name: _filled(height, width, part) for name, part in thirds.items()},
    }


def _filled(height: int, width: int, part: tuple[slice, slice]) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[part] = True
    return mask


def pasted(recipient: Tensor, donor: Tensor, mask: Tensor) -> Tensor:
    """The recipient with what the donor shows under a mask, bool (h, w), in the same place."""
    return torch.where(mask, donor, recipient)


def cast(image: Tensor, name: str) -> Tensor:
    """The image with the colour cast of CASTS, clipped; C must be 3."""
    gains = torch.tensor(CASTS[name])[:, None, None]
    return (image.float() * gains).round_().clamp_(0, 255).to(torch.uint8)


def elsewhere(mask: Tensor, seed: int) -> Tensor:
    """A mask, bool (h, w), at another place, each as likely as any other; all of it inside."""
    values = mask.numpy()
    size = values.shape[1], values.shape[0]
    steps = other_places(bounds(values), size, 1, seed)
    if not steps:
        return mask
    found = moved(values.view(np.uint8), steps[0], (0, 0, *size))
    return torch.from_numpy(found.view(np.bool_).copy())


def hidden(image: Tensor, mask: Tensor) -> Tensor:
    """The image with a region, bool (h, w), strongly blurred."""
    return torch.where(mask, blurred(image, BLUR * max(image.shape[1:])), image)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """The image after a Gaussian blur; sigma in pixels, 0 returns the image itself."""
    if sigma <= 0:
        return image
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    made = cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    return torch.from_numpy(made.reshape(pixels.shape)).permute(2, 0, 1).contiguous()


def sharpness(image: Tensor) -> float:
    """The mean absolute Laplacian of the mean of the channels, in levels of 0..255."""
    grey = image.float().mean(dim=0).numpy()
    return float(np.abs(cv2.Laplacian(grey, cv2.CV_32F)).mean())


def as_sharp_as(image: Tensor, wanted: float) -> Tensor:
    """The image blurred until its `sharpness` is at most `wanted`; unchanged where it already is.

    The blur is bounded by LARGEST_SIGMA, beyond which nothing of an object is left.
    """
    low, high = 0.0, LARGEST_SIGMA * max(image.shape[1:])
    if sharpness(image) <= wanted:
        return image
    for _ in range(6):
        middle = (low + high) / 2
        if sharpness(blurred(image, middle)) > wanted:
            low = middle
        else:
            high = middle
    return blurred(image, high)
