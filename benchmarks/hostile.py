"""What hostile requests cost the service: event loop, memory, and the answers of others.

    .venv/bin/python benchmarks/hostile.py                       # the table, half an hour
    .venv/bin/python benchmarks/hostile.py --rows 'A3 TIFF'      # some of it
    .venv/bin/python benchmarks/hostile.py --write               # ... and into its page
    .venv/bin/python benchmarks/hostile.py --storm               # 1,000 beside good clients
    .venv/bin/python benchmarks/hostile.py --slow-peers          # 400 silent peers, five minutes

Each row of the table is sent to `camserve serve` at rest, by a client in a process of its own. A
task on the server's event loop records how late it is woken, with and without the time that its
thread waits for a core (schedstat); the kernel records the peak of its memory. The server has the
3 GiB of the container that is deployed. A row that breaks a bound is repeated, and counts with the
least that was measured, since what differs is the machine. It ends with 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import hostile_table
from contained import bounded
from hostile_connections import connections
from hostile_files import images
from hostile_http import Hostile, Names
from hostile_sending import names_of, planned, sent
from hostile_slow_peers import slow_peers
from hostile_storm import storm
from hostile_table import MEBIBYTE, Row, put, table
from hostile_texts import texts
from measuring import ROOT, machine, photograph
from servers import HERE, end_when_told
from watched import Start, Watched, fetch, in_container, in_process

from service.settings import Settings

PAGE = ROOT / "docs" / "reference" / "robustness.md"
BEFORE = HERE / "hostile_before.json"
WORKS_ON = 20.0
"""Seconds after the answer, or after the client has gone, in which the server must be at rest."""
BESIDE = 1.5
"""Seconds after a hostile request that a good one is sent beside it."""

NOTE = """In parentheses: the delay including the time in which the event loop's thread was ready
but had no core, because the machine is shared; the limits exclude it. *Before* is the
released service, if it exceeded a limit; an empty cell: it did not, or the row is newer."""

UNANNOUNCED = 1024 * MEBIBYTE
"""The budget where no setting announces one."""


def rows_of(pattern: str, patience: float = math.inf) -> list[Hostile]:
    """The requests whose item and name match; their clients wait for so many seconds at most."""
    every = [*connections(), *texts(), *images()]
    return [
        replace(row, patience=min(row.patience, patience))
        for row in every
        if re.search(pattern, f"{row.item} {row.name}")
    ]


def budget_of(limit: int) -> int:
    """Bytes above rest that the settings announce for a process that may use `limit` bytes.

    For bodies, images while they are decoded, and answers, each of all requests together.
    """
    settings = Settings()
    if not hasattr(settings, "max_decode_bytes"):
        return UNANNOUNCED
    decoded = settings.max_decode_bytes or limit // 4
    answers = settings.max_held_answer_bytes or max(limit // 8, 256 * MEBIBYTE)
    return int(settings.max_queue_bytes + decoded + answers)


class Bench:
    """Measures rows against a watched server."""

    def __init__(self, server: Watched, folder: Path, works_on: float) -> None:
        self._server = server
        self._works_on = works_on
        self._folder = folder
        self._good = photograph(0, 320, 240)

    def names(self) -> Names:
        return names_of(self._server)

    def row(self, hostile: Hostile, names: Names) -> Row:
        """Send it once, and look."""
        server = self._server
        if hostile.fresh:
            server.stop()
        if server.ensure():
            self._warm()
        plan = planned(hostile, names, server.port, self._folder / "request")
        server.settles(self._works_on)
        rest = server.at_rest()
        with lateness_here() as here, self._beside(hostile) as beside:
            outcome = sent(plan, self._folder / "plan")
        is_busy = not server.settles(self._works_on) and server.is_alive()
        late, gross, peak = server.lateness(), server.gross_lateness(), server.peak()
        killed = not server.is_alive()
        if is_busy or killed:
            server.kill()
        answer = "; ".join([f"{outcome} in {outcome.seconds:.1f} s", *beside])
        size = sum(plan.sizes)
        memory = max(0, peak - rest)
        values = (size, outcome.sent, late, max(here, default=0.0), memory, answer)
        return Row(hostile.item, hostile.name, *values, killed=killed, busy=is_busy, gross=gross)

    def _warm(self) -> None:
        """What is made by the first requests is not what hostile ones cost."""
        for number in range(4):
            photo = photograph(number, 320, 240)
            path = "/explain?include=overlay&include=grid"
            fetch(self._server.port, "POST", path, photo, content_type="image/jpeg")

    @contextmanager
    def _beside(self, hostile: Hostile) -> Iterator[list[str]]:
        """Send a good request in the meantime; how it was answered is in the list at the end."""
        said: list[str] = []
        if not hostile.beside:
            yield said
            return

        def ask() -> None:
            time.sleep(BESIDE)
            started = time.monotonic()
            status = "lost"
            with suppress(OSError):
                fields = {"content_type": "image/jpeg"}
                found = fetch(self._server.port, "POST", "/explain", self._good, **fields)
                status = str(found[0])
            said.append(f"beside it {status} in {time.monotonic() - started:.1f} s")

        thread = threading.Thread(target=ask)
        thread.start()
        yield said
        thread.join()


@contextmanager
def lateness_here(every: float = 0.005) -> Iterator[list[float]]:
    """How late a thread of this process is woken, which does nothing else."""
    late, stop = [0.0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            started = time.monotonic()
            time.sleep(every)
            late[0] = max(late[0], time.monotonic() - started - every)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield late
    finally:
        stop.set()
        thread.join()


def measure(
    bench: Bench, rows: Sequence[Hostile], budget: int, again: int, keep: Path | None
) -> list[Row]:
    """Every row; one that breaks a bound is repeated `again` times. keep: written row by row."""
    found: list[Row] = []
    names = bench.names()
    for number, hostile in enumerate(rows, 1):
        row = bench.row(hostile, names)
        for _ in range(again):
            if row.killed or not row.broken(budget):
                break
            row = row.better(bench.row(hostile, names))
        found.append(row)
        if keep is not None:
            hostile_table.save(found, keep)
        broken = "; ".join(row.broken(budget))
        print(
            f"{number}/{len(rows)} {row.key}: {row.sent} B, {1000 * row.late:.0f} ms "
            f"({1000 * row.gross:.0f} with waits for a core, machine {1000 * row.machine:.0f}), "
            f"{row.memory >> 20} MiB, {row.answer}"
            f"{', works on' * row.busy}{f'  BROKEN: {broken}' * bool(broken)}",
            flush=True,
        )
    return found


def section(rows: Sequence[Row], budget: int, how: str, before: dict[str, Row]) -> str:
    """What goes into the page."""
    broken = [row for row in rows if row.broken(budget)]
    verdict = f"{len(broken)} of {len(rows)} exceed a limit" if broken else f"All {len(rows)} hold"
    today = datetime.now(UTC)
    return (
        f"Measured by `benchmarks/hostile.py` on {today.day} {today:%B %Y}, under {how}; "
        f"{machine()}.\nLimits: a request under 1 MB may stop the event loop for "
        f"{1000 * hostile_table.SMALL_SECONDS:.0f} ms, any other for "
        f"{1000 * hostile_table.SECONDS:.0f} ms; none may take more than {budget >> 20} MiB above "
        f"rest. {verdict}. MB are 10^6 bytes.\n{NOTE}\n\n{table(rows, budget, before)}"
    )


def make_table(start: Start, how: str, options: argparse.Namespace) -> bool:
    """Measure, print, write; whether every bound holds."""
    rows = rows_of(options.rows, options.patience)
    budget = options.budget << 20 or budget_of(options.memory)
    with tempfile.TemporaryDirectory() as folder, Watched(start) as server:
        bench = Bench(server, Path(folder), min(WORKS_ON, options.patience))
        found = measure(bench, rows, budget, options.again, options.save)
    made = section(found, budget, how, hostile_table.load(BEFORE))
    print(f"\n{made}")
    if options.write:
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(put(page, made), encoding="utf-8")
    return not any(row.broken(budget) for row in found)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--serve", nargs="*", default=[], help="more flags of camserve serve")
    parser.add_argument("--memory", type=_size, default="3g", help="bound on the server")
    parser.add_argument("--container", metavar="IMAGE", help="serve from it instead")
    parser.add_argument("--log", type=Path, help="where the server's log is kept")
    parser.add_argument("--rows", default="", help="expression over item and name")
    parser.add_argument("--patience", type=float, default=math.inf, help="seconds of a client")
    parser.add_argument("--again", type=int, default=2, help="repeats of what breaks a bound")
    parser.add_argument("--budget", type=int, default=0, help="MiB above rest; 0: as announced")
    parser.add_argument("--save", type=Path, help="keep the rows as JSON")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--storm", action="store_true", help="hostile requests beside good ones")
    parser.add_argument("--requests", type=int, default=1000, help="hostile ones of the storm")
    parser.add_argument("--seconds", type=float, help="of the storm (600), of a window (10)")
    parser.add_argument("--clients", type=int, default=4, help="good ones")
    parser.add_argument("--slow-peers", action="store_true", help="silent readers and uploaders")
    parser.add_argument("--peers", type=int, default=200, help="of each kind")
    parser.add_argument("--pairs", type=int, default=5, help="windows beside the slow peers")
    parser.add_argument("--addresses", type=int, default=16, help="of loopback, that they share")
    return parser.parse_args(arguments)


def _size(text: str) -> int:
    units = {"k": 10, "m": 20, "g": 30}
    return int(text[:-1]) << units[text[-1].lower()] if text[-1].isalpha() else int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was chosen, and end with 1 where something does not hold."""
    options = parsed(arguments)
    serve = ["--model", options.model, *options.serve]
    with bounded(options.memory) as bound:
        start, how = in_process(bound, serve, options.log), bound.how
        if options.container:
            start = in_container(options.container, options.memory, options.serve)
            how = f"the container {options.container} with {options.memory >> 20} MiB"
        print(f"served under {how}", flush=True)
        if options.storm:
            holds = storm(start, rows_of(options.rows, options.patience), options)
        elif options.slow_peers:
            holds = slow_peers(start, options)
        else:
            holds = make_table(start, how, options)
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    end_when_told()
    main()
