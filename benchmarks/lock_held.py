"""The time for which a request holds Python's lock, by function.

    .venv/bin/python benchmarks/lock_held.py                         # a minute on two quiet cores
    .venv/bin/python benchmarks/lock_held.py --before CHECKOUT       # beside another version
    .venv/bin/python benchmarks/lock_held.py --write docs/reference/capacity.md

A model that costs nothing (`null_model.py`) is served, and clients send 640 x 480 JPEGs without
pause. py-spy notes which thread holds the lock, some hundred times a second; the share of samples
in which one does, over the answers, is the time held by a request. Where other programs take the
cores, a holder also waits for one: that part is left out by the share of the server's time in which
its threads had a core (schedstat). With --before the two servers take turns, round by round.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from clients import Load, run
from measuring import ROOT, machine, markdown, photograph
from servers import Kind, Model, Server, camserve, end_when_told, serving

PATHS = ("/explain?include=heatmap", "/predict")
BEGIN, END = "<!-- lock:begin -->", "<!-- lock:end -->"
NULL = Model("null_model:build", None, "layer")

_FRAME = re.compile(r"(?P<function>.+) \((?P<file>[^:()]+)(:\d+)?\)$")
_PACKAGE = re.compile(r"site-packages/(\w+)")


@dataclass(slots=True)
class Held:
    """What was seen of one server under one load.

    answers: complete in the window. seconds: of the window with a thread that holds the lock, and
    of these the ones with a core. total: all CPU seconds. functions: samples by function.
    """

    answers: int = 0
    seconds: float = 0.0
    total: float = 0.0
    functions: Counter[str] = field(default_factory=Counter)

    @property
    def milliseconds(self) -> float:
        """Held by one request, on a core."""
        return 1000 * self.seconds / max(1, self.answers)

    def of(self, function: str) -> float:
        """The milliseconds of one request in a function."""
        return self.milliseconds * self.functions[function] / max(1, self.functions.total())

    def __iadd__(self, other: Held) -> Self:
        self.answers += other.answers
        self.seconds += other.seconds
        self.total += other.total
        self.functions += other.functions
        return self


def function_of(stack: str) -> str:
    """The innermost function of the service in a stack, else the package it ends in.

    stack: frames from the outermost on, joined by `;`, as py-spy writes them.
    """
    frames = [match for each in stack.split(";") if (match := _FRAME.match(each.strip()))]
    for frame in reversed(frames):
        file = frame["file"]
        if re.search(r"(^|/)(service|api_schemas)/", file):
            short = re.split(r"(?:^|/)(?=(?:service|api_schemas)/)", file)[-1]
            return f"`{short.removeprefix('service/')}` {frame['function']}"
    if not frames:
        return "other"
    package = _PACKAGE.search(frames[-1]["file"])
    return package[1] if package else Path(frames[-1]["file"]).parts[0].removesuffix(".py")


def by_function(raw: str) -> Counter[str]:
    """Samples by function, from py-spy's lines `frame;frame;frame count`."""
    found: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        found[function_of(stack)] += int(count)
    return found


def on_core(pid: int) -> tuple[float, float]:
    """Seconds that the threads of a process have had a core, and waited for one."""
    seconds = [0.0, 0.0]
    for stat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        for place, value in enumerate(stat.read_text().split()[:2]):
            seconds[place] += int(value) / 1e9
    return seconds[0], seconds[1]


class Sampler:
    """py-spy on a server for as long as a load lasts."""

    def __init__(self, server: Server, seconds: float, rate: int, folder: Path) -> None:
        self._pid, self._rate = server.pid, rate
        self._ticks = seconds * rate
        self._file = folder / "samples.raw"
        self._command = [
            *(str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(server.pid)),
            *("--gil", "--nonblocking", "--full-filenames", "--format", "raw"),
            *("--rate", str(rate), "--duration", str(max(1, round(seconds)))),
            *("--output", str(self._file)),
        ]

    def begin(self) -> None:
        self._before = on_core(self._pid)
        self._process = subprocess.Popen(  # noqa: S603 - of our own environment
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def end(self) -> None:
        self._after = on_core(self._pid)

    def held(self, rate: float, answers: int) -> Held:
        """What it saw; `rate`: answers a second. Raises RuntimeError if py-spy may not look."""
        said = self._process.communicate()[0].decode(errors="replace")
        if self._process.returncode:
            raise RuntimeError(f"py-spy: {said.strip()[-300:]}")
        functions = by_function(self._file.read_text())
        ran, waited = (
            after - before for before, after in zip(self._before, self._after, strict=True)
        )
        share = functions.total() / self._ticks * ran / (ran + waited)
        return Held(answers, share * answers / rate, ran, functions)


def measure(server: Server, path: str, options: argparse.Namespace, folder: Path) -> Held:
    """One server under one load. Raises RuntimeError if an answer is not 200."""
    sampler = Sampler(server, options.seconds, options.rate, folder)
    load = Load(server.port, path, options.clients, options.seconds)
    photos = [photograph(seed) for seed in range(3)]
    server.resume()
    try:
        found = run(load, photos, begins=sampler.begin, ends=sampler.end)
        if found.failures:
            raise RuntimeError(f"{path}: {found.failures}")
        return sampler.held(found.rate, len(found.latencies))
    finally:
        server.pause()


def kinds(before: Path | None) -> dict[str, Kind]:
    """The servers by the checkout they run."""
    now = replace(camserve(NULL), folder=ROOT)
    return {"now": now} if before is None else {"before": replace(now, folder=before), "now": now}


Found = Mapping[str, Mapping[str, Sequence[Held]]]
"""By checkout and path, one a round."""


def summed(rounds: Sequence[Held]) -> Held:
    """All rounds as one."""
    whole = Held()
    for each in rounds:
        whole += each
    return whole


def totals(found: Found) -> str:
    """The table of milliseconds held, and the ratio of the checkouts in the same round."""
    header = ["route", *(f"ms held, {name}" for name in found)]
    header += [f"ms of CPU, {name}" for name in found]
    if "before" in found:
        header.append("held before ÷ after")
    rows = []
    for path in PATHS:
        rounds = {name: summed(by_path[path]) for name, by_path in found.items()}
        row = [f"`{path}`", *(f"{each.milliseconds:.2f}" for each in rounds.values())]
        row += [f"{1000 * each.total / each.answers:.2f}" for each in rounds.values()]
        if "before" in found:
            pairs = zip(found["before"][path], found["now"][path], strict=True)
            row.append(
                f"{statistics.median(b.milliseconds / n.milliseconds for b, n in pairs):.2f}"
            )
        rows.append(row)
    return markdown(header, rows)


def functions(found: Found, path: str, most: int) -> str:
    """The table of the functions that hold the lock longest under one path."""
    wholes = {name: summed(by_path[path]) for name, by_path in found.items()}
    longest = [name for name, _ in next(iter(wholes.values())).functions.most_common(most)]
    rows = [[name, *(f"{each.of(name):.3f}" for each in wholes.values())] for name in longest]
    return markdown([f"`{path}`: function", *(f"ms, {name}" for name in found)], rows)


def report(options: argparse.Namespace) -> str:
    """Start the servers, measure in turn, and write the tables."""
    found: dict[str, dict[str, list[Held]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            name: stack.enter_context(serving(kind)) for name, kind in kinds(options.before).items()
        }
        for server in servers.values():
            server.pause()
        for number in range(options.rounds):
            for name, server in servers.items():
                for path in PATHS:
                    print(f"round {number + 1}, {name}, {path}", file=sys.stderr, flush=True)
                    held = measure(server, path, options, folder)
                    found.setdefault(name, {}).setdefault(path, []).append(held)
    tables = [totals(found), *(functions(found, path, options.functions) for path in PATHS)]
    settings = f"{options.rounds} rounds of {options.seconds:g} s, {options.clients} clients"
    return "\n\n".join([f"{settings}; {machine()}.", *tables])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; with --write, put them into a page between its marks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--before", type=Path, help="a checkout to measure in turn with this one")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rate", type=int, default=250, help="samples a second")
    parser.add_argument("--functions", type=int, default=12, help="rows of the table by function")
    parser.add_argument("--write", type=Path, help="a page with the marks lock:begin and lock:end")
    options = parser.parse_args(arguments)
    text = report(options)
    print(text)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    end_when_told()
    main()
