"""Measure what a machine takes under several settings and write docs/reference/capacity.md.

    make capacity                                    # servers of its own
    make capacity ARGS='--container camserve:latest' # each in a container with limits

One round loads every configuration in turn, so that whatever else the machine does meets all of
them; of several rounds each figure is the median. What the page says are ratios to the first one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import httpx
from load import BUILD, Look, Step, in_container, own_server, run
from measuring import ROOT
from servers import end_when_told, serving

PAGE = ROOT / "docs" / "reference" / "capacity.md"
RESULTS = BUILD / "capacity.json"
BEGIN, END = "<!-- load:begin -->", "<!-- load:end -->"


@dataclass(frozen=True, slots=True)
class Configuration:
    """Settings to compare, as flags of `camserve serve`."""

    name: str
    flags: str


CONFIGURATIONS = (
    Configuration("the defaults", ""),
    Configuration("one worker", "--workers 1"),
    Configuration("one thread for a single request", "--single-request-threads 1"),
    Configuration("batches of one", "--max-batch 1"),
    Configuration("no compiled lane", "--no-compile"),
)


LIMITS = ("--cpus", "2", "--memory", "3g", "--pids-limit", "512")
START = 600.0
"""Seconds that a container may take until it is ready."""
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/cache:mode=1777", "--cap-drop", "ALL")  # noqa: S108


def measure(image: str | None, steps: str, seconds: float, rounds: int) -> dict[str, list[Step]]:
    """Every configuration's steps, each figure the median of the rounds."""
    taken: dict[str, list[list[Step]]] = {each.name: [] for each in CONFIGURATIONS}
    for turn in range(rounds):
        for place, each in enumerate(CONFIGURATIONS):
            with _served(image, each.flags) as (url, look):
                found, code = run(url, look, steps, seconds, BUILD / f"{place}-{turn}.html")
            print(f"{each.name}, round {turn + 1} of {rounds}: exit code {code}", flush=True)
            taken[each.name].append(found)
    return {
        name: [_median(each) for each in zip(*runs, strict=True)] for name, runs in taken.items()
    }


def _median(steps: Sequence[Step]) -> Step:
    rows = [asdict(step) for step in steps]
    return Step(**{key: statistics.median(row[key] for row in rows) for key in rows[0]})


@contextmanager
def _served(image: str | None, flags: str) -> Iterator[tuple[str, Look]]:
    if image is None:
        with serving(own_server(flags), log_file=BUILD / "server.log") as server:
            yield f"http://127.0.0.1:{server.port}", server.usage
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"127.0.0.1:{port}"
    name = f"camserve-load-{port}"
    command = ["docker", "run", "--detach", "--rm", "--name", name, *HARDENED, *LIMITS]
    command += ["--publish", f"{url}:8000", image, "serve", *shlex.split(flags)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    try:
        _await_ready(f"http://{url}/health/ready")
        yield f"http://{url}", in_container(name)
    finally:
        subprocess.run(["docker", "stop", name], check=False, stdout=subprocess.DEVNULL)  # noqa: S603, S607


def _await_ready(url: str) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        with suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).is_success:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the container was not ready within {START:g} seconds")


def tables(found: dict[str, list[Step]]) -> str:
    """The page's measured part: one configuration by load, then all of them beside it."""
    first = next(iter(found.values()))
    alone = first[0]
    lines = [
        "| clients | responses/s ÷ those of 1 client | p50 ÷ p50 of 1 | p99 ÷ p50 of 1 | refused |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {step.clients} | {step.rate / alone.rate:.2f} | {step.p50 / alone.p50:.1f} | "
        f"{step.p99 / alone.p50:.1f} | {step.refused:.0%} |"
        for step in first
    ]
    busy = _busiest(first)
    lines += [
        "",
        f"Relative to the defaults, at {busy.clients} clients (*p50, 1 client*: at 1):",
        "",
        "| configuration | responses/s | CPU/response | p50, 1 client | p99 | memory | command |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for each in CONFIGURATIONS:
        steps = found[each.name]
        same = next(step for step in steps if step.clients == busy.clients)
        figures = (
            same.rate / busy.rate,
            (same.cpu or 0) / (busy.cpu or 1),
            steps[0].p50 / alone.p50,
            same.p99 / busy.p99,
            max(step.peak or 0 for step in steps) / max(step.peak or 1 for step in first),
        )
        cells = " | ".join(f"{figure:.2f}" for figure in figures)
        asked = f"make load ARGS='--serve \"{each.flags}\"'" if each.flags else "make load"
        lines.append(f"| {each.name} | {cells} | `{asked}` |")
    peak = max(step.peak or 0 for step in first)
    cpu = busy.cpu or 1
    sentence = (
        f"Absolute numbers, valid only for that machine at that time: {1 / cpu:.0f} responses of "
        f"this mix per second for each core that the service does not share (a response takes "
        f"{cpu * 1000:.0f} ms of CPU), and a peak of {peak:.0f} MiB."
    )
    return "\n".join([*lines, "", sentence])


def _busiest(steps: Sequence[Step]) -> Step:
    """The most clients of whom next to none was refused."""
    return [step for step in steps if step.refused < 0.01][-1]


def write(found: dict[str, list[Step]], how: str) -> None:
    """Put the tables into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(
        f"{before}{BEGIN}\n\n{how}\n\n{tables(found)}\n\n{END}{after}", encoding="utf-8"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--container", metavar="IMAGE", help="run each in a container of this image"
    )
    parser.add_argument("--steps", default="1,4,16,128", help="clients, step after step")
    parser.add_argument("--seconds", type=float, default=8, help="of each step")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    end_when_told()
    BUILD.mkdir(parents=True, exist_ok=True)
    found = measure(given.container, given.steps, given.seconds, given.rounds)
    kept = {name: [asdict(step) for step in steps] for name, steps in found.items()}
    RESULTS.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    where = f"a container (`{' '.join(LIMITS)}`, read-only)" if given.container else "a process"
    write(
        found,
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: the built-in model in {where} on "
        f"{os.cpu_count()} cores shared with the clients and other programs; {given.rounds} rounds "
        f"of all configurations in turn, {given.seconds:g} s per step.",
    )


if __name__ == "__main__":
    main()
