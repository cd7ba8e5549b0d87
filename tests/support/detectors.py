"""Detectors and segmenters with few channels and seeded random weights, of torchvision's parts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache, partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from service.errors import CamserveError
from service.inference.batch import Unfinished, run
from service.inference.questions import InferenceResult, Question
from service.models.catalog import ModelSpec
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition

CHANNELS = 32
CLASSES = 4
LABELS = ("__background__", "disc", "square", "ring")
SIZES: dict[str, Any] = {"min_size": 64, "max_size": 96}


class Pyramid(nn.Module):
    """Two levels, strides 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, CHANNELS, 3, 2, 1), nn.ReLU()
        )
        self.next = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1), nn.ReLU())
        self.out_channels: Any = CHANNELS

    def forward(self, images: Tensor) -> Any:
        first = self.stem(images)
        return OrderedDict([("0", first), ("1", self.next(first))])


def _seeded(make: Any) -> nn.Module:
    """Random weights with heads that are sure of something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module: nn.Module = make()
        for path, parameter in module.named_parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
                gain = next((value for word, value in _GAINS.items() if word in path), 1.0)
                with torch.no_grad():
                    parameter.mul_(gain)
            elif "cls_logits" in path:
                nn.init.zeros_(parameter)
    return module.eval()


_GAINS = {"cls": 2.0, "classification_head": 1.0, "bbox": 0.1, "regression_head": 0.2}
"""Scores that differ, and boxes near their anchors."""


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
    backbone = Pyramid()
    backbone.out_channels = [CHANNELS, CHANNELS]
    return _seeded(partial(SSD, backbone, boxes, (64, 64), CLASSES, detections_per_img=12))


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


class ScaledSegmenter(nn.Module):
    """Its backbone takes a number beside the images."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Scaled()
        self.classifier = nn.Conv2d(8, CLASSES, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.classifier(self.backbone(images, 2.0))}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, 4, 1)

    def forward(self, images: Tensor, factor: float) -> Tensor:
        features: Tensor = self.features(images)
        return features * factor


def scaled() -> nn.Module:
    return _seeded(ScaledSegmenter)


class ReadingSegmenter(Segmenter):
    """It reads an attribute of its backbone in each pass."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert self.backbone.out_channels == CHANNELS
        return super().forward(images)


def reader() -> nn.Module:
    return _seeded(ReadingSegmenter)


def sharp(name: str, **arguments: Any) -> nn.Module:
    """A detector or segmenter of torchvision whose random weights give class logits that differ.

    Else all scores are the same within rounding, and which boxes are listed is chance.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Any = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, **arguments
        ).eval()
    ends = ("cls_score", "cls_logits", "classification_head.module_list")
    last = [
        part
        for path, part in module.named_modules()
        if any(end in path for end in ends) and hasattr(part, "bias") and part.bias is not None
        if not isinstance(part, nn.BatchNorm2d) and getattr(part, "groups", 1) == 1
    ]
    for part in last:
        values: list[Tensor] = []
        with part.register_forward_hook(lambda _m, _a, out, kept=values: kept.append(out)):
            module([image(0, (150, 190)).float() / 255])
        with torch.no_grad():
            part.weight.mul_(3 / torch.cat([each.flatten() for each in values]).std())
    return module  # type: ignore[no-any-return]


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


@cache
def loaded(kind: str, *, compiled: bool = False) -> LoadedModel:
    spec = ModelSpec(kind, f"detectors:{kind}", labels=LABELS)
    return load_model(spec, compiler=Compiler() if compiled else None)


def answer(
    model: LoadedModel, question: Question, *others: Question, lane: str = "hooked"
) -> list[InferenceResult]:
    folded = lane == "folded"
    module = model.replicate(folded=folded)
    replica = Replica(model, module, Condition.of(module), folded)
    results = []
    for outcome in run(replica, [question, *others]):
        while isinstance(outcome, Unfinished):
            outcome = outcome.step(replica) or outcome  # noqa: PLW2901 - step by step
        assert not isinstance(outcome, CamserveError), outcome
        results.append(outcome)
    return results


def image(seed: int, size: tuple[int, int] = (70, 90)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    return (255 * smooth[0]).to(torch.uint8)


def question(model: LoadedModel, pixels: Tensor, **more: Any) -> Question:
    method = more.get("method", "hirescam")
    layers = () if method in {"rise", "occlusion", None} else model.default_layers
    return Question(
        pixels, **{"top_k": 100, "method": method, "layers": layers, "min_score": 0.05, **more}
    )


def plain(model: LoadedModel, pixels: Tensor) -> dict[str, Tensor]:
    """What torchvision returns for the upright image."""
    with torch.no_grad():
        (raw,) = copy.deepcopy(model.module)([pixels.float() / 255])
    return raw  # type: ignore[no-any-return]


def oracle(model: LoadedModel, pixels: Tensor, number: int) -> dict[str, Tensor]:
    """HiResCAM of a detection at each level with a gradient, by one backward pass through all."""
    module: Any = copy.deepcopy(model.module)
    levels: dict[str, Tensor] = {}
    heads: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        for name, value in output.items():
            value.requires_grad_(True)
            levels[name] = value

    def note(_module: Any, _args: Any, output: Any) -> None:
        heads.append(output["cls_logits"] if isinstance(output, dict) else output[0])

    module.backbone.register_forward_hook(keep)
    part = module.roi_heads.box_predictor if hasattr(module, "roi_heads") else module.head
    part.register_forward_hook(note)
    (raw,) = module([pixels.float() / 255])
    (logits,) = heads
    (slope,) = torch.autograd.grad(raw["scores"][number], logits, retain_graph=True)
    (row,) = slope.flatten(0, -2).abs().sum(dim=1).nonzero()[:, 0].tolist()
    value = logits.flatten(0, -2)[row, int(raw["labels"][number])]
    slopes = torch.autograd.grad(value, list(levels.values()), allow_unused=True)
    return {
        f"backbone[{name}]": (level * given).sum(dim=1).relu()[0].detach()
        for (name, level), given in zip(levels.items(), slopes, strict=True)
        if given is not None and bool(given.any())
    }
