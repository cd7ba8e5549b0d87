"""Torch's state of the thread and of the process is as it was after a lease, a load, a tail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from keeping import LEAVES, OPEN, Leaving
from tiny import SmallNet, loaded
from torch import nn

from service.inference.questions import Question
from service.metrics import Metrics
from service.models.catalog import ModelSpec
from service.models.compiled.front import CompiledLane
from service.models.library import Library
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool
from service.models.probes.torch_state import kept_torch_state
from service.scheduling.scheduler import Scheduler

PATIENCE = 10.0
IMAGE = torch.zeros(1, 3, 32, 32)


def state() -> dict[str, Any]:
    """All that is kept."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "onednn": torch.backends.mkldnn.enabled,
    }


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    with kept_torch_state():
        yield
        OPEN.clear()  # the end of a context that was never left changes the thread once more


def leaving(kind: str) -> LoadedModel:
    with kept_torch_state():
        return loaded(Leaving(kind))


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_a_block_leaves_torch_as_it_was(kind: str, raises: bool) -> None:
    before = state()

    def block() -> None:
        with kept_torch_state():
            LEAVES[kind]()
            assert raises is False, "planted"

    if raises:
        with pytest.raises(AssertionError, match="planted"):
            block()
    else:
        block()
    assert state() == before
    weight = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad((weight * 2).sum(), weight)
    assert gradient.tolist() == [2, 2]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_block_changes_nothing_by_itself(around: Callable[[], Any]) -> None:
    with around():
        before = state()
        with kept_torch_state():
            assert state() == before
        assert state() == before


@pytest.mark.parametrize("kind", LEAVES)
def test_a_lease_leaves_torch_as_it_was(kind: str) -> None:
    pool = ModelPool([leaving(kind)], replicas=1)
    before = state()
    with pool.lease("tiny") as replica:
        replica.module(IMAGE)
    assert state() == before


@pytest.mark.parametrize("kind", LEAVES)
def test_a_load_leaves_torch_as_it_was_in_the_thread_of_loads_too(kind: str) -> None:
    """Whether the builder changes it or the first call; the pool copies replicas after it."""
    states: list[dict[str, Any]] = []

    def load(spec: ModelSpec) -> LoadedModel:
        states.append(state())
        LEAVES[kind]()
        return loaded(SmallNet(), spec.name)

    library = Library(ModelPool(replicas=1), [ModelSpec(n, "tests") for n in "ab"], load)
    before = state()
    for future in library.load_in_background():
        future.exception(PATIENCE)
    library.close()
    assert states[0] == states[1], "the second load sees what the first one saw"
    assert state()["dtype"] == before["dtype"]


def test_models_that_are_loaded_before_the_start_leave_torch_as_it_was() -> None:
    def load(spec: ModelSpec) -> LoadedModel:
        for kind in set(LEAVES) - {"default_device", "inference_mode"}:
            LEAVES[kind]()
        return loaded(SmallNet(), spec.name)

    before = state()
    Library(ModelPool(replicas=1), [ModelSpec("a", "tests")], load).load_all()
    assert state() == before


@pytest.mark.parametrize("kind", LEAVES)
def test_a_worker_that_ran_one_model_runs_the_next_as_if_it_had_not(kind: str) -> None:
    """It did not: after `set_grad_enabled(False)` every other model failed until a restart."""
    models = [leaving(kind), loaded(SmallNet(), "other")]
    pool = ModelPool(models, replicas=1)
    seen: list[dict[str, Any]] = []

    def runner(replica: Any, _: Any) -> list[Any]:
        seen.append(state())
        if replica.model.name == "tiny":
            replica.module(IMAGE)
        return []

    scheduler = Scheduler(pool, Metrics(), workers=1, helpers=0, runner=runner)
    scheduler.start()
    try:
        for name in ("other", "tiny", "other", "other"):
            question = Question(torch.zeros(3, 32, 32, dtype=torch.uint8))
            scheduler.submit(name, question).exception(PATIENCE)
    finally:
        scheduler.close(PATIENCE)
    assert seen[0] == seen[2] == seen[3]


def test_blocks_that_overlap_restore_what_was_before_the_first() -> None:
    """The second begins while the first has changed the process, and ends after it."""
    changed, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with kept_torch_state():
            torch.set_default_dtype(torch.float64)
            changed.set()
            assert second_is_in.wait(PATIENCE)
        first_is_out.set()

    def second() -> None:
        assert changed.wait(PATIENCE)
        with kept_torch_state():
            second_is_in.set()
            assert first_is_out.wait(PATIENCE)

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(first), threads.submit(second)]:
            future.result(PATIENCE)
    assert torch.get_default_dtype() == torch.float32


def test_random_numbers_go_on_where_runs_are_compared() -> None:
    with kept_torch_state(random=False):
        one = torch.rand(3)
    with kept_torch_state(random=False):
        assert not torch.equal(torch.rand(3), one)


def test_the_tail_of_the_compiled_lane_leaves_torch_as_it_was() -> None:
    """It runs without a lease, on the master's own modules."""

    class Tail(nn.Module):
        def forward(self, x: Any) -> Any:
            LEAVES["no_grad"]()
            LEAVES["default_dtype"]()
            return x.mean(dim=(2, 3))[:, :7]

    def front(pixels: Any, *, wide: bool = False) -> Any:
        return (torch.zeros(len(pixels), 16, 8, 8),)

    model = loaded(SmallNet())
    lane = CompiledLane("features", front, Tail())  # type: ignore[arg-type]
    model = replace(model, compiled=lane)
    scheduler = Scheduler(ModelPool([model], replicas=1), Metrics(), workers=1, helpers=0)
    scheduler.start()
    try:
        before = scheduler.call(state).result(PATIENCE)
        question = Question(torch.zeros(3, 32, 32, dtype=torch.uint8))
        scheduler.submit(model, question).result(PATIENCE)
        assert scheduler.call(state).result(PATIENCE) == before
    finally:
        scheduler.close(PATIENCE)
