"""Who runs when: jobs that form batches by themselves, and short calls that go before them."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from service.errors import (
    CamserveError,
    DeadlineExceeded,
    InferenceFailed,
    InferenceHangs,
    ModelNotReady,
    OutOfMemory,
    ShuttingDown,
)
from service.inference.batch import Unfinished, run, run_compiled
from service.inference.questions import InferenceResult, Lane, Question, lane_of
from service.metrics import Metrics
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool, Replica
from service.models.probes.torch_state import kept_torch_state
from service.resources import is_out_of_memory, release_memory
from service.scheduling.workers import Task, Workers

P = ParamSpec("P")
R = TypeVar("R")
Outcome = InferenceResult | CamserveError | Unfinished
Runner = Callable[[Replica, Sequence[Question]], Sequence[Outcome]]

LEASE_SECONDS = 5.0
"""How long a worker waits for a replica. There is one a worker, so that it waits only while lost
ones are built again; other models need the worker meanwhile, and the request may come back."""


BATCH_PATIENCE = 1.0
"""Seconds after which a batch goes before the calls of requests: images of 64 megapixels, many in a
request, would keep it waiting until all of them are decoded."""


@dataclass(frozen=True, slots=True)
class Timed:
    """An answer with the seconds it waited for its first batch, and those its batches took."""

    answer: InferenceResult
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

    def succeed(self, answer: InferenceResult) -> None:
        with suppress(InvalidStateError):  # cancelled, or given up
            self.future.set_result(Timed(answer, self.queue or 0.0, self.inference))

    def fail(self, error: BaseException) -> None:
        fail(self.future, error)

    @property
    def lane(self) -> Lane:
        return lane_of(self.model, self.question)

    @property
    def is_serial(self) -> bool:
        """Whether its model has one replica, so that one batch runs at a time."""
        return not self.model.behaviour.isolated

    def goes_with(self, other: Job) -> bool:
        """Whether two jobs of one model can share a forward pass."""
        alone = self.alone or other.alone or self.rest is not None or other.rest is not None
        same_size = self.question.pixels.shape == other.question.pixels.shape
        # Every target of one image walks the graph of the whole batch.
        walks = {job.question.target_count for job in (self, other) if job.question.needs_gradients}
        alone = alone or not self.model.behaviour.batchable
        return not alone and self.lane == other.lane and same_size and len(walks) < 2


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A short function to run. request: a number of the request that it is one of several of."""

    future: Future[Any]
    function: Callable[[], Any]
    request: int | None = None

    def run(self) -> None:
        if self.future.done():
            return
        try:
            result = self.function()
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it, whatever it is
            fail(self.future, error)
        else:
            with suppress(InvalidStateError):
                self.future.set_result(result)

    def give_up(self) -> None:
        fail(self.future, hangs())


class Turns:
    """A queue of calls. Not for several threads at once: its owner has a lock.

    Requests take turns with each other, and with calls that belong to none: one call of each, so
    that thirty-two images of one keep another's single image waiting for one of them, not for all.
    And a request has at most `most` calls running, so that one leaves a thread to all others.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: OrderedDict[int | Call, deque[Call]] = OrderedDict()
        self._running: Counter[int | Call] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def has_next(self) -> bool:
        """Whether a call may run now."""
        return self._next() is not None

    @property
    def next_is_of_request(self) -> bool:
        """Whether the call whose turn it is is one of several of a request."""
        return isinstance(self._next(), int)

    def _next(self) -> int | Call | None:
        return next((each for each in self._waiting if self._running[each] < self._most), None)

    def add(self, call: Call) -> None:
        """Queue a call."""
        key = call if call.request is None else call.request
        self._waiting.setdefault(key, deque()).append(call)

    def take(self) -> Call:
        """The call whose turn it is, where there is one (`has_next`); it runs until `end`."""
        key = self._next()
        assert key is not None
        calls = self._waiting.pop(key)
        call = calls.popleft()
        if calls:
            self._waiting[key] = calls
        if isinstance(key, int):
            self._running[key] += 1
        return call

    def end(self, call: Call) -> None:
        """A call has run."""
        if call.request is not None:
            self._running[call.request] -= 1
            if not self._running[call.request]:
                del self._running[call.request]


class Batch:
    """Jobs that share a forward pass, or one step of a long one.

    Its worker settles it when it has the answers, or the watchdog when it hangs: whoever does so
    first deals with the jobs, and nobody else.
    """

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self._lock = threading.Lock()
        self._replica: Replica | None = None
        self._settled = False

    def begin(self) -> list[Job]:
        """The jobs that are still wanted now; the others are dropped. Empty where it was given up.

        Between taking a batch and running it a client may disconnect, or a deadline pass.
        """
        wanted = [job for job in self.jobs if job.is_wanted()]
        with self._lock:
            self.jobs = [] if self._settled else wanted
            return self.jobs

    def hold(self, replica: Replica) -> None:
        """Note what it runs on. Raises InferenceHangs where it was given up while it waited."""
        with self._lock:
            if self._settled:
                raise hangs()
            self._replica = replica

    def let_go(self) -> None:
        """The replica goes back: from now on it may be somebody else's."""
        with self._lock:
            self._replica = None

    def settle(self) -> bool:
        """Whether the caller is the first to deal with the jobs."""
        with self._lock:
            first, self._settled = not self._settled, True
            return first

    def abandon(self, pool: ModelPool) -> tuple[list[Job], bool]:
        """Settle it for its worker; the jobs to deal with, and whether its replica is lost."""
        with self._lock:
            if self._settled:
                return [], False
            self._settled = True
            if self._replica is not None:
                pool.drop(self._replica)
            return self.jobs, self._replica is not None


class Scheduler:
    """One pool of threads for everything that takes time, so that the event loop never waits.

    Short calls (rendering, decoding) go first: a rendered answer frees its place, and what is
    decoded meets in one batch. Requests take turns in decoding, each leaves a thread to others, and
    a batch that has waited for BATCH_PATIENCE goes before it. There are more threads than batches
    may run, so that a call never waits behind them. A free thread takes what waits for one model
    and lane, up to `max_batch`: an idle server answers a lone request at once, a busy one batches
    by itself. Models take turns. A method of many passes is worked off in steps and goes to the
    back of the queue between them. Jobs whose future was cancelled (the client is gone) or whose
    deadline has passed are dropped, unrun or between two steps.

    workers:   batches that run side by side. helpers: threads more than these.
    max_delay: seconds that a batch which is not full waits for more. Zero is best unless a large
               device is fed by many slow clients.
    threads_per_worker: intra-op threads of torch; one, where there are as many workers as cores.
    hang_seconds: what is at one batch or call for longer is given up, its thread and replica
               replaced (`Workers`).
    """

    def __init__(  # noqa: PLR0913 - each is a setting
        self,
        pool: ModelPool,
        metrics: Metrics,
        *,
        workers: int,
        helpers: int = 1,
        max_batch: int = 4,
        max_delay: float = 0.0,
        threads_per_worker: int = 1,
        hang_seconds: float = 120.0,
        runner: Runner = run,
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_delay = max_delay
        self._runner = runner
        self._calls = Turns(max(1, workers + helpers - 1))
        self._jobs: OrderedDict[int, deque[Job]] = OrderedDict()
        self._wake = threading.Condition()
        self._open = True
        self._side_by_side = workers
        self._running: set[Batch] = set()
        self.workers = Workers(
            self._take,
            count=workers + helpers,
            threads=threads_per_worker,
            hang_seconds=hang_seconds,
            max_abandoned=2 * workers,  # what hangs in company is tried again alone
        )

    def start(self) -> None:
        """Start the worker threads."""
        self.workers.start()

    def close(self, timeout: float | None = None) -> None:
        """Finish what was accepted, then end the threads; `timeout` seconds for all of them."""
        with self._wake:
            self._open = False
            self._wake.notify_all()
        self.workers.join(timeout)

    @property
    def waiting(self) -> int:
        """Jobs that no worker has taken yet."""
        with self._wake:
            return sum(len(jobs) for jobs in self._jobs.values())

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run a short function in a worker thread; before any batch."""
        return self._call(None, partial(function, *args, **kwargs))

    def call_in_turn(
        self, request: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> Future[R]:
        """Run one of many functions of a request, by the request's number; they take turns."""
        return self._call(request, partial(function, *args, **kwargs))

    def _call(self, request: int | None, function: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        with self._wake:
            self._refuse_when_closed()
            self._calls.add(Call(future, function, request))
            self._wake.notify()
        return future

    def submit(
        self, model: LoadedModel | str, question: Question, deadline: float | None = None
    ) -> Future[Timed]:
        """Queue one image for a version of a model that the caller holds (`ModelPool.use`).

        A name means its present version. `deadline` is on `time.monotonic()`'s clock.

        The future raises DeadlineExceeded where the job was still waiting then, NonFiniteOutput,
        InferenceFailed, OutOfMemory, or what `ModelPool.lease` raises.
        """
        held = self._pool.model(model) if isinstance(model, str) else model
        job = Job(held, question, deadline)
        with self._wake:
            self._refuse_when_closed()
            self._queue(job)
        return job.future

    def _refuse_when_closed(self) -> None:
        if not self._open:
            raise shutting_down()

    def _queue(self, job: Job, *, first: bool = False) -> None:
        with self._wake:
            waiting = self._jobs.setdefault(id(job.model), deque())
            (waiting.appendleft if first else waiting.append)(job)
            self._wake.notify()

    def _take(self) -> Task | None:
        """What a worker does next; None when everything is done and nothing more will come."""
        with self._wake:
            while True:
                self._wake.wait_for(self._something_to_do)
                if self._calls.has_next and not self._batch_is_due():
                    call = self._calls.take()
                    return Task(partial(self._run_call, call), call.give_up)
                if not self._jobs:
                    return None
                turn = self._turn()
                assert turn is not None
                wait = self._delay(turn)
                if wait <= 0:
                    batch = Batch(self._take_batch(turn))
                    self._running.add(batch)
                    return Task(partial(self._run_batch, batch), partial(self._give_up, batch))
                self._wake.wait(wait)

    def _something_to_do(self) -> bool:
        if self._jobs:
            is_free = len(self._running) < self._side_by_side and self._turn() is not None
            return self._calls.has_next or is_free
        return self._calls.has_next or not self._open

    def _batch_is_due(self) -> bool:
        """Whether a batch goes before the calls that wait."""
        turn = self._turn()
        if turn is None or len(self._running) >= self._side_by_side:
            return False
        if not self._calls.next_is_of_request:
            return False
        return time.monotonic() - self._jobs[turn][0].arrived > BATCH_PATIENCE

    def _turn(self) -> int | None:
        """The model whose turn it is; None where those that wait have one replica, which runs."""
        serial = {id(job.model) for batch in self._running for job in batch.jobs if job.is_serial}
        return next((model for model in self._jobs if model not in serial), None)

    def _delay(self, turn: int) -> float:
        """Seconds until the batch whose turn it is should go, though it is not full."""
        waiting = self._jobs[turn]
        if not self._max_delay or not self._open or len(waiting) >= self._max_batch:
            return 0.0
        return waiting[0].arrived + self._max_delay - time.monotonic()

    def _take_batch(self, model: int) -> list[Job]:
        """The longest waiting live job of a model, and those that go with it."""
        waiting = self._jobs.pop(model)
        batch: list[Job] = []
        others: deque[Job] = deque()
        for job in waiting:
            if len(batch) == self._max_batch or (batch and not job.goes_with(batch[0])):
                others.append(job)
            elif job.is_wanted():
                batch.append(job)
        if others:
            self._jobs[model] = others
            self._wake.notify()
        return batch

    def _is_alone(self) -> bool:
        """Whether the worker that asks is the only one at work, and nothing waits."""
        with self._wake:
            return not self._calls and not self._jobs and self.workers.busy <= 1

    def _run_call(self, call: Call) -> None:
        """Run a call, and let another one of its request run."""
        try:
            call.run()
        finally:
            if call.request is not None:
                with self._wake:
                    self._calls.end(call)
                    self._wake.notify()

    def _run_batch(self, batch: Batch) -> None:
        """Answer the jobs of a batch, and let another one run."""
        try:
            self._answer(batch)
        finally:
            self._ended(batch)

    def _answer(self, batch: Batch) -> None:
        jobs = batch.begin()
        if not jobs:
            return
        started = time.monotonic()
        self._metrics.batch_size.observe(len(jobs))
        try:
            outcomes = list(zip(jobs, self._outcomes(batch), strict=True))
        except BaseException as error:  # noqa: BLE001 - a future left pending would hang its client
            if batch.settle():
                self._failed(jobs, error)
            return
        if not batch.settle():
            return
        seconds = time.monotonic() - started
        for job, outcome in outcomes:
            job.queue = started - job.arrived if job.queue is None else job.queue
            job.inference += seconds
            if isinstance(outcome, InferenceResult):
                job.succeed(outcome)
            elif isinstance(outcome, Unfinished):
                job.rest = outcome
                self._queue(job)
            else:
                job.fail(outcome)

    def _outcomes(self, batch: Batch) -> Sequence[Outcome]:
        first, questions = batch.jobs[0], [job.question for job in batch.jobs]
        model, lane = self._pool.sound(first.model, LEASE_SECONDS), first.lane
        if lane == "compiled" and model.compiled is not None:
            with kept_torch_state():  # its tail is the model's own code
                return run_compiled(model, questions, wide=self._is_alone())
        with self._pool.lease(first.model, LEASE_SECONDS, folded=lane == "folded") as replica:
            batch.hold(replica)
            try:
                self._pool.sound(replica.model)
                if first.rest is None:
                    return self._runner(replica, questions)
                return [first.rest.step(replica) or first.rest]
            finally:
                batch.let_go()

    def _ended(self, batch: Batch) -> None:
        """Another batch may run instead; twice said is as good as once."""
        with self._wake:
            self._running.discard(batch)
            self._wake.notify_all()

    def _give_up(self, batch: Batch) -> None:
        """Drop a batch that hangs, and lend its replica no more.

        A single job fails. Of several one hangs, and the others shall not suffer: each runs alone.
        Jobs that were answered meanwhile, or go on with their next step, are left alone.
        """
        self._ended(batch)
        jobs, is_lost = batch.abandon(self._pool)
        if is_lost:
            self._mend()
        if len(jobs) > 1:
            self._queue_alone(jobs)
        elif jobs:
            jobs[0].fail(hangs())

    def _mend(self) -> None:
        """Have the pool build what it misses, in a worker: building runs the model's code."""
        with suppress(ShuttingDown):
            self.call(self._pool.replace_missing)

    def _queue_alone(self, jobs: list[Job]) -> None:
        for job in reversed(jobs):
            job.alone = True
            self._queue(job, first=True)

    def _failed(self, jobs: list[Job], error: BaseException) -> None:
        """One member may have spoiled its batch: run each alone before blaming anyone."""
        if is_out_of_memory(error):
            release_memory()
            error = OutOfMemory(
                "The device has no memory left for this; try again, or ask for fewer activations "
                "or a later layer."
            )
        if isinstance(error, ModelNotReady):  # no fault of any of them
            for job in jobs:
                job.fail(error)
            return
        if len(jobs) > 1:
            self._queue_alone(jobs)
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
