"""Maps of single boxes and regions, in plain torch: nothing of the service computes them.

The features of the frozen backbone become leaves, torchvision's own head runs on them, and autograd
gives the gradient of one score. So a map is its paper's formula, and an oracle for the service's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_iou

Map = NDArray[np.float32]


def gradcam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Selvaraju et al. 2017: channels weighted by their mean gradient; (c, h, w) to (h, w)."""
    return (gradient.mean(dim=(1, 2))[:, None, None] * activation).sum(dim=0).relu()


def hirescam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Draelos and Carin 2020: gradient times activation."""
    return (gradient * activation).sum(dim=0).relu()


def layercam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Jiang et al. 2021: only gradients above zero count."""
    return (gradient.relu() * activation).sum(dim=0).relu()


def eigencam(activation: Tensor, _gradient: Tensor) -> Tensor:
    """Muhammad and Yeasin 2020: the activations' first principal component, no target."""
    columns = activation.flatten(1).T
    first = torch.linalg.svd(columns - columns.mean(dim=0), full_matrices=False)[2][0]
    found = (columns @ first).reshape(activation.shape[1:])
    return (found if found.sum() >= 0 else -found).relu()


METHODS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"hirescam": hirescam, "layercam": layercam, "gradcam": gradcam, "eigencam": eigencam}
)


@dataclass(frozen=True, slots=True)
class Target:
    """One scalar of a model's output, with what it depends on.

    label: class number as the model has it, the background is 0. score: 0 to 1.
    box: float32 (4,), x1 y1 x2 y2 in pixels. mask: bool (h, w), the region of a segmenter.
    layers: name of a layer to its activation and the scalar's gradient there, float32 (c, h, w).
    own: name of the only level of the pyramid whose gradient is not zero.
    """

    label: int
    score: float
    box: Tensor
    mask: Tensor | None
    layers: Mapping[str, tuple[Tensor, Tensor]]
    own: str


def detections(net: Any, pixels: Tensor, least: float) -> list[Target]:
    """Every detection of a detector of torchvision, best first; pixels: uint8 (3, h, w).

    The image has the model's own size, so that one cell of a layer is a square of its pixels.
    """
    images, _ = net.transform([pixels / 255])
    with torch.no_grad():
        body = net.backbone.body(images.tensors)
    leaves = {key: value.requires_grad_() for key, value in body.items()}
    pyramid = net.backbone.fpn(leaves)
    (found,) = _heads(net, images, pyramid)
    layers = {f"C{key}": leaves[key] for key in leaves} | {f"P{k}": v for k, v in pyramid.items()}
    targets = []
    for index, score in enumerate(found["scores"]):
        if score < least:
            continue
        gradients = torch.autograd.grad(
            score.log(), list(layers.values()), retain_graph=True, allow_unused=True
        )
        both = {
            name: (layer.detach()[0], gradient[0])
            for (name, layer), gradient in zip(layers.items(), gradients, strict=True)
            if gradient is not None
        }
        own = max(
            (name for name in both if name[0] == "P"), key=lambda name: both[name][1].abs().sum()
        )
        box = found["boxes"][index].detach()
        targets.append(
            Target(int(found["labels"][index]), float(score.detach()), box, None, both, own)
        )
    return targets


def _heads(net: Any, images: Any, pyramid: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Boxes, labels and scores in pixels of the model's input."""
    if hasattr(net, "roi_heads"):
        proposals, _ = net.rpn(images, pyramid)
        found, _ = net.roi_heads(pyramid, proposals, images.image_sizes)
        return list(found)
    levels = list(pyramid.values())
    counts = [level.shape[2] * level.shape[3] for level in levels]
    per_cell = sum(net.anchor_generator.num_anchors_per_location()) // len(levels)
    outputs = net.head(levels)
    split = {
        name: list(value.split([count * per_cell for count in counts], dim=1))
        for name, value in outputs.items()
    }
    anchors = net.anchor_generator(images, levels)
    of_level = [list(each.split([count * per_cell for count in counts])) for each in anchors]
    return list(net.postprocess_detections(split, of_level, images.image_sizes))


def regions(net: Any, batch: Tensor, least: int) -> list[Target]:
    """The connected regions of each class that a segmenter names, of `least` pixels or more.

    batch: float32 (1, 3, h, w), normalized. The scalar is the class's mean logit in the region.
    """
    with torch.no_grad():
        body = net.backbone(batch)
    leaves = {key: value.requires_grad_() for key, value in body.items()}
    logits = functional.interpolate(
        net.classifier(leaves), size=batch.shape[-2:], mode="bilinear", align_corners=False
    )[0]
    named, scores = logits.argmax(dim=0), logits.softmax(dim=0)
    targets = []
    for label in range(1, len(logits)):
        count, parts = cv2.connectedComponents((named == label).numpy().astype(np.uint8))
        for part in range(1, count):
            mask = torch.from_numpy(parts == part)
            if int(mask.sum()) >= least:
                targets.append(_region(logits, scores, leaves, label, mask))
    return targets


def _region(
    logits: Tensor, scores: Tensor, leaves: Mapping[str, Tensor], label: int, mask: Tensor
) -> Target:
    gradients = torch.autograd.grad(
        logits[label][mask].mean(), list(leaves.values()), retain_graph=True
    )
    both = {
        name: (layer.detach()[0], gradient[0])
        for (name, layer), gradient in zip(leaves.items(), gradients, strict=True)
    }
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    box = torch.cat([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    return Target(label, float(scores[label][mask].mean().detach()), box, mask, both, "high")


def drawn(cells: Tensor, side: int) -> Map:
    """A layer's map (h, w) at the size of the square image, bilinear, float32 (side, side)."""
    larger = functional.interpolate(
        cells.detach()[None, None], size=(side, side), mode="bilinear", align_corners=False
    )
    return larger[0, 0].numpy()


def kept_score(answer: Mapping[str, Tensor], label: int, box: Tensor) -> float:
    """The best score of a label with an IoU of .5 with a box; 0 where none is there."""
    same = answer["labels"] == label
    if not bool(same.any()):
        return 0.0
    overlap = box_iou(answer["boxes"][same], box[None])[:, 0]
    return float((answer["scores"][same] * (overlap >= 0.5)).max())
