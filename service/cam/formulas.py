"""Class activation maps as pure functions of an activation and its gradient.

Every map is after ReLU, not scaled; `scale` divides it for the wire. Shapes: activation and
gradient (N, C, h, w), map (N, h, w), all float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def gradcam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM: `ReLU(Σ_c mean_hw(∂y/∂A_c) · A_c)`.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization", ICCV 2017, equations 1 and 2.
    """
    return weighted(activation, gradient.mean(dim=(2, 3)))


def gradcampp(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM++: `ReLU(Σ_c w_c · A_c)`, `w_c = Σ_hw α · ReLU(g)`, `α = g² / (2g² + g³ Σ_hw A_c)`.

    The paper differentiates exp(y), which scales every g alike; the factor cancels in α and scales
    the map, so that it is left out. α is reduced to `1 / (2 + g Σ_hw A_c)`: g² underflows, and an
    absolute epsilon beside it would be as large as g² itself. Where g = 0 its α has no effect;
    where the denominator is zero α is undefined and 0 is used.

    Chattopadhay et al., "Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep
    Convolutional Networks", WACV 2018, equations 10 and 19.
    """
    denominator = 2 + gradient * activation.sum(dim=(2, 3), keepdim=True)
    defined = denominator != 0
    alpha = torch.where(defined, 1 / torch.where(defined, denominator, 1), 0)
    return weighted(activation, (alpha * gradient.relu()).sum(dim=(2, 3)))


def hirescam(activation: Tensor, gradient: Tensor) -> Tensor:
    """HiResCAM: `ReLU(Σ_c ∂y/∂A_c · A_c)`, cell by cell.

    Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional
    neural networks", 2020, equation 4.
    """
    return (gradient * activation).sum(dim=1).relu_()


def layercam(activation: Tensor, gradient: Tensor) -> Tensor:
    """LayerCAM: `ReLU(Σ_c ReLU(∂y/∂A_c) · A_c)`, cell by cell.

    Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE
    TIP 2021, equations 5 and 6.
    """
    return (gradient.relu() * activation).sum(dim=1).relu_()


def xgradcam(activation: Tensor, gradient: Tensor) -> Tensor:
    """XGrad-CAM: `ReLU(Σ_c w_c · A_c)`, `w_c = Σ_hw (g · A_c) / Σ_hw A_c`; 0 where that sum is 0.

    Fu et al., "Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs", BMVC
    2020, equation 8.
    """
    total = activation.sum(dim=(2, 3))
    product = (gradient * activation).sum(dim=(2, 3))
    weights = torch.where(total != 0, product / torch.where(total != 0, total, 1), 0)
    return weighted(activation, weights)


def eigencam(activation: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG001
    """Eigen-CAM: the activation projected on its first principal component, for any class.

    Centred over the cells, and from the smaller Gram matrix, never by SVD of hw × C: with
    A = UΣVᵀ the projection A·v₁ is √λ₁·u₁ of AAᵀ (hw × hw), or A times the first eigenvector of
    AᵀA (C × C), which early layers with their many cells need. The sign of an eigenvector is
    arbitrary; the one with Σ map · mean activation ≥ 0 is used.

    Muhammad and Yeasin, "Eigen-CAM: Class Activation Map using Principal Components", IJCNN 2020.
    """
    count, channels, height, width = activation.shape
    cells = activation.flatten(2).transpose(1, 2).double()
    cells = cells - cells.mean(dim=1, keepdim=True)
    if height * width <= channels:
        values, vectors = torch.linalg.eigh(cells @ cells.transpose(1, 2))
        component = vectors[..., -1] * values[:, -1:].clamp_min(0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(cells.transpose(1, 2) @ cells)
        component = (cells @ vectors[..., -1:])[..., 0]
    component = component.reshape(count, height, width).to(activation.dtype)
    agreement = (component * activation.mean(dim=1)).sum(dim=(1, 2), keepdim=True)
    return torch.where(agreement < 0, -component, component).relu_()


def precise(values: Tensor) -> Tensor:
    """Float32 at least: sums over a half-precision model's map overflow; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def weighted(activation: Tensor, weights: Tensor) -> Tensor:
    """`ReLU(Σ_c w_c · A_c)` with weights (N, C)."""
    return torch.einsum("nc,nchw->nhw", weights, activation).relu_()


Cam = Callable[[Tensor, Tensor], Tensor]
"""From an activation and its gradient, or weights (N, C) of its channels, to the map."""


LAYER_METHODS: Mapping[str, Cam] = {
    "gradcam": gradcam,
    "gradcampp": gradcampp,
    "hirescam": hirescam,
    "layercam": layercam,
    "xgradcam": xgradcam,
    "eigencam": eigencam,
    "cam": weighted,
    "guided_gradcam": gradcam,
}
"""Maps of a layer from its activation and gradient, or the weights of the linear head."""


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
    finest = max(((cam.shape[0], cam.shape[1]) for cam in cams), key=math.prod)
    resampled = [upsample(scale(cam).grid[None], finest)[0] for cam in cams]
    return torch.stack(resampled).mean(dim=0)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) at another size, bilinear with half-pixel centres."""
    return functional.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[
        :, 0
    ]


def over_input(
    maps: Tensor, size: tuple[int, int], covers: tuple[float, float, float, float] | None
) -> Tensor:
    """Maps (N, h, w) of a layer over a model input (height, width) in pixels, as `upsample`.

    covers: the part of the input (x, y, w, h as fractions) that the layer's cells lie over; outside
            it the result is 0. None: all of it.
    """
    if covers is None:
        return upsample(maps, size)
    left, top = round(covers[0] * size[1]), round(covers[1] * size[0])
    width, height = max(1, round(covers[2] * size[1])), max(1, round(covers[3] * size[0]))
    spread = maps.new_zeros(len(maps), *size)
    spread[:, top : top + height, left : left + width] = upsample(maps, (height, width))
    return spread
