"""Lanes of the Makefile that collect their own tests alone: collecting all takes a minute."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("lane", ["labeling", "protocols"])
def test_a_lane_looks_wherever_its_marker_is(lane: str) -> None:
    recipe = rf"testpaths='(.+)' -m {lane} "
    (places,) = re.findall(recipe, (ROOT / "Makefile").read_text(encoding="utf-8"))
    marked = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if f"pytest.mark.{lane}" in path.read_text(encoding="utf-8")
    ]
    assert marked
    assert [each for each in marked if not each.startswith(tuple(places.split()))] == []
