"""The benchmark of Python's lock attributes samples to functions."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lock_held():
    pytest.importorskip("psutil", reason="no extra `bench`")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("lock_held")


RAW = """\
run (/x/uvicorn/server.py:7);put (/co/service/routes/server/outbox.py:61);send (/h11/a.py) 3
run (/x/uvicorn/server.py:7);put (/co/service/routes/server/outbox.py:70) 2
run (/x/site-packages/uvicorn/server.py:7) 4
dumps (/co/api_schemas/answers.py:1) 1
"""


def test_a_sample_counts_for_the_innermost_function_of_the_service(lock_held) -> None:
    assert lock_held.by_function(RAW) == {
        "`routes/server/outbox.py` put": 5,
        "uvicorn": 4,
        "`api_schemas/answers.py` dumps": 1,
    }


def test_what_a_request_holds_is_shared_among_the_functions(lock_held) -> None:
    """10 samples in .02 s held by 4 answers: 5 ms each, half of them in `put`."""
    held = lock_held.Held(4, 0.02, 0.1, lock_held.by_function(RAW))
    assert held.milliseconds == pytest.approx(5)
    assert held.of("`routes/server/outbox.py` put") == pytest.approx(2.5)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="no schedstat")
def test_the_time_on_a_core_grows_with_work(lock_held) -> None:
    before, _ = lock_held.on_core(os.getpid())
    sum(range(300_000))
    after, _ = lock_held.on_core(os.getpid())
    assert after > before
