"""Worker threads: each takes tasks and runs them; one that hangs or dies is replaced."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A piece of work.

    run:     does it and delivers the result or the error to those that wait; raises neither.
    give_up: delivers the error that it hangs; called from another thread while it still runs. It
             may end at this very moment, or have ended: what it delivered by then stays.
    """

    run: Callable[[], None]
    give_up: Callable[[], None]


@dataclass(slots=True, eq=False)
class _Worker:
    """One thread. It runs `task` since `since`, on `time.monotonic()`'s clock."""

    thread: threading.Thread | None = None
    task: Task | None = None
    since: float = 0.0
    abandoned: bool = False


class Workers:
    """A fixed number of threads that run what `take` returns, until it returns None.

    A thread cannot be stopped from outside. One that runs a task for longer than `hang_seconds` is
    abandoned: its task is given up, another thread replaces it, and it ends by itself if the task
    ever returns. It is a daemon, so that it does not delay the end of the process. Once
    `max_abandoned` threads hang at the same time no more are started: `healthy` is False from then
    on, until one returns.

    max_abandoned: None means twice `count`.
    take:    waits for a task; None means that there will be no more.
    threads: of torch, in each worker.
    """

    def __init__(
        self,
        take: Callable[[], Task | None],
        *,
        count: int,
        threads: int = 1,
        hang_seconds: float = 120.0,
        max_abandoned: int | None = None,
    ) -> None:
        self._take = take
        self._count = count
        self._threads = threads
        self._hang_seconds = hang_seconds
        # A job that hangs in a batch is tried again alone, so that it may take two threads.
        self._max_abandoned = 2 * count if max_abandoned is None else max_abandoned
        self._lock = threading.Lock()
        self._all: list[_Worker] = []
        self._replaced = 0
        self._closing = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="camserve-watchdog", daemon=True)

    def start(self) -> None:
        """Start the threads, and the one that watches them."""
        with self._lock:
            for _ in range(self._count):
                self._add()
        self._watchdog.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait until all but the abandoned have ended, `timeout` seconds at most.

        `take` must return None by now.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while waited := [worker for worker in self._workers() if not worker.abandoned]:
            rest = 0.05 if until is None else min(0.05, until - time.monotonic())
            if rest <= 0:
                break
            thread = waited[0].thread
            assert thread is not None
            thread.join(rest)  # not for long: meanwhile it may have been abandoned
        self._closing.set()
        if self._watchdog.ident is not None:
            self._watchdog.join()

    @property
    def busy(self) -> int:
        """Threads that run a task, without those that hang."""
        return sum(w.task is not None and not w.abandoned for w in self._workers())

    @property
    def abandoned(self) -> int:
        """Threads that hang."""
        return sum(worker.abandoned for worker in self._workers())

    @property
    def replaced(self) -> int:
        """Threads that were replaced since the start."""
        return self._replaced

    @property
    def healthy(self) -> bool:
        """Whether every thread that hangs has been replaced."""
        return self.abandoned <= self._max_abandoned

    def _workers(self) -> list[_Worker]:
        with self._lock:
            return list(self._all)

    def _add(self) -> None:
        """Start one more thread; holds the lock."""
        worker = _Worker()
        worker.thread = threading.Thread(
            target=self._work, args=(worker,), name="camserve-worker", daemon=True
        )
        self._all.append(worker)
        worker.thread.start()

    def _work(self, worker: _Worker) -> None:
        finished = False
        try:
            torch.set_num_threads(self._threads)
            while not worker.abandoned:
                task = self._take()
                if task is None:
                    finished = True
                    return
                with self._lock:
                    worker.task, worker.since = task, time.monotonic()
                task.run()
                with self._lock:
                    worker.task = None
                del task
        finally:
            self._ended(worker, expected=finished)

    def _ended(self, worker: _Worker, *, expected: bool) -> None:
        with self._lock:
            self._all.remove(worker)
            # Also where one returns that was not replaced.
            working = sum(not other.abandoned for other in self._all)
            if not expected and working < self._count and not self._closing.is_set():
                self._add()
            if expected or worker.abandoned:
                return
            self._replaced += 1
        _log.error("worker_died")
        if worker.task is not None:
            _give_up(worker.task)

    def _watch(self) -> None:
        while not self._closing.wait(min(1.0, self._hang_seconds / 4)):
            for worker in self._workers():
                self._abandon_if_it_hangs(worker)

    def _abandon_if_it_hangs(self, worker: _Worker) -> None:
        with self._lock:
            # Read under the lock: the worker may have ended a task that hung and begun another one,
            # which must not be given up in its place.
            task, seconds = worker.task, time.monotonic() - worker.since
            if task is None or worker.abandoned or seconds <= self._hang_seconds:
                return
            worker.abandoned = True
            self._replaced += 1
            hanging = sum(other.abandoned for other in self._all)
            replace = hanging <= self._max_abandoned
            if replace:
                self._add()
        _log.error("worker_hangs", seconds=self._hang_seconds, hanging=hanging, replaced=replace)
        _give_up(task)


def _give_up(task: Task) -> None:
    """Give a task up; an error in that ends neither the watchdog nor the calling thread."""
    try:
        task.give_up()
    except Exception as error:  # noqa: BLE001 - the other threads still need the watchdog
        _log.error("give_up_failed", exc_info=error)
