"""The lanes of the Makefile and of CI, and the hooks that run some of them before a commit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("lane", ["labeling", "protocols"])
def test_a_lane_looks_wherever_its_marker_is(lane: str) -> None:
    """It collects its own tests alone: collecting all takes a minute."""
    recipe = rf"testpaths='(.+)' -m {lane} "
    (places,) = re.findall(recipe, (ROOT / "Makefile").read_text(encoding="utf-8"))
    marked = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if f"pytest.mark.{lane}" in path.read_text(encoding="utf-8")
    ]
    assert marked
    assert [each for each in marked if not each.startswith(tuple(places.split()))] == []


def test_ci_runs_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (lanes,) = re.findall(r"^lanes=\((.+)\)$", script, re.MULTILINE)
    assert {"check", "test"} < set(lanes.split())
    for lane in lanes.split():
        assert re.search(rf"^{lane}:", makefile, re.MULTILINE), lane


RECORDING_MAKE = """#!/bin/sh
printf '%s|' "$@" >>"$MADE"
printf '\\n' >>"$MADE"
echo 'Required test coverage of 96.0% reached. Total coverage: 96.70%'
echo '=== 3 passed in 1.00s ==='
[ "$2" != "$FAILS" ]
"""
"""Stands in for make: notes its arguments, and fails in one lane."""


def ran(folder: Path, fails: str = "") -> tuple[int, str, list[list[str]]]:
    """A copy of `.ci/run` far from everything: its status, its output, and what make was given."""
    script, tools = folder / "checkout" / ".ci" / "run", folder / "tools"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", script)
    tools.mkdir()
    for name, text in {"make": RECORDING_MAKE, "apt-get": "#!/bin/sh\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    made = folder / "made"
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "MADE": str(made), "FAILS": fails}
    done = subprocess.run(
        [script], env=environment, capture_output=True, text=True, timeout=10, check=False
    )
    lines = made.read_text().splitlines()
    return done.returncode, done.stdout, [line.split("|")[1:-1] for line in lines]


needs_bash = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("timeout")), reason="needs bash and timeout"
)


@needs_bash
def test_ci_runs_the_readmes_test_command_and_measures_its_coverage(tmp_path: Path) -> None:
    status, output, made = ran(tmp_path)
    assert status == 0
    assert "`make test`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert ["check"] in made
    assert [each for each in made if "test" in each] == [["test", "ARGS=--cov --cov-report=term"]]
    assert "Total coverage: 96.70%" in output.splitlines()[-2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["coverage"]["report"]["fail_under"] >= 96


@needs_bash
def test_ci_ends_with_the_first_lane_that_fails(tmp_path: Path) -> None:
    status, output, made = ran(tmp_path, fails="test")
    assert status == 1
    assert made[-1][0] == "test"
    assert re.search(r"^test +failed after", output, re.MULTILINE)


def test_hooks_before_a_commit_run_what_make_check_runs_and_fetch_nothing() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (check,) = re.findall(r"^check:.*\n((?:\t.+\n)+)", makefile, re.MULTILINE)
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        command = hook["entry"].partition(" --force-exclude")[0]
        assert re.search(rf"{re.escape(command)}\b", check), hook["id"]
