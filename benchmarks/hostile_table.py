"""The table of hostile requests: its rows, its bounds, and its place in the page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from measuring import markdown

MEBIBYTE = 1 << 20
BEGIN, END = "<!-- hostile:begin -->", "<!-- hostile:end -->"
HEADING = "## Hostile requests"
SMALL = 1_000_000
"""Bytes of a request that may stop the event loop for `SMALL_SECONDS`; others for `SECONDS`."""
SMALL_SECONDS, SECONDS = 0.1, 0.5
_BESIDE = "beside it"
_FAILURE = re.compile(r"(?:^|, |× )500(?! ×)\b")
"""The status 500, not five hundred of another."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one hostile request did.

    size:    bytes of one of its requests. sent: of all connections together.
    late:    seconds that a task of the event loop was late at most, waits for a core left out.
    gross:   the same with them.
    machine: the same of a process beside it that did nothing.
    memory:  bytes above rest at the peak.
    answer:  what came back. killed: the server ended.
    busy:    it still worked on it long after the client had gone.
    """

    item: str
    name: str
    size: int
    sent: int
    late: float
    machine: float
    memory: int
    answer: str
    killed: bool = False
    busy: bool = False
    gross: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.item} {self.name}"

    @property
    def allowed(self) -> float:
        """Seconds that it may stop the event loop for."""
        return SMALL_SECONDS if self.size < SMALL else SECONDS

    def broken(self, budget: int) -> list[str]:
        """The bounds that it breaks, in words. budget: bytes above rest."""
        found = []
        if self.killed:
            found.append("the server ended")
        if self.late >= self.allowed:
            found.append(f"{1000 * self.late:.0f} ms, of {1000 * self.allowed:.0f} allowed")
        if self.memory > budget:
            found.append(f"{self.memory >> 20} MiB, of {budget >> 20} allowed")
        return found + ([self.failed] if self.failed else [])

    @property
    def failed(self) -> str:
        """What is wrong with the answers; empty: nothing."""
        if _FAILURE.search(self.answer):
            return "500"
        if _BESIDE in self.answer and f"{_BESIDE} 200" not in self.answer:
            return "a good request was not answered"
        return ""

    def better(self, other: Row) -> Row:
        """The row with the least of what two runs measured: the rest was the machine's."""
        least = min(self, other, key=lambda row: row.late)
        values = {each.name: getattr(least, each.name) for each in fields(Row)}
        return Row(**{**values, "memory": min(self.memory, other.memory)})


def save(rows: Sequence[Row], path: Path) -> None:
    """Keep the rows for `load`."""
    text = json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=0)
    path.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Row]:
    """Rows of an earlier run by their keys; none where there is no file."""
    if not path.exists():
        return {}
    rows = [Row(**each) for each in json.loads(path.read_text(encoding="utf-8"))]
    return {row.key: row for row in rows}


def table(rows: Sequence[Row], budget: int, before: Mapping[str, Row]) -> str:
    """In Markdown. A figure in bold breaks its bound. before: rows to show beside these."""
    columns = ["", "request", "sent", "event loop stopped", "memory above rest", "answer"]
    shown = [_cells(row, budget, before) for row in rows]
    if before:
        columns.append("before")
    return markdown(columns, shown)


def _cells(row: Row, budget: int, before: Mapping[str, Row]) -> list[str]:
    late, memory, answer = _measured(row, budget)
    cells = [row.item, row.name.replace("|", "\\|"), _bytes(row), late, memory, answer]
    if before:
        old = before.get(row.key)
        cells.append("" if old is None else ", ".join(_measured(old, budget)))
    return cells


def _measured(row: Row, budget: int) -> tuple[str, str, str]:
    late, memory, answer = f"{1000 * row.late:.0f} ms", f"{row.memory >> 20} MiB", row.answer
    with_waits = f" ({1000 * row.gross:.0f})" if row.gross else ""
    if row.killed:
        return late, memory, f"{answer}; **killed**"
    if row.busy:
        answer += "; works on"
    return (
        (f"**{late}**" if row.late >= row.allowed else late) + with_waits,
        f"**{memory}**" if row.memory > budget else memory,
        f"**{answer}**" if row.failed else answer,
    )


def _bytes(row: Row) -> str:
    for unit, size in (("MB", 1_000_000), ("kB", 1000)):
        if row.sent >= size:
            return f"{row.sent / size:.{0 if row.sent >= 10 * size else 1}f} {unit}"
    return f"{row.sent} B"


def put(page: str, made: str) -> str:
    """The page with that between its markers, or with a section for it at its end."""
    section = f"{BEGIN}\n\n{made}\n\n{END}"
    if BEGIN in page and END in page:
        before, rest = page.split(BEGIN, 1)
        return before + section + rest.split(END, 1)[1]
    return f"{page.rstrip()}\n\n{HEADING}\n\n{section}\n"
