"""Boxes and regions measured again in changed copies of their image: verdicts and experiments.

A detection is measured by the best detection of its class that overlaps it; a region by the mean
probability of its class over the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from service.cam.verdict import (
    RUNS,
    WHOLE,
    Evidence,
    Verdict,
    contrasts,
    design,
    filled,
    hidden,
    judge,
)
from service.errors import CamserveError, InvalidOption
from service.images.decode import Rect
from service.inference.hidden_parts import images_at_once, scaled_down, to_source
from service.inference.questions import (
    Edit,
    Explanation,
    ImageEdit,
    InferenceResult,
    Prediction,
    Question,
    TrackedEffect,
)
from service.inference.verdicts import ROUNDING
from service.models.loaded import LoadedModel
from service.models.pool import Replica


@dataclass(frozen=True, slots=True, eq=False)
class Tracker:
    """The targets of an image, and how they are found in the output for copies of it.

    values:      (2, K), the score of each target and how much of it is left: of a detection the
                 IoU, of a region the share of its pixels that keeps the class; both 0..1, and 0 of
                 what is gone. own: in the image itself; measure: in each copy of a batch's output.
    predictions: of the first copy.
    """

    targets: tuple[Prediction, ...]
    own: Tensor
    measure: Callable[[Any], list[Tensor]]
    predictions: Callable[[Any], tuple[Prediction, ...]]


def with_tracked(
    model: LoadedModel, question: Question, result: InferenceResult, tracker: Tracker
) -> Generator[None, Replica, InferenceResult]:
    """The result with the effects of a question's edits, and a verdict for each explanation."""
    effects: tuple[TrackedEffect | CamserveError, ...] = ()
    for edit in question.edits:
        effects = (*effects, (yield from _effect(model, question, edit, tracker)))
    result = replace(result, effects=effects, tracked=tracker.targets)
    if question.verify and result.explanations:
        result = yield from _judged(model, question, result, tracker)
    return result


def _measured(
    model: LoadedModel,
    count: int,
    images: Callable[[slice], Tensor],
    measure: Callable[[Any], list[Tensor]],
    most: int,
) -> Generator[None, Replica, Tensor]:
    """The values (count, 2, K) in copies, uint8 (n, C, h, w), made `most` at a time."""
    found: list[Tensor] = []
    for start in range(0, count, most):
        replica = yield
        with torch.no_grad():
            pixels = model.normalised(images(slice(start, min(start + most, count))))
            found += measure(model.outputs(replica.module, pixels))
    return torch.stack(found)


def _effect(
    model: LoadedModel, question: Question, edit: Edit, tracker: Tracker
) -> Generator[None, Replica, TrackedEffect | CamserveError]:
    """The effect of an edit of the image and of its controls."""
    assert isinstance(edit, ImageEdit), "other edits are refused for boxes and regions"
    same: list[int] = []
    listed: list[tuple[Prediction, ...]] = []

    def images(some: slice) -> Tensor:
        made = [edit.make(number) for number in range(edit.count)[some]]
        same.extend(some.start + n for n, each in enumerate(made) if each.equal(question.pixels))
        return torch.stack(made)

    def measure(raw: Any) -> list[Tensor]:
        if not listed:  # of the edit itself, which is the first copy
            listed.append(tracker.predictions(raw))
        return tracker.measure(raw)

    most = images_at_once(model, question.pixels)
    values = yield from _measured(model, edit.count, images, measure, most)
    # Batches of another size may differ in the last bits; an image that is the same does not.
    values[same] = tracker.own
    if not bool(values.isfinite().all()):
        return InvalidOption(
            "The model answers this edit with NaN or infinity, so there is no change to report; "
            "send a weaker edit."
        )
    return TrackedEffect(values, tracker.own, listed[0])


def _judged(
    model: LoadedModel, question: Question, result: InferenceResult, tracker: Tracker
) -> Generator[None, Replica, InferenceResult]:
    """The result with a verdict for each explanation, from the runs of the design."""
    image, scale = scaled_down(question.pixels)
    plan = design((image.shape[1], image.shape[2]), question.seen)
    fills = filled(image, plan)
    values = yield from _measured(
        model,
        RUNS,
        lambda runs: hidden(image, plan, runs, fills),
        lambda raw: tracker.measure(to_source(raw, scale)),
        images_at_once(model, image),
    )
    falls = tracker.own[0] - values[:, 0]
    evidence = Evidence(plan, falls, contrasts(image, plan), rounding=ROUNDING)
    return replace(
        result,
        explanations=tuple(
            replace(one, verdict=_verdict(evidence, number, one, _covers(model, question, one)))
            for number, one in enumerate(result.explanations)
        ),
    )


def _verdict(evidence: Evidence, number: int, one: Explanation, covers: Rect) -> Verdict:
    """The verdict on the map of one target, by the falls of its own score."""
    own = replace(evidence, falls=evidence.falls[:, number, None], covers=covers)
    return judge(own, torch.tensor(one.grid), 0)


def _covers(model: LoadedModel, question: Question, one: Explanation) -> Rect:
    """The part of the model input under a map, as fractions; more than all of it if padded."""
    if one.window is None:
        return model.preprocessing.covers or WHOLE
    height, width = question.pixels.shape[1:]
    x, y, w, h = one.window
    return x / width, y / height, w / width, h / height
