"""Several server processes: no request fails in a reload, nor by a kill if it is repeated."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import urllib.request
from pathlib import Path

import coverage
import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def processes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("processes")


def kind_of(processes):
    """Two processes of a model without work; measured, where this process is."""
    model = processes.Model("null_model:build", None, "")
    kind = processes.camserve(model, "--processes", "2", *processes.QUICK)
    if coverage.Coverage.current() is None:
        return kind
    measured = ("-m", "coverage", "run", "--parallel-mode", *kind.arguments)
    return dataclasses.replace(kind, arguments=measured)


@pytest.mark.timeout(360)
def test_a_rolling_reload_fails_no_request(processes) -> None:
    clients = processes.disturbed("reloads", kind_of(processes), 1, 2)
    assert clients.failures == {}
    assert clients.outcomes["200"] > 0
    assert clients.repeated == 0


@pytest.mark.large
@pytest.mark.timeout(360)
def test_a_killed_process_fails_no_request_that_is_repeated_once(processes) -> None:
    clients = processes.disturbed("kills", kind_of(processes), 1, 2)
    assert clients.failures == {}
    assert clients.outcomes["200"] > 0


@pytest.mark.timeout(360)
def test_all_processes_count_in_one_metrics_and_end_with_their_parent(
    processes, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with processes.serving(kind_of(processes), log_file=log) as server:
        processes.Watched(log).wait("process_ready", 2)
        clients = processes.Clients(server.port, 0, count=2)
        clients.begin()
        while sum(clients.outcomes.values()) < 6:
            clients._threads[0].join(0.01)
        clients.end()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as response:
            lines = response.read().decode().splitlines()
        children = psutil.Process(server.pid).children()
    counted = 'camserve_requests_total{route="/explain",status="200"} '
    assert [line for line in lines if line.startswith(counted)] == [
        f"{counted}{float(clients.outcomes['200'])}"
    ]
    assert psutil.wait_procs(children, timeout=20)[1] == []


@pytest.mark.timeout(360)
def test_processes_end_when_their_parent_is_killed(processes, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with processes.serving(kind_of(processes), log_file=log) as server:
        processes.Watched(log).wait("process_ready", 1)
        parent = psutil.Process(server.pid)
        children = parent.children()
        parent.kill()
        assert psutil.wait_procs(children, timeout=120)[1] == []


@pytest.mark.timeout(200)
def test_a_model_that_cannot_be_loaded_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--processes", "2"]
    done = subprocess.run(
        [*command, "--model", "none=no_such_module:build"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 2, done.stderr
    assert "no_such_module" in done.stderr
    assert "Traceback" not in done.stderr
