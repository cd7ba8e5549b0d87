"""What does a model need? Resident memory and start time of a service, by model.

    .venv/bin/python benchmarks/footprint.py                       # a few minutes
    .venv/bin/python benchmarks/footprint.py torchvision/vit_b_16

Starts `camserve serve` with each model alone, without downloads (random weights of the same size;
the built-in model has its own), and reads the time until `/health/ready` answers 200, the resident
memory then, and its peak after 20 explained images of 640 x 480 pixels, four at a time. Prints a
table in Markdown.
"""

from __future__ import annotations

import argparse
import http.client
import os
import platform
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version

import psutil
from measuring import photograph
from servers import Kind, end_when_told, serving

MODELS = (
    *("builtin", "torchvision/mobilenet_v3_small", "torchvision/resnet18"),
    *("torchvision/resnet50", "torchvision/convnext_tiny", "torchvision/vit_b_16"),
)
MEBIBYTE = 1 << 20
CLIENTS, IMAGES = 4, 20


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


def row(builder: str, *flags: str) -> str:
    """Start a service with one model, load it, and read what it took."""
    serve = ("-m", "service", "serve", "--port", "{port}", "--model", f"served={builder}", *flags)
    started = time.monotonic()
    with serving(Kind(serve, "/health/ready")) as server:
        seconds = time.monotonic() - started
        process = psutil.Process(server.pid)
        ready = peak = process.memory_info().rss
        threads = [
            threading.Thread(target=explain, args=(server.port, IMAGES // CLIENTS))
            for _ in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.02)
    return f"| `{builder}` | {seconds:.0f} s | {ready / MEBIBYTE:.0f} | {peak / MEBIBYTE:.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--flag", action="append", default=[], help="of `camserve serve`")
    options = parser.parse_args(arguments)
    os.environ["CAMSERVE_ALLOW_RANDOM_WEIGHTS"] = "true"
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, torch {version('torch')}\n"
    )
    print("| model | ready after | MiB when ready | MiB at most |")
    print("|---|---|---|---|")
    for builder in options.models:
        print(row(builder, *options.flag), flush=True)


if __name__ == "__main__":
    end_when_told()
    main()
