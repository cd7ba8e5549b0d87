"""The scheduler: dynamic batching of inference, and short calls that take precedence over it."""

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
from service.models.compiled.front import alone
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool, Replica
from service.models.probes.torch_state import kept_torch_state
from service.resources import is_out_of_memory, release_memory
from service.scheduling.admission import shutdown_error
from service.scheduling.workers import Task, Workers

P = ParamSpec("P")
R = TypeVar("R")
Outcome = InferenceResult | CamserveError | Unfinished
Runner = Callable[[Replica, Sequence[Question]], Sequence[Outcome]]

LEASE_SECONDS = 5.0
"""How long a worker waits for a replica. There is one replica per worker, so a worker waits only
while lost ones are rebuilt; other models need the worker meanwhile, and the client can retry."""

BATCH_PATIENCE = 1.0
"""Seconds after which a batch takes precedence over the calls of requests: it would otherwise wait
until all images of a request are decoded, which may be many of 64 megapixels."""


LOOK_SECONDS = 1.0
"""How often an idle thread looks for work unasked. A thread that queues what it is free for itself
wakes no other; should it be abandoned just then, another one finds it."""


@dataclass(frozen=True, slots=True)
class TimedResult:
    """A result with the seconds it waited for its first batch, and those its batches took.

    ended: when its last batch ended, on `time.monotonic()`'s clock.
    """

    result: InferenceResult
    queue_seconds: float
    inference_seconds: float
    ended: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class InferenceJob:
    """One image that waits for inference, or is in it.

    deadline:   on `time.monotonic()`'s clock.
    then:       turns the result into that of `future`, in a worker; None: it is the result.
    unfinished: what is left of a method of many passes.
    runs_alone: whether it must not share a batch, because one it was in failed.
    queue_seconds, inference_seconds: until its first batch, and in its batches so far.
    """

    model: LoadedModel
    question: Question
    deadline: float | None
    then: Callable[[TimedResult], Any] | None = None
    arrived: float = field(default_factory=time.monotonic)
    future: Future[Any] = field(default_factory=Future)
    unfinished: Unfinished | None = None
    runs_alone: bool = False
    queue_seconds: float | None = None
    inference_seconds: float = 0.0

    def is_wanted(self) -> bool:
        """Whether a client still waits; fails the job if its deadline has passed."""
        if self.future.done():
            return False
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.fail(
                DeadlineExceeded("The request waited longer than its deadline; try again later.")
            )
            return False
        return True

    def succeed(self, result: InferenceResult) -> Call | None:
        """Deliver the result, or return the call that does."""
        timed = TimedResult(result, self.queue_seconds or 0.0, self.inference_seconds)
        if self.then is not None:
            return Call(self.future, partial(self.then, timed))
        with suppress(InvalidStateError):  # cancelled, or given up
            self.future.set_result(timed)
        return None

    def fail(self, error: BaseException) -> None:
        fail(self.future, error)

    @property
    def lane(self) -> Lane:
        return lane_of(self.model, self.question)

    @property
    def is_serial(self) -> bool:
        """Whether its model has one replica, so that its batches run one after another."""
        return not self.model.behaviour.isolated

    def can_share_batch(self, other: InferenceJob) -> bool:
        """Whether two jobs of one model can share a forward pass."""
        jobs = (self, other)
        if not self.model.behaviour.batchable or any(
            job.runs_alone or job.unfinished is not None for job in jobs
        ):
            return False
        same_size = self.question.pixels.shape == other.question.pixels.shape
        # The backward pass for a target of one image goes through the graph of the whole batch.
        counts = {job.question.target_count for job in jobs if job.question.needs_gradients}
        same_rules = self.question.libra == other.question.libra
        return self.lane == other.lane and same_size and same_rules and len(counts) < 2


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A short function to run. request: the number of the request that it is one of several of."""

    future: Future[Any]
    function: Callable[[], Any]
    request: int | None = None

    def run(self) -> InferenceJob | None:
        """Deliver the result; or, if that is a job, return it: it delivers its own."""
        if self.future.done():
            return None
        try:
            result = self.function()
        except BaseException as error:  # noqa: BLE001 - the caller that waits gets it
            fail(self.future, error)
            return None
        if isinstance(result, InferenceJob):
            result.future = self.future
            return result
        with suppress(InvalidStateError):
            self.future.set_result(result)
        return None

    def give_up(self) -> None:
        fail(self.future, hang_error())


class CallQueue:
    """A fair queue of calls. Not thread-safe: its owner has a lock.

    Requests take turns with each other, and with calls that belong to none: one call of each, so
    that another request's single image waits for one of thirty-two images, not for all of them.
    A request has at most `most` calls running, so that one thread is left for the others.
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
        """Whether the next call is one of several of a request."""
        return isinstance(self._next(), int)

    def _next(self) -> int | Call | None:
        return next((key for key in self._waiting if self._running[key] < self._most), None)

    def add(self, call: Call) -> None:
        """Queue a call."""
        key = call if call.request is None else call.request
        self._waiting.setdefault(key, deque()).append(call)

    def take(self) -> Call:
        """The next call, if there is one (`has_next`); it runs until `end`."""
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
        """Count a call as run."""
        if call.request is not None:
            self._running[call.request] -= 1
            if not self._running[call.request]:
                del self._running[call.request]


class Batch:
    """Jobs that share a forward pass, or one step of a method of many passes.

    Its worker claims it when it has the results, or the watchdog when it hangs: the first of the
    two completes or fails the jobs, and the other one does nothing.
    """

    def __init__(self, jobs: list[InferenceJob]) -> None:
        self.jobs = jobs
        self._lock = threading.Lock()
        self._replica: Replica | None = None
        self._claimed = False

    def begin(self) -> list[InferenceJob]:
        """The jobs that are still wanted; the others are dropped. Empty if it was given up.

        Between taking a batch and running it a client may disconnect, or a deadline may pass.
        """
        wanted = [job for job in self.jobs if job.is_wanted()]
        with self._lock:
            self.jobs = [] if self._claimed else wanted
            return self.jobs

    def hold_replica(self, replica: Replica) -> None:
        """Note the replica it runs on. Raises InferenceHangs if it was given up while it waited."""
        with self._lock:
            if self._claimed:
                raise hang_error()
            self._replica = replica

    def release_replica(self) -> None:
        """Note that the replica is returned: from now on another batch may have it."""
        with self._lock:
            self._replica = None

    def claim(self) -> bool:
        """Whether the caller is the first, so that it completes or fails the jobs."""
        with self._lock:
            first, self._claimed = not self._claimed, True
            return first

    def abandon(self, pool: ModelPool) -> tuple[list[InferenceJob], bool]:
        """Claim it for its worker; the jobs to fail or retry, and whether its replica is lost."""
        with self._lock:
            if self._claimed:
                return [], False
            self._claimed = True
            if self._replica is not None:
                pool.drop(self._replica)
            return self.jobs, self._replica is not None


class Scheduler:
    """One pool of threads for everything that takes time, so that the event loop never waits.

    Calls (rendering, decoding) take precedence over batches: a rendered answer frees room for
    another request, and images decoded together share a batch. Requests take turns in decoding and
    each leaves a thread to others; a batch that has waited for BATCH_PATIENCE takes precedence.
    There are more threads than batches may run, so that a call never waits for a batch.

    A call may return an InferenceJob, and the job's `then` is a call again: an image is decoded,
    computed and drawn for one future, without a step of the event loop between.

    Batching is dynamic: a free thread takes the jobs that wait for one model and lane, up to
    `max_batch`. An idle server runs a single request at once, a busy one forms batches. Models take
    turns. A method of many passes runs in steps and goes to the back of the queue between them.
    Jobs whose future was cancelled (the client disconnected) or whose deadline has passed are
    dropped, before they run or between two steps.

    workers:   batches that run side by side. helpers: threads beyond these.
    max_delay: seconds that a batch which is not full waits for more. Zero is best unless many slow
               clients use a large device.
    threads_per_worker: intra-op threads of torch; one if there are as many workers as cores.
    hang_seconds: a batch or call that takes longer is given up, its thread and replica replaced
               (`Workers`).
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
        self._calls = CallQueue(max(1, workers + helpers - 1))
        self._jobs: OrderedDict[int, deque[InferenceJob]] = OrderedDict()
        self._wake = threading.Condition()
        self._open = True
        self._max_running = workers
        self._running: set[Batch] = set()
        self.workers = Workers(
            self._take,
            count=workers + helpers,
            threads=threads_per_worker,
            hang_seconds=hang_seconds,
            max_abandoned=2 * workers,  # a job that hangs in a batch is tried again alone
        )

    def start(self) -> None:
        """Start the worker threads."""
        self.workers.start()

    def close(self, timeout: float | None = None) -> None:
        """Finish the accepted work, then end the threads; `timeout` seconds for all of them."""
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
        """Run a short function in a worker thread; it takes precedence over batches."""
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
    ) -> Future[TimedResult]:
        """Queue one image for a version of a model that the caller holds (`ModelPool.use`).

        A name means its current version. `deadline` is on `time.monotonic()`'s clock.

        The future raises DeadlineExceeded if the job still waits at the deadline, NonFiniteOutput,
        InferenceFailed, OutOfMemory, or what `ModelPool.lease` raises.
        """
        version = self._pool.model(model) if isinstance(model, str) else model
        job = InferenceJob(version, question, deadline)
        with self._wake:
            self._refuse_when_closed()
            self._queue(job)
        return job.future

    def _refuse_when_closed(self) -> None:
        if not self._open:
            raise shutdown_error()

    def _queue(self, job: InferenceJob, *, first: bool = False, from_call: bool = False) -> None:
        """Queue a job. from_call: the calling thread takes it itself, unless calls wait."""
        with self._wake:
            waiting = self._jobs.setdefault(id(job.model), deque())
            (waiting.appendleft if first else waiting.append)(job)
            if not from_call or self._calls:
                self._wake.notify()

    def _take(self) -> Task | None:
        """A worker's next task; None when everything is done and nothing more will come."""
        with self._wake:
            while True:
                if not self._wake.wait_for(self._has_work, LOOK_SECONDS):
                    continue
                if self._calls.has_next and not self._batch_is_due():
                    call = self._calls.take()
                    return Task(partial(self._run_call, call), call.give_up)
                if not self._jobs:
                    return None
                model = self._next_model()
                assert model is not None
                wait = self._delay(model)
                if wait <= 0:
                    batch = Batch(self._take_batch(model))
                    self._running.add(batch)
                    return Task(partial(self._run_batch, batch), partial(self._give_up, batch))
                self._wake.wait(wait)

    def _has_work(self) -> bool:
        if self._jobs:
            is_free = len(self._running) < self._max_running and self._next_model() is not None
            return self._calls.has_next or is_free
        return self._calls.has_next or not self._open

    def _batch_is_due(self) -> bool:
        """Whether a batch takes precedence over the calls that wait."""
        model = self._next_model()
        if model is None or len(self._running) >= self._max_running:
            return False
        if not self._calls.next_is_of_request:
            return False
        return time.monotonic() - self._jobs[model][0].arrived > BATCH_PATIENCE

    def _next_model(self) -> int | None:
        """The model that is next; None if each one that waits has a single replica, in use."""
        busy_models = {
            id(job.model) for batch in self._running for job in batch.jobs if job.is_serial
        }
        return next((model for model in self._jobs if model not in busy_models), None)

    def _delay(self, model: int) -> float:
        """Seconds until a model's batch should run, though it is not full."""
        waiting = self._jobs[model]
        if not self._max_delay or not self._open or len(waiting) >= self._max_batch:
            return 0.0
        return waiting[0].arrived + self._max_delay - time.monotonic()

    def _take_batch(self, model: int) -> list[InferenceJob]:
        """The job of a model that waited longest, and those that can share its batch."""
        waiting = self._jobs.pop(model)
        batch: list[InferenceJob] = []
        others: deque[InferenceJob] = deque()
        for job in waiting:
            if len(batch) == self._max_batch or (batch and not job.can_share_batch(batch[0])):
                others.append(job)
            elif job.is_wanted():
                batch.append(job)
        if others:
            self._jobs[model] = others
            self._wake.notify()
        return batch

    def _is_alone(self) -> bool:
        """Whether the calling worker is the only busy one, and nothing waits."""
        with self._wake:
            return not self._calls and not self._jobs and self.workers.busy <= 1

    def _run_call(self, call: Call) -> None:
        """Run a call, and allow another one of its request."""
        try:
            job = call.run()
            if job is not None:
                self._queue(job, from_call=True)
        finally:
            if call.request is not None:
                with self._wake:
                    self._calls.end(call)
                    if self._calls:  # else a thread would wake for nothing
                        self._wake.notify()

    def _run_batch(self, batch: Batch) -> None:
        """Run the jobs of a batch, and allow another batch."""
        try:
            self._infer(batch)
        finally:
            self._end_batch(batch)

    def _infer(self, batch: Batch) -> None:
        jobs = batch.begin()
        if not jobs:
            return
        started = time.monotonic()
        self._metrics.batch_size.observe(len(jobs))
        try:
            outcomes = list(zip(jobs, self._outcomes(batch), strict=True))
        except BaseException as error:  # noqa: BLE001 - a future left pending would hang its client
            if batch.claim():
                self._fail_jobs(jobs, error)
            return
        if not batch.claim():
            return
        seconds = time.monotonic() - started
        calls: list[Call] = []
        for job, outcome in outcomes:
            if job.queue_seconds is None:
                job.queue_seconds = started - job.arrived
            job.inference_seconds += seconds
            if isinstance(outcome, InferenceResult):
                call = job.succeed(outcome)
                calls += [] if call is None else [call]
            elif isinstance(outcome, Unfinished):
                job.unfinished = outcome
                self._queue(job)
            else:
                job.fail(outcome)
        self._queue_calls(calls)

    def _queue_calls(self, calls: Sequence[Call]) -> None:
        """Queue calls, of which the calling worker takes one itself when its batch has ended."""
        with self._wake:
            for call in calls:
                self._calls.add(call)
            self._wake.notify(max(0, len(calls) - 1))

    def _outcomes(self, batch: Batch) -> Sequence[Outcome]:
        first, questions = batch.jobs[0], [job.question for job in batch.jobs]
        model, lane = self._pool.sound(first.model, LEASE_SECONDS), first.lane
        if lane == "compiled" and model.compiled is not None and first.unfinished is None:
            with kept_torch_state():  # its tail is the model's own code
                return run_compiled(model, questions, wide=self._is_alone())
        with self._pool.lease(first.model, LEASE_SECONDS, folded=lane == "folded") as replica:
            batch.hold_replica(replica)
            try:
                self._pool.sound(replica.model)
                with alone(self._is_alone()):
                    if first.unfinished is None:
                        return self._runner(replica, questions)
                    return [first.unfinished.step(replica) or first.unfinished]
            finally:
                batch.release_replica()

    def _end_batch(self, batch: Batch) -> None:
        """Allow another batch in place of this one; a second call does nothing."""
        with self._wake:
            self._running.discard(batch)
            if self._jobs or not self._open:
                self._wake.notify_all()

    def _give_up(self, batch: Batch) -> None:
        """Drop a batch that hangs, and retire its replica.

        A single job fails. Of several jobs one hangs and the others are not at fault: each is run
        again alone. Jobs that have a result by now, or wait for their next step, are not touched.
        """
        self._end_batch(batch)
        jobs, is_lost = batch.abandon(self._pool)
        if is_lost:
            self._restore_replicas()
        if len(jobs) > 1:
            self._queue_alone(jobs)
        elif jobs:
            jobs[0].fail(hang_error())

    def _restore_replicas(self) -> None:
        """Have the pool rebuild missing replicas, in a worker: building runs the model's code."""
        with suppress(ShuttingDown):
            self.call(self._pool.replace_missing)

    def _queue_alone(self, jobs: list[InferenceJob]) -> None:
        for job in reversed(jobs):
            job.runs_alone = True
            self._queue(job, first=True)

    def _fail_jobs(self, jobs: list[InferenceJob], error: BaseException) -> None:
        """Fail a job, or run each of several again alone: any of them may have failed the batch."""
        if is_out_of_memory(error):
            release_memory()
            error = OutOfMemory(
                "The device has too little free memory for this request; try again, or request "
                "fewer activations or a later layer."
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
    """Set the error of a future, unless it is cancelled or done."""
    with suppress(InvalidStateError):  # cancelled, or given up
        future.set_exception(error)


def hang_error() -> InferenceHangs:
    """The error of work that was given up."""
    return InferenceHangs(
        "Inference on this image did not end and was given up. Try another image or a cheaper "
        "request; the server's log has more under this request id."
    )
