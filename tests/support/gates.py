"""Ways to hold a scheduler still, so that tests about time need no sleeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from service.scheduling.admission import Admission
from service.scheduling.scheduler import Scheduler

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds after which a test that waits for something has failed."""


class Gate:
    """Stands before a scheduler's runner: batches are noted, and wait until the gate opens.

        with Gate(scheduler) as gate:
            ...                      # send something
            gate.wait_for_a_batch()  # a worker stands at the gate with it
            gate.open()

    batches: the sizes of the batches that came, in order.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._runner = scheduler._runner
        self._came = threading.Semaphore(0)
        self._is_open = threading.Event()
        self.batches: list[int] = []

    def open(self) -> None:
        """Let everything through from now on."""
        self._is_open.set()

    def wait_for_a_batch(self) -> None:
        """Return when the next batch stands at the gate."""
        assert self._came.acquire(timeout=PATIENCE), "no batch came"

    def _run(self, replica: Any, questions: Any) -> Any:
        self.batches.append(len(questions))
        self._came.release()
        assert self._is_open.wait(PATIENCE), "the gate never opened"
        return self._runner(replica, questions)

    def __enter__(self) -> Self:
        self._scheduler._runner = self._run
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.open()
        self._scheduler._runner = self._runner


class Hold:
    """Short calls that keep every thread busy, from when it is their turn until `release`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._running, self._released = threading.Semaphore(0), threading.Event()
        self._count = scheduler.workers._count
        for _ in range(self._count):
            scheduler.call(self._wait)

    def _wait(self) -> None:
        self._running.release()
        self._released.wait(PATIENCE)

    def wait_until_it_holds(self) -> None:
        """Return when all threads are busy with it."""
        for _ in range(self._count):
            assert self._running.acquire(timeout=PATIENCE), "no worker came"

    def release(self) -> None:
        """Let them go on."""
        self._released.set()


def wait_until(scheduler: Scheduler, is_so: Callable[[Scheduler], bool]) -> None:
    """Return when `is_so`. Its threads must be held."""
    until = time.monotonic() + PATIENCE / 2  # before those that are held give up
    with scheduler._wake:
        # An idle worker may take the word that something came, so the queue is looked at as well.
        while not is_so(scheduler):
            assert time.monotonic() < until, "it never came so"
            scheduler._wake.wait(0.01)


def jobs_waiting(count: int) -> Callable[[Scheduler], bool]:
    """For `wait_until`: that many images wait for a batch."""
    return lambda scheduler: sum(map(len, scheduler._jobs.values())) == count


def calls_waiting(count: int) -> Callable[[Scheduler], bool]:
    """For `wait_until`: that many short calls wait."""
    return lambda scheduler: len(scheduler._calls) == count


@contextmanager
def queued(
    scheduler: Scheduler, asks: Sequence[Callable[[], T]], jobs: int | None = None
) -> Iterator[list[Future[T]]]:
    """Send requests of one raw image each; inside the `with` their images wait for a batch.

    jobs: how many images reach the queue, where some fail
    before.
    """
    first = Hold(scheduler)
    first.wait_until_it_holds()
    second = None
    with ThreadPoolExecutor(len(asks), thread_name_prefix="ask") as threads:
        try:
            answers = [threads.submit(ask) for ask in asks]
            wait_until(scheduler, calls_waiting(len(asks)))
            second = Hold(scheduler)  # behind the decoding, before any batch
            first.release()
            wait_until(scheduler, jobs_waiting(len(asks) if jobs is None else jobs))
            yield answers
        finally:
            first.release()
            if second is not None:
                second.release()


def together(
    scheduler: Scheduler, asks: Sequence[Callable[[], T]], jobs: int | None = None
) -> list[T]:
    """What requests answer whose images meet in one batch; as `queued`.

    `max_batch` must be at least their number.
    """
    with queued(scheduler, asks, jobs) as answers:
        pass
    return [answer.result(PATIENCE) for answer in answers]


class Emptied:
    """Knows when the last place of an admission has been given back."""

    def __init__(self, admission: Admission) -> None:
        self._admission, self._give = admission, admission.give
        self._is_so = threading.Event()
        admission.give = self._note  # type: ignore[method-assign]

    def _note(self, images: int, declared_bytes: int) -> None:
        self._give(images, declared_bytes)
        if self._admission.images == 0:
            self._is_so.set()

    def wait(self) -> None:
        """Return when nothing is held."""
        assert self._is_so.wait(PATIENCE), "a place is still held"
