"""The task of a model: what its output is, and the parts of a detector that its maps need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.cam.hooks import tensors_in
from service.errors import InvalidOption
from service.images.decode import Preprocessing
from service.models.catalog import Output, Task

WHOLE_SIDE = 520
"""The shorter side that images of a segmenter are resized to, as torchvision's weights expect."""


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """The boxes of one image, best score first, with their graph if there is one.

    boxes:  (N, 4), x1, y1, x2, y2 in pixels of the image that the model was given; those of queries
            in pixels of the upright source.
    scores: (N,), 0..1. labels: (N,), class ids. masks: (N, 1, H, W), 0..1, if the model has any.
    logits: (N, C), the class logits of the query behind each box, if the model has queries.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BoxHead:
    """Where a detector of torchvision's structure makes its boxes.

    path:    the module whose output has one row of class logits and of box offsets per candidate.
    logits, offsets: the parts of that output, as `service.cam.hooks.calls_of` names them.
    levels:  the paths of the feature maps that the head reads, in order.
    pooled:  whether candidates are proposals, whose features RoI pooling cuts out of the levels;
             otherwise a candidate is an anchor at a cell of one level.
    """

    path: str
    logits: str
    offsets: str
    levels: tuple[str, ...] = ()
    pooled: bool = False


def task_of(raw: Any) -> Task | None:
    """The task by the output of a forward pass; None if it is none of the known structures.

    A list with a dict of `boxes`, `scores` and `labels` per image is a detector's, and so is a dict
    of `logits` (B, Q, C) and `pred_boxes` (B, Q, 4); a tensor (B, C, h, w), alone or as `out` or
    `logits` of a dict, a segmenter's; a tensor (B, C) a classifier's.
    """
    if isinstance(raw, Sequence) and len(raw) and all(map(_has_boxes, raw)):
        return "detection"
    if has_queries(raw):
        return "detection"
    logits = _logits(raw)
    if logits is None or logits.ndim not in {2, 4}:
        return None
    return "segmentation" if logits.ndim == 4 and logits.shape[2:].numel() > 1 else "classification"


def per_image(raw: Any) -> Sequence[Any]:
    """The output of each image: a dict of a detector, logits (C, h, w) of a segmenter."""
    if has_queries(raw):
        pairs = zip(raw["logits"], raw["pred_boxes"], strict=True)
        return [{"logits": logits, "pred_boxes": boxes} for logits, boxes in pairs]
    return list(raw if isinstance(raw, Sequence) else region_logits(raw))


def has_queries(raw: Any) -> bool:
    """Whether an output has class logits and a box for each query, as those of DETR."""
    return isinstance(raw, Mapping) and {"logits", "pred_boxes"} <= set(raw)


def detections_in(each: Mapping[str, Tensor], size: tuple[int, int], output: Output) -> Detections:
    """The boxes of one image, sorted by score; of equal scores, in the order of the model.

    each:   the output for the image, as `per_image` returns it.
    size:   (width, height) of the upright image, which the boxes of queries are fractions of.
    output: the activation of their logits: `softmax` with a last one for *no object*, and one box
            for each query; `sigmoid`: as many of all classes' boxes as there are queries.
    """
    if not has_queries(each):
        return _sorted(each)
    logits, (x, y, w, h) = each["logits"], each["pred_boxes"].unbind(-1)
    boxes = torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], dim=-1)
    boxes = boxes * torch.tensor([*size, *size]).to(boxes)
    if output == "softmax":
        scores, labels = logits.softmax(dim=-1)[:, :-1].max(dim=-1)
        rows, logits = torch.arange(len(logits), device=logits.device), logits[:, :-1]
    else:
        scores, best = logits.sigmoid().flatten().topk(len(logits))
        rows, labels = best // logits.shape[1], best % logits.shape[1]
    found = {"boxes": boxes[rows], "scores": scores, "labels": labels, "logits": logits[rows]}
    return _sorted(found)


def region_logits(raw: Any) -> Tensor:
    """The logits (B, C, h, w), float32, of a segmenter's output."""
    logits = _logits(raw)
    assert logits is not None, "the task was read from such an output"
    return logits.float()


def box_head(module: nn.Module) -> BoxHead | None:
    """The head of a detector of torchvision's structure; None for any other module."""
    if hasattr(module, "roi_heads") and hasattr(module.roi_heads, "box_predictor"):
        return BoxHead("roi_heads.box_predictor", "[0]", "[1]", pooled=True)
    if hasattr(module, "head") and hasattr(module, "anchor_generator"):
        return BoxHead("head", "[cls_logits]", "[bbox_regression]")
    return None


def compilable_parts(module: nn.Module) -> tuple[str, ...]:
    """The modules of torchvision's structure behind the backbone that are much of the work."""
    names = ("rpn.head",) if hasattr(module, "roi_heads") else ("head", "classifier")
    known = {path for path, _ in module.named_modules()}
    return tuple(name for name in names if name in known)


def class_count(module: nn.Module, raw: Any, task: Task, output: Output) -> int | None:
    """The number of classes, with the background if the model has one; None if unknown.

    output: the activation of the logits of queries, see `detections_in`.
    """
    if task == "segmentation":
        return region_logits(raw).shape[1]
    if has_queries(raw):
        return int(raw["logits"].shape[-1]) - (output == "softmax")
    for path in ("roi_heads.box_predictor.cls_score", "head.classification_head"):
        try:
            part = module.get_submodule(path)
        except AttributeError:
            continue
        names = ("out_features", "num_classes", "num_columns")
        counts = (getattr(part, name, None) for name in names)
        return next((count for count in counts if isinstance(count, int)), None)
    return None


def whole_image(module: nn.Module, task: Task, base: Preprocessing | None) -> Preprocessing:
    """The preprocessing of a detector, which resizes and normalizes itself, or of a segmenter.

    base: what the builder says of a segmenter's; None: torchvision's.
    """
    if task == "segmentation":
        resize = WHOLE_SIDE if base is None or not isinstance(base.resize, int) else base.resize
        common = base or Preprocessing()
        return Preprocessing(
            resize=resize,
            crop=(resize, resize),
            mean=common.mean,
            std=common.std,
            interpolation=common.interpolation,
            whole=True,
        )
    return Preprocessing(
        resize=0, crop=_trial_size(module), mean=(0.0,) * 3, std=(1.0,) * 3, whole=True
    )


def padded_window(seen: Any, image: int, source: tuple[int, int]) -> tuple[float, ...] | None:
    """The part of an image that the padded tensor of torchvision's transform covers: x, y, w, h.

    seen: the output of the transform. source: (height, width) of the image that it was given. None
    for the transform of another library.
    """
    batch = seen[0] if isinstance(seen, tuple) else seen
    if not hasattr(batch, "image_sizes") or not hasattr(batch, "tensors"):
        return None
    rows, columns = batch.tensors.shape[-2:]
    height, width = batch.image_sizes[image]
    return 0.0, 0.0, source[1] * columns / width, source[0] * rows / height


def finite(raw: Any) -> bool:
    """Whether all numbers of an output are finite."""
    return all(bool(tensor.isfinite().all()) for _, tensor in tensors_in(raw))


def check_labels(labels: Tensor, classes: Sequence[str], name: str) -> None:
    """Raise InvalidOption where a detector returns a class that has no label."""
    highest = int(labels.max()) if labels.numel() else 0
    if highest >= len(classes):
        raise InvalidOption(
            f"Model {name!r} returned class {highest}, and it has {len(classes)} labels; set one "
            "per class in models.toml, the background included."
        )


def _has_boxes(each: Any) -> bool:
    return isinstance(each, Mapping) and {"boxes", "scores", "labels"} <= set(each)


def _logits(raw: Any) -> Tensor | None:
    if isinstance(raw, Mapping):
        raw = raw.get("out", raw.get("logits"))
    return raw if isinstance(raw, Tensor) else None


def _sorted(each: Mapping[str, Tensor]) -> Detections:
    scores = each["scores"]
    order = scores.detach().argsort(descending=True, stable=True)
    masks, logits = each.get("masks"), each.get("logits")
    return Detections(
        each["boxes"][order],
        scores[order],
        each["labels"][order],
        None if masks is None else masks[order],
        None if logits is None else logits[order],
    )


def _trial_size(module: nn.Module) -> tuple[int, int]:
    """The (height, width) of the largest image that torchvision's transform resizes to."""
    transform = getattr(module, "transform", None)
    fixed = getattr(transform, "fixed_size", None)
    if fixed is not None:
        return int(fixed[1]), int(fixed[0])
    shorter = getattr(transform, "min_size", None)
    longer = getattr(transform, "max_size", None)
    if isinstance(shorter, Sequence) and isinstance(longer, int):
        return int(shorter[-1]), max(int(shorter[-1]), longer)
    return 224, 224


def taken_as_list(module: nn.Module, images: Tensor) -> tuple[Any, bool]:
    """The output for images (B, C, h, w), and whether the module needs them as a list."""
    with torch.no_grad():
        try:
            return module(images.clone()), False
        except Exception:  # noqa: BLE001 - a user's detector may raise anything about a tensor
            return module(list(images.clone())), True
