"""A thread that hangs or dies is replaced; nobody waits for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.scheduling.workers import Workers

PATIENCE = 10.0


class Note:
    """A task that says when it began and ended; it hangs until it is released."""

    def __init__(self, *, hangs: bool = False, raises: BaseException | None = None) -> None:
        self.began, self.ended, self.given_up = (threading.Event() for _ in range(3))
        self.released = threading.Event()
        self.raises = raises
        if not hangs:
            self.released.set()

    def run(self) -> None:
        self.began.set()
        if self.raises is not None:
            raise self.raises
        self.released.wait()
        self.ended.set()

    def give_up(self) -> None:
        self.given_up.set()


class Line:
    """A queue of tasks, as `take` sees it."""

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue[Note | None] = queue.SimpleQueue()
        self.closed = False

    def take(self) -> Note | None:
        while not self.closed:
            try:
                return self.tasks.get(timeout=0.02)
            except queue.Empty:
                continue
        return None

    def put(self, task: Note) -> Note:
        self.tasks.put(task)
        return task


@contextmanager
def working(count: int = 1, **options: float) -> Iterator[tuple[Workers, Line]]:
    line = Line()
    workers = Workers(line.take, count=count, **options)
    workers.start()
    try:
        yield workers, line
    finally:
        line.closed = True
        workers.join(PATIENCE)
        assert workers.busy == 0


def until(condition) -> None:
    waited = threading.Event()
    for _ in range(1000):
        if condition():
            return
        waited.wait(0.01)
    pytest.fail("it did not come true")


def test_a_task_that_hangs_is_given_up_and_its_thread_replaced() -> None:
    with working(hang_seconds=0.1) as (workers, line):
        hanging = line.put(Note(hangs=True))
        assert hanging.given_up.wait(PATIENCE)
        assert line.put(Note()).ended.wait(PATIENCE), "another thread took its place"
        assert (workers.abandoned, workers.replaced, workers.healthy) == (1, 1, True)
        hanging.released.set()
        until(lambda: workers.abandoned == 0)
        assert line.put(Note()).ended.wait(PATIENCE)


def test_a_task_within_its_time_is_left_alone() -> None:
    with working(hang_seconds=60) as (workers, line):
        task = line.put(Note(hangs=True))
        assert task.began.wait(PATIENCE)
        assert (workers.busy, workers.abandoned) == (1, 0)
        task.released.set()
        assert task.ended.wait(PATIENCE)
        assert not task.given_up.is_set()


def test_past_the_bound_no_more_threads_are_made_and_it_is_said() -> None:
    with working(hang_seconds=0.1, max_abandoned=1) as (workers, line):
        first, second = (line.put(Note(hangs=True)) for _ in range(2))
        assert second.given_up.wait(PATIENCE)
        assert (workers.abandoned, workers.healthy) == (2, False)
        waiting = line.put(Note())
        assert not waiting.began.wait(0.3)
        first.released.set()
        assert waiting.ended.wait(PATIENCE), "one came back, so there is room for a thread again"
        assert workers.healthy
        second.released.set()
        until(lambda: workers.abandoned == 0)


def test_a_thread_that_hangs_does_not_hold_up_the_end() -> None:
    hanging = Note(hangs=True)
    with working(hang_seconds=0.1) as (workers, line):
        line.put(hanging)
        assert hanging.given_up.wait(PATIENCE)
        (thread,) = (each.thread for each in workers._workers() if each.abandoned)
        assert thread is not None
        assert thread.daemon
    assert thread.is_alive(), "the end did not wait for it"
    hanging.released.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [RuntimeError("planted"), SystemExit(3)])
def test_a_thread_that_dies_is_replaced_and_its_task_given_up(error: BaseException) -> None:
    with working() as (workers, line):
        dying = line.put(Note(raises=error))
        assert dying.given_up.wait(PATIENCE)
        assert line.put(Note()).ended.wait(PATIENCE)
        assert (workers.replaced, workers.abandoned) == (1, 0)


def test_many_threads_work_at_once() -> None:
    with working(count=4) as (workers, line):
        tasks = [line.put(Note(hangs=True)) for _ in range(4)]
        assert all(task.began.wait(PATIENCE) for task in tasks)
        assert workers.busy == 4
        for task in tasks:
            task.released.set()
