"""Work given up at the worst moment: each question is answered once, and no replica is lost.

The threads of these tests are played: a batch is taken and run here, and between two of its steps
the watchdog, a client or the clock acts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import SmallNet, loaded

from service.errors import DeadlineExceeded, InferenceHangs
from service.inference.batch import Unfinished
from service.inference.questions import InferenceResult, Question
from service.metrics import Metrics
from service.models.pool import ModelPool, Replica
from service.scheduling.scheduler import InferenceJob, Scheduler
from service.scheduling.workers import Task, Workers

PATIENCE = 10.0
NOTHING = InferenceResult((), (), ())


class Steps(Unfinished):
    """Goes on for ever."""

    def __init__(self) -> None:
        self.count = 0

    def step(self, _: Replica) -> InferenceResult | None:
        self.count += 1
        return None


class Played:
    """A scheduler whose threads are this one.

    batches: how many questions were run together, in order. outcome: of each.
    """

    def __init__(self) -> None:
        self.pool = ModelPool([loaded(SmallNet(), "tiny")], replicas=1)
        self.batches: list[int] = []
        self.outcome: Any = NOTHING
        self.scheduler = Scheduler(self.pool, Metrics(), workers=1, runner=self._run)

    def _run(self, _replica: Replica, questions: Sequence[Question]) -> list[Any]:
        self.batches.append(len(questions))
        return [self.outcome for _ in questions]

    def submit(self, count: int, deadline: float | None = None) -> list[Any]:
        pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        return [self.scheduler.submit("tiny", Question(pixels), deadline) for _ in range(count)]

    def take(self) -> Task:
        task = self.scheduler._take()
        assert task is not None
        return task

    def run_all(self) -> None:
        """Until nothing waits, the building of lost replicas included."""
        while self.scheduler.waiting or self.scheduler._calls:
            self.take().run()

    def check_whole(self) -> None:
        """Every replica is back, and another batch may run."""
        assert self.pool.faults() == []
        assert not self.scheduler._running


def before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], Any]) -> None:
    """Do something once, just before a method is called."""
    original, acted = getattr(owner, name), []

    def both(*arguments: Any, **options: Any) -> Any:
        if not acted:
            acted.append(True)
            act()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, both)


# ---- given up


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_given_up_before_it_has_its_replica_runs_nothing(monkeypatch, count: int) -> None:
    """It would run for nobody, and a replica it hung on would be lost for ever."""
    played = Played()
    futures = played.submit(count)
    batch, lease = played.take(), played.pool.lease

    @contextmanager
    def give_up_meanwhile(*arguments: Any, **options: Any) -> Iterator[Replica]:
        with lease(*arguments, **options) as replica:
            monkeypatch.setattr(played.pool, "lease", lease)
            batch.give_up()
            yield replica

    monkeypatch.setattr(played.pool, "lease", give_up_meanwhile)
    batch.run()
    assert played.batches == []
    played.run_all()
    if count == 1:
        with pytest.raises(InferenceHangs):
            futures[0].result(0)
    else:
        assert [future.result(0).result for future in futures] == [NOTHING] * count
        assert played.batches == [1] * count, "each alone: one of them may have hung"
    played.check_whole()
    assert played.pool.replaced == {"tiny": 0}


def test_a_batch_given_up_before_it_begins_runs_nothing() -> None:
    played = Played()
    (future,) = played.submit(1)
    batch = played.take()
    batch.give_up()
    batch.run()
    assert played.batches == []
    with pytest.raises(InferenceHangs):
        future.result(0)
    played.check_whole()


def test_a_batch_given_up_as_it_answers_answers_once(monkeypatch) -> None:
    played = Played()
    futures = played.submit(3)
    batch = played.take()
    before(monkeypatch, InferenceJob, "succeed", batch.give_up)
    batch.run()
    played.run_all()
    assert [future.result(0).result for future in futures] == [NOTHING] * 3
    assert played.batches == [3], "none is run again"
    played.check_whole()


def test_a_long_method_given_up_as_a_step_ends_goes_on_once(monkeypatch) -> None:
    """Run by two workers at once, its steps would count double."""
    played = Played()
    played.outcome = Steps()
    futures = played.submit(2)
    batch = played.take()
    before(monkeypatch, played.scheduler, "_queue", batch.give_up)
    batch.run()
    assert not any(future.done() for future in futures)
    assert played.scheduler.waiting == 2
    for future in futures:
        future.cancel()
    played.run_all()
    played.check_whole()


def test_a_batch_given_up_after_its_end_takes_nobody_elses_replica() -> None:
    played = Played()
    futures = played.submit(2)
    batch = played.take()
    batch.run()
    with played.pool.lease("tiny") as replica:
        batch.give_up()
        assert played.pool.replaced == {"tiny": 0}
        assert id(replica) in played.pool._lent
    assert [future.result(0).result for future in futures] == [NOTHING] * 2
    played.run_all()
    assert played.batches == [2]
    played.check_whole()


def test_a_batch_given_up_on_its_replica_is_run_on_a_fresh_one() -> None:
    played = Played()
    futures = played.submit(2)
    batch = played.take()

    def hang(replica: Replica, questions: Sequence[Question]) -> list[Any]:
        played.scheduler._runner = played._run
        batch.give_up()
        return [NOTHING for _ in questions]

    played.scheduler._runner = hang
    batch.run()
    assert not any(future.done() for future in futures), "what comes back late counts no more"
    played.run_all()
    assert played.batches == [1, 1]
    assert [future.result(0).result for future in futures] == [NOTHING] * 2
    assert played.pool.replaced == {"tiny": 1}
    played.check_whole()


def test_a_batch_of_nobody_can_be_given_up() -> None:
    played = Played()
    for future in played.submit(2):
        future.cancel()
    batch = played.take()
    batch.give_up()
    batch.run()
    assert played.batches == []
    played.check_whole()


def test_a_call_given_up_as_it_ends_has_one_outcome(monkeypatch) -> None:
    played = Played()
    future = played.scheduler.call(divmod, 7, 2)
    call = played.take()
    before(monkeypatch, future, "set_result", call.give_up)
    call.run()
    with pytest.raises(InferenceHangs):
        future.result(0)
    call.give_up()


# ---- unwanted between being taken and being run


def test_a_deadline_that_passes_after_the_batch_was_taken_is_kept(monkeypatch) -> None:
    played = Played()
    (late,) = played.submit(1, time.monotonic() + 60)
    (early,) = played.submit(1)
    task = played.take()
    (batch,) = played.scheduler._running
    batch.jobs[0].deadline = time.monotonic() - 1
    task.run()
    with pytest.raises(DeadlineExceeded):
        late.result(0)
    assert early.result(0).result is NOTHING
    assert played.batches == [1]
    played.check_whole()


@pytest.mark.parametrize("cancelled", [1, 2])
def test_a_client_that_disconnects_after_the_batch_was_taken_costs_no_pass(cancelled: int) -> None:
    played = Played()
    futures = played.submit(2)
    batch = played.take()
    for future in futures[:cancelled]:
        assert future.cancel()
    batch.run()
    assert played.batches == [1][: 2 - cancelled]
    assert all(future.done() for future in futures)
    played.check_whole()


def test_a_call_that_is_cancelled_after_it_was_taken_is_not_run() -> None:
    played = Played()
    called: list[int] = []
    future = played.scheduler.call(called.append, 1)
    call = played.take()
    assert future.cancel()
    call.run()
    assert called == []


# ---- the watchdog


class Clock:
    """Stands in for the module `time`; moves when it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Note:
    """A task that says when it began, and ends when it is released."""

    def __init__(self) -> None:
        self.began, self.released, self.given_up = (threading.Event() for _ in range(3))
        self.fails = False

    def run(self) -> None:
        self.began.set()
        assert self.released.wait(PATIENCE)

    def give_up(self) -> None:
        self.given_up.set()
        if self.fails:
            raise RuntimeError("planted")


class Lock:
    """A lock that lets something happen before the watchdog gets it."""

    def __init__(self, lock: Any, before: Callable[[], None]) -> None:
        self._lock, self._before = lock, before

    def __enter__(self) -> None:
        if threading.current_thread().name == "camserve-watchdog":
            self._before()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("moment", [1, 2])
def test_a_task_that_follows_one_that_hung_is_not_given_up_in_its_place(
    monkeypatch, moment: int
) -> None:
    """The first ends, and the next begins, while the watchdog looks."""
    clock = Clock()
    monkeypatch.setattr("service.scheduling.workers.time", clock)
    first, second = Note(), Note()
    tasks = iter([first, second, None])
    workers = Workers(lambda: next(tasks, None), count=1, hang_seconds=0.04)
    looked = [0]
    passed = threading.Event()

    def change() -> None:
        """At the watchdog's n-th turn since the first task is over its time."""
        if clock.now == 0.0 or looked[0] > moment + 4:
            return
        looked[0] += 1
        if looked[0] == moment:
            first.released.set()
            assert second.began.wait(PATIENCE)
        if looked[0] == moment + 4:  # it has looked at the second one, too
            passed.set()

    workers._lock = Lock(workers._lock, change)  # type: ignore[assignment]
    workers.start()
    assert first.began.wait(PATIENCE)
    clock.now = 1.0
    assert passed.wait(PATIENCE)
    assert not second.given_up.is_set()
    assert workers.replaced == int(first.given_up.is_set())
    second.released.set()
    workers.join(PATIENCE)


def test_a_task_that_fails_to_be_given_up_does_not_end_the_watchdog() -> None:
    tasks = [Note(), Note()]
    tasks[0].fails = True
    waiting = iter([*tasks, None, None])
    workers = Workers(lambda: next(waiting, None), count=2, hang_seconds=0.04)
    workers.start()
    assert all(task.given_up.wait(PATIENCE) for task in tasks)
    for task in tasks:
        task.released.set()
    workers.join(PATIENCE)
