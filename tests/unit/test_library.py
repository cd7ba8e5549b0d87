"""The library under any order of load, unload, replacement, demand, failure and eviction.

Loads run where a test says so, and other calls are made in the middle of a load: no lock is held
then, so that one thread plays all interleavings.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tiny import SmallNet, loaded

from service.errors import ConfigurationError, ModelNotReady, ShuttingDown, UnknownModel
from service.models.catalog import ModelSpec
from service.models.library import Library
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool

BASE = loaded(SmallNet(), side=16)
SIZE = sum(t.nbytes for t in (*BASE.module.parameters(), *BASE.module.buffers()))


def spec(name: str, version: int = 1) -> ModelSpec:
    return ModelSpec(name, f"tests/{version}")


class Played:
    """A library whose thread works when `work` says so."""

    def __init__(self, names: Sequence[str] = ("a",), models_at_once: int = 0) -> None:
        self.now = 0.0
        self.tasks: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.futures: list[Future[None]] = []
        self.loads: list[ModelSpec] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.error: BaseException | None = None
        self.wrong: BaseException | None = None
        self.is_working = False
        self.pool = ModelPool(replicas=1)
        self.library = Library(
            self.pool,
            [spec(name) for name in names],
            self._load,
            max_bytes=models_at_once * SIZE,
            clock=lambda: self.now,
        )
        self.library._thread = self  # type: ignore[assignment]

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        self.tasks.append((function, args))

    def shutdown(self, *, cancel_futures: bool) -> None:
        assert cancel_futures
        self.tasks.clear()

    def _load(self, wanted: ModelSpec) -> LoadedModel:
        self.loads.append(wanted)
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        error = self.error
        try:
            meanwhile()
        except BaseException as wrong:
            self.wrong = wrong  # the library takes it for a load that failed
            raise
        if error is not None:
            raise error
        return replace(BASE, spec=wanted)

    def work(
        self,
        error: BaseException | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Do the next task; `meanwhile` is called in the middle of its load, if it loads."""
        self.error, self.meanwhile = error, meanwhile
        function, args = self.tasks.popleft()
        self.is_working = True
        function(*args)
        self.is_working = False
        self.error, self.meanwhile = None, lambda: None
        if self.wrong is not None:
            raise self.wrong

    def work_all(self) -> None:
        while self.tasks:
            self.work()

    # ---- what others do

    def load(self, name: str) -> None:
        with suppress(UnknownModel):
            self.futures.append(self.library.load(name))

    def unload(self, name: str) -> None:
        with suppress(UnknownModel):
            self.library.unload(name)

    def replace_all(self, *specs: ModelSpec) -> None:
        self.futures += self.library.replace_all(specs)

    def demand(self, name: str) -> None:
        with suppress(UnknownModel, ModelNotReady):
            future = self.library.demand(name)
            if future is not None:
                self.futures.append(future)

    # ---- what must hold

    def check(self) -> None:
        """The pool serves exactly what the entries say, and holds nothing else."""
        entries = self.library._entries
        ready = {name for name, entry in entries.items() if entry.state == "ready"}
        assert set(self.pool.models) == ready
        versions = {id(served) for served in self.pool._versions.values()}
        assert versions == {id(served) for served in self.pool._served.values()}, "an orphan"
        assert self.pool.faults() == []
        for name in ready:
            if entries[name].reason is None and name not in self.library._loads:
                assert self.pool.model(name).spec == entries[name].spec
        assert set(self.library._loads) <= set(entries)
        if not self.tasks and not self.is_working:
            assert not self.library._loads, "somebody waits for what nobody does"
            assert all(future.done() for future in self.futures)


def failing() -> ConfigurationError:
    return ConfigurationError("planted: no such file")


# ---- every order of two calls in the middle of a load


CALLS: dict[str, Callable[[Played], None]] = {
    "load": lambda p: p.load("a"),
    "unload": lambda p: p.unload("a"),
    "the same again": lambda p: p.replace_all(spec("a")),
    "a newer one": lambda p: p.replace_all(spec("a", 2)),
    "another": lambda p: p.replace_all(spec("b")),
    "both": lambda p: p.replace_all(spec("b"), spec("a", 3)),
    "demand": lambda p: p.demand("a"),
}
ORDERS = [(), *itertools.product(CALLS), *itertools.product(CALLS, repeat=2)]


@pytest.mark.parametrize("before", ["loading", "ready", "failed"])
@pytest.mark.parametrize("fails", [False, True], ids=["loads", "fails"])
@pytest.mark.parametrize("order", ORDERS, ids=" and ".join)
def test_what_was_asked_for_last_holds(order: tuple[str, ...], fails: bool, before: str) -> None:
    played = Played()
    played.load("a")
    if before != "loading":
        played.work(failing() if before == "failed" else None)
        played.load("a")

    def meanwhile() -> None:
        for call in order:
            CALLS[call](played)
            played.check()

    played.work(failing() if fails else None, meanwhile)
    played.check()
    played.work_all()
    played.check()
    last = next((call for call in reversed(order) if call != "demand"), None)
    entries = played.library._entries
    if last is None:
        assert entries["a"].state == ("ready" if not fails or before == "ready" else "failed")
    elif last == "unload":
        # A model that was dropped before is not unloaded.
        assert "a" not in entries or entries["a"].state == "unloaded"
    else:
        assert {entry.state for entry in entries.values()} == {"ready"}
        assert {entry.reason for entry in entries.values()} == {None}


# ---- each race by its name


def test_a_newer_spec_that_comes_during_a_load_is_the_one_that_serves() -> None:
    """The pending load was returned, and the newer spec was never read."""
    played = Played()
    played.load("a")
    played.work(meanwhile=lambda: played.replace_all(spec("a", 2)))
    assert not played.pool.models, "the older spec does not count any more"
    played.work_all()
    assert played.pool.model("a").spec == spec("a", 2)
    played.check()


def test_a_model_that_is_unloaded_during_its_load_stays_unloaded() -> None:
    played = Played()
    played.load("a")
    played.work(meanwhile=lambda: played.unload("a"))
    assert played.library.entry("a").state == "unloaded"
    assert not played.pool.models
    with pytest.raises(UnknownModel, match="unloaded while it was loading"):
        played.futures[0].result(0)
    played.check()


def test_a_model_that_is_dropped_during_its_load_leaves_no_orphan() -> None:
    played = Played(("a", "b"))
    played.load("a")
    played.work(meanwhile=lambda: played.replace_all(spec("b")))
    played.work_all()
    assert list(played.pool.models) == ["b"]
    with pytest.raises(UnknownModel, match="not served any more"):
        played.futures[0].result(0)
    played.check()


def test_a_name_that_is_dropped_and_named_again_is_not_served_by_the_older_load() -> None:
    played = Played()
    played.load("a")

    def meanwhile() -> None:
        played.replace_all(spec("b"))
        played.replace_all(spec("a", 2))

    played.work(meanwhile=meanwhile)
    assert not played.pool.models
    played.work_all()
    assert played.pool.model("a").spec == spec("a", 2)


def test_a_load_that_was_overtaken_and_fails_changes_nothing() -> None:
    played = Played()
    played.load("a")
    played.work(failing(), lambda: played.load("a"))
    assert played.library.entry("a").state == "loading"
    played.work_all()
    assert played.library.entry("a").state == "ready"
    assert played.futures[0] is played.futures[1]
    assert played.futures[0].result(0) is None


def test_loads_that_have_not_begun_are_one() -> None:
    played = Played()
    for _ in range(5):
        played.load("a")
    played.work_all()
    assert len(played.loads) == 1


# ---- what failed is tried again


def test_one_failure_that_passes_marks_a_model_failed_until_it_is_asked_for_again() -> None:
    played = Played()
    played.load("a")
    played.work(failing())
    assert played.library.entry("a").state == "failed"
    with pytest.raises(ModelNotReady, match="is failed; GET /models/a says more") as refused:
        played.library.demand("a")
    assert refused.value.retry_after == 5
    assert not played.tasks
    played.now = 5.0
    future = played.library.demand("a")
    assert played.library.demand("a") is future, "all wait for the same load"
    assert played.library.entry("a").state == "failed", "others are not told that it comes"
    played.work_all()
    assert future.result(0) is None
    assert played.library.demand("a") is None
    played.check()


def test_delays_between_failures_double_and_are_bounded() -> None:
    played = Played()
    played.load("a")
    played.work(failing())
    waits: list[int] = []
    for _ in range(9):
        with pytest.raises(ModelNotReady) as refused:
            played.library.demand("a")
        waits.append(refused.value.retry_after)
        played.now += refused.value.retry_after
        assert played.library.demand("a") is not None
        played.work(failing())
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_an_older_version_serves_on_while_the_newest_is_tried_again() -> None:
    played = Played()
    played.load("a")
    played.work()
    played.replace_all(spec("a", 2))
    played.work(OSError("planted: the share is away"))
    assert played.pool.model("a").spec == spec("a", 1)
    assert "server's log" in str(played.library.entry("a").reason)
    assert played.library.demand("a") is None
    assert not played.tasks
    played.now = 5.0
    assert played.library.demand("a") is None, "nobody waits: the older one answers"
    played.work_all()
    assert played.pool.model("a").spec == spec("a", 2)
    assert played.library.entry("a").reason is None


def test_what_failed_is_tried_again_by_a_probe_alone() -> None:
    """A balancer sends no request to an instance that is not ready."""
    played = Played()
    played.load("a")
    played.work(failing())
    played.library.retry()
    assert not played.tasks
    played.now = 5.0
    played.library.retry()
    played.library.retry()
    assert len(played.tasks) == 1
    played.work_all()
    played.check()


def test_a_model_whose_load_ends_its_thread_is_failed_and_nobody_waits() -> None:
    played = Played()
    played.load("a")
    played.work(SystemExit(1))
    assert played.library.entry("a").state == "failed"
    with pytest.raises(ConfigurationError):
        played.futures[0].result(0)


# ---- room and the end


def test_what_made_room_during_its_own_load_is_loaded_by_the_next_request() -> None:
    played = Played(("a", "b"), models_at_once=1)
    played.load("a")
    played.work(meanwhile=lambda: played.load("b"))
    played.work_all()
    assert list(played.pool.models) == ["b"]
    played.demand("a")
    played.work_all()
    assert list(played.pool.models) == ["a"]
    played.check()


def test_whoever_waits_for_a_load_is_refused_when_the_library_closes() -> None:
    played = Played()
    played.load("a")
    played.library.close()
    with pytest.raises(ShuttingDown):
        played.futures[0].result(0)
    with pytest.raises(ShuttingDown):
        played.library.load("a")
    with pytest.raises(ShuttingDown):
        played.library.replace_all([spec("a")])
    played.library.retry()


def test_a_library_without_models_is_not_ready() -> None:
    played = Played()
    played.replace_all()
    with pytest.raises(ModelNotReady):
        played.library.demand(None)
    played.check()


# ---- any order


NAMES = st.sampled_from(("a", "b", "c"))
SPECS = st.lists(NAMES, unique=True, min_size=1).flatmap(
    lambda names: st.tuples(*(st.builds(spec, st.just(name), st.integers(1, 3)) for name in names))
)
CALL = st.one_of(
    st.tuples(st.just("load"), NAMES),
    st.tuples(st.just("unload"), NAMES),
    st.tuples(st.just("demand"), NAMES),
    st.tuples(st.just("replace_all"), SPECS),
)


class LibraryStates(RuleBasedStateMachine):
    """Rules are calls, the loader's next task with calls in its middle, and time that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.played = Played(("a", "b"), models_at_once=2)

    @rule(call=CALL)
    def call(self, call: tuple[str, Any]) -> None:
        self._do(call)

    @rule(calls=st.lists(CALL, max_size=3), fails=st.booleans())
    def work(self, calls: list[tuple[str, Any]], fails: bool) -> None:
        if self.played.tasks:
            error = failing() if fails else None
            self.played.work(error, lambda: [self._do(call) for call in calls] and None)

    @rule(seconds=st.integers(1, 400))
    def pass_time(self, seconds: int) -> None:
        self.played.now += seconds

    @rule()
    def probe(self) -> None:
        self.played.library.retry()

    def _do(self, call: tuple[str, Any]) -> None:
        verb, what = call
        getattr(self.played, verb)(*(what if verb == "replace_all" else (what,)))

    @invariant()
    def holds(self) -> None:
        self.played.check()

    def teardown(self) -> None:
        self.played.work_all()
        self.played.check()
        specs = [entry.spec for entry in self.played.library._entries.values()]
        self.played.replace_all(*specs)
        self.played.work_all()
        self.played.check()
        self.played.library.close()


test_the_pool_serves_what_the_entries_say_in_any_order = pytest.mark.timeout(60)(
    LibraryStates.TestCase
)
LibraryStates.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
