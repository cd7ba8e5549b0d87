"""Detectors and segmenters with few channels and seeded random weights, of torchvision's parts."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

CHANNELS = 16
CLASSES = 4
LABELS = ("__background__", "disc", "square", "ring")
SIZES: dict[str, Any] = {"min_size": 64, "max_size": 96}


class Pyramid(nn.Module):
    """Two levels, strides 8 and 16."""

    def __init__(self, *, named: bool = True) -> None:
        super().__init__()
        self.named = named
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, CHANNELS, 3, 2, 1), nn.ReLU()
        )
        self.next = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1), nn.ReLU())
        self.out_channels = CHANNELS

    def forward(self, images: Tensor) -> Any:
        first = self.stem(images)
        return OrderedDict([("0", first), ("1", self.next(first))])


def _seeded(make: Any) -> nn.Module:
    """Random weights with heads that are sure of something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module: nn.Module = make()
        for path, parameter in module.named_parameters():
            if parameter.ndim == 4 or path.endswith("weight"):
                gain = 6.0 if any(word in path for word in _LAST) else 1.5
                nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else None
                with torch.no_grad():
                    parameter.mul_(gain if parameter.ndim > 1 else 1.0)
            elif "cls_logits" in path:
                nn.init.zeros_(parameter)
    return module.eval()


_LAST = ("cls_score", "cls_logits.weight", "classification_head.module_list")


def _anchors() -> AnchorGenerator:
    return AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)


def faster_rcnn(**more: Any) -> nn.Module:
    return _seeded(partial(_rcnn, FasterRCNN, **more))


def mask_rcnn() -> nn.Module:
    pool = MultiScaleRoIAlign(["0", "1"], 6, 2)
    return _seeded(partial(_rcnn, MaskRCNN, mask_roi_pool=pool))


def _rcnn(kind: Any, **more: Any) -> nn.Module:
    module: nn.Module = kind(
        Pyramid(),
        CLASSES,
        rpn_anchor_generator=_anchors(),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 5, 2),
        rpn_post_nms_top_n_test=30,
        box_detections_per_img=12,
        **(SIZES | more),
    )
    return module


def retinanet() -> nn.Module:
    head = RetinaNetHead(CHANNELS, 3, CLASSES)
    return _seeded(
        partial(
            RetinaNet,
            Pyramid(),
            CLASSES,
            anchor_generator=_anchors(),
            head=head,
            detections_per_img=12,
            **SIZES,
        )
    )


def fcos() -> nn.Module:
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    return _seeded(
        partial(FCOS, Pyramid(), CLASSES, anchor_generator=anchors, detections_per_img=12, **SIZES)
    )


def ssd() -> nn.Module:
    boxes = DefaultBoxGenerator([[2], [2, 3]], scales=[0.2, 0.5, 0.8])
    make = partial(SSD, Pyramid(), boxes, (64, 64), CLASSES, detections_per_img=12)
    return _seeded(make)


class Segmenter(nn.Module):
    """`{"out": (B, C, h, w)}` at the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Pyramid()
        self.classifier = nn.Conv2d(CHANNELS, CLASSES, 3, 1, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        logits = self.classifier(features["1"])
        out = nn.functional.interpolate(logits, images.shape[2:], mode="bilinear")
        return {"out": out}


def segmenter() -> nn.Module:
    return _seeded(Segmenter)


class OwnDetector(nn.Module):
    """A user's detector: it takes a list, and has one box per cell of a coarse grid."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.ReLU())
        self.scores = nn.Conv2d(8, CLASSES, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        if not isinstance(images, list):
            raise TypeError("a list of images")
        return [self._boxes(image) for image in images]

    def _boxes(self, image: Tensor) -> dict[str, Tensor]:
        scores = self.scores(self.features(image[None]))[0].sigmoid()
        best, labels = scores.flatten(1).max(dim=0)
        rows, columns = torch.meshgrid(*map(torch.arange, scores.shape[1:]), indexing="ij")
        corners = torch.stack([columns, rows], dim=-1).flatten(0, 1) * 8.0
        keep = best.topk(min(5, len(best))).indices
        boxes = torch.cat([corners, corners + 8], dim=1)[keep]
        return {"boxes": boxes, "scores": best[keep], "labels": labels[keep]}


def own() -> nn.Module:
    return _seeded(OwnDetector)
