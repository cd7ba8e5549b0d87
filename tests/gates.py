"""Ways to hold a scheduler still, so that tests about time need no sleeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from service.scheduler import Scheduler

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
    """A short call that keeps the only worker busy, from when it is its turn until `release`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._running, self._released = threading.Event(), threading.Event()
        scheduler.call(self._wait)

    def _wait(self) -> None:
        self._running.set()
        self._released.wait(PATIENCE)

    def wait_until_it_holds(self) -> None:
        """Return when the worker is busy with it."""
        assert self._running.wait(PATIENCE), "no worker came"

    def release(self) -> None:
        """Let the worker go on."""
        self._released.set()


def wait_until(scheduler: Scheduler, is_so: Callable[[Scheduler], bool]) -> None:
    """Return when `is_so`; whatever enters a queue is noticed. Its only worker must be held."""
    with scheduler._wake:
        assert scheduler._wake.wait_for(lambda: is_so(scheduler), PATIENCE), "it never came so"


def jobs_waiting(count: int) -> Callable[[Scheduler], bool]:
    """For `wait_until`: that many images wait for a batch."""
    return lambda scheduler: sum(map(len, scheduler._jobs.values())) == count


def calls_waiting(count: int) -> Callable[[Scheduler], bool]:
    """For `wait_until`: that many short calls wait."""
    return lambda scheduler: len(scheduler._calls) == count


def together(
    scheduler: Scheduler, asks: Sequence[Callable[[], T]], jobs: int | None = None
) -> list[T]:
    """Send requests of one raw image each so that their images meet in one batch.

    The scheduler must have one worker and a `max_batch` of at least their number. jobs: how many
    images reach the queue, where some fail before.
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
        finally:
            first.release()
            if second is not None:
                second.release()
        return [answer.result(PATIENCE) for answer in answers]
