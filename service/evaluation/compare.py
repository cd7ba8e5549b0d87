"""Compare two models on the same images: labels, scores, and where their evidence lies.

    for outcome in compare_images(one, other, images):
        print(outcome.name, outcome.flipped, outcome.maps.correlation)
    comparison = summarise(one, other, outcomes)

The first model sets the question: each image's class is its prediction, and both models explain
that class. Of detectors each detection is compared, with the one of the other model that overlaps
it by an IoU of .5 or more. Each image runs alone on a replica of its own, so that two loads of the
same weights differ by exactly 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from service.cam.heatmap import resample
from service.cam.rank_correlation import rank_correlation
from service.errors import CamserveError, ConfigurationError, InvalidOption
from service.evaluation.box_matches import matched
from service.evaluation.object_masks import ObjectMasks
from service.evaluation.single_runs import replica_of, result_of
from service.images.decode import Geometry, Rect, preview_size
from service.images.upload import Upload, open_upload
from service.inference.method_table import check_method, default_method
from service.inference.questions import Explanation, InferenceResult, Prediction, Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica

RASTER = 64
"""Most cells of a side where two maps of different models are compared."""

MASK_SIDE = 256
"""Longer side, in pixels, at which evidence off the object is measured."""

MOST_BOXES = 100
"""Detections of an image that are compared, the best ones of each model."""

NOTHING = "nothing"
"""The label where a model has no detection."""

FEW = 12
"""Most labels that a note lists."""

Opened = Callable[[LoadedModel], Upload]
"""Opens one image for a model. Raises CamserveError or OSError."""

Map = tuple[NDArray[np.float32], Geometry]
"""A grid and where it lies in the source."""


@dataclass(frozen=True, slots=True)
class MapDifference:
    """How two maps of one class on one image differ.

    correlation:  Spearman's rank correlation of their cells, −1..1.
    overlap:      of their shares of |evidence|: 1 if these are equal, 0 if nothing is shared.
    centre_shift: distance of their centres, as a share of the diagonal of what both models see;
                  None if a map is zero.
    outside:      shares of |evidence| off the object, first and second model, 0..1; None without
                  a mask, or if a map is zero.
    """

    correlation: float
    overlap: float
    centre_shift: float | None
    outside: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """What one model answers on one image; `explanation` is of the class that both explain.

    score: of that class; None where the model does not have it.
    """

    label: str
    score: float | None
    upload: Upload
    explanation: Explanation | None


@dataclass(frozen=True, slots=True)
class ComparedImage:
    """Both models on one image, or on one detection in it.

    shared:  whether the second model has the class that the first one predicts.
    flipped: whether the second model predicts another class; False where it is not shared. Of a
             detection also whether one of the models does not have it.
    maps:    None where a model has no map.
    """

    name: Path
    one: Side
    other: Side
    shared: bool
    flipped: bool
    maps: MapDifference | None

    @property
    def score_change(self) -> float | None:
        """Score of the first model's class in the second model, minus that in the first, −1..1."""
        if self.one.score is None or self.other.score is None:
            return None
        return self.other.score - self.one.score


@dataclass(frozen=True, slots=True)
class UncomparedImage:
    """An image that a model failed on. `models`: the names of those that did; two: both."""

    name: Path
    models: tuple[str, ...]
    detail: str


Outcome = ComparedImage | UncomparedImage


@dataclass(frozen=True, slots=True)
class Differences:
    """What a set of images says.

    images:  compared ones, whose class both models have; of detectors, detections.
    flips:   how many labels differ; `flip_interval` is the share's 95 % interval (Wilson).
    score_change, score_distance: mean of the change of the score, and of its absolute value.
    correlation, overlap, centre_shift: medians over the images with maps; None without maps.
    outside: mean shares of evidence off the object, first and second model; None without masks.
    """

    images: int
    flips: int
    flip_interval: tuple[float, float]
    score_change: float
    score_distance: float
    maps: int
    correlation: float | None
    overlap: float | None
    centre_shift: float | None
    outside: tuple[float, float] | None

    @property
    def flip_share(self) -> float:
        return self.flips / self.images if self.images else 0.0

    @property
    def outside_shift(self) -> float | None:
        """How much more of the second model's evidence is off the object, −1..1."""
        return None if self.outside is None else self.outside[1] - self.outside[0]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All images, and by class of the first model.

    flips:    (image, label of the first model, label of the second).
    left_out: images whose class the second model does not have, with that class.
    failed:   images that a model could not answer.
    notes:    what limits the comparison, in sentences.
    """

    one: LoadedModel
    other: LoadedModel
    overall: Differences
    classes: Mapping[str, Differences]
    flips: tuple[tuple[Path, str, str], ...]
    left_out: tuple[tuple[Path, str], ...]
    failed: tuple[UncomparedImage, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two models with replicas, the class ids of the first one that the second one has, by id.

    method: None if one of them cannot be explained by the requested one.
    """

    one: Replica
    other: Replica
    class_of: Mapping[int, int]
    method: str | None


def shared_classes(one: Sequence[str], other: Sequence[str]) -> dict[int, int]:
    """Class ids of the first labels to those of the second, by text.

    Equal lists match by position. Otherwise a text that stands twice in a list is not matched.
    """
    if list(one) == list(other):
        return {index: index for index in range(len(one))}
    places = _unique(other)
    return {index: places[text] for text, index in _unique(one).items() if text in places}


def _unique(labels: Sequence[str]) -> dict[str, int]:
    places: defaultdict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        places[label].append(index)
    return {label: found[0] for label, found in places.items() if len(found) == 1}


def compare_files(
    one: LoadedModel,
    other: LoadedModel,
    files: Iterable[tuple[Path, Path]],
    *,
    method: str | None = None,
    masks: ObjectMasks | None = None,
    max_pixels: int = 50_000_000,
    preview_side: int | None = None,
) -> Iterator[Outcome]:
    """Compare two models on files, given with their names as `find_images` returns them.

    preview_side: longer side of the images that are kept to draw on; None: none.

    Yields each image's outcome in order. Raises as `compare_images`.
    """

    def opener(path: Path) -> Opened:
        def opened(model: LoadedModel) -> Upload:
            return open_upload(
                path.read_bytes(),
                model.preprocessing,
                None,
                max_pixels=max_pixels,
                preview_side=preview_side,
            )

        return opened

    named = ((path, _full_name(path, name), opener(path)) for path, name in files)
    images = ((name, opened) for _, name, opened in named)
    return compare_images(one, other, images, method=method, masks=masks)


def _full_name(path: Path, name: Path) -> Path:
    """The name with its suffix, which `find_images` may take off."""
    return name if name.name == path.name else name.with_name(path.name)


def compare_images(
    one: LoadedModel,
    other: LoadedModel,
    images: Iterable[tuple[Path, Opened]],
    *,
    method: str | None = None,
    masks: ObjectMasks | None = None,
) -> Iterator[Outcome]:
    """Compare two models on named images; yields each image's outcomes in order.

    An image has one, of detectors one for each detection of either model, or none.

    method: of the maps, at each model's default layer, None: the default of the models' task;
            labels alone are compared if one of the models does not allow it.
    masks:  of the objects, to measure evidence off them.

    Raises ConfigurationError at once if the models share no label or their tasks cannot be
    compared, and while it runs for a mask that does not fit its image.
    """
    _check_tasks(one, other)
    method = method or default_method(one)
    class_of = shared_classes(one.labels, other.labels)
    if not class_of:
        raise ConfigurationError(
            f"{one.name} and {other.name} have no label in common, so there is nothing to compare: "
            f"{one.name} knows {one.knows}, and {other.name} {other.knows}. Give both the same "
            "texts, as `labels` in models.toml or in the weights' metadata."
        )
    allowed = None if any(why_no_maps(each, method) for each in (one, other)) else method
    pair = _Pair(replica_of(one), replica_of(other), class_of, allowed)
    if one.task == "detection":
        outcomes = (_compared_boxes(pair, name, opened, masks) for name, opened in images)
        return chain.from_iterable(outcomes)
    return (_compared(pair, name, opened, masks) for name, opened in images)


def _check_tasks(one: LoadedModel, other: LoadedModel) -> None:
    """Raise ConfigurationError for segmenters, and for two models of different tasks."""
    for model in (one, other):
        if model.task == "segmentation" or model.task != one.task:
            raise ConfigurationError(
                f"camserve compare is for two models that classify or two that detect, and "
                f"{model.name}'s task is {model.task}."
            )


def why_no_maps(model: LoadedModel, method: str) -> str | None:
    """Why a model has no maps by this method; None if it has."""
    if model.target_layer is None:
        return model.no_layers or f"model {model.name!r} has no layer with a suitable feature map"
    with suppress(InvalidOption):
        check_method(model, method)
        return None
    return model.no_gradients or f"model {model.name!r} does not allow the method {method}"


def _compared(pair: _Pair, name: Path, opened: Opened, masks: ObjectMasks | None) -> Outcome:
    models = pair.one.model, pair.other.model
    one = _answer(pair.one, opened, None, pair.method)
    wanted = None
    if not isinstance(one, str):
        wanted = pair.class_of.get(one[1].predictions[0].class_id)
    other = _answer(pair.other, opened, wanted, pair.method if wanted is not None else None)
    if isinstance(one, str) or isinstance(other, str):
        return _failed(pair, name, one, other)
    best = other[1].predictions[0].class_id
    mask = None if masks is None else masks.mask(name, (one[0].width, one[0].height))
    sides = (
        _side(models[0], one, one[1].predictions[0].class_id),
        _side(models[1], other, wanted),
    )
    shared = wanted is not None
    maps = _maps(sides, mask) if shared else None
    return ComparedImage(name, *sides, shared, shared and best != wanted, maps)


def _failed(
    pair: _Pair,
    name: Path,
    one: tuple[Upload, InferenceResult] | str,
    other: tuple[Upload, InferenceResult] | str,
) -> UncomparedImage:
    given = ((pair.one.model, one), (pair.other.model, other))
    reasons = {model.name: reason for model, reason in given if isinstance(reason, str)}
    return UncomparedImage(name, tuple(reasons), "; ".join(dict.fromkeys(reasons.values())))


def _compared_boxes(
    pair: _Pair, name: Path, opened: Opened, masks: ObjectMasks | None
) -> Iterator[Outcome]:
    """Yield both models on each detection of an image, or why one of them failed."""
    one, other = (_answer(each, opened, None, pair.method) for each in (pair.one, pair.other))
    if isinstance(one, str) or isinstance(other, str):
        yield _failed(pair, name, one, other)
        return
    mask = None if masks is None else masks.mask(name, (one[0].width, one[0].height))
    for mine, theirs in matched(one[1].predictions, other[1].predictions, pair.class_of):
        wanted = None if mine is None else pair.class_of.get(mine.class_id)
        is_same = theirs is not None and theirs.class_id == wanted
        sides = (
            _side_of_box(pair.one.model, one, mine, has_score=is_same),
            _side_of_box(pair.other.model, other, theirs, has_score=is_same),
        )
        shared = mine is None or wanted is not None
        maps = _maps(sides, mask) if is_same else None
        yield ComparedImage(name, *sides, shared, shared and not is_same, maps)


def _side_of_box(
    model: LoadedModel,
    answer: tuple[Upload, InferenceResult],
    found: Prediction | None,
    *,
    has_score: bool,
) -> Side:
    upload, result = answer
    if found is None:
        return Side(NOTHING, None, upload, None)
    of = (each for each in result.explanations if each.detection == found.detection)
    score = found.score if has_score else None
    return Side(model.labels[found.class_id], score, upload, next(of, None))


def _answer(
    replica: Replica, opened: Opened, wanted: int | None, method: str | None
) -> tuple[Upload, InferenceResult] | str:
    """Return the image and the result, or why there is none. wanted: None: the best class."""
    model = replica.model
    try:
        upload = opened(model)
    except CamserveError as error:
        return error.detail
    except OSError as error:
        return f"{error.strerror or error}"
    is_detector = model.task == "detection"
    question = Question(
        **upload.model_input.placed,
        top_k=MOST_BOXES if is_detector else len(model.labels),
        targets=() if wanted is None or method is None else (wanted,),
        explain_top=MOST_BOXES if is_detector else 1,
        method=method,
        layers=_layers(model, method),
    )
    try:
        result = result_of(replica, question)
    except Exception as error:  # noqa: BLE001 - the user's model may raise anything
        return f"{type(error).__name__}: {error}"
    return result.detail if isinstance(result, CamserveError) else (upload, result)


def _layers(model: LoadedModel, method: str | None) -> tuple[str, ...]:
    if method is None or model.target_layer is None:
        return ()
    return model.default_layers or (model.target_layer,)


def _side(model: LoadedModel, answer: tuple[Upload, InferenceResult], class_id: int | None) -> Side:
    upload, result = answer
    scores: Mapping[int, Prediction] = {each.class_id: each for each in result.predictions}
    explained = result.explanations[0] if result.explanations else None
    label = model.labels[result.predictions[0].class_id]
    score = None if class_id is None else scores[class_id].score
    return Side(label, score, upload, explained)


def _maps(sides: tuple[Side, Side], mask: NDArray[np.bool_] | None) -> MapDifference | None:
    maps = [
        (side.explanation.grid, _geometry(side.upload.model_input.geometry, side.explanation))
        for side in sides
        if side.explanation is not None
    ]
    return map_difference(maps[0], maps[1], mask) if len(maps) == 2 else None


def _geometry(geometry: Geometry, explanation: Explanation) -> Geometry:
    """Where a map lies in the source: a detector pads the image itself."""
    window = explanation.window
    return geometry if window is None else replace(geometry, window=window)


def map_difference(one: Map, other: Map, mask: NDArray[np.bool_] | None = None) -> MapDifference:
    """Compare two maps of the same source image.

    Cell by cell if they have the same cells, otherwise on a raster as coarse as the coarser one,
    over the part that both models see. mask: of the object, bool (h, w) of the upright source.
    """
    cells, rect = _on_same_cells(one, other)
    shares = [_shares(each) for each in cells]
    overlap, shift = float(cells[0].any() == cells[1].any()), None
    if shares[0] is not None and shares[1] is not None:
        overlap = 1 - float(np.abs(shares[0] - shares[1]).sum()) / 2
        shift = _distance(_centre(shares[0]), _centre(shares[1]), rect)
    outside = None
    if mask is not None:
        found = [_outside(each, mask) for each in (one, other)]
        outside = None if found[0] is None or found[1] is None else (found[0], found[1])
    return MapDifference(rank_correlation(*cells), overlap, shift, outside)


def _on_same_cells(
    one: Map, other: Map
) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], Rect]:
    """Both maps as arrays of one shape, and the part of the source that these cover."""
    (grid, geometry), (other_grid, other_geometry) = one, other
    if grid.shape == other_grid.shape and geometry == other_geometry:
        return (grid, other_grid), geometry.covered
    rect = _common(geometry.seen, other_geometry.seen)
    rows, columns = (
        min(*sides, RASTER) for sides in zip(grid.shape, other_grid.shape, strict=True)
    )
    drawn = [resample(*each, (columns, rows), rect) for each in (one, other)]
    return (drawn[0], drawn[1]), rect


def _common(one: Rect, other: Rect) -> Rect:
    """What two rectangles share; the first one if they share nothing."""
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right = min(one[0] + one[2], other[0] + other[2])
    bottom = min(one[1] + one[3], other[1] + other[3])
    return (left, top, right - left, bottom - top) if right > left and bottom > top else one


def _shares(cells: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """Each cell's share of |evidence|, sum 1; None for a map of zeros."""
    strength = np.abs(cells).astype(np.float64)
    total = float(strength.sum())
    return strength / total if total else None


def _centre(shares: NDArray[np.float64]) -> tuple[float, float]:
    """The mean place (x, y) of shares, as fractions of the sides."""
    rows, columns = shares.shape
    x = float(shares.sum(axis=0) @ (np.arange(columns) + 0.5)) / columns
    y = float(shares.sum(axis=1) @ (np.arange(rows) + 0.5)) / rows
    return x, y


def _distance(one: tuple[float, float], other: tuple[float, float], rect: Rect) -> float:
    width, height = rect[2:]
    across, down = (one[0] - other[0]) * width, (one[1] - other[1]) * height
    return math.hypot(across, down) / math.hypot(width, height)


def _outside(drawn: Map, mask: NDArray[np.bool_]) -> float | None:
    """The share of |evidence| off the object; None for a map of zeros."""
    grid, geometry = drawn
    size = preview_size(geometry.source_size, MASK_SIDE)
    whole = 0.0, 0.0, float(geometry.source_size[0]), float(geometry.source_size[1])
    strength = _shares(resample(np.abs(grid), geometry, size, whole))
    if strength is None:
        return None
    covered = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return float((strength * (1 - covered)).sum())


_Figure = tuple[str, bool, float | None, MapDifference | None]
"""Label of the first model, whether it flips, change of the score, and of the map."""


@dataclass(slots=True)
class Summary:
    """Adds up outcomes without keeping their images."""

    one: LoadedModel
    other: LoadedModel
    method: str | None = None
    _figures: list[_Figure] = field(default_factory=list)
    _flips: list[tuple[Path, str, str]] = field(default_factory=list)
    _left_out: list[tuple[Path, str]] = field(default_factory=list)
    _failed: list[UncomparedImage] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one image."""
        if isinstance(outcome, UncomparedImage):
            self._failed.append(outcome)
            return
        if not outcome.shared:
            self._left_out.append((outcome.name, outcome.one.label))
            return
        label = outcome.one.label
        self._figures.append((label, outcome.flipped, outcome.score_change, outcome.maps))
        if outcome.flipped:
            self._flips.append((outcome.name, label, outcome.other.label))

    def comparison(self) -> Comparison:
        """Return what all added images say."""
        by_class: defaultdict[str, list[_Figure]]
        by_class = defaultdict(list)
        for figure in self._figures:
            by_class[figure[0]].append(figure)
        return Comparison(
            self.one,
            self.other,
            _differences(self._figures),
            {label: _differences(by_class[label]) for label in sorted(by_class)},
            tuple(self._flips),
            tuple(self._left_out),
            tuple(self._failed),
            tuple(_notes(self.one, self.other, self.method or default_method(self.one))),
        )


def summarise(
    one: LoadedModel, other: LoadedModel, outcomes: Iterable[Outcome], method: str | None = None
) -> Comparison:
    """Return what the outcomes of `compare_images` say together."""
    summary = Summary(one, other, method)
    for outcome in outcomes:
        summary.add(outcome)
    return summary.comparison()


def _differences(figures: Sequence[_Figure]) -> Differences:
    flips = sum(flipped for _, flipped, _, _ in figures)
    changes = np.array([one for _, _, one, _ in figures if one is not None] or [0.0])
    maps = [found for *_, found in figures if found is not None]
    outside = [found.outside for found in maps if found.outside is not None]
    means = np.mean(outside, axis=0).tolist() if outside else None
    return Differences(
        len(figures),
        flips,
        wilson(flips, len(figures)),
        float(changes.mean()),
        float(np.abs(changes).mean()),
        len(maps),
        _median([found.correlation for found in maps]),
        _median([found.overlap for found in maps]),
        _median([found.centre_shift for found in maps if found.centre_shift is not None]),
        None if means is None else (means[0], means[1]),
    )


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, JASA 1927); (0, 1) of no images."""
    if of == 0:
        return 0.0, 1.0
    z, share = 1.959964, count / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    spread = math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) * z / (1 + z * z / of)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def _notes(one: LoadedModel, other: LoadedModel, method: str) -> Iterator[str]:
    """Yield what limits a comparison of two models."""
    if one.task == "detection":
        yield (
            "Counted are detections, not images: matched by an IoU of 0.5 or more, those of one "
            "label first. Scores and maps are of matched detections with the same label; "
            f"{NOTHING!r} is where a model has no detection."
        )
    if one.version == other.version:
        yield f"Both models have the weights {one.version}."
    matched = shared_classes(one.labels, other.labels)
    rest = set(range(len(other.labels))) - set(matched.values())
    unmatched = (
        (one, [label for index, label in enumerate(one.labels) if index not in matched]),
        (other, [other.labels[index] for index in sorted(rest)]),
    )
    for model, labels in unmatched:
        if labels:
            more = f" and {len(labels) - FEW:,} more" if len(labels) > FEW else ""
            yield (
                f"Only {model.name} has the labels {', '.join(labels[:FEW])}{more} (or they stand "
                "twice in a list of labels)."
            )
    if one.preprocessing != other.preprocessing:
        yield (
            f"The models see images differently ({one.preprocessing}; {other.preprocessing}): "
            "their maps are compared over the part that both see."
        )
    for model in (one, other):
        reason = why_no_maps(model, method)
        if reason is not None:
            yield f"Maps are not compared: {reason.rstrip('.')}."
        if not model.behaviour.deterministic:
            yield f"The answers of {model.name} vary from call to call; differences include that."
        if model.random_weights:
            yield f"The weights of {model.name} are random."
