"""The tables of docs/reference/verdicts.md, from what `verdicts.py` has measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- verdicts:begin -->", "<!-- verdicts:end -->"

VERDICTS = ("supported", "inconclusive", "refuted")
CONTROLS = (
    "cells permuted",
    "shifted or turned",
    "other image's map",
    "centred",
    "centred, jittered",
)
SEARCHED = ("gradcam", "shifted or turned", "other image's map")
SEARCHES = ("", ", search", ", search, undivided")
METHODS = (
    "gradcam",
    "layercam",
    "layercam, earlier layer",
    "integrated_gradients",
    "eigencam",
    "second class",
    "random class",
)
PLANTED = (
    "gradcam",
    "layercam",
    "layercam, earlier layer",
    "integrated_gradients",
    "the tag's mask",
    "the flower's map",
)
DEPTHS = ("weights permuted: head", "weights permuted: last half", "weights permuted: all")

ON_THE_EVIDENCE = {"planted: corner"}
"""Where the map of another image lies on the evidence: the tag is always in one corner."""

EARLIER = {
    "mobilenet_v2, one a class": 0.62,
    "squeezenet1_1, one a class": 0.83,
    "builtin": 0.75,
}
"""Share of Grad-CAM's maps that were supported when the rules were chosen; `planted`: .91."""

MOST = {"mobilenet_v2": 45, "resnet50": 42}
"""Forward passes that a verdict may cost."""

Rows = Mapping[str, Mapping[str, int]]
Found = Mapping[str, Rows]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of n with its 95 % interval, Wilson's."""

    part: int
    n: int

    @property
    def value(self) -> float:
        return self.part / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        z, p = 1.959964, self.value
        middle = (p + z * z / (2 * self.n)) / (1 + z * z / self.n)
        half = z / (1 + z * z / self.n) * math.sqrt(p * (1 - p) / self.n + (z / (2 * self.n)) ** 2)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        if not self.n:
            return "–"
        low, high = self.interval
        return f"{self.part}/{self.n} = {self.value:.3f} [{low:.2f}–{high:.2f}]"


@dataclass(frozen=True, slots=True)
class Target:
    """A figure with the bound that it is to keep: `most`, or at least `least`."""

    name: str
    figure: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def is_met(self) -> bool:
        return (self.least is None or self.value >= self.least) and (
            self.most is None or self.value <= self.most
        )

    def __str__(self) -> str:
        bound = f"≥ {self.least:g}" if self.most is None else f"≤ {self.most:g}"
        return f"| {self.name} | {bound} | {self.figure} | {'met' if self.is_met else 'missed'} |"


def of_group(parts: Mapping[str, Any], *groups: str) -> dict[str, Rows]:
    """What was found of the subjects of some groups, by name."""
    return {
        name: part["found"]
        for name, part in parts.items()
        if part["settings"].get("group") in groups
    }


def pooled(found: Found, row: str, leaving_out: Iterable[str] = ()) -> Counter[str]:
    """The counts of one row over several subjects."""
    counts = Counter[str]()
    for name, rows in found.items():
        if name not in leaving_out:
            counts.update(rows.get(row, {}))
    return counts


def share(counts: Mapping[str, int], verdict: str = "supported") -> Share:
    """The share with one verdict."""
    return Share(counts.get(verdict, 0), sum(counts.get(each, 0) for each in VERDICTS))


def control(found: Found, row: str) -> Counter[str]:
    """A control over all subjects, without those where it lies on the evidence."""
    return pooled(found, row, ON_THE_EVIDENCE if row.startswith("other") else ())


def targets(parts: Mapping[str, Any]) -> list[Target]:
    """What the verdicts have to hold, with what was measured."""
    everything = of_group(parts, "photographs", "planted", "fits")
    photographs, planted = of_group(parts, "photographs"), of_group(parts, "planted")
    made = []
    for row in CONTROLS:
        found = share(control(everything, row))
        made.append(Target(f"`supported`: {row}", f"{found}", found.value, most=0.05))
    for row, bound in (("gradcam", {"least": 0.9}), ("the flower's map", {"most": 0.05})):
        found = share(pooled(planted, row))
        made.append(Target(f"`supported`: planted cues, {row}", f"{found}", found.value, **bound))
    found = share(pooled(everything, "gradcam"), "refuted")
    made.append(Target("`refuted`: gradcam", f"{found}", found.value, most=0.01))
    for name, least in EARLIER.items():
        if name in photographs:
            found = share(photographs[name]["gradcam"])
            highest = found.interval[1] if found.n else math.nan
            label = f"`supported`: gradcam, {name}; the interval reaches"
            made.append(Target(label, f"{found}", highest, least=least))
    for model, cost in parts.get("cost", {"found": {}})["found"].items():
        if model in MOST:
            figure = cost["verdict"]
            made.append(
                Target(
                    f"forward passes of a verdict, {model}",
                    _ratio(figure),
                    figure[0],
                    most=MOST[model],
                )
            )
        for method in ("rise", "occlusion", "scorecam"):
            of_hooked, of_forward = cost[method]["of_hooked"], cost[method]["of_forward"]
            made += [
                Target(
                    f"{method}, {model}: wall time ÷ hooked",
                    _ratio(of_hooked),
                    of_hooked[0],
                    most=0.7,
                ),
                Target(
                    f"{method}, {model}: a pass ÷ plain",
                    _ratio(of_forward),
                    of_forward[0],
                    most=1.1,
                ),
            ]
    return [each for each in made if not math.isnan(each.value)]


def tables(parts: Mapping[str, Any]) -> str:
    """All tables, in Markdown; `parts` is what `measuring.Results` keeps."""
    everything = of_group(parts, "photographs", "planted", "fits")
    searched = {name: rows for name, rows in everything.items() if "gradcam, search" in rows}
    return "\n\n".join(
        [
            "### Targets",
            _table(["", "target", "measured", ""], [f"{each}" for each in targets(parts)]),
            "### Maps that know nothing of the image",
            _verdicts(everything, CONTROLS),
            "`supported` by model:",
            _by_subject(everything, CONTROLS),
            "### Photographs",
            _by_subject(of_group(parts, "photographs"), METHODS),
            "### Planted cues that decide",
            _by_subject(of_group(parts, "planted"), PLANTED, is_pooled=True),
            "### Other ways to fit an image",
            _by_subject(of_group(parts, "fits"), METHODS),
            "### Collages of four photographs",
            _collages(of_group(parts, "collages")),
            "### Randomised weights",
            _by_subject(everything, DEPTHS, without=("fits",), is_pooled=True),
            "### `verify=search`",
            _verdicts(searched, [f"{row}{way}" for row in SEARCHED for way in SEARCHES]),
            "### Why Grad-CAM's maps are inconclusive",
            _reasons(parts),
            "### Cost",
            _cost(parts.get("cost", {"found": {}})["found"]),
        ]
    )


def write(page: Path, made: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Put tables between two markers of a page."""
    begin, end = marks
    before, rest = page.read_text(encoding="utf-8").split(begin, 1)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n\n{made}\n\n{end}{after}", encoding="utf-8")


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *rows])


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(f'{cell}' for cell in cells)} |"


def _verdicts(found: Found, rows: Sequence[str]) -> str:
    made = []
    for row in rows:
        counts = control(found, row)
        made.append(_line([row, *(share(counts, each) for each in ("supported", "refuted"))]))
    return _table(["map", "supported", "refuted"], made)


def _by_subject(
    found: Found, rows: Sequence[str], without: Sequence[str] = (), *, is_pooled: bool = False
) -> str:
    made = [
        _line([name, *(share(own.get(row, {})) for row in rows)])
        for name, own in found.items()
        if any(row in own for row in rows) and not any(each in name for each in without)
    ]
    if is_pooled:
        made.append(_line(["all", *(share(pooled(found, row)) for row in rows)]))
    return _table(["", *rows], made)


def _collages(found: Found) -> str:
    rows = [
        _line(
            [
                name,
                share(own.get("gradcam", {})),
                share(own.get("another quarter's class", {})),
                share(own.get("another quarter's class", {}), "refuted"),
            ]
        )
        for name, own in found.items()
    ]
    return _table(["", "gradcam: supported", "another quarter's class: supported", "refuted"], rows)


def _reasons(parts: Mapping[str, Any]) -> str:
    reasons = ("elsewhere_as_good", "centre_as_good", "fills_disagree", "flat_map", "flat_score")
    rows = []
    for group in ("photographs", "planted", "fits"):
        counts = pooled(of_group(parts, group), "gradcam")
        n = share(counts).n
        rows.append(_line([group, n, *(counts.get(each, 0) for each in reasons)]))
    return _table(["", "maps", *(f"`{each}`" for each in reasons)], rows)


def _cost(found: Mapping[str, Any]) -> str:
    methods = ("rise", "occlusion", "scorecam")
    rows = [
        _line(
            [
                model,
                _ratio(cost["verdict"]),
                *(
                    f"{_ratio(cost[method]['of_hooked'])}; {_ratio(cost[method]['of_forward'])}"
                    for method in methods
                ),
            ]
        )
        for model, cost in found.items()
    ]
    return _table(["", "a verdict, in forward passes", *methods], rows)


def _ratio(figure: Sequence[float]) -> str:
    median, low, high = figure
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} [{low:.{digits}f}–{high:.{digits}f}]"
