"""The tables of docs/reference/audits.md, from the results of `audits.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from audit_cues import CUES
from measuring import ROOT

from service.evaluation.audit.proportions import Proportion

PAGE = ROOT / "docs" / "reference" / "audits.md"
STRONG = 0.5
"""From this truth on, a cue is one that an audit should find."""

Row = Mapping[str, Any]


def write(rows: Sequence[Row]) -> None:
    """Put the tables between the markers of the page."""
    _put("audits", section(rows))


def write_cost(section: str) -> None:
    """Put the cost between its markers."""
    _put("cost", section)


def _put(name: str, section: str) -> None:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n\n{section}\n\n{end}{after}", encoding="utf-8")


def section(rows: Sequence[Row]) -> str:
    """What stands between the markers."""
    planted = [row for row in rows if row["cue"]]
    counts = ", ".join(
        f"{_count(rows, half=half, planted=True)} planted and "
        f"{_count(rows, half=half, planted=False)} clean on `{half}`"
        for half in ("dev", "hold")
    )
    cost = max((one["forwards"] for row in rows for one in row["classes"]), default=0)
    return "\n\n".join(
        [
            f"{len(rows)} models: {counts}. The dearest class took {cost:,} forward passes.",
            "### Found",
            _found(planted),
            "### Accused without a cue",
            _accused(rows),
            "### Every planted model",
            _models(planted),
        ]
    )


def is_suspected(row: Row) -> bool:
    """Whether the class with the cue is `suspected_cue`."""
    return bool(_class_of(row)["verdict"] == "suspected_cue")


def innocents(row: Row) -> list[Row]:
    """The classes of a model without a cue that were tested."""
    return [
        one
        for one in row["classes"]
        if one["verdict"] != "not_tested"
        and not (row["cue"] and one["class_id"] == row["class_id"])
    ]


def _count(rows: Sequence[Row], *, half: str, planted: bool) -> int:
    return sum(row["half"] == half and bool(row["cue"]) == planted for row in rows)


def _class_of(row: Row) -> Row:
    return next(one for one in row["classes"] if one["class_id"] == row["class_id"])


def _found(planted: Sequence[Row]) -> str:
    def cell(chosen: Callable[[Row], bool]) -> str:
        some = [row for row in planted if chosen(row)]
        return f"{sum(map(is_suspected, some))}/{len(some)}" if some else "–"

    lines = [
        "| cue | dev | hold-out | hold-out, truth ≥ .5 | `look`, hold-out |",
        "|---|---|---|---|---|",
    ]
    for cue in CUES:
        look = [row for row in planted if row["cue"] == cue and row["half"] == "hold"]
        looked = sum(_class_of(row)["verdict"] == "look" for row in look)
        cells = (
            cell(lambda row, cue=cue: row["cue"] == cue and row["half"] == "dev"),  # type: ignore[misc]
            cell(lambda row, cue=cue: row["cue"] == cue and row["half"] == "hold"),  # type: ignore[misc]
            cell(
                lambda row, cue=cue: (  # type: ignore[misc]
                    row["cue"] == cue and row["half"] == "hold" and row["truth"] >= STRONG
                )
            ),
            f"{looked}/{len(look)}" if look else "–",
        )
        lines.append(f"| {cue} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _accused(rows: Sequence[Row]) -> str:
    lines = ["| | classes without the cue | clean models | `look` |", "|---|---|---|---|"]
    for half in ("dev", "hold"):
        some = [row for row in rows if row["half"] == half]
        clean = [row for row in some if not row["cue"]]
        classes = [one for row in some for one in innocents(row)]
        wrong = sum(one["verdict"] == "suspected_cue" for one in classes)
        wrong_models = sum(
            any(one["verdict"] == "suspected_cue" for one in row["classes"]) for row in clean
        )
        look = sum(one["verdict"] == "look" for one in classes)
        lines.append(
            f"| {half} | {_share(wrong, len(classes))} | {_share(wrong_models, len(clean))} | "
            f"{_share(look, len(classes))} |"
        )
    return "\n".join(lines)


def _models(planted: Sequence[Row]) -> str:
    lines = [
        "| network | half | cue | tie | truth | verdict | confirmed: flips, control |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(planted, key=lambda row: (row["network"], CUES.index(row["cue"]), row["half"]))
    for row in order:
        one = _class_of(row)
        found = "; ".join(_finding(each) for each in one["findings"] if each["confirmed"])
        lines.append(
            f"| {row['network']} | {row['half']} | {row['cue']} | {row['tie']:.0%} | "
            f"{_number(row['truth'])} | `{one['verdict']}` | {found or '–'} |"
        )
    return "\n".join(lines)


def _finding(found: Row) -> str:
    control = found["control"]
    other = f", {control['k']}/{control['n']}" if control else ""
    return f"{found['place']} {found['flips']['k']}/{found['flips']['n']}{other}"


def _share(part: int, n: int) -> str:
    if not n:
        return "–"
    low, high = Proportion(part, n).interval
    return f"{part}/{n} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")
