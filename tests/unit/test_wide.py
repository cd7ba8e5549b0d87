"""The simulation of a wide machine is right where its throughput can be computed by hand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("simpy", reason="no extra `bench`")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wide():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("wide")


def request_of(wide, client: float = 0.0):
    """1 ms of the lock and 3 ms without, in all stages together."""
    parts = {
        "loop": wide.Part(0.0004, 0.0),
        "decode": wide.Part(0.0002, 0.001),
        "inference": wide.Part(0.0002, 0.001),
        "render": wide.Part(0.0002, 0.001),
    }
    return wide.Request(parts, client)


def test_on_one_core_all_work_counts(wide) -> None:
    assert wide.simulated(request_of(wide), 1) == pytest.approx(1 / 0.004, rel=0.02)
    assert wide.simulated(request_of(wide, 0.001), 1) == pytest.approx(1 / 0.005, rel=0.02)


def test_on_many_cores_one_process_is_bound_by_its_lock(wide) -> None:
    assert wide.simulated(request_of(wide), 32) == pytest.approx(1 / 0.001, rel=0.05)


def test_two_processes_have_two_locks(wide) -> None:
    one, two = (wide.simulated(request_of(wide), 32, processes) for processes in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.05)


def test_more_cores_are_never_slower(wide) -> None:
    rates = [wide.simulated(request_of(wide), number) for number in (1, 2, 4, 8)]
    assert rates == pytest.approx([250, 500, 1000, 1000], rel=0.05)


def test_the_parts_of_a_request_add_up_to_what_was_measured(wide) -> None:
    """4 answers held the lock for 4 ms together and took 16 ms of CPU."""
    functions = wide.Held().functions
    functions.update({"`images/decode.py` decode": 1, "`cam/heatmap.py` render": 1, "uvicorn": 2})
    held = wide.Held(4, 0.004, 0.016, functions)
    request = wide.request_of(held, {"decode": 1.0, "inference": 1.0, "render": 2.0}, 0.0)
    assert request.held == pytest.approx(0.001)
    assert request.total == pytest.approx(0.004)
    assert request.stages["loop"] == wide.Part(pytest.approx(0.0005), 0.0)
    assert request.stages["render"].free == pytest.approx(0.0015)


STAT = """cpu  30 0 30 140 0 0 0 0 0 0
cpu0 10 5 15 60 9 1 2 3 0 0
cpu1 20 0 15 80 0 0 0 0 0 0
intr 12345 0
"""


def test_what_other_programs_take_is_what_is_left_of_the_busy_seconds(wide) -> None:
    """Idle and waiting time is not busy, stolen time is; of 2 s others took 1 s."""
    ticks = wide.os.sysconf("SC_CLK_TCK")
    assert wide.busy(STAT, [0]) == pytest.approx(36 / ticks)
    assert wide.busy(STAT, [0, 1]) == pytest.approx(71 / ticks)
    taken = wide.Taken(None, [0])
    taken._before, taken._after = (10.0, 4.0), (11.8, 4.5)
    found = wide.Measured([0.1], 2.0, 0.0, client_cpu=0.3, failures=[])
    assert taken.share(found) == pytest.approx(0.5)


def test_one_disturbed_round_does_not_count(wide) -> None:
    rounds = [wide.Real(100.0, 0.0), wide.Real(20.0, 0.7), wide.Real(102.0, 0.01)]
    assert wide.middle(rounds) == wide.Real(100.0, 0.01)
