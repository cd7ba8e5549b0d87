"""The parts of docs/reference/compiled-models.md that `probes.py` writes: two columns and timm."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "compiled-models.md"

TIMM = "## timm"
"""The heading of the section that `probes.py` owns, the last one of the page."""


def with_probes(page: str, done: Mapping[str, Any], timm: str, left_out: Sequence[str]) -> str:
    """The page with the columns and the section of timm from these results.

    timm: its version. left_out: its families that have no pretrained classifier.
    """
    columns = {
        builder.partition("/")[2]: _cells(found)
        for builder, found in done.items()
        if builder.startswith("torchvision/")
    }
    return with_columns(page.partition(TIMM)[0], columns) + "\n" + _timm(done, timm, left_out)


def kept(page: str, old: str) -> str:
    """A new page of `compiled_models.py` with what `probes.py` wrote on the old one."""
    rows = [_split(line) for line in old.partition(TIMM)[0].splitlines() if line.startswith("| ")]
    has = "transform" in old
    columns = {cells[0]: (cells[-2], cells[-1]) for cells in rows if has and cells[0] != "model"}
    section = old.partition(TIMM)
    return with_columns(page, columns) + (f"\n{TIMM}{section[2]}" if section[1] else "")


def with_columns(page: str, columns: Mapping[str, tuple[str, str]]) -> str:
    """Each table of models with the columns `probes` and `transform`, in place of older ones."""
    lines, has = [], False
    for line in page.splitlines():
        cells = _split(line)
        if not line.startswith("|"):
            lines.append(line)
            continue
        if cells[0] == "model":
            has = cells[-2:] == ["probes", "transform"]
            more: tuple[str, ...] = ("probes", "transform")
        elif set(cells[0]) == {"-"}:
            more = ("---", "---")
        else:
            more = columns.get(cells[0], ("not measured", ""))
        joined = [*(cells[:-2] if has else cells), *more]
        is_rule = set(joined[0]) == {"-"}
        lines.append(f"|{'|'.join(joined)}|" if is_rule else f"| {' | '.join(joined)} |")
    return "\n".join(lines).rstrip() + "\n"


def _split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _cells(found: Mapping[str, Any]) -> tuple[str, str]:
    for key in ("refused", "skipped"):
        if key in found:
            return f"{key}: {found[key]}", ""
    return ", ".join(found["probes"]) or "passed", found["transform"]


def _timm(done: Mapping[str, Any], release: str, left_out: Sequence[str]) -> str:
    measured = {builder: each for builder, each in done.items() if "forwards" in each}
    costs = sorted(each["forwards"] for each in measured.values())
    lines = [
        TIMM,
        "",
        f"A small pretrained configuration of each family, of timm {release}; made by",
        "`benchmarks/probes.py` like the columns *probes* (those that a model did not pass, see",
        "[What is measured of a model at load](../explanation/measured-at-load.md)) and",
        "*transform* above. Weights are random, and in some networks with random weights each cell",
        "sees the whole image: these do not pass *places*, and maps carry `places_unclear`. *map*:",
        "width × height of the map at the target layer. *forwards*: what the probes cost, in",
        f"forward passes of one image; over the {len(costs)} models of timm and torchvision from",
        f"{costs[0]:g} to {costs[-1]:g}, with a median of {statistics.median(costs):g}.",
        "",
        f"Without a pretrained classifier, and not tried: {', '.join(left_out) or 'none'}.",
        "",
        "| model | target layer | map | probes | transform | forwards |",
        "|---|---|---|---|---|---|",
    ]
    for builder, each in sorted(done.items()):
        if not builder.startswith("timm/"):
            continue
        probes, transform = _cells(each)
        cells = ["", "", ""]
        if builder in measured:
            rows, columns = each["grid"] or (0, 0)
            layer = f"`{each['layer']}`" if each["layer"] else "none"
            cells = [layer, f"{columns}×{rows}" if rows else "", f"{each['forwards']:g}"]
        lines.append(
            f"| {builder} | {cells[0]} | {cells[1]} | {probes} | {transform} | {cells[2]} |"
        )
    return "\n".join(lines) + "\n"
