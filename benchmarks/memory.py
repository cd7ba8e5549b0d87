"""Does memory stay flat? What one more replica costs, and what ten thousand mixed requests leave.

    .venv/bin/python benchmarks/memory.py                      # about five minutes
    .venv/bin/python benchmarks/memory.py --requests 2000

The requests go to `camserve serve` with the built-in model: all methods of one pass and some of
several, activations, layers, formats and sizes, four at a time. Its resident memory is read after
every hundred; the slope is the median of the slopes between all pairs of readings (Theil and Sen)
after the first thousand requests, or the first tenth where there are fewer.
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import json
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import contenders
import psutil
from measuring import ROOT, Results, photograph
from PIL import Image
from servers import Kind, end_when_told, serving

from api_schemas.methods import METHODS
from service.models.pool import ModelPool

MEBIBYTE = 1 << 20
REPLICA_BOUND, SLOPE_BOUND = 1.0, 1.0
"""MiB a further replica may cost, and MiB that a thousand requests may leave."""

SAMPLED_EVERY = 100
CLIENTS = 4

MIXED = (
    *("gradcam", "gradcampp", "hirescam", "layercam", "xgradcam", "eigencam"),
    *("input_gradient", "guided_backprop", "guided_gradcam"),
)
OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"include": ["heatmap", "overlay"], "format": "webp"},
    {"include": ["overlay", "grid", "regions"], "format": "png"},
    {"activations": "type:Conv2d", "activation_as": ["stats", "image"]},
    {"activations": "type:BatchNorm2d", "activation_as": "array"},
    {"explain_top": 3, "fit": "pad"},
    {"size": "model", "fit": "squash", "include": "none"},
)


def replica(builder: str, count: int = 16) -> float:
    """MiB of resident memory that each of `count` more replicas takes when it is built."""
    model, process = contenders.load(builder, compiled=False), psutil.Process()
    first = ModelPool([model], replicas=2)
    before = process.memory_info().rss
    more = ModelPool([model], replicas=count)
    after = process.memory_info().rss
    assert not first.faults()
    assert not more.faults()
    return float(after - before) / MEBIBYTE / count


def pictures() -> list[tuple[str, bytes]]:
    """Media types and images of several sizes."""
    sizes = ((320, 240), (640, 480), (480, 640), (1600, 1200))
    found = [("image/jpeg", photograph(seed, *size)) for seed, size in enumerate(sizes)]
    file = io.BytesIO()
    Image.open(io.BytesIO(found[0][1])).save(file, "PNG")
    return [*found, ("image/png", file.getvalue())]


@dataclass
class Mix:
    """Requests without end, and what came of them."""

    port: int
    pid: int
    wanted: int
    layers: Sequence[str]
    rss: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _asked: int = 0

    def __post_init__(self) -> None:
        self._pictures = pictures()
        self._requests = self._mixed()

    def _mixed(self) -> Iterator[tuple[str, tuple[str, bytes]]]:
        """Paths and images; the lengths have no common factor, so all combinations come."""
        turns = zip(
            itertools.cycle(MIXED),
            itertools.cycle(OPTIONS),
            itertools.cycle((None, *self.layers)),
            itertools.cycle(self._pictures),
            strict=False,
        )
        for number, (method, options, layer, picture) in enumerate(turns):
            if number % 10 == 9:
                yield "/predict?top_k=3", picture
                continue
            at = {"layer": layer} if layer and METHODS[method].has_layer else {}
            yield f"/explain?{urlencode({'method': method, **options, **at}, doseq=True)}", picture

    def ask(self) -> None:
        """One client."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        while True:
            with self._lock:
                if self._asked >= self.wanted:
                    break
                self._asked += 1
                path, (kind, data) = next(self._requests)
            connection.request("POST", path, data, {"content-type": kind})
            response = connection.getresponse()
            response.read()
            with self._lock:
                self.statuses[response.status] = self.statuses.get(response.status, 0) + 1
                if sum(self.statuses.values()) % SAMPLED_EVERY == 0:
                    self.rss.append(psutil.Process(self.pid).memory_info().rss / MEBIBYTE)
        connection.close()

    def run(self) -> None:
        """All of them."""
        threads = [threading.Thread(target=self.ask) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def slope(rss: Sequence[float], first: int) -> float:
    """MiB a thousand requests, of readings every hundred, without the `first` readings."""
    kept = list(enumerate(rss))[first:]
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in itertools.combinations(kept, 2)]
    return statistics.median(slopes) * 1000 / SAMPLED_EVERY if slopes else float("nan")


def layers_of(port: int, model: str) -> list[str]:
    """Three layers that a map can be drawn from."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", f"/models/{model}/layers")
    found = json.load(connection.getresponse())["layers"]
    connection.close()
    targets = [layer["path"] for layer in found if layer["target"]]
    return targets[:: max(1, len(targets) // 3)][:3]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both, print them, and fail where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="builtin", help="that is served")
    parser.add_argument("--replica-of", default="torchvision/resnet50")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench.json")
    options = parser.parse_args(arguments)
    results = Results(options.out)
    cost = replica(options.replica_of)
    print(f"a further replica of {options.replica_of}: {cost:.2f} MiB", flush=True)
    results.keep("memory/replica", {"of": options.replica_of}, cost)

    serve = ("-m", "service", "serve", "--port", "{port}", "--model", f"served={options.model}")
    with serving(Kind(serve, "/health/ready")) as server:
        mix = Mix(server.port, server.pid, options.requests, layers_of(server.port, "served"))
        mix.run()
    first = min(1000, options.requests // 10) // SAMPLED_EVERY
    found = slope(mix.rss, first)
    print(f"{options.requests} mixed requests, answered {mix.statuses}; {results.found('machine')}")
    shown = mix.rss[:: max(1, len(mix.rss) // 10)]
    print(f"resident MiB: {', '.join(f'{each:.0f}' for each in shown)}")
    print(f"slope after the first {first * SAMPLED_EVERY}: {found:.2f} MiB a thousand")
    results.keep("memory/slope", {"requests": options.requests}, {"slope": found, "rss": mix.rss})
    if cost >= REPLICA_BOUND or found >= SLOPE_BOUND or set(mix.statuses) != {200}:
        sys.exit(f"allowed: {REPLICA_BOUND} MiB a replica, {SLOPE_BOUND} MiB a thousand, all 200")


if __name__ == "__main__":
    end_when_told()
    main()
