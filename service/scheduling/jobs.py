"""What waits for a worker: one image of a request, or a short call."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from service.errors import DeadlineExceeded, InferenceHangs, ShuttingDown
from service.inference.questions import Answer, Lane, Question
from service.inference.steps import Unfinished
from service.models.loaded import LoadedModel

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Timed:
    """An answer with the seconds it waited for its first batch, and those its batches took."""

    answer: Answer
    queue: float
    inference: float


@dataclass(slots=True)
class Job:
    """One image to be answered.

    deadline: on `time.monotonic()`'s clock. rest: what is left of a method of many passes.
    alone:    whether it must not share a batch: one it was in failed.
    queue, inference: seconds until its first batch, and in its batches so far.
    """

    model: LoadedModel
    question: Question
    lane: Lane
    deadline: float | None
    arrived: float = field(default_factory=time.monotonic)
    future: Future[Timed] = field(default_factory=Future)
    rest: Unfinished | None = None
    alone: bool = False
    queue: float | None = None
    inference: float = 0.0

    def is_wanted(self) -> bool:
        """Whether somebody still waits; ends the job where its deadline has passed."""
        if self.future.done():
            return False
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.fail(
                DeadlineExceeded("The request waited longer than its deadline; try again later.")
            )
            return False
        return True

    def succeed(self, answer: Answer) -> None:
        with suppress(InvalidStateError):  # cancelled, or given up
            self.future.set_result(Timed(answer, self.queue or 0.0, self.inference))

    def fail(self, error: BaseException) -> None:
        fail(self.future, error)

    @property
    def is_serial(self) -> bool:
        """Whether its model has one replica, so that one batch runs at a time."""
        return not self.model.behaviour.isolated

    def goes_with(self, other: Job) -> bool:
        """Whether two jobs of one model can share a forward pass."""
        alone = self.alone or other.alone or self.rest is not None or other.rest is not None
        same_size = self.question.pixels.shape == other.question.pixels.shape
        # Every target of one image walks the graph of the whole batch.
        walks = {job.question.count for job in (self, other) if job.question.walks}
        alone = alone or not self.model.behaviour.batchable
        return not alone and self.lane == other.lane and same_size and len(walks) < 2


class Call(Generic[R]):
    """A short function to run."""

    def __init__(self, future: Future[R], function: Callable[[], R]) -> None:
        self._future = future
        self._function = function

    def run(self) -> None:
        if self._future.done():
            return
        try:
            result = self._function()
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it, whatever it is
            fail(self._future, error)
        else:
            with suppress(InvalidStateError):
                self._future.set_result(result)

    def give_up(self) -> None:
        fail(self._future, hangs())


def fail(future: Future[Any], error: BaseException) -> None:
    """Tell whoever waits, unless they went or were told something else."""
    with suppress(InvalidStateError):  # cancelled, or given up
        future.set_exception(error)


def hangs() -> InferenceHangs:
    """Of work that was given up."""
    return InferenceHangs(
        "The work on this image did not end; it was given up. Try another image or a cheaper "
        "request; the server's log says more under this request id."
    )


def shutting_down() -> ShuttingDown:
    """Of work that the service takes no more."""
    return ShuttingDown("The service is shutting down; ask another instance.")
