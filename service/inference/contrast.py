"""What a target's logit is compared with: why this class rather than those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Contrast:
    """The explained value is `Σ_i w_i (z_target − z_i)` over some classes i, of logits z.

    classes: those classes; or the `nearest` ones to the target by their logits for the image.
    weights: of each class: `z_target − Σ_i w_i z_i`. Empty: the classes' probabilities among them,
             `softmax(z_i)`, which change with the logits; of one class that is 1.

    Zhang et al., "Finer-CAM: Spotting the Difference Reveals Finer Details for Visual Explanation",
    CVPR 2025; the weights are those of its published code.
    """

    classes: tuple[int, ...] = ()
    nearest: int = 0
    weights: tuple[float, ...] = ()

    def at(self, logits: Tensor, target: int) -> Contrast:
        """The contrast with its classes, for an image's logits (classes,)."""
        if not self.nearest:
            return self
        gaps = (logits - logits[target]).abs()
        gaps[target] = torch.inf
        count = min(self.nearest, len(logits) - 1)
        return Contrast(tuple(gaps.topk(count, largest=False).indices.tolist()))

    def weights_at(self, logits: Tensor) -> Tensor:
        """The weights (..., number of classes) for logits (..., classes)."""
        if self.weights:
            return torch.tensor(self.weights).to(logits)
        return self._of(logits).softmax(dim=-1)

    def as_mapping(self, logits: Tensor) -> Mapping[int, float]:
        """The weight of each class, for an image's logits (classes,)."""
        weights = self.weights or self.weights_at(logits).tolist()
        return dict(zip(self.classes, weights, strict=True))

    def lead(self, logits: Tensor, target: int) -> Tensor:
        """The explained value of logits (..., classes), as (...)."""
        return logits[..., target] - (self.weights_at(logits) * self._of(logits)).sum(dim=-1)

    def _of(self, logits: Tensor) -> Tensor:
        """The logits of the classes, without an index tensor, which would have to be sent along."""
        return torch.stack([logits[..., each] for each in self.classes], dim=-1)

    def slope(self, logits: Tensor, target: int) -> Tensor:
        """The gradient of `lead` at an image's logits (classes,), (classes,)."""
        point = logits.detach().clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.lead(point, target), point)
        return slope
