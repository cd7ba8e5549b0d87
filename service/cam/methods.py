"""Class activation maps as pure functions: activation and gradient in, map out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Method = Callable[[Tensor, Tensor], Tensor]


def gradcam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM: `ReLU(Σ_c mean_hw(∂y/∂A_c) · A_c)`.

    activation, gradient: (N, C, h, w), float. Returns (N, h, w), not negative, not scaled.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization", ICCV 2017, equations 1 and 2.
    """
    weights = gradient.mean(dim=(2, 3))
    return torch.einsum("nc,nchw->nhw", weights, activation).relu_()


METHODS: Mapping[str, Method] = {"gradcam": gradcam}


class Scaled(NamedTuple):
    """A map divided by its largest absolute value, and its [min, max] before that."""

    grid: Tensor
    low: float
    high: float


def scale(cam: Tensor) -> Scaled:
    """Divide one map (h, w) by its largest absolute value; an all-zero map stays zero.

    Never min-max: zero means "no evidence here" and must stay zero.
    """
    low, high = (float(value) for value in torch.aminmax(cam))
    largest = max(abs(low), abs(high))
    return Scaled(cam / largest if largest > 0 else cam, low, high)


def fuse(cams: Sequence[Tensor]) -> Tensor:
    """Fuse the maps of several layers: the mean of the scaled maps, at the finest one's shape.

    Each map (h, w) is scaled by its own maximum first, so that a layer with large activations does
    not drown the others, and is resampled bilinearly with half-pixel centres.
    """
    if len(cams) == 1:
        return cams[0]
    finest = max((tuple(cam.shape) for cam in cams), key=lambda shape: shape[0] * shape[1])
    resampled = [
        functional.interpolate(
            scale(cam).grid[None, None], size=finest, mode="bilinear", align_corners=False
        )[0, 0]
        for cam in cams
    ]
    return torch.stack(resampled).mean(dim=0)
