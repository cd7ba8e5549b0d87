"""Worker threads that decode, infer in batches that form by themselves, and render."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch

from service.errors import CamserveError, DeadlineExceeded, InferenceFailed, ShuttingDown
from service.metrics import Metrics
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool, Replica
from service.questions import Answer, Question
from service.stepwise import Unfinished, run

P = ParamSpec("P")
R = TypeVar("R")
Outcome = Answer | CamserveError | Unfinished
Runner = Callable[[Replica, Sequence[Question]], Sequence[Outcome]]


@dataclass(frozen=True, slots=True)
class Timed:
    """An answer with the seconds it waited for its first batch, and those its batches took."""

    answer: Answer
    queue: float
    inference: float


@dataclass(slots=True)
class _Job:
    model: LoadedModel
    question: Question
    deadline: float | None
    arrived: float = field(default_factory=time.monotonic)
    future: Future[Timed] = field(default_factory=Future)
    rest: Unfinished | None = None
    queue: float | None = None
    inference: float = 0.0

    def is_wanted(self) -> bool:
        """Whether somebody still waits; ends the job where its deadline has passed."""
        if self.future.cancelled():
            return False
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.fail(
                DeadlineExceeded("The request waited longer than its deadline; try again later.")
            )
            return False
        return True

    def succeed(self, answer: Answer) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(Timed(answer, self.queue or 0.0, self.inference))

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Scheduler:
    """One pool of threads for everything that takes time, so that the event loop never waits.

    Short calls (decoding, rendering) go first: a rendered answer frees its place, and what is
    decoded meets in one batch. A free thread then takes what waits for one model, up to
    `max_batch`: an idle server answers a lone request at once, a busy one batches by itself.
    Models take turns. A method of many passes is worked off in steps and goes to the back of the
    queue between them. Jobs whose future was cancelled (the client is gone) or whose deadline has
    passed are dropped, unrun or between two steps.

    threads_per_worker: intra-op threads of torch; one, where there are as many workers as cores.
    """

    def __init__(
        self,
        pool: ModelPool,
        metrics: Metrics,
        *,
        workers: int,
        max_batch: int = 4,
        threads_per_worker: int = 1,
        runner: Runner = run,
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._max_batch = max_batch
        self._threads_per_worker = threads_per_worker
        self._runner = runner
        self._calls: deque[Callable[[], None]] = deque()
        self._jobs: OrderedDict[int, deque[_Job]] = OrderedDict()
        self._wake = threading.Condition()
        self._open = True
        self._threads = [
            threading.Thread(target=self._work, name=f"camserve-worker-{index}", daemon=True)
            for index in range(workers)
        ]

    def start(self) -> None:
        """Start the worker threads."""
        for thread in self._threads:
            thread.start()

    def close(self, timeout: float | None = None) -> None:
        """Finish what was accepted, then end the threads; `timeout` seconds for all of them."""
        with self._wake:
            self._open = False
            self._wake.notify_all()
        until = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(None if until is None else max(0.0, until - time.monotonic()))

    @property
    def waiting(self) -> int:
        """Jobs that no worker has taken yet."""
        with self._wake:
            return sum(len(jobs) for jobs in self._jobs.values())

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run a short function in a worker thread; before any batch."""
        future: Future[R] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it, whatever it is
                future.set_exception(error)

        with self._wake:
            self._refuse_when_closed()
            self._calls.append(task)
            self._wake.notify()
        return future

    def submit(
        self, model: LoadedModel | str, question: Question, deadline: float | None = None
    ) -> Future[Timed]:
        """Queue one image for a version of a model that the caller holds (`ModelPool.use`).

        A name means its present version. `deadline` is on `time.monotonic()`'s clock.

        The future raises DeadlineExceeded where the job was still waiting then, NonFiniteOutput,
        InferenceFailed, or what `ModelPool.lease` raises.
        """
        held = self._pool.model(model) if isinstance(model, str) else model
        job = _Job(held, question, deadline)
        with self._wake:
            self._refuse_when_closed()
            self._queue(job)
        return job.future

    def _refuse_when_closed(self) -> None:
        if not self._open:
            raise ShuttingDown("The service is shutting down; ask another instance.")

    def _work(self) -> None:
        torch.set_num_threads(self._threads_per_worker)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._calls or self._jobs or not self._open)
                if self._calls:
                    task: Callable[[], None] = self._calls.popleft()
                elif self._jobs:
                    task = self._batch_task(self._take_batch())
                else:
                    return
            task()
            del task

    def _batch_task(self, jobs: list[_Job]) -> Callable[[], None]:
        return lambda: self._run(jobs)

    def _take_batch(self) -> list[_Job]:
        """The longest waiting live jobs of the model whose turn it is; holds the lock."""
        model, waiting = self._jobs.popitem(last=False)
        batch: list[_Job] = []
        while waiting and len(batch) < self._max_batch:
            if batch and not _goes_with(waiting[0], batch[0]):
                break
            job = waiting.popleft()
            if job.is_wanted():
                batch.append(job)
        if waiting:
            self._jobs[model] = waiting
            self._wake.notify()
        return batch

    def _run(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        started = time.monotonic()
        self._metrics.batch_size.observe(len(jobs))
        try:
            with self._pool.lease(jobs[0].model) as replica:
                outcomes = list(zip(jobs, self._outcomes(replica, jobs), strict=True))
        except BaseException as error:  # noqa: BLE001 - a future left pending would hang its client
            self._failed(jobs, error)
            return
        seconds = time.monotonic() - started
        for job, outcome in outcomes:
            job.queue = started - job.arrived if job.queue is None else job.queue
            job.inference += seconds
            if isinstance(outcome, Answer):
                job.succeed(outcome)
            elif isinstance(outcome, Unfinished):
                job.rest = outcome
                self._queue(job)
            else:
                job.fail(outcome)

    def _outcomes(self, replica: Replica, jobs: list[_Job]) -> Sequence[Outcome]:
        rest = jobs[0].rest
        if rest is None:
            return self._runner(replica, [job.question for job in jobs])
        return [rest.step(replica) or rest]

    def _queue(self, job: _Job) -> None:
        with self._wake:
            self._jobs.setdefault(id(job.model), deque()).append(job)
            self._wake.notify()

    def _failed(self, jobs: list[_Job], error: BaseException) -> None:
        """One member may have spoiled its batch: run each alone before blaming anyone."""
        if len(jobs) > 1:
            for job in jobs:
                self._run([job] if job.is_wanted() else [])
            return
        if isinstance(error, CamserveError):
            jobs[0].fail(error)
            return
        failure = InferenceFailed(
            "The model failed on this image. Try the image again; if it fails again, the server's "
            "log has the cause under this request id."
        )
        failure.__cause__ = error
        jobs[0].fail(failure)


def _goes_with(job: _Job, other: _Job) -> bool:
    """Whether two jobs can share a forward pass."""
    steps = job.rest is not None or other.rest is not None
    return not steps and job.question.pixels.shape == other.question.pixels.shape
