"""Answers as Label Studio's regions and choices: in percent of the image, with existing labels.

Each control of a project gets its kind of result: Choices the class, BrushLabels the whole map,
RectangleLabels and PolygonLabels the parts above the threshold, KeyPointLabels the peak. Of a
detector or a segmenter they get what it finds, each with its score: RectangleLabels the boxes,
BrushLabels and PolygonLabels the masks, Choices the classes.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import orjson

from api_schemas.answers import Rect, verdict_summary
from service.cam.file_sizes import brush_bytes, region_bytes
from service.cam.regions import Regions, find_regions, mask_polygons, source_mask
from service.images.declared_size import Size
from service.inference.questions import Prediction
from service.integrations.label_studio.brush import alpha_of, encode_rle
from service.integrations.label_studio.host import Score
from service.integrations.label_studio.label_config import Control, Parameters, TaskImage
from service.models.loaded import LoadedModel
from service.pipeline.answer_size import AnswerSizes, Price
from service.routes.lifecycle import Billed

MAX_REGIONS = 10
"""Boxes and polygons of one map at most, the largest ones."""

MAX_FOUND = 100
"""Boxes of one image at most, the best ones."""

META_BYTES = 320
"""Of the verdict in one region, JSON."""

KEYPOINT_WIDTH = 1.5
"""Of the peak, in percent of the image's width."""

CHOSEN = 0.5
"""The minimum score if several classes can be chosen and the project sets no threshold."""


@dataclass(frozen=True)
class TaskEvidence:
    """The answer for one image of a task, and its drawings, made once for all controls."""

    model: LoadedModel
    answered: Billed
    parameters: Parameters
    render_side: int
    ordering: Score = "probability"

    @property
    def class_id(self) -> int:
        """The explained class, or the top-1 class."""
        answer = self.answered.inference
        return (answer.explanations or answer.predictions)[0].class_id

    @property
    def score(self) -> float:
        """Of a detector the lowest one, 0 if nothing is found."""
        answer = self.answered.inference
        if self.finds:
            return min((each.score for each in answer.predictions), default=0.0)
        return (answer.explanations or answer.predictions)[0].score

    @property
    def finds(self) -> bool:
        """Whether the answer is boxes or regions, not one class for the image."""
        return self.model.task != "classification"

    @property
    def certainty(self) -> float:
        """What tasks are ordered by, the least certain first."""
        inference = self.answered.inference
        if self.finds or self.ordering == "probability":
            return self.score
        return inference.margin if self.ordering == "margin" else 1 - inference.entropy

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the class in the project."""
        return self.names_of(self.class_id)

    def names_of(self, class_id: int) -> tuple[str, ...]:
        return self.parameters.names_of(self.model.labels[class_id])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright source."""
        return self.answered.upload.width, self.answered.upload.height

    @cached_property
    def regions(self) -> Regions:
        (explanation, *_) = self.answered.inference.explanations
        geometry = self.answered.upload.model_input.geometry
        threshold = self.parameters.options.threshold
        return find_regions(explanation.grid, geometry, threshold, self.render_side)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The fields of a region that has a verdict: Label Studio shows `text` beside the region.

        Empty without the option `verify`.
        """
        (explanation, *_) = self.answered.inference.explanations
        found = explanation.verdict
        if found is None:
            return {}
        return {
            "meta": {
                "text": [verdict_summary(found)],
                "verdict": found.verdict,
                "reason": found.reason,
                "agreement": found.agreement,
                "p_place": found.p_place,
                "p_centred": found.p_centred,
            }
        }

    @cached_property
    def rle(self) -> list[int]:
        """The map as a brush; empty if the map is all zero."""
        (explanation, *_) = self.answered.inference.explanations
        geometry = self.answered.upload.model_input.geometry
        alpha = alpha_of(explanation.grid, geometry, self.render_side)
        return encode_rle(alpha) if alpha.any() else []


def prediction(
    images: Sequence[tuple[TaskImage, TaskEvidence]], version: str, *, of_click: bool = False
) -> bytes:
    """A task's entry in the response, JSON; `[]` if no result fits the project's labels.

    Label Studio would store an empty prediction and not request this version again.

    of_click: whether it answers a click. Then it may be empty, and has no choices: the page would
    replace the annotator's choice at once, before the suggested regions are accepted.
    """
    result = [
        entry
        for image, evidence in images
        for entry in _of_image(image, evidence)
        if not (of_click and entry["type"] == "choices")
    ]
    if not result and not of_click:
        return b"[]"
    score = min(evidence.certainty for _, evidence in images) if images else 0.0
    return orjson.dumps({"result": result, "score": score, "model_version": version})


def price(images: Sequence[TaskImage], sizes: AnswerSizes) -> Price:
    """Bytes of one image of a task in the response at most, for the largest of the images."""
    controls = [Counter(control.kind for control in image.controls) for image in images]
    is_found = sizes.model.task != "classification"
    cells = sizes.model.preprocessing.crop if is_found else sizes.cells
    listed = min(MAX_FOUND, sizes.question.top_k) if is_found else 1

    def bytes_of(source: Size) -> int:
        regions = region_bytes(source, cells, sizes.render_side)
        an_entry = 512 + (MAX_REGIONS * META_BYTES if sizes.question.verify else 0)
        a_kind = {
            "brushlabels": brush_bytes(source, cells),
            "choices": sizes.predictions(),
            "polygonlabels": 4 * regions,  # in percent, with all digits
            "rectanglelabels": MAX_REGIONS * 512,
        }
        totals = (
            sum(listed * count * (an_entry + a_kind.get(kind, 0)) for kind, count in kinds.items())
            for kinds in controls
        )
        return 512 + max(totals, default=0)

    return bytes_of if any(controls) else lambda _: 512


def _of_image(image: TaskImage, evidence: TaskEvidence) -> Iterator[dict[str, Any]]:
    for control in image.controls:
        if evidence.finds:
            yield from _found(control, evidence)
            continue
        if control.kind == "choices":
            yield from _choices(control, evidence)
            continue
        label = control.region_label(*evidence.names)
        if label is None or not evidence.answered.inference.explanations:
            continue
        for value in _VALUES[control.kind](evidence):
            yield _region(control, evidence, evidence.score, label, value) | evidence.meta


def _region(
    control: Control, evidence: TaskEvidence, score: float, label: str, value: dict[str, Any]
) -> dict[str, Any]:
    return _entry(control, score) | {
        "original_width": evidence.size[0],
        "original_height": evidence.size[1],
        "image_rotation": 0,
        "value": {**value, control.kind: [label]},
    }


def _found(control: Control, evidence: TaskEvidence) -> Iterator[dict[str, Any]]:
    """What is found of the control's labels, sure enough, in the control's form."""
    named: dict[str, float] = {}
    for prediction in evidence.answered.inference.predictions[:MAX_FOUND]:
        label = control.label_of(*evidence.names_of(prediction.class_id))
        if label is None or prediction.score < (control.at_least or 0.0):
            continue
        named.setdefault(label, prediction.score)
        for value in _values_of(control.kind, prediction, evidence):
            yield _region(control, evidence, prediction.score, label, value)
    if control.kind == "choices" and named:
        chosen = list(named) if control.several else list(named)[:1]
        yield _entry(control, named[chosen[-1]]) | {"value": {"choices": chosen}}


def _values_of(
    kind: str, prediction: Prediction, evidence: TaskEvidence
) -> Iterator[dict[str, Any]]:
    """A box in percent, or a mask as a brush or as polygons; nothing for other kinds."""
    geometry = evidence.answered.upload.model_input.geometry
    if kind == "rectanglelabels" and prediction.box is not None:
        yield _rectangle(prediction.box, evidence.size)
    if prediction.mask is None:
        return
    if kind == "brushlabels":
        alpha = np.where(source_mask(prediction.mask, geometry), np.uint8(255), np.uint8(0))
        yield {"format": "rle", "rle": encode_rle(alpha)}
    if kind == "polygonlabels":
        for polygon in mask_polygons(prediction.mask, geometry)[:MAX_REGIONS]:
            yield _polygon(polygon, evidence.size)


def _entry(control: Control, score: float) -> dict[str, Any]:
    """The fields of all results; the id is new, because regions of one page must differ."""
    return {
        "id": uuid.uuid4().hex[:10],
        "from_name": control.name,
        "to_name": control.to_name,
        "type": control.kind,
        "score": score,
    }


def _choices(control: Control, evidence: TaskEvidence) -> Iterator[dict[str, Any]]:
    """The explained class; if several can be chosen, all with a sufficient score."""
    least = control.at_least
    chosen: list[tuple[int, float]] = [(evidence.class_id, evidence.score)]
    if control.several:
        least = CHOSEN if least is None else least
        predictions: Sequence[Prediction] = evidence.answered.inference.predictions
        chosen = [(listed.class_id, listed.score) for listed in predictions]
    kept = [(class_id, score) for class_id, score in chosen if least is None or score >= least]
    labels = [(control.label_of(*evidence.names_of(class_id)), score) for class_id, score in kept]
    known = {label: score for label, score in reversed(labels) if label is not None}
    if known:
        value = {"choices": sorted(known, key=lambda label: -known[label])}
        yield _entry(control, max(known.values())) | {"value": value}


def _brush(evidence: TaskEvidence) -> Iterator[dict[str, Any]]:
    if evidence.rle:
        yield {"format": "rle", "rle": evidence.rle}


def _boxes(evidence: TaskEvidence) -> Iterator[dict[str, Any]]:
    for box in evidence.regions.boxes[:MAX_REGIONS]:
        yield _rectangle(box, evidence.size)


def _rectangle(box: Rect, size: tuple[int, int]) -> dict[str, Any]:
    """A box in pixels as a value in percent."""
    (x, y, w, h), (width, height) = box, size
    return {
        "x": 100 * x / width,
        "y": 100 * y / height,
        "width": 100 * w / width,
        "height": 100 * h / height,
        "rotation": 0,
    }


def _polygons(evidence: TaskEvidence) -> Iterator[dict[str, Any]]:
    for polygon in evidence.regions.polygons[:MAX_REGIONS]:
        yield _polygon(polygon, evidence.size)


def _polygon(polygon: Sequence[tuple[float, float]], size: tuple[int, int]) -> dict[str, Any]:
    points = [[100 * x / size[0], 100 * y / size[1]] for x, y in polygon]
    return {"points": points, "closed": True}


def _peak(evidence: TaskEvidence) -> Iterator[dict[str, Any]]:
    if evidence.regions.peak is not None:
        x, y = evidence.regions.peak
        width, height = evidence.size
        yield {"x": 100 * x / width, "y": 100 * y / height, "width": KEYPOINT_WIDTH}


class _RegionValues(Protocol):
    def __call__(self, evidence: TaskEvidence, /) -> Iterator[dict[str, Any]]: ...


_VALUES: Mapping[str, _RegionValues] = MappingProxyType(
    {
        "brushlabels": _brush,
        "rectanglelabels": _boxes,
        "polygonlabels": _polygons,
        "keypointlabels": _peak,
    }
)
