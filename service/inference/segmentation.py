"""Regions of a segmenter, and the map of each region that a question explains."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from service.cam.formulas import LAYER_METHODS, fuse, precise
from service.cam.hooks import Recording, record
from service.cam.layouts import Layout
from service.cam.regions import component
from service.cam.verdict import WHOLE
from service.errors import CamserveError, InvalidOption, NonFiniteOutput
from service.images.run_lengths import rle_decode
from service.inference.explanations import contrast_fields, explanation_of
from service.inference.hidden_parts import hidden_part_maps
from service.inference.questions import Explanation, InferenceResult, Prediction, Question
from service.inference.tracked import Tracker, with_tracked
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.tasks import region_logits

BACKGROUND = ("__background__", "background")

CLASS_SIDE = 1536
"""Pixels of the longer side of a map of classes; run lengths of a finer one would be too long."""

MAX_LOGITS = 1 << 28
"""Values of an image's logits at that size: about a second of one core."""

CLASSES = 8
"""Classes whose logits are resized at a time."""

Steps = Generator[None, Replica, InferenceResult]
Size = tuple[int, int]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One class over a part of the image. mask: bool (h, w) over what the model input shows.

    logits, scores: the means of all classes over it, (classes,).
    """

    class_id: int
    mask: Mask
    logits: Tensor
    scores: Tensor


def segment(replica: Replica, questions: Sequence[Question]) -> list[Steps | CamserveError]:
    """Run a batch of images of one size once; each image's steps end with its result."""
    model = replica.model
    pixels = model.normalised(model.batch([question.pixels for question in questions]))
    walks = [question for question in questions if question.needs_gradients]
    modules = {path.partition("[")[0] for question in walks for path in question.layers}
    points = [layer.path for layer in model.layers if layer.path in modules]
    with (
        nullcontext() if walks else torch.no_grad(),
        record(replica.module, targets=points) as recording,
    ):
        logits = region_logits(model.outputs(replica.module, pixels))
    return [
        _of_image(model, recording, question, logits, image)
        for image, question in enumerate(questions)
    ]


def _of_image(
    model: LoadedModel, recording: Recording, question: Question, batch: Tensor, image: int
) -> Steps | CamserveError:
    logits = batch[image].detach().cpu()
    if not bool(logits.isfinite().all()):
        return NonFiniteOutput(
            "The model returned NaN or infinity for this image, so there is nothing to explain; "
            "check the weights and the precision of the model."
        )
    classes = _resized_classes(logits, _class_size(model, question))
    try:
        has_targets = question.explains or question.tracks
        targets = _targets(model, question, classes, logits) if has_targets else []
    except InvalidOption as error:
        return error
    maps = None
    if question.needs_gradients:
        points = _points(model, recording, question)
        maps = [_map(points, question, batch[image], image, target) for target in targets]
    return _steps(model, question, logits, classes, targets, maps)


def _steps(  # noqa: PLR0917 - one call
    model: LoadedModel,
    question: Question,
    logits: Tensor,
    classes: Tensor,
    targets: Sequence[Region],
    maps: Sequence[tuple[Tensor, bool]] | None,
) -> Steps:
    if maps is None and question.explains and targets:
        own = torch.stack([target.scores[target.class_id] for target in targets])

        def values(raw: Any) -> Tensor:
            return torch.stack([_probabilities(each, targets) for each in region_logits(raw)])

        cams = yield from hidden_part_maps(model, question, own, values)
        maps = [(cam, False) for cam in cams]
    explanations = tuple(
        _explanation(model, question, target, cam, not_used=not_used)
        for target, (cam, not_used) in zip(
            targets if question.explains else (), maps or (), strict=True
        )
    )
    result = InferenceResult(_predictions(model, question, logits, classes), explanations, ())
    if not (question.tracks or question.verify):
        return result
    return (
        yield from with_tracked(model, question, result, _tracker(model, question, targets, logits))
    )


def _tracker(
    model: LoadedModel, question: Question, targets: Sequence[Region], logits: Tensor
) -> Tracker:
    """Measures regions by the probability of their class, and by the pixels that keep it."""
    size = _class_size(model, question)

    def measure(raw: Tensor) -> Tensor:
        classes = _resized_classes(raw, size).numpy()
        kept = [float((classes[one.mask] == one.class_id).mean()) for one in targets]
        return torch.stack([_probabilities(raw, targets), torch.tensor(kept)])

    def predictions(raw: Any) -> tuple[Prediction, ...]:
        first = region_logits(raw)[0].cpu()
        return _predictions(model, question, first, _resized_classes(first, size))

    return Tracker(
        tuple(map(_as_prediction, targets)),
        measure(logits),
        lambda raw: [measure(each) for each in region_logits(raw).cpu()],
        predictions,
    )


def _class_size(model: LoadedModel, question: Question) -> Size:
    """The (height, width) that has one class for each pixel.

    That of the model input; the upright source's where the input is all of it in another shape, as
    Hugging Face returns it, scaled down to CLASS_SIDE and MAX_LOGITS.
    """
    size = (question.pixels.shape[1], question.pixels.shape[2])
    width, height = question.source
    shares = (*question.seen, *(question.shown or (0, 0, width, height))[2:])
    if model.preprocessing.whole or 0 in question.source:
        return size
    if not np.allclose(shares, (*WHOLE, width, height), rtol=1e-6, atol=1e-6):
        return size
    affordable = (MAX_LOGITS / (len(model.labels) * width * height)) ** 0.5
    scale = min(1.0, CLASS_SIDE / max(width, height), affordable)
    return max(1, int(scale * height)), max(1, int(scale * width))


def _resized_classes(logits: Tensor, size: Size) -> Tensor:
    """The most probable class of each pixel, (h, w), of logits (C, h', w') resized to `size`."""
    if logits.shape[1:] == size:
        return logits.argmax(dim=0)
    best = torch.full(size, -torch.inf)
    classes = torch.zeros(size, dtype=torch.long)
    for first in range(0, len(logits), CLASSES):  # all of them at once would take gigabytes
        part = logits[None, first : first + CLASSES]
        values, found = functional.interpolate(part, size, mode="bilinear")[0].max(dim=0)
        classes = torch.where(values > best, found + first, classes)
        best = torch.maximum(best, values)
    return classes


def _over(mask: Mask, size: tuple[int, int]) -> Tensor:
    """The share of each cell (h, w) of the output that a mask of the input covers."""
    given = torch.from_numpy(mask)[None, None].float()
    if mask.shape == size:
        return given[0, 0]
    return functional.interpolate(given, size, mode="bilinear", antialias=True)[0, 0]


def _region(class_id: int, mask: Mask, logits: Tensor) -> Region:
    share = _over(mask, (logits.shape[1], logits.shape[2]))
    weight = share / share.sum().clamp_min(1e-9)
    means = (logits * weight).sum(dim=(1, 2))
    return Region(class_id, mask, means, (logits.softmax(dim=0) * weight).sum(dim=(1, 2)))


def _probabilities(logits: Tensor, targets: Sequence[Region]) -> Tensor:
    """The mean probability of each target's class over its region, (K,)."""
    if not targets:
        return torch.zeros(0)
    logits = logits.detach().cpu()
    return torch.stack(
        [_region(each.class_id, each.mask, logits).scores[each.class_id] for each in targets]
    )


def _by_size(model: LoadedModel, classes: Tensor) -> list[int]:
    """The classes of some pixels, the most frequent first and the background last."""
    ids, counts = classes.unique(return_counts=True)
    largest = [int(ids[number]) for number in counts.argsort(descending=True, stable=True)]
    return sorted(largest, key=lambda one: model.labels[one].lower() in BACKGROUND)


def _predictions(
    model: LoadedModel, question: Question, logits: Tensor, classes: Tensor
) -> tuple[Prediction, ...]:
    """One for each class that is the most probable one somewhere, in the order of `_by_size`."""
    listed = _by_size(model, classes)[: question.top_k]
    return tuple(_as_prediction(_region(one, (classes == one).numpy(), logits)) for one in listed)


def _as_prediction(region: Region) -> Prediction:
    score, logit = float(region.scores[region.class_id]), float(region.logits[region.class_id])
    return Prediction(region.class_id, score, logit, mask=region.mask)


def _targets(
    model: LoadedModel, question: Question, classes: Tensor, logits: Tensor
) -> list[Region]:
    """The regions to explain. Raises InvalidOption for a place that is not in the image."""
    if question.places:
        return [_at(question, place, classes, logits) for place in question.places]
    largest = _by_size(model, classes)
    shown = [one for one in largest if model.labels[one].lower() not in BACKGROUND]
    wanted = [one for one in question.targets if one in largest] or (
        [] if question.targets else shown[: question.explain_top]
    )
    return [_region(one, component((classes == one).numpy()), logits) for one in wanted]


def _at(question: Question, place: Any, classes: Tensor, logits: Tensor) -> Region:
    """The region at a point, or the most frequent class within a box or a mask."""
    inside = _inside(question, place, (classes.shape[0], classes.shape[1]))
    if not inside.any():
        raise InvalidOption(
            "A place in `at` covers nothing of this image; send it in upright source pixels, with "
            "0, 0 at the upper left."
        )
    here = classes[torch.from_numpy(inside)]
    target = int(here.mode().values) if not question.targets else question.targets[0]
    if len(place) == 2 and all(isinstance(each, float) for each in place):
        row, column = np.argwhere(inside)[0]
        target = int(classes[row, column])
        inside = component((classes == target).numpy(), (int(row), int(column)))
    return _region(target, inside, logits)


def _inside(question: Question, place: Any, size: tuple[int, int]) -> Mask:
    """The pixels (h, w) of the model input that a place in source pixels names."""
    (width, height), (left, top, across, down) = question.source, question.seen
    first_x, first_y, wide, high = question.shown or (0.0, 0.0, width, height)
    if not all(isinstance(each, float) for each in place):
        rows, counts = place
        if tuple(rows) != (height, width):
            raise InvalidOption(
                f"A mask in `at` is for an image of [height, width] {list(rows)}, and this one is "
                f"{[height, width]}; send it in upright source pixels."
            )
        try:
            mask = torch.from_numpy(rle_decode((rows[0], rows[1]), counts))[None, None].float()
        except ValueError as error:
            raise InvalidOption(f"A mask in `at` cannot be read: {error}.") from error
        mask = mask[..., math.floor(first_y) : math.ceil(first_y + high), :]
        mask = mask[..., math.floor(first_x) : math.ceil(first_x + wide)]
        inner = max(1, round(down * size[0])), max(1, round(across * size[1]))
        shown = functional.interpolate(mask, inner, mode="nearest")[0, 0] > 0
        found = np.zeros(size, dtype=np.bool_)
        first, start = round(top * size[0]), round(left * size[1])
        part = found[first : first + inner[0], start : start + inner[1]]
        part |= shown.numpy()[: part.shape[0], : part.shape[1]]
        return found
    x, y, w, h = (*place, 0.0, 0.0)[:4]
    xs = [(left + (each - first_x) / wide * across) * size[1] for each in (x, x + w)]
    ys = [(top + (each - first_y) / high * down) * size[0] for each in (y, y + h)]
    found = np.zeros(size, dtype=np.bool_)
    if len(place) == 2:
        row, column = int(np.floor(ys[0])), int(np.floor(xs[0]))
        if 0 <= row < size[0] and 0 <= column < size[1]:
            found[row, column] = True
        return found
    rows, columns = (slice(max(0, round(ends[0])), max(0, round(ends[1]))) for ends in (ys, xs))
    found[rows, columns] = True
    return found


def _points(
    model: LoadedModel, recording: Recording, question: Question
) -> list[tuple[Tensor, Layout]]:
    """The recorded output of each of the question's layers, and its layout."""
    layouts = ((path, model.layer(path).layout) for path in question.layers)
    return [(recording.targets[path][-1], layout) for path, layout in layouts if layout is not None]


def _map(
    points: Sequence[tuple[Tensor, Layout]],
    question: Question,
    logits: Tensor,
    image: int,
    target: Region,
) -> tuple[Tensor, bool]:
    """The map (h, w) of a region at the question's layers, and whether none of them is used.

    logits: (C, h, w) of the image, with a graph to the points.
    """
    share = _over(target.mask, (logits.shape[1], logits.shape[2])).to(logits)
    slope = torch.zeros(len(logits)).to(logits)
    slope[target.class_id] = 1
    if question.contrast is not None:
        contrast = question.contrast.at(target.logits, target.class_id)
        slope = contrast.slope(target.logits, target.class_id).to(logits)
    gradients: Sequence[Tensor | None] = [None] * len(points)
    if logits.requires_grad:
        weights = slope[:, None, None] * (share / share.sum().clamp_min(1e-9))
        at = [point for point, _ in points]
        gradients = torch.autograd.grad(logits, at, weights, retain_graph=True, allow_unused=True)
    cams, used = [], False
    for (point, layout), gradient in zip(points, gradients, strict=True):
        values = precise(point.detach()[image : image + 1])
        given = torch.zeros_like(values) if gradient is None else gradient[image : image + 1]
        used = used or bool(given.any())
        values, given = layout.as_map(values), layout.as_map(precise(given))
        cams.append(LAYER_METHODS[question.method or ""](values, given)[0].cpu())
    return fuse(cams), not used


def _explanation(
    model: LoadedModel, question: Question, target: Region, cam: Tensor, *, not_used: bool
) -> Explanation:
    record, class_id = question.method_record, target.class_id
    assert record is not None
    flags = {
        "target_not_predicted": class_id != int(target.scores.argmax()),
        "layer_not_used": not_used,
        "places_unclear": not model.unclear.isdisjoint(question.layers),
        "not_per_box": not record.per_box,
    }
    return explanation_of(
        model,
        question,
        cam,
        flags,
        class_id=class_id,
        score=float(target.scores[class_id]),
        logit=float(target.logits[class_id]),
        region=target.mask,
        **contrast_fields(question.contrast, target.logits, class_id),
    )
