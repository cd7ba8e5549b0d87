"""The lanes of the Makefile and of CI, and the hooks that run some of them before a commit."""

from __future__ import annotations

import re
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
