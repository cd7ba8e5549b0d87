"""Fixtures that every test shares, and the proof after each one that nothing was left behind."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service import logs
from service.models.pool import ModelPool

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"

_pools: weakref.WeakSet[ModelPool] = weakref.WeakSet()


@pytest.fixture(autouse=True, scope="session")
def _compile_nothing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiling, and measuring sensitivity, take seconds a model; their tests ask for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMSERVE_COMPILE", "false")
        patch.setenv("CAMSERVE_SENSITIVITY", "false")
        patch.setenv("CAMSERVE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _any_host() -> Iterator[None]:
    """Clients of tests write what they like into `Host`; tests of its check unset this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMSERVE_ALLOWED_HOSTS", "*")
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread_each() -> None:
    """Two cores are shared by workers that count on having one each."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logs_as_served() -> None:
    """Without it structlog prints the local variables of every traceback, which takes seconds.

    Before each test, because commands of the CLI turn the logs down for their whole process.
    """
    logs.configure()


@pytest.fixture(autouse=True, scope="session")
def _remember_every_pool() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        build = ModelPool.__init__

        def build_and_remember(self: ModelPool, *args: object, **kwargs: object) -> None:
            build(self, *args, **kwargs)  # type: ignore[arg-type]
            _pools.add(self)

        patch.setattr(ModelPool, "__init__", build_and_remember)
        yield


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """After every test: pools whole, no hook, no gradient, no new thread."""
    threads = set(threading.enumerate())
    yield
    until = time.monotonic() + 2
    while time.monotonic() < until:
        faults = [fault for pool in _pools for fault in pool.faults()]
        stray = [thread.name for thread in set(threading.enumerate()) - threads if _is_ours(thread)]
        hooks = sum(pool.hooks_live() for pool in _pools)
        if not faults and not stray and not hooks:
            return
        threading.Event().wait(0.01)  # an answer may arrive before its worker is done with it
    pytest.fail(f"left behind: {faults}, {hooks} hooks, threads {stray}")


def _is_ours(thread: threading.Thread) -> bool:
    return thread.is_alive() and thread.name.startswith(("camserve", "asyncio"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and photographs, where there is one."""
    if not SHARED.is_dir():
        pytest.skip(
            "the folder shared/data with weights and photographs is not beside this checkout"
        )
    return SHARED
