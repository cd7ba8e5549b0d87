"""Load the service step by step, up to more than it takes, and say what each step saw.

    make load                                        # a server of its own, on loopback
    make load ARGS='--serve "--workers 1"'           # with other settings
    make load ARGS='--url http://127.0.0.1:8000'     # one that runs; --container NAME: in docker

The exit code is that of `locustfile.py`. build/load/ gets report.html, and the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from measuring import ROOT
from servers import Kind, Usage, end_when_told, serving, usage

HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "load"
EVERY = 0.25
"""Seconds between two looks at what the server has used."""

Look = Callable[[], Usage]


@dataclass(frozen=True, slots=True)
class Step:
    """One step. rate: requests answered a second (not: images). refused: their share.

    p50, p99: seconds, of those answered with 200. cpu: seconds of CPU a request answered; peak:
    MiB, since the start; both None where the server's processes cannot be seen.
    """

    clients: int
    rate: float
    refused: float
    p50: float
    p99: float
    cpu: float | None
    peak: float | None


def run(
    url: str, look: Look | None, steps: str, seconds: float, report: Path
) -> tuple[list[Step], int]:
    """Send the load; what each step saw, and Locust's exit code.

    report: where Locust's page goes; the figures go beside it.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    results = report.with_suffix(".answers.json")
    results.unlink(missing_ok=True)
    given = {"LOAD_STEPS": steps, "LOAD_SECONDS": str(seconds), "LOAD_RESULTS": str(results)}
    command = [sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), "--headless"]
    command += ["--host", url, "--html", str(report), "--only-summary"]
    with _watched(look) as seen:
        code = subprocess.run(command, env=os.environ | given, check=False).returncode  # noqa: S603
    told = json.loads(results.read_text(encoding="utf-8"))
    found = []
    for place, answers in enumerate(told["steps"]):
        start = told["began"] + place * seconds
        used = [usage for at, usage in seen if start <= at <= start + seconds]
        found.append(_step(told["clients"][place], answers, seconds, used))
    figures = json.dumps([asdict(each) for each in found], indent=1)
    report.with_suffix(".json").write_text(figures, encoding="utf-8")
    return found, code


def _step(clients: int, answers: list[list], seconds: float, used: list[Usage]) -> Step:
    good = sorted(each[2] for each in answers if each[1] == 200)
    refused = sum(each[1] in (429, 503) for each in answers)
    hundredths = statistics.quantiles(good, n=100) if len(good) > 1 else [0.0] * 99
    answered = max(1, len(answers) - refused)
    return Step(
        clients=clients,
        rate=(len(answers) - refused) / seconds,
        refused=refused / max(1, len(answers)),
        p50=hundredths[49],
        p99=hundredths[98],
        cpu=(used[-1].cpu - used[0].cpu) / answered if used else None,
        peak=max(each.peak for each in used) if used else None,
    )


@contextmanager
def _watched(look: Look | None) -> Iterator[list[tuple[float, Usage]]]:
    """What the server had used, again and again, with the time."""
    seen: list[tuple[float, Usage]] = []
    ended = threading.Event()

    def watch() -> None:
        while look is not None and not ended.wait(EVERY):
            seen.append((time.time(), look()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def in_container(name: str) -> Look:
    """What the processes of a container of this machine have used."""
    asked = ["docker", "inspect", "--format", "{{.State.Pid}}", name]
    pid = subprocess.run(asked, check=True, capture_output=True, text=True).stdout  # noqa: S603
    return partial(usage, int(pid))


def own_server(settings: str) -> Kind:
    """`camserve serve` with these flags."""
    command = ("-m", "service", "serve", "--port", "{port}", *shlex.split(settings))
    return Kind(command, "/health/ready")


def table(steps: list[Step]) -> str:
    """The steps as a table for a page."""
    lines = [
        "| clients | answers/s | refused | p50 | p99 | CPU an answer | memory |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in steps:
        cpu = "–" if each.cpu is None else f"{each.cpu * 1000:.1f} ms"
        peak = "–" if each.peak is None else f"{each.peak:.0f} MiB"
        lines.append(
            f"| {each.clients} | {each.rate:.1f} | {each.refused:.0%} | {each.p50 * 1000:.0f} ms | "
            f"{each.p99 * 1000:.0f} ms | {cpu} | {peak} |"
        )
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a server that runs; without it one is started")
    parser.add_argument("--container", help="the docker container that it runs in, to measure it")
    parser.add_argument("--serve", default="", help="flags of the server that is started")
    parser.add_argument("--steps", default="1,4,16,64,128", help="clients, step after step")
    parser.add_argument("--seconds", type=float, default=15, help="of each step")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder for the report")
    given = parser.parse_args()
    given.build.mkdir(parents=True, exist_ok=True)
    report = given.build / "report.html"
    end_when_told()
    if given.url:
        look = in_container(given.container) if given.container else None
        steps, code = run(given.url, look, given.steps, given.seconds, report)
    else:
        with serving(own_server(given.serve), log_file=given.build / "server.log") as server:
            url = f"http://127.0.0.1:{server.port}"
            steps, code = run(url, server.usage, given.steps, given.seconds, report)
    print(table(steps))
    return code


if __name__ == "__main__":
    sys.exit(main())
