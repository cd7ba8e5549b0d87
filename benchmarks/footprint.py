"""What does a model need? Resident memory and start time of a service, by model.

    .venv/bin/python benchmarks/footprint.py                       # a few minutes
    .venv/bin/python benchmarks/footprint.py torchvision/vit_b_16
    .venv/bin/python benchmarks/footprint.py --before CHECKOUT --write docs/how-to/deploy.md

Starts `camserve serve` with each model alone, without downloads (random weights of the same size;
the built-in model has its own), and reads the time until `/health/ready` answers 200, the resident
memory then, and its peak after 20 explained images of 640 x 480 pixels, four at a time. The first
row is a process that only imports the service. With --before the two checkouts take turns, round by
round; a figure is the median of the rounds. A first start without measurement fills the caches.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil
from measuring import ROOT, machine, markdown, photograph, put_between
from servers import Kind, end_when_told, serving

MODELS = (
    *("builtin", "torchvision/mobilenet_v3_small", "torchvision/resnet18"),
    *("torchvision/resnet50", "torchvision/convnext_tiny", "torchvision/vit_b_16"),
)
MEBIBYTE = 1 << 20
CLIENTS, IMAGES = 4, 20
IMPORTS = "import service.cli.serve_http; print(open('/proc/self/status').read())"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Seconds until ready; MiB resident then, those of them that no file has, and the peak."""

    seconds: float
    ready: float
    anonymous: float
    peak: float


def explain(port: int, images: int) -> None:
    """Send some images, one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    for seed in range(images):
        body = photograph(seed, 640, 480)
        connection.request("POST", "/explain", body, {"content-type": "image/jpeg"})
        response = connection.getresponse()
        response.read()
        assert response.status == 200, response.status
    connection.close()


def resident(status: str) -> tuple[float, float]:
    """MiB in memory, and those of them that no file has, from /proc/PID/status."""
    found = (re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE) for name in FIELDS)
    ready, anonymous = (int(each[1]) / 1024 if each else float("nan") for each in found)
    return ready, anonymous


FIELDS = ("VmRSS", "RssAnon")


def of_imports(folder: Path) -> Footprint:
    """A process that imports what `camserve serve` does, and loads no model."""
    started = time.monotonic()
    printed = subprocess.check_output([sys.executable, "-c", IMPORTS], cwd=folder, text=True)  # noqa: S603 - our own
    ready, anonymous = resident(printed)
    return Footprint(time.monotonic() - started, ready, anonymous, ready)


def of_model(builder: str, folder: Path, flags: Sequence[str]) -> Footprint:
    """Start a service with one model, load it, and read what it took."""
    serve = ("-m", "service", "serve", "--port", "{port}", "--model", f"served={builder}", *flags)
    started = time.monotonic()
    with serving(Kind(serve, "/health/ready", folder=folder)) as server:
        seconds = time.monotonic() - started
        ready, anonymous = resident(Path(f"/proc/{server.pid}/status").read_text())
        process, peak = psutil.Process(server.pid), ready
        threads = [
            threading.Thread(target=explain, args=(server.port, IMAGES // CLIENTS))
            for _ in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            peak = max(peak, process.memory_info().rss / MEBIBYTE)
            time.sleep(0.02)
    return Footprint(seconds, ready, anonymous, peak)


def row(builder: str, folder: Path, options: argparse.Namespace) -> Footprint:
    """One start of one checkout."""
    if builder == "imports":
        return of_imports(folder)
    return of_model(builder, folder, options.flag)


def measured(builder: str, options: argparse.Namespace) -> list[list[str]]:
    """The rows of one model: each checkout, in turns."""
    folders = {"before": options.before, "now": ROOT} if options.before else {"": ROOT}
    found: dict[str, list[Footprint]] = {name: [] for name in folders}
    for number in range(options.rounds + 1):
        for name, folder in folders.items():
            footprint = row(builder, folder, options)
            print(builder, name, footprint, file=sys.stderr, flush=True)
            found[name] += [footprint] if number else []
    return [_cells(builder, name, rounds) for name, rounds in found.items()]


def _cells(builder: str, name: str, rounds: Sequence[Footprint]) -> list[str]:
    columns = zip(*map(astuple, rounds), strict=True)
    seconds, *mebibytes = map(statistics.median, columns)
    what = "imports alone" if builder == "imports" else f"`{builder}`"
    return [
        f"{what}, {name}" if name else what,
        f"{seconds:.1f} s",
        *(f"{each:,.0f}" for each in mebibytes),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models one after the other; with --write, put the table into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="*", default=("imports", *MODELS))
    parser.add_argument("--flag", action="append", default=[], help="of `camserve serve`")
    parser.add_argument("--before", type=Path, help="a checkout to measure in turn with this one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a page with the marks footprint:begin and :end")
    options = parser.parse_args(arguments)
    os.environ["CAMSERVE_ALLOW_RANDOM_WEIGHTS"] = "true"
    rows = [each for builder in options.models for each in measured(builder, options)]
    header = ["model", "ready after", "MiB when ready", "of these in no file", "MiB at most"]
    text = f"{machine()}; load {os.getloadavg()[0]:.1f}.\n\n{markdown(header, rows)}"
    print(text)
    if options.write:
        put_between(options.write, "footprint", text)


if __name__ == "__main__":
    end_when_told()
    main()
