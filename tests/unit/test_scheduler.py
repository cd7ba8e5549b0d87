"""The scheduler: batches that form by themselves, and futures that always end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from gates import Gate, Hold, wait_until
from tiny import SmallNet, loaded
from torch import nn

from service.errors import (
    CorruptImage,
    DeadlineExceeded,
    InferenceFailed,
    NonFiniteOutput,
    OutOfMemory,
    ShuttingDown,
    UnknownModel,
)
from service.inference.batch import Unfinished
from service.inference.questions import InferenceResult, Question
from service.metrics import Metrics
from service.models.compiled.folding import fold
from service.models.compiled.front import CompiledLane, is_alone
from service.models.pool import ModelPool, Replica
from service.models.probes.behaviour import Behaviour
from service.scheduling import scheduler as scheduling_module
from service.scheduling.scheduler import (
    BATCH_PATIENCE,
    Call,
    CallQueue,
    InferenceJob,
    Scheduler,
    TimedResult,
)

PATIENCE = 4.0
NOTHING = InferenceResult((), (), ())


def question(number: int = 0, side: int = 32) -> Question:
    """A question that is known by its first pixel."""
    pixels = torch.zeros(3, side, side, dtype=torch.uint8)
    pixels[0, 0, 0] = number
    return Question(pixels)


class Notes:
    """A runner that notes which questions came together, and fails for those it should."""

    def __init__(self, fails: dict[int, BaseException] | None = None) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.outcomes: dict[int, Any] = {}
        self.fails = fails or {}

    def __call__(self, replica: Replica, questions: Sequence[Question]) -> list[Any]:
        numbers = [int(each.pixels[0, 0, 0]) for each in questions]
        self.batches.append((replica.model.name, numbers))
        for number in numbers:
            if number in self.fails:
                raise self.fails[number]
        return [self.outcomes.get(number, NOTHING) for number in numbers]


@contextmanager
def scheduling(
    runner: Callable[..., Any], workers: int = 1, names: Sequence[str] = ("tiny",), **more: Any
) -> Iterator[Scheduler]:
    pool = ModelPool([loaded(SmallNet(), name) for name in names], replicas=workers)
    scheduler = Scheduler(pool, Metrics(), workers=workers, runner=runner, **more)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.close(PATIENCE)
        assert not scheduler.workers._workers()


@contextmanager
def held(scheduler: Scheduler) -> Iterator[None]:
    hold = Hold(scheduler)
    hold.wait_until_it_holds()
    try:
        yield
    finally:
        hold.release()


# ---- lanes


def test_each_question_runs_in_the_lane_that_was_chosen_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    def compiled(*_: object, **__: object) -> list[InferenceResult]:
        ran.append("compiled")
        return [NOTHING]

    def on_a_replica(replica: Replica, _: object) -> list[InferenceResult]:
        norms = [each for each in replica.module.modules() if isinstance(each, nn.BatchNorm2d)]
        ran.append("hooked" if norms else "folded")
        return [NOTHING]

    monkeypatch.setattr(scheduling_module, "run_compiled", compiled)
    model = loaded(SmallNet())
    lane = CompiledLane("features", *[cast(Any, None)] * 2)
    model = replace(model, compiled=lane, folded=fold(model.replicate()))
    scheduler = Scheduler(ModelPool([model], replicas=1), Metrics(), workers=1, runner=on_a_replica)
    scheduler.start()
    try:
        asked = replace(question(), method=None)
        for each in (
            asked,
            replace(asked, activations=("features.3",)),
            replace(asked, activations=("features.1",)),
        ):
            scheduler.submit("tiny", each).result(PATIENCE)
    finally:
        scheduler.close(PATIENCE)
    assert ran == ["compiled", "folded", "hooked"]


# ---- batches


def test_compiled_parts_may_use_all_cores_while_nothing_else_waits() -> None:
    ran: list[bool] = []

    def runner(_: Replica, questions: Sequence[object]) -> list[InferenceResult]:
        ran.append(is_alone.get())
        return [NOTHING for _ in questions]

    with scheduling(runner, names=("one", "two")) as scheduler:
        with held(scheduler):
            jobs = [scheduler.submit(name, question()) for name in ("one", "two")]
        for job in jobs:
            job.result(PATIENCE)
        wait_until(scheduler, lambda one: one.workers.busy == 0)
        scheduler.submit("one", question()).result(PATIENCE)
    assert (ran[0], ran[-1]) == (False, True)
    assert not is_alone.get()


def test_a_lone_question_is_answered_at_once_and_timed() -> None:
    notes = Notes()
    with scheduling(notes) as scheduler:
        timed = scheduler.submit("tiny", question()).result(PATIENCE)
        assert timed.result is NOTHING
        assert 0 <= timed.queue_seconds < PATIENCE
        assert 0 <= timed.inference_seconds < PATIENCE
        assert scheduler.waiting == 0
    assert notes.batches == [("tiny", [0])]


def test_what_waits_meets_in_batches_of_at_most_max_batch_in_order() -> None:
    notes = Notes()
    with scheduling(notes, max_batch=3) as scheduler:
        with held(scheduler):
            futures = [scheduler.submit("tiny", question(number)) for number in range(7)]
            assert scheduler.waiting == 7
        for future in futures:
            future.result(PATIENCE)
    assert [numbers for _, numbers in notes.batches] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_batch_waits_for_more_only_until_it_is_full() -> None:
    notes = Notes()
    with scheduling(notes, max_batch=2, max_delay=1000) as scheduler:
        futures = [scheduler.submit("tiny", question(number)) for number in range(2)]
        for future in futures:
            future.result(PATIENCE)
    assert notes.batches == [("tiny", [0, 1])]


def test_a_batch_that_waits_for_more_runs_at_the_end() -> None:
    notes = Notes()
    with scheduling(notes, max_batch=2, max_delay=1000) as scheduler:
        future = scheduler.submit("tiny", question())
        assert not future.done()
    assert future.result(PATIENCE).result is NOTHING
    assert notes.batches == [("tiny", [0])]


def test_a_batch_that_is_never_full_waits_as_long_as_it_may() -> None:
    with scheduling(Notes(), max_batch=2, max_delay=0.05) as scheduler:
        assert scheduler.submit("tiny", question()).result(PATIENCE).queue_seconds > 0.049


def test_models_take_turns_and_never_share_a_batch() -> None:
    notes = Notes()
    with scheduling(notes, names=("a", "b"), max_batch=2) as scheduler:
        with held(scheduler):
            futures = [scheduler.submit("a", question(number)) for number in range(4)]
            futures += [scheduler.submit("b", question(9))]
        for future in futures:
            future.result(PATIENCE)
    assert notes.batches == [("a", [0, 1]), ("b", [9]), ("a", [2, 3])]


def test_only_inputs_of_one_size_share_a_batch() -> None:
    notes = Notes()
    with scheduling(notes) as scheduler:
        with held(scheduler):
            sides = [32, 32, 64, 32]
            futures = [scheduler.submit("tiny", question(n, side)) for n, side in enumerate(sides)]
        for future in futures:
            future.result(PATIENCE)
    assert [numbers for _, numbers in notes.batches] == [[0, 1, 3], [2]]


def test_short_calls_go_before_batches() -> None:
    order: list[str] = []
    notes = Notes()

    def runner(*args: Any) -> Any:
        order.append("batch")
        return notes(*args)

    with scheduling(runner) as scheduler:
        with held(scheduler):
            future = scheduler.submit("tiny", question())
            scheduler.call(order.append, "call")
        future.result(PATIENCE)
    assert order == ["call", "batch"]


def test_requests_take_turns_in_their_calls_with_those_of_none() -> None:
    order: list[str] = []
    with scheduling(Notes(), helpers=0) as scheduler:
        with held(scheduler):
            futures = [
                scheduler.call_in_turn(request, order.append, f"{request}{number}")
                for request, count in ((1, 3), (2, 1), (3, 2))
                for number in range(count)
            ]
            futures += [scheduler.call(order.append, "none")]
        for future in futures:
            future.result(PATIENCE)
    assert order == ["10", "20", "30", "none", "11", "31", "12"]


def test_a_request_leaves_a_thread_to_others() -> None:
    started, may_end = threading.Semaphore(0), threading.Event()

    def slow() -> None:
        started.release()
        assert may_end.wait(PATIENCE)

    with scheduling(Notes(), workers=2, helpers=1) as scheduler:
        futures = [scheduler.call_in_turn(1, slow) for _ in range(5)]
        for _ in range(2):
            assert started.acquire(timeout=PATIENCE)
        assert scheduler.submit("tiny", question()).result(PATIENCE).result is NOTHING
        assert scheduler.call_in_turn(2, int).result(PATIENCE) == 0
        assert not started.acquire(blocking=False)
        cancelled = futures[2].cancel()
        may_end.set()
        for future in (each for each in futures if not each.cancelled()):
            future.result(PATIENCE)
        assert cancelled
    assert not scheduler._calls._running


def test_what_is_in_turn_is_finished_before_the_threads_end() -> None:
    order: list[int] = []
    with scheduling(Notes(), workers=2, helpers=1) as scheduler, held(scheduler):
        for number in range(5):
            scheduler.call_in_turn(1, order.append, number)
    assert sorted(order) == list(range(5))


@pytest.mark.parametrize(
    ("waited", "first"), [(BATCH_PATIENCE - 1000, "call"), (BATCH_PATIENCE, "batch")]
)
def test_a_batch_that_has_waited_goes_before_the_calls_of_requests(
    waited: float, first: str
) -> None:
    order: list[str] = []
    notes = Notes()

    def runner(*args: Any) -> Any:
        order.append("batch")
        return notes(*args)

    with scheduling(runner, helpers=0) as scheduler:
        with held(scheduler):
            futures: list[Future[Any]] = [
                scheduler.call_in_turn(1, order.append, "call") for _ in range(2)
            ]
            futures += [scheduler.submit("tiny", question())]
            scheduler._jobs[next(iter(scheduler._jobs))][0].arrived -= waited
        for future in futures:
            future.result(PATIENCE)
    assert order[0] == first
    assert sorted(order) == ["batch", "call", "call"]


def test_several_workers_run_batches_beside_each_other() -> None:
    """Each waits until the other one is there too."""
    both = threading.Barrier(2)

    def runner(_: Replica, questions: Sequence[Question]) -> list[InferenceResult]:
        both.wait(PATIENCE)
        return [NOTHING] * len(questions)

    with scheduling(runner, workers=2, max_batch=1) as scheduler:
        for future in [scheduler.submit("tiny", question(number)) for number in range(2)]:
            assert future.result(PATIENCE).result is NOTHING


def test_a_model_with_one_replica_runs_one_batch_while_another_model_goes_on() -> None:
    serial = replace(loaded(SmallNet(), "serial"), behaviour=Behaviour(isolated=False))
    began: list[str] = []
    first, gate = threading.Event(), threading.Event()

    def runner(replica: Replica, questions: Sequence[Question]) -> list[InferenceResult]:
        began.append(replica.model.name)
        if replica.model.name == "serial" and not gate.is_set():
            first.set()
            assert gate.wait(PATIENCE)
        return [NOTHING] * len(questions)

    pool = ModelPool([serial, loaded(SmallNet(), "tiny")], replicas=2)
    assert pool.size("serial") == 1
    scheduler = Scheduler(pool, Metrics(), workers=2, runner=runner, max_batch=1)
    scheduler.start()
    try:
        slow = [scheduler.submit("serial", question(number)) for number in range(2)]
        assert first.wait(PATIENCE)
        assert scheduler.submit("tiny", question()).result(PATIENCE).result is NOTHING
        assert began == ["serial", "tiny"]
        gate.set()
        assert [future.result(PATIENCE).result for future in slow] == [NOTHING, NOTHING]
    finally:
        gate.set()
        scheduler.close(PATIENCE)


def test_images_of_a_model_that_mixes_batches_run_alone() -> None:
    notes = Notes()
    alone = replace(loaded(SmallNet(), "tiny"), behaviour=Behaviour(batchable=False))
    scheduler = Scheduler(ModelPool([alone], replicas=1), Metrics(), workers=1, runner=notes)
    futures = [scheduler.submit("tiny", question(number)) for number in range(3)]
    scheduler.start()
    try:
        assert all(future.result(PATIENCE) for future in futures)
    finally:
        scheduler.close(PATIENCE)
    assert notes.batches == [("tiny", [0]), ("tiny", [1]), ("tiny", [2])]


def test_a_worker_uses_as_many_torch_threads_as_it_is_told() -> None:
    with scheduling(Notes(), threads_per_worker=2) as scheduler:
        assert scheduler.call(torch.get_num_threads).result(PATIENCE) == 2


# ---- short calls


def test_a_call_gives_its_result_or_its_exception() -> None:
    with scheduling(Notes()) as scheduler:
        assert scheduler.call(divmod, 7, 2).result(PATIENCE) == (3, 1)
        assert scheduler.call(dict, a=1).result(PATIENCE) == {"a": 1}
        with pytest.raises(ZeroDivisionError):
            scheduler.call(divmod, 7, 0).result(PATIENCE)
        assert scheduler.call(divmod, 7, 2).result(PATIENCE) == (3, 1)


def test_a_cancelled_call_is_never_run() -> None:
    ran: list[int] = []
    with scheduling(Notes()) as scheduler:
        with held(scheduler):
            assert scheduler.call(ran.append, 1).cancel()
            last = scheduler.call(ran.append, 2)
        last.result(PATIENCE)
    assert ran == [2]


# ---- a call, a batch and a call for one future


def job(scheduler: Scheduler, then: Callable[[TimedResult], Any], number: int = 0) -> InferenceJob:
    return InferenceJob(scheduler._pool.model("tiny"), question(number), None, then)


def test_a_call_may_go_on_with_a_batch_and_another_call() -> None:
    notes = Notes()
    with scheduling(notes) as scheduler:
        future = scheduler.call(lambda: job(scheduler, lambda timed: ("made", timed.result)))
        assert future.result(PATIENCE) == ("made", NOTHING)
    assert notes.batches == [("tiny", [0])]


def test_images_of_a_batch_are_each_made_into_their_own() -> None:
    notes = Notes()
    with scheduling(notes, workers=2, max_batch=4) as scheduler:
        with held(scheduler):
            futures = [scheduler.call(lambda n=n: job(scheduler, lambda _: n, n)) for n in range(4)]
        assert [future.result(PATIENCE) for future in futures] == [0, 1, 2, 3]


def test_what_is_made_of_a_result_may_fail_as_any_call() -> None:
    with scheduling(Notes(fails={1: CorruptImage("It is not read.")})) as scheduler:
        future = scheduler.call(lambda: job(scheduler, lambda _: 1 // 0))
        with pytest.raises(ZeroDivisionError):
            future.result(PATIENCE)
        future = scheduler.call(lambda: job(scheduler, lambda _: "never", 1))
        with pytest.raises(CorruptImage):
            future.result(PATIENCE)


def test_what_is_cancelled_goes_no_further() -> None:
    """Neither from the call to the batch, nor from the batch to the last call."""
    notes, made = Notes(), list[Any]()
    with scheduling(notes) as scheduler, Gate(scheduler) as gate:
        began, goes_on = threading.Event(), threading.Event()

        def opened() -> InferenceJob:
            began.set()
            assert goes_on.wait(PATIENCE)
            return job(scheduler, made.append)

        first = scheduler.call(opened)
        assert began.wait(PATIENCE)
        assert first.cancel()
        goes_on.set()
        second = scheduler.call(lambda: job(scheduler, made.append, 2))
        gate.wait_for_a_batch()
        assert second.cancel()
        gate.open()
        third = scheduler.call(lambda: job(scheduler, lambda _: "made", 3))
        assert third.result(PATIENCE) == "made"
    assert made == []
    assert notes.batches == [("tiny", [2]), ("tiny", [3])]


class GuardedQueue(CallQueue):
    """A queue of calls that is used only by the thread that has the scheduler's lock."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        super().__init__(2)

    def __getattribute__(self, name: str) -> Any:
        if name in {"_waiting", "_running"}:
            scheduler: Scheduler = super().__getattribute__("_scheduler")
            assert scheduler._wake._is_owned()  # type: ignore[attr-defined]
        return super().__getattribute__(name)


def test_the_queue_of_calls_is_used_under_the_lock_alone() -> None:
    """Otherwise one thread counts what waits while another one changes it."""
    pool = ModelPool([loaded(SmallNet(), "tiny")], replicas=1)
    scheduler = Scheduler(pool, Metrics(), workers=1, runner=Notes())
    with scheduler._wake:
        scheduler._calls = GuardedQueue(scheduler)
    scheduler.start()
    try:
        future = scheduler.call_in_turn(1, lambda: job(scheduler, lambda _: "made"))
        assert future.result(PATIENCE) == "made"
    finally:
        scheduler.close(PATIENCE)


def test_what_a_lost_thread_left_in_the_queue_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that queues what it is free for wakes no other, and may be abandoned just then."""
    monkeypatch.setattr(scheduling_module, "LOOK_SECONDS", 0.01)
    with scheduling(Notes()) as scheduler:
        left: Future[str] = Future()
        scheduler._queue_calls([Call(left, lambda: "found")])
        assert left.result(PATIENCE) == "found"
        last = job(scheduler, lambda _: "found")
        scheduler._queue(last, from_call=True)
        assert last.future.result(PATIENCE) == "found"


# ---- what is not run


def test_a_cancelled_question_is_never_run() -> None:
    notes = Notes()
    with scheduling(notes) as scheduler:
        with held(scheduler):
            futures = [scheduler.submit("tiny", question(number)) for number in range(3)]
            assert futures[1].cancel()
        assert futures[2].result(PATIENCE).result is NOTHING
    assert notes.batches == [("tiny", [0, 2])]


def test_places_of_cancelled_questions_are_filled_from_behind() -> None:
    notes = Notes()
    with scheduling(notes, max_batch=2) as scheduler:
        with held(scheduler):
            futures = [scheduler.submit("tiny", question(number)) for number in range(4)]
            futures[0].cancel()
            futures[1].cancel()
        futures[3].result(PATIENCE)
    assert notes.batches == [("tiny", [2, 3])]


def test_a_question_past_its_deadline_is_never_run_and_says_so() -> None:
    notes = Notes()
    with scheduling(notes) as scheduler:
        with held(scheduler):
            late = scheduler.submit("tiny", question(0), time.monotonic() - 0.001)
            early = scheduler.submit("tiny", question(1), time.monotonic() + 60)
        with pytest.raises(DeadlineExceeded):
            late.result(PATIENCE)
        assert early.result(PATIENCE).result is NOTHING
    assert notes.batches == [("tiny", [1])]


def test_a_queue_of_nothing_but_the_unwanted_is_emptied() -> None:
    notes = Notes()
    with scheduling(notes) as scheduler:
        with held(scheduler):
            for number in range(10):
                scheduler.submit("tiny", question(number)).cancel()
        wait = scheduler.submit("tiny", question(10))
        wait.result(PATIENCE)
        assert scheduler.waiting == 0
    assert [numbers for _, numbers in notes.batches] == [[10]]


def test_a_question_cancelled_while_it_runs_hurts_nobody() -> None:
    with scheduling(Notes()) as scheduler, Gate(scheduler) as gate:
        running = scheduler.submit("tiny", question())
        gate.wait_for_a_batch()
        running.cancel()
        gate.open()
        assert scheduler.submit("tiny", question()).result(PATIENCE).result is NOTHING


# ---- failures


def test_one_bad_question_fails_alone_and_its_batch_is_run_one_by_one() -> None:
    cause = RuntimeError("planted")
    notes = Notes(fails={1: cause})
    with scheduling(notes) as scheduler:
        with held(scheduler):
            futures = [scheduler.submit("tiny", question(number)) for number in range(3)]
        assert futures[0].result(PATIENCE).result is NOTHING
        assert futures[2].result(PATIENCE).result is NOTHING
        with pytest.raises(InferenceFailed, match="Try the image again") as failed:
            futures[1].result(PATIENCE)
        assert failed.value.__cause__ is cause
        assert "planted" not in failed.value.detail
    assert [numbers for _, numbers in notes.batches] == [[0, 1, 2], [0], [1], [2]]


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), StopIteration()])
def test_a_worker_survives_whatever_a_model_raises(error: BaseException) -> None:
    with scheduling(Notes(fails={1: error})) as scheduler:
        with pytest.raises(InferenceFailed):
            scheduler.submit("tiny", question(1)).result(PATIENCE)
        assert scheduler.submit("tiny", question(0)).result(PATIENCE).result is NOTHING


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate"),
    ],
)
def test_a_batch_too_large_for_the_memory_is_run_one_by_one_then_refused(error) -> None:
    """Who alone is too large is told to come again; the others are answered."""
    notes = Notes(fails={1: error})
    with scheduling(notes) as scheduler:
        with held(scheduler):
            futures = [scheduler.submit("tiny", question(number)) for number in range(3)]
        assert futures[0].result(PATIENCE).result is NOTHING
        assert futures[2].result(PATIENCE).result is NOTHING
        with pytest.raises(OutOfMemory) as refused:
            futures[1].result(PATIENCE)
    assert refused.value.retry_after > 0
    assert [numbers for _, numbers in notes.batches] == [[0, 1, 2], [0], [1], [2]]


def test_an_error_of_ours_goes_through_as_it_is() -> None:
    error = CorruptImage("planted")
    with scheduling(Notes(fails={1: error})) as scheduler:
        with pytest.raises(CorruptImage) as failed:
            scheduler.submit("tiny", question(1)).result(PATIENCE)
        assert failed.value is error


def test_an_error_in_an_answers_place_is_that_questions_alone() -> None:
    notes = Notes()
    notes.outcomes[1] = NonFiniteOutput("planted")
    with scheduling(notes) as scheduler:
        with held(scheduler):
            futures = [scheduler.submit("tiny", question(number)) for number in range(3)]
        assert futures[0].result(PATIENCE).result is NOTHING
        assert futures[2].result(PATIENCE).result is NOTHING
        with pytest.raises(NonFiniteOutput):
            futures[1].result(PATIENCE)
    assert len(notes.batches) == 1


def test_a_runner_that_answers_too_few_leaves_no_future_pending() -> None:
    with scheduling(lambda _replica, _questions: []) as scheduler:
        with held(scheduler):
            futures = [scheduler.submit("tiny", question(number)) for number in range(3)]
        for future in futures:
            with pytest.raises(InferenceFailed):
                future.result(PATIENCE)


def test_an_unknown_model_is_refused() -> None:
    with scheduling(Notes()) as scheduler, pytest.raises(UnknownModel):
        scheduler.submit("other", question()).result(PATIENCE)


# ---- methods of many passes


class Countdown(Unfinished):
    """Answers after some steps, noting each."""

    def __init__(self, steps: int, noted: list[str], name: str) -> None:
        self._left, self._noted, self._name = steps, noted, name

    def step(self, _: Replica) -> InferenceResult | None:
        self._noted.append(self._name)
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("planted: step")
        return NOTHING if self._left == 0 else None


def test_a_long_method_lets_others_in_between_its_steps() -> None:
    noted: list[str] = []
    notes = Notes()
    notes.outcomes = {1: Countdown(3, noted, "one"), 2: Countdown(2, noted, "two")}
    with scheduling(notes) as scheduler:
        with held(scheduler):
            futures = [scheduler.submit("tiny", question(number)) for number in (1, 2)]
        for future in futures:
            assert future.result(PATIENCE).result is NOTHING
    assert noted == ["one", "two", "one", "two", "one"]
    assert len(notes.batches) == 1


def test_a_long_method_that_nobody_waits_for_is_not_continued() -> None:
    noted: list[str] = []
    notes = Notes()
    notes.outcomes = {1: Countdown(1000, noted, "step")}
    stepped = threading.Event()
    with scheduling(notes) as scheduler:
        with held(scheduler):
            future = scheduler.submit("tiny", question(1))
        hold = None
        while not noted and not stepped.wait(0.001):
            pass
        hold = Hold(scheduler)
        hold.wait_until_it_holds()
        assert future.cancel()
        steps = len(noted)
        hold.release()
        scheduler.submit("tiny", question(0)).result(PATIENCE)
        assert scheduler.waiting == 0
    assert 0 < len(noted) == steps < 1000


def test_a_step_that_fails_ends_its_question_alone() -> None:
    noted: list[str] = []
    notes = Notes()
    notes.outcomes = {1: Countdown(0, noted, "bad"), 2: Countdown(2, noted, "good")}
    with scheduling(notes) as scheduler:
        with held(scheduler):
            bad, good = (scheduler.submit("tiny", question(number)) for number in (1, 2))
        with pytest.raises(InferenceFailed):
            bad.result(PATIENCE)
        assert good.result(PATIENCE).result is NOTHING


# ---- the end


def test_what_was_accepted_is_finished_before_the_threads_end() -> None:
    notes = Notes()
    with scheduling(notes, max_batch=1) as scheduler:
        hold = Hold(scheduler)
        hold.wait_until_it_holds()
        futures = [scheduler.submit("tiny", question(number)) for number in range(3)]
        called = scheduler.call(divmod, 7, 2)
        scheduler.close(timeout=0)  # comes back although a worker is busy
        hold.release()
        assert called.result(PATIENCE) == (3, 1)
        for future in futures:
            assert future.result(PATIENCE).result is NOTHING
    assert len(notes.batches) == 3


def test_a_closed_scheduler_takes_nothing() -> None:
    with scheduling(Notes()) as scheduler:
        scheduler.close(PATIENCE)
        with pytest.raises(ShuttingDown):
            scheduler.submit("tiny", question())
        with pytest.raises(ShuttingDown):
            scheduler.call(divmod, 7, 2)
        scheduler.close(PATIENCE)


def test_a_scheduler_that_never_started_can_be_closed() -> None:
    pool = ModelPool([loaded(SmallNet())], replicas=1)
    Scheduler(pool, Metrics(), workers=1).close(PATIENCE)


def test_a_question_submitted_before_the_start_is_answered() -> None:
    pool = ModelPool([loaded(SmallNet())], replicas=1)
    scheduler = Scheduler(pool, Metrics(), workers=1, runner=Notes())
    future = scheduler.submit("tiny", question())
    assert scheduler.waiting == 1
    scheduler.start()
    assert future.result(PATIENCE).result is NOTHING
    scheduler.close(PATIENCE)


def test_a_wait_ends_when_something_is_queued() -> None:
    """Of the tools of these tests: without a worker nothing leaves the queue."""
    pool = ModelPool([loaded(SmallNet())], replicas=1)
    scheduler = Scheduler(pool, Metrics(), workers=0)
    thread = threading.Thread(target=scheduler.submit, args=("tiny", question()))
    thread.start()
    wait_until(scheduler, lambda each: bool(each._jobs))
    thread.join(PATIENCE)
    assert scheduler.waiting == 1
