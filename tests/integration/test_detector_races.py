"""Threads at once on a detector and a segmenter, in both lanes: right answers, and a whole pool."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import detectors
import pytest
import torch
from detectors import answer, image, loaded, question

from service.inference.batch import run
from service.inference.questions import InferenceResult, Question, lane_of
from service.metrics import Metrics
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool
from service.scheduling.scheduler import Scheduler

pytestmark = pytest.mark.timeout(300)

WORKERS = 4
PATIENCE = 200
SIZES = ((70, 90), (90, 70), (64, 120))


@contextmanager
def scheduling(models: list[LoadedModel]) -> Iterator[tuple[Scheduler, ModelPool]]:
    pool = ModelPool(models, replicas=WORKERS)
    scheduler = Scheduler(pool, Metrics(), workers=WORKERS, runner=run)
    scheduler.start()
    try:
        yield scheduler, pool
    finally:
        scheduler.close(PATIENCE)


def asked(model: LoadedModel) -> list[Question]:
    """Predictions, maps at the default and at a named layer, and RISE, of images of three sizes."""
    kinds: list[dict[str, Any]] = [
        {"method": None},
        {"explain_top": 2},
        {"explain_top": 1, "layers": ("backbone.stem",)},
        {"explain_top": 1, "method": "rise", "samples": 9},
    ]
    return [_question(model, seed, kind) for seed, kind in itertools.product(range(6), kinds)]


def _question(model: LoadedModel, seed: int, kind: dict[str, Any]) -> Question:
    height, width = SIZES[seed % len(SIZES)]
    source = {"source": (width, height)} if model.task == "segmentation" else {}
    return question(model, image(seed, (height, width)), **source, **kind)


def check(one: InferenceResult, other: InferenceResult) -> None:
    assert len(one.predictions) == len(other.predictions) > 0
    for mine, theirs in zip(one.predictions, other.predictions, strict=True):
        assert mine.class_id == theirs.class_id
        assert mine.score == pytest.approx(theirs.score, abs=1e-4)
    assert len(one.explanations) == len(other.explanations)
    for mine_, theirs_ in zip(one.explanations, other.explanations, strict=True):
        assert mine_.layers == theirs_.layers
        assert abs(torch.from_numpy(mine_.grid - theirs_.grid)).max() <= 1e-2


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
def test_threads_get_what_they_get_alone_and_leave_the_pool_whole(compiled: bool) -> None:
    models = [loaded(kind, compiled=compiled) for kind in ("faster_rcnn", "segmenter")]
    questions = [(model, each) for model in models for each in asked(model)]
    lanes = {lane_of(model, each) for model, each in questions}
    assert lanes == ({"folded", "hooked"} if compiled else {"hooked"})
    alone = [answer(model, each)[0] for model, each in questions]
    with scheduling(models) as (scheduler, pool):
        jobs = [scheduler.submit(model, each) for model, each in questions]
        found = [job.result(PATIENCE).result for job in jobs]
        assert pool.faults() == []
    for one, other in zip(found, alone, strict=True):
        check(one, other)


def test_a_detector_that_fails_on_one_image_answers_the_others() -> None:
    """The pool builds no replica for it: nothing of the replica was changed."""
    model = loaded("retinanet", compiled=True)
    bad = detectors.question(model, torch.zeros(3, 0, 9, dtype=torch.uint8))
    good = question(model, image(1), explain_top=1)
    with scheduling([model]) as (scheduler, pool):
        failed, answered = scheduler.submit(model, bad), scheduler.submit(model, good)
        assert failed.exception(PATIENCE) is not None
        check(answered.result(PATIENCE).result, answer(model, good)[0])
        assert pool.faults() == []
