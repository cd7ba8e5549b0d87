"""Several server processes: how many times one process they are, and what a reload or a kill costs.

    .venv/bin/python benchmarks/processes.py                         # about six minutes
    .venv/bin/python benchmarks/processes.py --parts ratio --model torchvision/resnet50
    .venv/bin/python benchmarks/processes.py --parts reloads kills --times 20

`ratio`: answers a second of one process and of two with the same cores, in turns. `reloads`: SIGHUP
again and again while clients on lasting connections explain images; none of them retries. `kills`:
SIGKILL of one process again and again; a client repeats a request once whose connection broke. It
exits with an error if a request failed.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from clients import Load, run
from measuring import machine, markdown, photograph, ratio
from servers import Kind, Model, Server, camserve, end_when_told, serving

QUICK = ("--no-compile", "--no-sensitivity")
"""For servers whose speed does not matter: they start sooner."""

PATIENCE = 300.0
"""Seconds to wait for a process that is to be ready."""


@dataclass
class Clients:
    """Threads that explain one image again and again on lasting connections, until `end`.

    retries: how often a request is repeated whose connection broke. outcomes: by status or error.
    repeated: how many requests were.
    """

    port: int
    retries: int
    count: int = 4
    outcomes: Counter[str] = field(default_factory=Counter)
    repeated: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._body = photograph(0, 320, 240)
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.count)]

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def failures(self) -> dict[str, int]:
        """What was not answered with 200."""
        return {name: count for name, count in self.outcomes.items() if name != "200"}

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        while not self._stop.is_set():
            self.outcomes[self._outcome(connection)] += 1
        connection.close()

    def _outcome(self, connection: http.client.HTTPConnection) -> str:
        for attempt in range(self.retries + 1):
            try:
                connection.request("POST", "/explain", self._body, {"content-type": "image/jpeg"})
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                said = repr(error)
                self.repeated += attempt < self.retries
            else:
                return str(response.status)
        return said


class Watched:
    """A server's log, as it grows: which of its processes are ready."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def events(self, name: str) -> list[int]:
        """The processes that had an event, in order."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        found = re.findall(rf"\] {name} .*?process(?:es)?=\D*?(\d+)", _plain(text))
        return [int(number) for number in found]

    def wait(self, name: str, count: int) -> None:
        """Wait until an event has happened so often. Raises TimeoutError."""
        until = time.monotonic() + PATIENCE
        while len(self.events(name)) < count:
            if time.monotonic() > until:
                raise TimeoutError(f"{name} happened {len(self.events(name))} times, not {count}")
            time.sleep(0.1)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def reload(server: Server, log: Watched, number: int, _processes: int) -> None:
    """One rolling reload, to its end."""
    os.kill(server.pid, signal.SIGHUP)
    log.wait("reloaded", number + 1)


def kill(_server: Server, log: Watched, number: int, processes: int) -> None:
    """Kill the process that was ready first of those that live, and wait for the next one."""
    dead = set(log.events("process_died"))
    os.kill(next(each for each in log.events("process_ready") if each not in dead), signal.SIGKILL)
    log.wait("process_ready", processes + number + 1)


Disturb = Callable[[Server, Watched, int, int], None]
DISTURBANCES: dict[str, tuple[Disturb, int]] = {"reloads": (reload, 0), "kills": (kill, 1)}
"""By name: what happens, and how often a client may repeat a request."""


def disturbed(name: str, kind: Kind, times: int, processes: int) -> Clients:
    """Disturb a server so often while clients ask."""
    disturb, retries = DISTURBANCES[name]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with serving(kind, log_file=log) as server:
            watched = Watched(log)
            watched.wait("process_ready", processes)
            clients = Clients(server.port, retries)
            clients.begin()
            try:
                for number in range(times):
                    disturb(server, watched, number, processes)
            finally:
                clients.end()
    return clients


def rates(model: Model, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Answers a second of one process and of several, round by round."""
    found: dict[int, list[float]] = {1: [], options.processes: []}
    photos = [photograph(seed) for seed in range(3)]
    with ExitStack() as stack:
        servers = {}
        for count in found:
            kind = camserve(model, "--processes", str(count), *options.serve.split())
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            log = Path(folder) / "log"
            servers[count] = stack.enter_context(serving(kind, options.cores, log))
            if count > 1:
                Watched(log).wait("process_ready", count)
            servers[count].pause()
        for number in range(options.rounds):
            for count, server in servers.items():
                server.resume()
                load = Load(server.port, options.path, options.clients, options.seconds)
                measured = run(load, photos)
                server.pause()
                print(f"round {number + 1}: {count}: {measured.rate:.1f}/s", file=sys.stderr)
                found[count].append(measured.rate)
    return found[1], found[options.processes]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts; 1 if a request failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--parts", nargs="+", default=("ratio", *DISTURBANCES))
    parser.add_argument("--model", default="null_model:build")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--times", type=int, default=20, help="reloads, and kills")
    parser.add_argument("--rounds", type=int, default=7, help="of the ratio")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each round")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--path", default="/explain?include=heatmap")
    parser.add_argument("--cores", nargs="+", type=int, default=(), help="that servers may use")
    parser.add_argument("--serve", default="", help="more arguments of camserve serve, in quotes")
    options = parser.parse_args(arguments)
    model = Model(options.model, None, "")
    rows, failed = [], False
    if "ratio" in options.parts:
        one, several = rates(model, options)
        rows.append(["answers/s of 1 process", f"{statistics.median(one):.0f}"])
        name = f"{options.processes} processes ÷ 1"
        rows.append([name, str(ratio(several, one))])
    kind = camserve(model, "--processes", str(options.processes), *QUICK, *options.serve.split())
    for name in [each for each in DISTURBANCES if each in options.parts]:
        clients = disturbed(name, kind, options.times, options.processes)
        failed = failed or bool(clients.failures)
        said = f"{clients.outcomes['200']} answers, {clients.failures or 'none failed'}"
        rows.append([f"{options.times} {name}", f"{said}, {clients.repeated} repeated"])
    print(f"{machine()}\n\n{markdown(['', ''], rows)}")
    return int(failed)


if __name__ == "__main__":
    end_when_told()
    sys.exit(main())
