"""Four times what the service can do, for two minutes; then SIGTERM in the middle of the same.

    .venv/bin/python benchmarks/overload.py                    # about five minutes
    .venv/bin/python benchmarks/overload.py --seconds 30

First the peak: a closed loop of sixteen clients. Then an open loop offers a multiple of it, from a
process of its own, over connections that are kept alive. What is accepted must be answered within
the deadline and at nearly the peak's rate, what is refused must be refused at once, and memory must
stay. Clients and server share the machine's cores: the time of a refusal is also given as the
server's log has it, and the rates also by the second of CPU time that the server used.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import clients
import psutil
from measuring import machine, markdown, photograph, quantile
from open_loop import LOST, UNCONNECTED, Offer, Offered, offer
from servers import Kind, Server, end_when_told, serving

MEBIBYTE = 1 << 20
SHARE_OF_PEAK, REFUSAL_SECONDS, GROWTH = 0.9, 0.050, 64.0
"""Of the peak's rate; of a refusal at the 99th percentile; MiB between the quarters of the run."""
REFUSALS = (429, 503)


@dataclass
class Verdicts:
    """What must hold, and whether it did."""

    said: list[tuple[str, str, bool]] = field(default_factory=list)

    def add(self, what: str, figure: str, is_so: bool) -> None:
        self.said.append((what, figure, is_so))

    def table(self) -> str:
        rows = [[what, figure, "yes" if is_so else "**no**"] for what, figure, is_so in self.said]
        return markdown(("what must hold", "measured", "does it"), rows)


@contextmanager
def served(options: argparse.Namespace, log: Path) -> Iterator[Server]:
    """The service, with its log in that file."""
    arguments = (
        *("-m", "service", "serve", "--port", "{port}", "--log-format", "json"),
        *("--model", options.model, "--request-timeout", str(options.deadline)),
    )
    with serving(Kind(arguments, "/health/ready"), log_file=log) as server:
        yield server


def logged(log: Path) -> list[dict[str, object]]:
    """The lines about requests."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if '"event": "request"' in line]


@contextmanager
def watched(server: Server, every: float = 0.5) -> Iterator[list[float]]:
    """Resident MiB of the server, as they go."""
    readings: list[float] = []
    stop, process = threading.Event(), psutil.Process(server.pid)

    def watch() -> None:
        while not stop.wait(every):
            readings.append(process.memory_info().rss / MEBIBYTE)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield readings
    finally:
        stop.set()
        thread.join()


def overload(options: argparse.Namespace, photos: list[bytes], verdicts: Verdicts) -> float:
    """Offer too much and judge; the peak's rate."""
    with tempfile.TemporaryDirectory() as folder, served(options, Path(folder) / "log") as server:
        load = clients.Load(server.port, "/explain", options.clients, options.peak_seconds)
        usage = [server.usage().cpu]
        peak = clients.run(load, photos, *[lambda: usage.append(server.usage().cpu)] * 2)
        peak_cpu = (usage[2] - usage[1]) / peak.window
        rate = options.times * peak.rate
        print(f"peak: {peak.rate:.1f} a second; offered: {rate:.1f}", flush=True)
        before = server.usage().cpu
        with watched(server) as rss:
            found = offer(Offer(server.port, "/explain", rate, options.seconds), photos)
        cpu = (server.usage().cpu - before) / options.seconds
        log = Path(folder) / "log"
        own = [float(str(each["ms"])) / 1000 for each in logged(log) if each["status"] == 429]
    _say(found)
    _judge(options, verdicts, found, peak.rate, rss)
    print(
        f"answered by the second of the server's CPU time: {peak.rate / peak_cpu:.1f} at the peak, "
        f"{len(found.seconds(200)) / options.seconds / cpu:.1f} overloaded; it used {peak_cpu:.2f} "
        f"and {cpu:.2f} cores"
    )
    if own:
        verdicts.add(
            "a refusal by the server's own clock, 99th percentile",
            f"{1000 * quantile(own, 0.99):.1f} ms",
            quantile(own, 0.99) <= REFUSAL_SECONDS,
        )
    return peak.rate


def _say(found: Offered) -> None:
    statuses = Counter(each.status for each in found.sent)
    rows = []
    for status, count in sorted(statuses.items()):
        took = [1000 * value for value in found.seconds(status)]
        shown = [f"{quantile(took, share):.0f}" for share in (0.5, 0.9, 0.99, 1.0)]
        name = {LOST: "lost", UNCONNECTED: "not connected"}.get(status, str(status))
        rows.append([name, str(count), *shown])
    print(markdown(("status", "n", "p50 ms", "p90", "p99", "max"), rows))
    late = 1000 * quantile(found.late, 0.99)
    print(f"{found.connections} connections; sent too late by {late:.0f} ms at p99", flush=True)


def _judge(
    options: argparse.Namespace, verdicts: Verdicts, found: Offered, peak: float, rss: list[float]
) -> None:
    accepted = found.seconds(200)
    refused = [seconds for status in REFUSALS for seconds in found.seconds(status)]
    others = len(found.sent) - len(accepted) - len(refused)
    verdicts.add("every request is answered or refused", f"{others} otherwise", others == 0)
    p99 = quantile(accepted, 0.99)
    within = f"{p99:.2f} s, of {options.deadline:g} allowed"
    verdicts.add("what is accepted, 99th percentile", within, p99 <= options.deadline)
    share = len(accepted) / options.seconds / peak
    verdicts.add("rate of what is accepted", f"{share:.2f} of the peak", share >= SHARE_OF_PEAK)
    p99 = quantile(refused, 0.99)
    told = f"{1000 * p99:.0f} ms, of {1000 * REFUSAL_SECONDS:g} allowed"
    verdicts.add("a refusal as the client sees it, 99th percentile", told, p99 <= REFUSAL_SECONDS)
    quarter = max(1, len(rss) // 4)
    grown = max(rss[-quarter:]) - max(rss[quarter : 2 * quarter] or rss)
    shown = f"{max(rss):.0f} MiB at most; last quarter {grown:+.1f} MiB over the second"
    verdicts.add("memory stays", shown, grown <= GROWTH)


def told_to_stop(
    options: argparse.Namespace, photos: list[bytes], rate: float, verdicts: Verdicts
) -> None:
    """SIGTERM in the middle of the same load: what was accepted is answered, and the end is 0."""
    seconds = min(options.seconds, 20.0)
    with tempfile.TemporaryDirectory() as folder, served(options, Path(folder) / "log") as server:
        process = psutil.Process(server.pid)
        term = threading.Timer(seconds / 2, os.kill, (server.pid, signal.SIGTERM))
        term.start()
        found = offer(Offer(server.port, "/explain", rate, seconds), photos)
        term.join()
        ended = process.wait(30) if process.is_running() else 0
        lines = {str(each.get("request_id")): each for each in logged(Path(folder) / "log")}
    _say(found)
    lost = [each for each in found.sent if each.status == LOST]
    accepted = [each for each in lost if str(each.number) in lines]
    failed = [e for e in found.sent if e.status not in (200, LOST, UNCONNECTED, *REFUSALS)]
    verdicts.add(
        "after SIGTERM: what the server had read is answered or refused",
        f"{len(accepted)} lost, {len(failed)} failed; {len(found.seconds(200))} answered",
        not accepted and not failed,
    )
    print(
        f"{len(lost) - len(accepted)} requests met a connection that was just being closed: the "
        f"server never read them. It ended with {ended}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print verdicts, and fail where one is a no."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--seconds", type=float, default=120.0, help="of overload")
    parser.add_argument("--peak-seconds", type=float, default=15.0)
    parser.add_argument("--times", type=float, default=4.0, help="the peak's rate")
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop")
    parser.add_argument("--deadline", type=float, default=10.0, help="CAMSERVE_REQUEST_TIMEOUT")
    options = parser.parse_args(arguments)
    photos = [photograph(seed, 320, 240) for seed in range(8)]
    verdicts = Verdicts()
    peak = overload(options, photos, verdicts)
    told_to_stop(options, photos, options.times * peak, verdicts)
    print(f"\n{verdicts.table()}\n\n{machine()}")
    if not all(is_so for *_, is_so in verdicts.said):
        sys.exit(1)


if __name__ == "__main__":
    end_when_told()
    main()
