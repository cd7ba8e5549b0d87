"""Throughput on machines of 1 to 64 cores, simulated from what one request takes on this one.

    .venv/bin/python benchmarks/wide.py --write docs/reference/capacity.md    # four minutes
    .venv/bin/python benchmarks/wide.py --model torchvision/resnet50

First the parts of a request are measured: seconds in which it holds Python's lock, by stage
(`lock_held.py`), all its seconds of CPU, and the share of each stage (`Server-Timing`). Then
clients, event loop, worker threads, lock and cores are simulated (SimPy), and for 1 and 2 cores
compared with a real server that may use so many, with its clients on the same ones. The two servers
take turns, round by round; the seconds of these cores that other programs took do not count.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simpy
from clients import Load, Measured, multipart, run
from lock_held import Held, Sampler
from measuring import ROOT, cores, machine, markdown, photograph, put_between
from servers import Model, Server, camserve, end_when_told, serving

PLOT = ROOT / "docs" / "images" / "wide.svg"
PHOTOS = tuple(photograph(seed) for seed in range(3))
CORES = (1, 2, 4, 8, 16, 32, 64)
STAGES = ("loop", "decode", "inference", "render")

_ROOMS = {
    "images/": "decode",
    "inference/": "inference",
    "models/": "inference",
    "cam/": "render",
    "pipeline/response": "render",
}
"""The stage of a function by the beginning of its file; all others are of the event loop."""

SLICE = 0.0001
"""Seconds of one piece of work: a longer one lets others have the lock or the core in between."""


@dataclass(frozen=True, slots=True)
class Part:
    """Seconds of CPU of a stage: with the lock held, and without."""

    held: float
    free: float


@dataclass(frozen=True, slots=True)
class Request:
    """What one request takes, by stage, and its client on the same cores, in seconds of CPU."""

    stages: Mapping[str, Part]
    client: float = 0.0

    @property
    def held(self) -> float:
        return sum(part.held for part in self.stages.values())

    @property
    def total(self) -> float:
        """All CPU of server and client."""
        return self.client + sum(part.held + part.free for part in self.stages.values())


class Machine:
    """A machine of some cores, with server processes and their clients, as events.

    workers: threads of each process that run calls and batches.
    """

    def __init__(self, request: Request, number: int, processes: int, workers: int) -> None:
        self._request = request
        self._environment = simpy.Environment()
        self._cores = simpy.Resource(self._environment, number)
        self._locks = [simpy.Resource(self._environment, 1) for _ in range(processes)]
        self._loops = [simpy.Resource(self._environment, 1) for _ in range(processes)]
        self._workers = [simpy.Resource(self._environment, workers) for _ in range(processes)]
        self._answers = 0

    def rate(self, clients: int, answers: int) -> float:
        """Answers a second of a closed loop of `clients`, once it has settled."""
        for number in range(clients):
            self._environment.process(self._client(number % len(self._locks)))
        self._run_until(answers // 4)
        started, before = self._environment.now, self._answers
        self._run_until(before + answers)
        return float((self._answers - before) / (self._environment.now - started))

    def _run_until(self, answers: int) -> None:
        while self._answers < answers:
            self._environment.step()

    def _client(self, process: int) -> Iterator[Any]:
        stages = self._request.stages
        while True:
            yield from self._work(None, self._request.client)
            with self._loops[process].request() as loop:
                yield loop
                yield from self._stage(process, stages["loop"])
            for name in STAGES[1:]:
                with self._workers[process].request() as worker:
                    yield worker
                    yield from self._stage(process, stages[name])
            self._answers += 1

    def _stage(self, process: int, part: Part) -> Iterator[Any]:
        yield from self._work(self._locks[process], part.held)
        yield from self._work(None, part.free)

    def _work(self, lock: simpy.Resource | None, seconds: float) -> Iterator[Any]:
        pieces = max(1, math.ceil(seconds / SLICE)) if seconds else 0
        for _ in range(pieces):
            if lock is None:
                yield from self._compute(seconds / pieces)
                continue
            with lock.request() as mine:
                yield mine
                yield from self._compute(seconds / pieces)

    def _compute(self, seconds: float) -> Iterator[Any]:
        with self._cores.request() as core:
            yield core
            yield self._environment.timeout(seconds)


def simulated(request: Request, number: int, processes: int = 1, answers: int = 400) -> float:
    """Answers a second on so many cores, with enough clients to use them."""
    share = max(1, number // processes)
    clients = 4 * max(4, number)
    machine_ = Machine(request, number, processes, min(16, share) + 1)
    return machine_.rate(clients, max(answers, 4 * clients))


def stage_of(function: str) -> str:
    """The stage of a function, as `lock_held.function_of` names it."""
    file = function.lstrip("`")
    return next((stage for room, stage in _ROOMS.items() if file.startswith(room)), "loop")


def request_of(held: Held, timing: Mapping[str, float], client: float) -> Request:
    """The parts of a request from what was measured.

    timing: seconds of each stage but the loop's, of single requests. client: its CPU seconds.
    """
    by_stage = dict.fromkeys(STAGES, 0.0)
    for function in held.functions:
        by_stage[stage_of(function)] += held.of(function) / 1000
    free = max(0.0, held.total / held.answers - sum(by_stage.values()))
    whole = sum(timing.values())
    parts = {
        name: Part(seconds, free * timing.get(name, 0.0) / whole)
        for name, seconds in by_stage.items()
    }
    return Request(parts, client)


def timing_of(server: Server, path: str, count: int = 20) -> dict[str, float]:
    """The median seconds of decoding, inference and rendering of single requests."""
    kind, body = multipart(photograph(0))
    url = f"http://127.0.0.1:{server.port}{path}"
    found: dict[str, list[float]] = {name: [] for name in STAGES[1:]}
    for _ in range(count):
        sent = urllib.request.Request(url, body, {"content-type": kind})
        with urllib.request.urlopen(sent, timeout=60) as response:  # noqa: S310
            header = response.headers["server-timing"]
        for item in header.split(", "):
            name, _, milliseconds = item.partition(";dur=")
            if name in found:
                found[name].append(float(milliseconds) / 1000)
    return {name: statistics.median(values) for name, values in found.items()}


class Taken:
    """The share of some cores that other programs take while a server and its clients run."""

    def __init__(self, server: Server, allowed: Sequence[int]) -> None:
        self._server, self._cores = server, allowed

    def begin(self) -> None:
        self._before = self._now()

    def end(self) -> None:
        self._after = self._now()

    def _now(self) -> tuple[float, float]:
        return busy(Path("/proc/stat").read_text(), self._cores), self._server.usage().cpu

    def share(self, found: Measured) -> float:
        """Of the window of a load, between 0 and 1."""
        every, own = (b - a for a, b in zip(self._before, self._after, strict=True))
        others = every - own - found.client_cpu
        return min(1.0, max(0.0, others / (len(self._cores) * found.window)))


def busy(stat: str, allowed: Sequence[int]) -> float:
    """Seconds in which some cores were not idle; `stat`: the text of /proc/stat."""
    ticks = 0
    for line in stat.splitlines():
        name, *values = line.split()
        if name in {f"cpu{core}" for core in allowed}:
            user, nice, system, _idle, _waits, interrupts, soft, stolen = map(int, values[:8])
            ticks += user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Real:
    """A real server on some cores: answers a second of free cores, and the share not free."""

    rate: float
    taken: float


@contextmanager
def running(server: Server, allowed: Sequence[int]) -> Iterator[None]:
    """Let a paused server run; what is started inside is on its cores."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, allowed)
    server.resume()
    try:
        yield
    finally:
        server.pause()
        os.sched_setaffinity(0, every)


def loaded(server: Server, allowed: Sequence[int], options: argparse.Namespace) -> Real:
    """The rate of one server under one load. Raises RuntimeError if an answer is not 200."""
    load = Load(server.port, options.path, 16, options.seconds)
    taken = Taken(server, allowed)
    with running(server, allowed):
        found = run(load, PHOTOS, begins=taken.begin, ends=taken.end)
    if found.failures:
        raise RuntimeError(f"{options.path}: {found.failures}")
    share = taken.share(found)
    print(f"{len(allowed)} cores: {found.rate:.0f}/s, {share:.0%} taken", file=sys.stderr)
    return Real(found.rate / max(0.01, 1 - share), share)


def parts(server: Server, allowed: Sequence[int], options: argparse.Namespace) -> Request:
    """The parts of a request, of all rounds together."""
    load = Load(server.port, options.path, 16, options.seconds)
    held, client, answers = Held(), 0.0, 0
    with tempfile.TemporaryDirectory() as folder, running(server, allowed):
        timing = timing_of(server, options.path)
        for _ in range(options.rounds):
            sampler = Sampler(server, options.seconds, 250, Path(folder))
            seen = run(load, PHOTOS, begins=sampler.begin, ends=sampler.end)
            held += sampler.held(seen.rate, len(seen.latencies))
            client += seen.client_cpu
            answers += len(seen.latencies)
    return request_of(held, timing, client / answers)


def measured(options: argparse.Namespace) -> tuple[Request, dict[int, Real]]:
    """The parts of a request on one core, and real servers on 1 and 2, in turns."""
    every = sorted(os.sched_getaffinity(0))
    allowed = {number: every[:number] for number in (1, 2)[: cores()]}
    found: dict[int, list[Real]] = {number: [] for number in allowed}
    kind = camserve(Model(options.model, None, ""), *options.flag)
    with ExitStack() as stack:
        servers = {n: stack.enter_context(serving(kind, on)) for n, on in allowed.items()}
        for server in servers.values():
            server.pause()
        for _ in range(options.rounds):
            for number, server in servers.items():
                found[number].append(loaded(server, allowed[number], options))
        request = parts(servers[1], allowed[1], options)
    return request, {number: middle(rounds) for number, rounds in found.items()}


def middle(rounds: Sequence[Real]) -> Real:
    """The medians of some rounds."""
    rates, taken = [each.rate for each in rounds], [each.taken for each in rounds]
    return Real(statistics.median(rates), statistics.median(taken))


def processes_for(number: int) -> int:
    """As `--processes auto` on a CPU."""
    return math.ceil(number / 8)


def curves(request: Request) -> dict[str, list[float]]:
    """Answers a second by number of cores, clients on other machines."""
    alone = Request(request.stages)
    return {
        "one process": [simulated(alone, number) for number in CORES],
        "--processes auto": [simulated(alone, number, processes_for(number)) for number in CORES],
    }


def draw(found: Mapping[str, Sequence[float]], path: Path) -> None:
    """The curves, both axes logarithmic."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - for the plot alone

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, rates in found.items():
        axes.plot(CORES, [rate / rates[0] for rate in rates], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="cores", ylabel="throughput ÷ that of one core")
    axes.set_xticks(CORES, [str(number) for number in CORES])
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def report(request: Request, reals: Mapping[int, Real], found: Mapping[str, Any]) -> str:
    """The tables: parts of a request, the check, and the curves."""
    rows = [
        [name, f"{1000 * part.held:.2f}", f"{1000 * part.free:.2f}"]
        for name, part in request.stages.items()
    ]
    rows.append(["client", "", f"{1000 * request.client:.2f}"])
    checks = []
    for number, real in reals.items():
        expected = simulated(request, number)
        row = [str(number), f"{real.rate:.0f}", f"{expected:.0f}", f"{expected / real.rate:.2f}"]
        checks.append([*row, f"{real.taken:.0%}"])
    wide = [
        [str(number), *(f"{values[place] / values[0]:.1f}" for values in found.values())]
        for place, number in enumerate(CORES)
    ]
    return "\n\n".join(
        [
            f"{machine()}; load {os.getloadavg()[0]:.1f} during the measurement.",
            markdown(["stage", "ms with the lock", "ms without"], rows),
            markdown(["cores", "answers/s, real", "simulated", "÷", "other programs"], checks),
            markdown(["cores", *(f"{name} ÷ 1 core" for name in found)], wide),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, simulate, and print; 1 if the simulation is off by more than a tenth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="null_model:build")
    parser.add_argument("--path", default="/explain?include=heatmap")
    parser.add_argument("--flag", action="append", default=[], help="of `camserve serve`")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a page with the marks wide:begin and wide:end")
    options = parser.parse_args(arguments)
    request, reals = measured(options)
    found = curves(request)
    text = report(request, reals, found)
    print(text)
    if options.write:
        put_between(options.write, "wide", text)
        draw(found, PLOT)
    errors = [abs(simulated(request, number) / real.rate - 1) for number, real in reals.items()]
    return int(max(errors) > 0.1)


if __name__ == "__main__":
    end_when_told()
    sys.exit(main())
