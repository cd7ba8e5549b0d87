"""Parts of a class's evidence: factors of a layer's activation, weighted by their contribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.cam.formulas import over_input
from service.evaluation.audit.factors import factorise
from service.evaluation.audit.passes import Passes
from service.models.head import linear_head
from service.models.loaded import LoadedModel

COUNT = 5
"""Parts of each class."""

STRONGEST = 12
"""Images of a part from which it is taken."""

LARGEST = 0.10
"""The largest region of a part, as a share of the image's area."""

MISSING = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One factor of a class's evidence over its images.

    number: from 0, the part with the largest contribution first.
    maps:   how much of it each cell of each image has, (n, h, w) ≥ 0.
    share:  of the class's evidence over all images, 0..1.
    order:  positions of the images, the strongest first.
    """

    number: int
    maps: Tensor
    share: float
    order: tuple[int, ...]

    @property
    def strength(self) -> Tensor:
        """The largest cell of each image, (n,)."""
        return self.maps.amax(dim=(1, 2))

    @property
    def presence(self) -> float:
        """The share of the images with at least half the strength of the strongest ones."""
        strongest = self.strength[list(self.order[:STRONGEST])].median()
        return float((self.strength >= strongest / 2).float().mean())

    @property
    def unseen(self) -> tuple[int, ...]:
        """Further images with at least half the strength of the strongest, in this order."""
        least = float(self.strength[list(self.order[:STRONGEST])].median()) / 2
        return tuple(at for at in self.order[STRONGEST:] if float(self.strength[at]) >= least)


def why_no_parts(model: LoadedModel) -> str | None:
    """Why a model has no parts, in one sentence; None if it has."""
    if model.no_layers:
        return f"no layer of the model can be recorded: {model.no_layers}"
    if model.target_layer is None:
        return "the model has no target layer; configure `target_layer`"
    return None


def find_parts(
    passes: Passes, images: Sequence[Tensor], class_id: int, layer: str, seed: int
) -> list[Part] | str:
    """The parts of a class in its images, or why there are none.

    The weights of the channels are those of a linear head behind the layer, less their mean over
    classes; without such a head they are the gradient of the class's logit above the mean.
    """
    model = passes.model
    activation, logits = passes.activations(images, layer)
    weights = linear_head(model, activation[:1].to(model.device), logits[0])
    if weights is not None:
        row = (weights[class_id] - weights.mean(dim=0)).cpu().clamp_min(0)
        evidence = activation * row[:, None, None]
    elif model.no_gradients:
        return f"the model has no linear head, and no gradients: {model.no_gradients}"
    else:
        activation, slopes = passes.gradients(images, layer, class_id)
        evidence = activation * slopes
    return _factored(evidence.clamp_min_(0), seed)


def _factored(evidence: Tensor, seed: int) -> list[Part] | str:
    """Parts of evidence (n, channels, h, w) ≥ 0."""
    count, channels, height, width = evidence.shape
    rows = evidence.permute(0, 2, 3, 1).reshape(-1, channels)
    rows = rows[:, rows.amax(dim=0) > 0]
    if not rows.numel() or not math.isfinite(float(rows.sum())):
        return "the layer has no evidence for the class that can be told apart"
    weights, factors = factorise(rows, min(COUNT, rows.shape[1]), seed)
    contributions = weights * factors.sum(dim=1)
    total = float(contributions.sum()) + MISSING
    maps = contributions.T.reshape(-1, count, height, width)
    ranked = sorted(maps, key=lambda each: -float(each.sum()))
    return [
        Part(
            number,
            each,
            float(each.sum()) / total,
            tuple(each.amax(dim=(1, 2)).argsort(descending=True, stable=True).tolist()),
        )
        for number, each in enumerate(ranked)
        if float(each.sum()) > MISSING * total
    ]


def region(
    part: Part, at: int, size: tuple[int, int], model: LoadedModel, largest: float = LARGEST
) -> Tensor:
    """Where an image shows a part: bool (h, w), at least half its peak, at most a share of area.

    at: the position of the image. size: (height, width) of the model input.
    """
    heat = over_input(part.maps[at][None], size, model.preprocessing.covers)[0]
    most = max(1, round(largest * heat.numel()))
    chosen = torch.zeros(heat.numel(), dtype=torch.bool)
    chosen[heat.flatten().argsort(descending=True, stable=True)[:most]] = True
    return chosen.reshape(heat.shape) & (heat >= heat.max() / 2)
