"""Replicas that cannot be verified or built again, and weights that cannot be reloaded.

None is lost for good: the pool says what it misses, refuses clearly meanwhile, and tries again.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from keeping import Copied
from tiny import SmallNet, loaded

from service.errors import ModelNotReady
from service.inference.questions import Question, lane_of
from service.metrics import Metrics
from service.models.catalog import ModelSpec
from service.models.compiled.front import CompiledLane
from service.models.library import Library
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool
from service.scheduling.scheduler import Scheduler

PATIENCE = 10.0
IMAGE = torch.zeros(1, 3, 32, 32)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextmanager
def copying(before: Callable[[], None]) -> Iterator[None]:
    """What every copy of a `Copied` does first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Copied, "before", staticmethod(before))
        yield


def fail() -> None:
    raise RuntimeError("planted: cannot be copied")


def soil(module: Any) -> None:
    module.features[0].register_forward_hook(lambda *_: None)


def change_weights(module: Any) -> None:
    with torch.no_grad():
        module.head.weight.mul_(2)


def pool_of(clock: Clock, replicas: int = 1, **more: Any) -> ModelPool:
    return ModelPool([loaded(Copied())], replicas=replicas, clock=clock, **more)


# ---- replicas


def test_a_replica_that_cannot_be_built_again_is_refused_clearly_and_tried_again(clock) -> None:
    pool = pool_of(clock)
    with copying(fail):
        with pool.lease("tiny") as replica:
            soil(replica.module)
        assert pool.replaced == {"tiny": 1}
        assert list(pool.lost) == ["tiny"]
        assert pool.size("tiny") == 0
        with (
            pytest.raises(ModelNotReady, match="cannot answer now") as refused,
            pool.lease("tiny"),  # without a timeout, and at once
        ):
            pass
        assert refused.value.retry_after == 1
        assert "planted" not in refused.value.detail
    assert not pool.has_missing, "the delay has not passed"
    clock.now += 1
    assert pool.has_missing
    with pool.lease("tiny") as replica:
        assert replica.module(IMAGE).shape == (1, 7)
    assert (pool.lost, pool.faults()) == ({}, [])


def test_the_delay_doubles_up_to_a_minute_and_success_forgets_it(clock) -> None:
    pool = pool_of(clock)
    attempts: list[float] = []

    def note_and_fail() -> None:
        attempts.append(clock.now)
        fail()

    with copying(note_and_fail):
        with pool.lease("tiny") as replica:
            soil(replica.module)
        for _ in range(400):
            pool.replace_missing()
            clock.now += 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(attempts)]
    assert gaps == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    clock.now += 60
    pool.replace_missing()
    assert pool.faults() == []


def test_one_lost_replica_of_two_leaves_the_other_serving(clock) -> None:
    pool = pool_of(clock, replicas=2)
    with copying(fail):
        with pool.lease("tiny") as replica:
            soil(replica.module)
        assert pool.lost == {}
        assert pool.size("tiny") == 1
        for _ in range(3):
            with pool.lease("tiny", timeout=0):
                pass
    clock.now += 1
    pool.replace_missing()
    assert pool.faults() == []


def test_who_waits_is_refused_when_the_last_replica_is_lost(clock) -> None:
    pool = pool_of(clock)
    waits = threading.Event()
    with ThreadPoolExecutor(1) as threads, copying(fail):

        def wait_for_it() -> None:
            waits.set()
            with pool.lease("tiny"):
                pass

        with pool.lease("tiny") as replica:
            waiting = threads.submit(wait_for_it)
            assert waits.wait(PATIENCE)
            soil(replica.module)
        with pytest.raises(ModelNotReady):
            waiting.result(PATIENCE)
    clock.now += 1
    pool.replace_missing()


def test_a_replica_that_can_be_neither_verified_nor_built_comes_back_when_it_can(
    clock, capsys
) -> None:
    """The user's object raises wherever it is looked into or copied."""

    class Sealed:
        sealed = False

        def __getattribute__(self, name: str) -> Any:
            if name in {"__dict__", "__reduce_ex__"} and type(self).sealed:
                raise RuntimeError("planted: sealed")
            return object.__getattribute__(self, name)

    module = SmallNet()
    module.thing = Sealed()
    module.thing.value = 1
    pool = ModelPool([loaded(module)], replicas=1, clock=clock)
    with pool.lease("tiny"):
        Sealed.sealed = True
    assert pool.replaced == {"tiny": 1}
    assert list(pool.lost) == ["tiny"]
    Sealed.sealed = False
    clock.now += 1
    with pool.lease("tiny") as replica:
        assert replica.module(IMAGE).shape == (1, 7)
    assert pool.faults() == []


def test_a_buffer_of_inference_mode_costs_nobody_an_answer(clock) -> None:
    """It has no version counter, and reading that raised: every later request waited for ever."""
    pool = pool_of(clock)
    for _ in range(3):
        with pool.lease("tiny", timeout=0) as replica:
            with torch.inference_mode():
                replica.module.features[1].running_mean = torch.ones(8)
            assert replica.module(IMAGE).shape == (1, 7)
    assert pool.replaced == {"tiny": 3}
    assert pool.faults() == []


# ---- weights


def test_weights_that_cannot_be_read_again_answer_nobody_until_they_can(clock) -> None:
    broken = True

    def reload(model: LoadedModel) -> LoadedModel:
        if broken:
            raise OSError("planted: the disk is away")
        return replace(loaded(Copied()), version="again")

    model = loaded(Copied())
    pool = ModelPool([model], replicas=2, reload=reload, clock=clock)
    with pool.lease("tiny") as replica:
        change_weights(replica.module)
    assert list(pool.lost) == ["tiny"]
    with pytest.raises(ModelNotReady, match="cannot be reloaded") as refused:
        pool.sound(model)
    assert "planted" not in refused.value.detail
    clock.now += 1
    broken = False
    assert pool.sound(model).version == "again"
    assert (pool.lost, pool.faults()) == ({}, [])


@pytest.mark.parametrize("lane", ["hooked", "compiled"])
def test_a_request_is_refused_while_the_weights_are_known_to_be_wrong(clock, lane: str) -> None:
    def reload(_: LoadedModel) -> LoadedModel:
        raise OSError("planted: the disk is away")

    model = loaded(Copied())
    if lane == "compiled":
        model = replace(model, compiled=CompiledLane("features", *[cast(Any, never)] * 2))
    ran: list[object] = []
    pool = ModelPool([model], replicas=1, reload=reload, clock=clock)
    scheduler = Scheduler(pool, Metrics(), workers=1, runner=lambda *_: ran.append(1) or [])
    scheduler.start()
    try:
        with pool.lease("tiny") as replica:
            change_weights(replica.module)
        pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        question = Question(pixels)
        assert lane_of(model, question) == lane
        future = scheduler.submit(model, question)
        with pytest.raises(ModelNotReady):
            future.result(PATIENCE)
    finally:
        scheduler.close(PATIENCE)
    assert ran == []


def never(*_: object, **__: object) -> None:
    raise AssertionError("the compiled lane of a spoiled model ran")


# ---- no lock is held while a model's code runs


class Held:
    """A builder that waits until it may go on."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.inside.set()
        assert self.go_on.wait(PATIENCE)


def what_the_loop_takes(pool: ModelPool, library: Library, scheduler: Scheduler) -> None:
    """Every property and method that a route, a probe or a scrape calls."""
    model = pool.model("tiny")
    for call in (
        lambda: pool.models,
        lambda: pool.replaced,
        lambda: pool.lost,
        lambda: pool.has_missing,
        lambda: pool.model(None),
        lambda: pool.size("tiny"),
        pool.hooks_live,
        lambda: library.entries,
        lambda: library.default,
        lambda: library.entry("tiny"),
        lambda: library.demand("tiny"),
        library.retry,
        lambda: scheduler.waiting,
        lambda: scheduler.workers.healthy,
        lambda: scheduler.call(int),
    ):
        call()
    with pool.use("tiny") as used:
        assert used is model


class Looked:
    """What waits when it is looked into."""

    before: Any = None

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__" and Looked.before is not None:
            Looked.before()
        return object.__getattribute__(self, name)


class Parts:
    """A pool, a library and a scheduler whose builder waits where a test says so."""

    def __init__(self) -> None:
        self.held = Held()
        self.loader_waits = False
        self.pool = ModelPool(replicas=1, reload=self._reload)
        specs = [ModelSpec("tiny", "tests"), ModelSpec("other", "tests")]
        self.library = Library(self.pool, specs, self._load)
        self.scheduler = Scheduler(self.pool, Metrics(), workers=1)
        self.library.load("tiny").result(PATIENCE)

    def _reload(self, model: LoadedModel) -> LoadedModel:
        self.held()
        return loaded(Copied(), model.name)

    def _load(self, spec: ModelSpec) -> LoadedModel:
        if self.loader_waits:
            self.held()
        module = Copied()
        module.thing = Looked()
        return loaded(module, spec.name)


def a_replica(parts: Parts) -> None:
    with copying(parts.held), parts.pool.lease("tiny") as replica:
        soil(replica.module)


def the_weights(parts: Parts) -> None:
    with parts.pool.lease("tiny") as replica:
        change_weights(replica.module)


def one_that_was_given_up(parts: Parts) -> None:
    with parts.pool.lease("tiny") as replica, copying(parts.held):
        parts.pool.abandon(replica)


def a_first_load(parts: Parts) -> None:
    parts.loader_waits = True
    parts.library.load("other").result(PATIENCE)


def a_newer_version(parts: Parts) -> None:
    parts.loader_waits = True
    parts.library.load("tiny").result(PATIENCE)


def replicas_of_a_load(parts: Parts) -> None:
    with copying(parts.held):
        parts.library.load("tiny").result(PATIENCE)


def another_model(parts: Parts) -> None:
    with copying(parts.held):
        parts.pool.put(loaded(Copied(), "third"))


def a_verification(parts: Parts) -> None:
    with pytest.MonkeyPatch.context() as patch, parts.pool.lease("tiny"):
        patch.setattr(Looked, "before", parts.held)


@pytest.mark.parametrize(
    "build",
    [
        *(a_replica, the_weights, one_that_was_given_up, a_first_load, a_newer_version),
        *(replicas_of_a_load, another_model, a_verification),
    ],
)
def test_no_lock_of_the_loop_is_held_while_a_builder_sleeps(build: Callable[[Parts], None]) -> None:
    parts = Parts()
    with ThreadPoolExecutor(2) as threads:
        building = threads.submit(build, parts)
        assert parts.held.inside.wait(PATIENCE)
        try:
            looking = threads.submit(
                what_the_loop_takes, parts.pool, parts.library, parts.scheduler
            )
            looking.result(PATIENCE / 2)
        finally:
            parts.held.go_on.set()
        building.result(PATIENCE)
    parts.library.close()
    parts.scheduler.close(PATIENCE)
