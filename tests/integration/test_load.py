"""`make load`: what it sends must be answered as it expects, and what is wrong must be noticed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="no extra `load`"),
]


def load(tmp_path: Path, **given: str) -> subprocess.CompletedProcess[str]:
    """The command on a small net, one client and then two."""
    command = [sys.executable, str(ROOT / "deploy" / "load" / "load.py"), "--build", str(tmp_path)]
    command += ["--steps", "1,1,2", "--seconds", "4"]
    command += ["--serve", "--model tiny:small --device cpu --workers 1"]
    folders = [ROOT / "benchmarks", ROOT / "deploy" / "load", ROOT / "tests" / "support", ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), **given}
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_request_of_the_mix_gets_the_status_that_it_must_have(tmp_path: Path) -> None:
    done = load(tmp_path, LOAD_P99="60000")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "report.json").read_text())
    assert [step["clients"] for step in steps] == [1, 1, 2]
    assert sum(step["rate"] for step in steps) > 0
    assert all(step["cpu"] > 0 and step["peak"] > 0 for step in steps)
    assert "| 2 |" in done.stdout
    assert "<html" in (tmp_path / "report.html").read_text()[:200]


@pytest.mark.large
def test_late_answers_give_exit_code_1(tmp_path: Path) -> None:
    done = load(tmp_path, LOAD_P99="0.001")
    assert done.returncode == 1, done.stdout + done.stderr
