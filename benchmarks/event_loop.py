"""How long `/health/live` waits while the service explains as much as it can.

    python benchmarks/event_loop.py                                # the built-in model
    python benchmarks/event_loop.py --model torchvision/resnet50 --seconds 60

Everything but the service's own work stays off the event loop; were something to run there, the
probe would wait for it. Three processes: `camserve serve`, the clients that ask for explanations,
and this one, which only probes.
"""

from __future__ import annotations

import argparse
import http.client
import math
import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from measuring import ROOT, machine, photograph
from servers import Kind, end_when_told, serving

BUILTIN = ROOT / "service" / "models" / "builtin" / "weights.safetensors"
BOUND_MS = 50.0
"""What `/health/live` may take under load, at the 99th percentile."""

READY = "/health/ready"
EVERY = 0.010
"""Seconds between two probes."""


def explain_until(port: int, clients: int, stop: Event, answered: multiprocessing.Queue) -> None:
    """Ask for heatmap and overlay without pause, each client on its own connection."""
    seconds: list[float] = []
    failures: list[str] = []

    def client(number: int) -> None:
        picture = photograph(number)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while not stop.is_set():
            started = time.perf_counter()
            connection.request(
                "POST",
                "/explain?include=heatmap&include=overlay",
                picture,
                {"content-type": "image/jpeg"},
            )
            response = connection.getresponse()
            response.read()
            seconds.append(time.perf_counter() - started)
            if response.status != 200:
                failures.append(str(response.status))
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered.put((seconds, failures))


def probe(port: int, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds that `/health/live` took, and by how much this process itself overslept."""
    took, late = [], []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    until = time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        connection.request("GET", "/health/live")
        response = connection.getresponse()
        response.read()
        answered = time.perf_counter()
        if response.status != 200:
            sys.exit(f"/health/live answered {response.status}")
        took.append((answered - started) * 1000)
        pause = max(0.0, started + EVERY - answered)
        time.sleep(pause)
        late.append((time.perf_counter() - answered - pause) * 1000)
    connection.close()
    return took, late


def cpu_seconds(*pids: int) -> tuple[float, float]:
    """CPU time since the start: of these processes, and of everything on this machine (Linux)."""
    own = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        own += int(fields[11]) + int(fields[12])
    with Path("/proc/stat").open(encoding="utf-8") as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    per_second = os.sysconf("SC_CLK_TCK")
    return own / per_second, (sum(ticks) - ticks[3] - ticks[4]) / per_second


def line(name: str, values: list[float]) -> str:
    """One row of the table: p50, p90, p99, maximum and the count."""
    ranked = sorted(values)
    shown = [ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.9, 0.99, 1)]
    return f"| {name} | {' | '.join(f'{value:.1f}' for value in shown)} | {len(ranked)} |"


def main() -> None:
    """Measure, print the table, and fail where the bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", help="as of camserve serve; random weights where none are given")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the load")
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    model = options.model or ("builtin" if BUILTIN.exists() else "torchvision/resnet50")
    arguments = ["--model", model]
    if model.startswith("torchvision/") and "@" not in model:
        arguments.append("--allow-random-weights")
    spawn = multiprocessing.get_context("spawn")
    stop, answered = spawn.Event(), spawn.Queue()
    with serving(Kind(("-m", "service", "serve", "--port", "{port}", *arguments), READY)) as server:
        port, pid = server.port, server.pid
        probe(port, 1)  # warm
        idle, idle_late = probe(port, min(options.seconds, 5))
        load = spawn.Process(target=explain_until, args=(port, options.clients, stop, answered))
        load.start()
        probe(port, 4)  # until the clients are up
        before = cpu_seconds(pid, load.pid or 0, os.getpid())
        busy, busy_late = probe(port, options.seconds)
        after = cpu_seconds(pid, load.pid or 0, os.getpid())
        stop.set()
        seconds, failures = answered.get(timeout=120)
        load.join()
    print(f"{model}, {options.clients} clients, {options.seconds:g} s; {machine()}\n")
    print("| milliseconds | p50 | p90 | p99 | max | n |\n|---|---|---|---|---|---|")
    print(line("/health/live, idle", idle))
    print(line("/health/live, under load", busy))
    print(line("the probe's own delay, idle", idle_late))
    print(line("the probe's own delay, under load", busy_late))
    print(line("/explain, heatmap and overlay", [each * 1000 for each in seconds]))
    print(f"\n/explain: {options.clients * len(seconds) / sum(seconds):.1f} requests a second")
    ours, all_of_it = (
        (end - start) / options.seconds for start, end in zip(before, after, strict=True)
    )
    print(f"cores in use under load: {ours:.2f} by this, {all_of_it - ours:.2f} by others")
    if failures:
        sys.exit(f"{len(failures)} explanations failed: {sorted(set(failures))}")
    p99 = sorted(busy)[math.ceil(0.99 * len(busy)) - 1]
    if p99 > BOUND_MS:
        sys.exit(f"/health/live took {p99:.1f} ms at p99 under load; {BOUND_MS:g} are allowed")


if __name__ == "__main__":
    end_when_told()
    main()
