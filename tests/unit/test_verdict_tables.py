"""The page of verdicts: its intervals, its targets, and that each of them holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    import verdict_tables
    from verdict_tables import BEGIN, CONTROLS, END, Share, Target

PAGE = (ROOT / "docs" / "reference" / "verdicts.md").read_text(encoding="utf-8")


def section(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of the page."""
    lines = PAGE.partition(f"### {heading}\n")[2].strip().split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(
    ("part", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 100, 0.0215, 0.1118), (50, 100, 0.4038, 0.5962), (8, 8, 0.6756, 1)],
)
def test_intervals_are_those_of_wilson(part: int, n: int, low: float, high: float) -> None:
    """As Brown, Cai and DasGupta 2001 and any table of the score interval have them."""
    assert Share(part, n).interval == pytest.approx((low, high), abs=1e-4)


def test_a_target_is_met_at_its_bound_and_missed_behind_it() -> None:
    assert Target("a", "", 0.05, most=0.05).is_met
    assert not Target("a", "", 0.051, most=0.05).is_met
    assert Target("a", "", 0.9, least=0.9).is_met
    assert not Target("a", "", 0.89, least=0.9).is_met


def test_every_target_of_the_page_is_met() -> None:
    rows = section("Targets")
    assert len(rows) >= 25
    for name, bound, figure, verdict in rows:
        limit = float(bound[2:])
        value = float(re.findall(r"(?:= |^)([\d.]+)", figure)[-1])
        if "the interval reaches" in name:
            value = float(re.search(r"–([\d.]+)\]", figure)[1])  # type: ignore[index]
        assert verdict == "met", name
        assert value >= limit if bound[0] == "≥" else value <= limit, name


def test_every_control_has_at_least_300_maps() -> None:
    rows = {cells[0]: cells[1] for cells in section("Maps that know nothing of the image")}
    assert set(rows) == set(CONTROLS)
    for name, figure in rows.items():
        part, n = map(int, re.match(r"(\d+)/(\d+)", figure).groups())  # type: ignore[union-attr]
        assert n >= 300, name
        assert part <= 0.05 * n, name


def parts() -> dict[str, object]:
    counts = {"supported": 1, "inconclusive": 8, "refuted": 1, "elsewhere_as_good": 8}
    found = dict.fromkeys((*CONTROLS, "gradcam"), counts)
    return {
        "machine": {"settings": {}, "found": ""},
        "one": {"settings": {"group": "photographs"}, "found": found},
        "planted: corner": {"settings": {"group": "planted"}, "found": found},
    }


def test_a_control_is_pooled_without_where_it_lies_on_the_evidence() -> None:
    made = verdict_tables.tables(parts())
    assert "| cells permuted | 2/20 = 0.100 [0.03–0.30] | 2/20 = 0.100 [0.03–0.30] |" in made
    assert "| other image's map | 1/10 = 0.100 [0.02–0.40] |" in made
    assert "| `supported`: cells permuted | ≤ 0.05 | 2/20 = 0.100 [0.03–0.30] | missed |" in made
    assert "| photographs | 10 | 8 | 0 | 0 | 0 | 0 |" in made


def test_the_tables_are_written_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        verdict_tables.write(page, "new")
        assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
