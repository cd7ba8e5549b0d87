"""Boxes of a detector, and the map of each box that a question explains."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from service.cam.formulas import LAYER_METHODS, fuse, precise
from service.cam.hooks import Recording, record, watch
from service.cam.layouts import Layout
from service.errors import CamserveError, InvalidOption, NonFiniteOutput
from service.images.decode import Rect
from service.inference.box_tail import level_rows, row_of
from service.inference.explanations import SATURATED, contrast_fields, explanation_of
from service.inference.hidden_parts import hidden_part_maps
from service.inference.questions import Explanation, InferenceResult, Prediction, Question
from service.inference.tracked import Tracker, with_tracked
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes.logits import as_logits
from service.models.tasks import (
    Detections,
    check_labels,
    detections_in,
    finite,
    padded_window,
    per_image,
)

NEAR = 0.5
"""The smallest overlap (IoU) at which a box in `at` names a detection."""

MASK_BYTES = 2 << 30
"""Bytes of the masks of all detections of an image, which torchvision lays out at its full size."""

COORDINATES = ("x1", "y1", "x2", "y2")

Steps = Generator[None, Replica, InferenceResult]


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What one forward pass gave a batch. seen: calls of the modules that the maps need."""

    model: LoadedModel
    module: Any
    recording: Recording
    seen: Mapping[str, tuple[Any, Any]]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class BoxMap:
    """The map (h, w) of one target. layers: that it is drawn from; window: what they cover."""

    cam: Tensor
    layers: tuple[str, ...]
    window: Rect | None
    logits: Tensor | None = None
    not_used: bool = False
    clipped: bool = False
    saturated: bool = False


def detect(replica: Replica, questions: Sequence[Question]) -> list[Steps | CamserveError]:
    """Run a batch of images of one size once; each image's steps end with its result.

    The maps of methods from a gradient are computed here, while the graph is there.
    """
    model = replica.model
    if (refused := _masks_too_large(replica, questions[0])) is not None:
        return [refused for _ in questions]
    pixels = model.normalised(model.batch([question.pixels for question in questions]))
    walks = any(question.needs_gradients for question in questions)
    named = {path for q in questions if q.needs_gradients for path in _named_layers(model, q)}
    head = model.head.path if model.head else None
    points = {path.partition("[")[0] for path in named} | ({head} if head and walks else set())
    with (
        nullcontext() if walks else torch.no_grad(),
        watch(replica.module, ["transform", *([_reads(model)] if walks and head else [])]) as seen,
        record(replica.module, targets=_in_order(model, points)) as recording,
    ):
        raw = model.outputs(replica.module, pixels)
    scene = Scene(model, replica.module, recording, seen, (pixels.shape[2], pixels.shape[3]))
    outputs = zip(questions, per_image(raw), strict=True)
    return [
        _of_image(scene, question, image, _found(model, question, each), is_finite=finite(each))
        for image, (question, each) in enumerate(outputs)
    ]


def _found(model: LoadedModel, question: Question, each: Any) -> Detections:
    return detections_in(each, question.source, model.output)


def _masks_too_large(replica: Replica, question: Question) -> InvalidOption | None:
    """The error where the masks of an image would take too much memory."""
    if not replica.model.gives_masks:
        return None
    heads = getattr(replica.module, "roi_heads", None)
    height, width = question.pixels.shape[1:]
    largest = MASK_BYTES // (4 * int(getattr(heads, "detections_per_img", 100)))
    if height * width <= largest:
        return None
    return InvalidOption(
        f"Model {replica.model.name!r} gives masks, and this image has {height * width:,} pixels; "
        f"at most {largest:,} are allowed. Scale the image down, or use a detector without masks."
    )


def _reads(model: LoadedModel) -> str:
    """The module whose arguments are the levels that the head reads."""
    assert model.head is not None
    return "roi_heads.box_roi_pool" if model.head.pooled else model.head.path


def _named_layers(model: LoadedModel, question: Question) -> tuple[str, ...]:
    """The layers to differentiate at in the whole graph; none where the tail alone runs again."""
    return () if model.head and question.layers == model.default_layers else question.layers


def _in_order(model: LoadedModel, paths: set[str]) -> list[str]:
    return [layer.path for layer in model.layers if layer.path in paths]


def _of_image(
    scene: Scene, question: Question, image: int, found: Detections, *, is_finite: bool
) -> Steps | CamserveError:
    if not is_finite:
        return NonFiniteOutput(
            "The model returned NaN or infinity for this image, so there is nothing to explain; "
            "check the weights and the precision of the model."
        )
    try:
        check_labels(found.labels, scene.model.labels, scene.model.name)
        has_targets = question.explains or question.tracks
        targets = chosen_boxes(question, found) if has_targets else []
        maps = _maps(scene, question, image, found, targets) if question.needs_gradients else None
    except InvalidOption as error:
        return error
    return _steps(scene.model, question, _detached(found), targets, maps)


def _steps(
    model: LoadedModel,
    question: Question,
    found: Detections,
    targets: Sequence[int],
    maps: Sequence[BoxMap] | None,
) -> Steps:
    boxes, labels = found.boxes[list(targets)], found.labels[list(targets)]
    if maps is None and question.explains and targets:

        def values(raw: Any) -> Tensor:
            images = (_found(model, question, each) for each in per_image(raw))
            return torch.stack([_overlap(each, boxes, labels) for each in images])

        own = found.scores[list(targets)]
        cams = yield from hidden_part_maps(model, question, own, values)
        maps = [BoxMap(cam, (), None) for cam in cams]
    explained = targets if question.explains else ()
    result = InferenceResult(
        _predictions(question, found),
        tuple(
            _explanation(model, question, found, target, one)
            for target, one in zip(explained, maps or (), strict=True)
        ),
        (),
    )
    if not (question.tracks or question.verify):
        return result
    tracker = _tracker(model, question, found, targets)
    return (yield from with_tracked(model, question, result, tracker))


def _tracker(
    model: LoadedModel, question: Question, found: Detections, targets: Sequence[int]
) -> Tracker:
    """Measures detections by the best one of the same class that overlaps each."""
    boxes, labels = found.boxes[list(targets)], found.labels[list(targets)]

    def images(raw: Any) -> list[Detections]:
        return [_detached(_found(model, question, each)) for each in per_image(raw)]

    def measure(raw: Any) -> list[Tensor]:
        return [best_matches(each, boxes, labels) for each in images(raw)]

    def predictions(raw: Any) -> tuple[Prediction, ...]:
        first = images(raw)[0]
        check_labels(first.labels, model.labels, model.name)
        return _predictions(question, first)

    return Tracker(
        tuple(_prediction(found, number) for number in targets),
        torch.stack([found.scores[list(targets)], torch.ones(len(targets))]),
        measure,
        predictions,
    )


def best_matches(found: Detections, boxes: Tensor, labels: Tensor) -> Tensor:
    """Score and IoU (2, K) of the best match of some boxes (K, 4) among detections.

    A match has the same class and an IoU of NEAR or more; the best one has the highest score.
    Zeros where there is none.
    """
    if not len(found.scores):
        return torch.zeros(2, len(boxes))
    overlaps = box_iou(boxes, found.boxes)
    matches = (overlaps >= NEAR) & (labels[:, None] == found.labels)
    scores, best = torch.where(matches, found.scores, -1).max(dim=1)
    values = torch.stack([scores, overlaps.gather(1, best[:, None])[:, 0]])
    return torch.where(scores >= 0, values, 0)


def _overlap(found: Detections, boxes: Tensor, labels: Tensor) -> Tensor:
    """The largest score · IoU of a detection of the same class, for each of some boxes (K,)."""
    if not len(found.scores):
        return torch.zeros(len(boxes))
    found = _detached(found)
    values = box_iou(boxes, found.boxes) * found.scores
    return torch.where(labels[:, None] == found.labels, values, 0).amax(dim=1)


def _detached(found: Detections) -> Detections:
    boxes, scores, labels = (
        each.detach().cpu() for each in (found.boxes.float(), found.scores.float(), found.labels)
    )
    return Detections(
        boxes, scores, labels, None if found.masks is None else found.masks.detach().cpu()
    )


def _predictions(question: Question, found: Detections) -> tuple[Prediction, ...]:
    count = min(question.top_k, int((found.scores >= question.min_score).sum()))
    return tuple(_prediction(found, number) for number in range(count))


def _prediction(found: Detections, number: int) -> Prediction:
    return Prediction(
        int(found.labels[number]),
        float(found.scores[number]),
        float(as_logits(found.scores[number : number + 1], "sigmoid")[0]),
        number,
        box_of(found, number),
        None if found.masks is None else (found.masks[number, 0] > 0.5).numpy(),
    )


def box_of(found: Detections, number: int) -> Rect:
    """A box as x, y, w, h."""
    x1, y1, x2, y2 = found.boxes[number].tolist()
    return x1, y1, x2 - x1, y2 - y1


def chosen_boxes(question: Question, found: Detections) -> list[int]:
    """The detections to explain. Raises InvalidOption for a place where none is."""
    kept = [n for n, score in enumerate(found.scores.tolist()) if score >= question.min_score]
    labels = found.labels.tolist()
    if question.places:
        among = [n for n in kept if not question.targets or labels[n] in question.targets]
        places = (_at(place, among, found) for place in question.places)
        return list(dict.fromkeys(places))
    if not question.targets:
        return kept[: question.explain_top]
    return [
        number
        for target in question.targets
        for number in [n for n in kept if labels[n] == target][: question.explain_top]
    ]


def _at(place: Any, among: Sequence[int], found: Detections) -> int:
    """The detection that a place names. Raises InvalidOption."""
    if not all(isinstance(each, float) for each in place):
        raise InvalidOption("`at` takes boxes and points of a detector, not masks.")
    shown = ", ".join(f"{each:g}" for each in place)
    if not among:
        raise InvalidOption(
            f"There is nothing at {shown}: the model detects nothing here with `min_score`; lower "
            "it."
        )
    boxes = found.boxes.detach().cpu()[list(among)]
    if len(place) == 2:
        x, y = place
        inside = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
        if bool(inside.any()):
            return among[int(inside.nonzero()[0])]
        raise InvalidOption(f"No detection is at the point {shown}; see `predictions` for boxes.")
    x, y, width, height = place
    overlaps = box_iou(torch.tensor([[x, y, x + width, y + height]]), boxes)[0]
    best = int(overlaps.argmax())
    if float(overlaps[best]) >= NEAR:
        return among[best]
    near = ", ".join(f"{each:.0f}" for each in box_of(found, among[best]))
    raise InvalidOption(
        f"No detection overlaps the box {shown} by an IoU of {NEAR} or more; the nearest is {near} "
        f"with {float(overlaps[best]):.2f}."
    )


def _maps(
    scene: Scene, question: Question, image: int, found: Detections, targets: Sequence[int]
) -> list[BoxMap]:
    """The map of each target from its gradient. Raises InvalidOption."""
    if not targets:
        return []
    head = scene.model.head
    if head is None:
        return [_without_head(scene, question, image, found, target) for target in targets]
    logits = scene.recording.targets[head.path + head.logits][-1]
    offsets = scene.recording.targets[head.path + head.offsets][-1]
    rows = [
        row_of(found.boxes[number], found.scores[number], logits, offsets) for number in targets
    ]
    values = logits.detach().flatten(0, -2)
    asked = {row: values[row] for row in rows if row is not None}
    again: Mapping[int, Any] = {}
    if not _named_layers(scene.model, question):
        again = level_rows(scene.module, head, scene.seen[_reads(scene.model)][0], asked)
    if any(row is None for row in rows) and not _named_layers(scene.model, question):
        return _with_lost_rows(scene, question, image, found, targets, rows, again)
    return [
        _without_head(scene, question, image, found, number)
        if row is None
        else _of_row(scene, question, image, found, number, row, again.get(row))
        for number, row in zip(targets, rows, strict=True)
    ]


def _with_lost_rows(  # noqa: PLR0917 - one call
    scene: Scene,
    question: Question,
    image: int,
    found: Detections,
    targets: Sequence[int],
    rows: Sequence[int | None],
    again: Mapping[int, Any],
) -> list[BoxMap]:
    """The maps where a box has no row: its edges are at the border, its score saturated."""
    level = scene.model.default_layers[0]
    grid = scene.model.layer(level).layout
    assert grid is not None
    lost = BoxMap(torch.zeros(grid.grid), (level,), _window(scene, image), saturated=True)
    return [
        lost if row is None else _of_row(scene, question, image, found, number, row, again.get(row))
        for number, row in zip(targets, rows, strict=True)
    ]


def _of_row(  # noqa: PLR0917 - one call
    scene: Scene,
    question: Question,
    image: int,
    found: Detections,
    number: int,
    row: int,
    computed: Any,
) -> BoxMap:
    """The map of one box from the row that made it, computed again or in the whole graph."""
    head = scene.model.head
    assert head is not None
    logits, offsets = (
        scene.recording.targets[head.path + part][-1] for part in (head.logits, head.offsets)
    )
    of_row = logits.detach().flatten(0, -2)[row].float().cpu()
    slope, is_class = _slope(question, found, number, offsets, row, of_row)
    clipped = not bool(slope.any())
    if computed is not None:
        given = computed.logits if is_class else computed.offsets
        gradient = computed.gradient((given * slope.to(given)).sum())
        cam = _cam(question, computed.values, gradient)
        return BoxMap(cam, (computed.level,), _window(scene, image), of_row, clipped=clipped)
    given = (logits if is_class else offsets).flatten(0, -2)[row]
    one = _at_layers(scene, question, image, (given * slope.to(given)).sum())
    return BoxMap(one.cam, one.layers, one.window, of_row, one.not_used and not clipped, clipped)


def _slope(  # noqa: PLR0917 - one call
    question: Question,
    found: Detections,
    number: int,
    offsets: Tensor,
    row: int,
    of_row: Tensor,
) -> tuple[Tensor, bool]:
    """The gradient of the target at its row of the head, and whether that is the class logits'."""
    if question.of == "class":
        return _class_slope(question, of_row, int(found.labels[number])), True
    edge = found.boxes[number][COORDINATES.index(question.of)]
    if not edge.requires_grad:
        return torch.zeros_like(offsets.flatten(0, -2)[row]).detach(), False
    (slope,) = torch.autograd.grad(edge, offsets, retain_graph=True)
    return slope.flatten(0, -2)[row], False


def _class_slope(question: Question, of_row: Tensor, label: int) -> Tensor:
    """The gradient of the target at the class logits (C,) of its row."""
    if question.contrast is not None:
        return question.contrast.at(of_row, label).slope(of_row, label)
    slope = torch.zeros_like(of_row)
    slope[label] = 1
    return slope


def _without_head(
    scene: Scene, question: Question, image: int, found: Detections, number: int
) -> BoxMap:
    """The map of one box in the whole graph, from an edge of it or from the logit of its class.

    That is the one in the row of its query, or log s − log(1 − s) of the score s if it has none.
    """
    if question.of != "class":
        value = found.boxes[number][COORDINATES.index(question.of)]
        return _at_layers(scene, question, image, value)
    if found.logits is None:
        value = as_logits(found.scores[number : number + 1], "sigmoid")[0]
        return _at_layers(scene, question, image, value)
    given = found.logits[number]
    of_row = given.detach().float().cpu()
    slope = _class_slope(question, of_row, int(found.labels[number]))
    one = _at_layers(scene, question, image, (given * slope.to(given)).sum())
    return replace(one, logits=of_row)


def _at_layers(scene: Scene, question: Question, image: int, value: Tensor) -> BoxMap:
    """The map of a scalar at the question's layers, fused."""
    points = [_point(scene.recording, path) for path in question.layers]
    gradients: Sequence[Tensor | None] = [None] * len(points)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, points, retain_graph=True, allow_unused=True)
    used = {
        path: (point, gradient)
        for path, point, gradient in zip(question.layers, points, gradients, strict=True)
        if gradient is not None and bool(gradient.any())
    }
    own_level = question.layers == scene.model.default_layers
    shown = (tuple(used) or question.layers[:1]) if own_level else question.layers
    cams = []
    for path in shown:
        point, gradient = used.get(path, (_point(scene.recording, path), None))
        values = point.detach()[image : image + 1]
        slope = torch.zeros_like(values) if gradient is None else gradient[image : image + 1]
        as_map = _layout(scene, path).as_map
        cams.append(_cam(question, as_map(values), as_map(slope)))
    return BoxMap(fuse(cams), tuple(shown), _window(scene, image), not_used=not used)


def _layout(scene: Scene, path: str) -> Layout:
    """The layout of a layer for images of the scene's size."""
    layout = scene.model.layer(path).layout
    assert layout is not None, "target_layers() refuses it"
    return layout.scaled(scene.size, scene.model.preprocessing.crop)


def _point(recording: Recording, path: str) -> Tensor:
    return recording.targets[path][-1]


def _cam(question: Question, activation: Tensor, gradient: Tensor) -> Tensor:
    """The map (h, w) on the CPU; of an edge both directions count: |gradient · activation|."""
    activation, gradient = precise(activation), precise(gradient)
    if question.of != "class":
        return (gradient * activation).sum(dim=1).abs()[0].cpu()
    return LAYER_METHODS[question.method or ""](activation, gradient)[0].detach().cpu()


def _window(scene: Scene, image: int) -> Rect | None:
    if "transform" not in scene.seen:
        return None
    window = padded_window(scene.seen["transform"][1], image, scene.size)
    return None if window is None else (window[0], window[1], window[2], window[3])


def _explanation(
    model: LoadedModel, question: Question, found: Detections, number: int, one: BoxMap
) -> Explanation:
    record, score, class_id = (
        question.method_record,
        float(found.scores[number]),
        int(found.labels[number]),
    )
    assert record is not None
    flags = {
        "saturated": one.saturated or (not model.knows_rows and score > SATURATED),
        "layer_not_used": one.not_used,
        "edge_clipped": one.clipped,
        "not_per_box": not record.per_box,
    }
    return explanation_of(
        model,
        question,
        one.cam,
        flags,
        class_id=class_id,
        score=score,
        logit=float(as_logits(found.scores[number : number + 1], "sigmoid")[0]),
        layers=one.layers if record.has_layer else (),
        detection=number,
        box=box_of(found, number),
        of=question.of,
        window=one.window,
        **contrast_fields(question.contrast, one.logits, class_id),
    )
