"""Explanations over HTTP: the service beside other ways to serve them, and beside prediction alone.

    .venv/bin/python benchmarks/over_http.py                   # about 13 minutes on two cores
    .venv/bin/python benchmarks/over_http.py --servers camserve openvino --loads 640x480/16

Every server is a process of its own on loopback. In each round each of them is measured once under
each load, in a new order; the others are stopped (SIGSTOP) meanwhile. Ratios are taken within a
round. Before that, each server has shown that it answers right.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torchvision
from clients import Load, multipart, run
from contenders import agreement
from core import OUT
from measuring import Ratio, Results, markdown, photographs, quantile, ratio
from numpy.typing import NDArray
from safetensors.torch import save_file
from servers import (
    Kind,
    Model,
    Server,
    Usage,
    camserve,
    end_when_told,
    fastapi,
    litserve,
    serving,
)
from torch import random as torch_random

ALONE, BUSY = "640x480/1", "640x480/16"
LOADS = (ALONE, "640x480/4", BUSY, "12MP/4")
"""Photograph and number of clients."""

VIT = "vit_b_16"
"""The transformer of `make bench`, and what marks its loads among the results."""

MARKED = tuple(f"{VIT} {load}" for load in (ALONE, BUSY))

SIZES = {"640x480": (640, 480), "12MP": (4000, 3000)}
AGREES = 0.98
"""Correlation of a peer's map with ours, below which its answer counts as wrong."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is asked of which server, at which path, checked at another, under which loads."""

    name: str
    server: str
    path: str
    checked: str
    loads: Sequence[str] = ()


OURS, OURS_PREDICT = "camserve /explain", "camserve /predict"
HEATMAP = "camserve /explain, heatmap alone"
NARROW = "camserve /explain, one thread per request"
BF16 = "camserve /explain, bf16 front"
INT8 = "camserve /explain, int8 front"
EAGER, OPENVINO = "FastAPI + eager torch /predict", "FastAPI + OpenVINO /predict"
ROWS = (
    Row(OURS, "camserve", "/explain?include=overlay", "/explain?include=overlay&include=grid"),
    Row(OURS_PREDICT, "camserve", "/predict", "/predict"),
    Row(HEATMAP, "camserve", "/explain", "/explain", ("640x480/4", "12MP/4")),
    Row(
        BF16,
        "camserve-bf16",
        "/explain?include=overlay",
        "/explain?include=overlay&include=grid",
        (ALONE, BUSY),
    ),
    Row(
        INT8,
        "camserve-int8",
        "/explain?include=overlay",
        "/explain?include=overlay&include=grid",
        (BUSY,),
    ),
    Row(
        NARROW,
        "camserve-narrow",
        "/explain?include=overlay",
        "/explain?include=overlay&include=grid",
        (ALONE,),
    ),
    Row("FastAPI + pytorch-grad-cam", "gradcam", "/explain", "/explain?grid=true"),
    Row(
        "FastAPI + pytorch-grad-cam, tuned",
        "gradcam-tuned",
        "/explain",
        "/explain?grid=true",
        (ALONE, BUSY),
    ),
    Row("FastAPI + TorchCAM", "torchcam", "/explain", "/explain?grid=true"),
    Row("FastAPI + Captum", "captum", "/explain", "/explain?grid=true"),
    Row("LitServe + TorchCAM", "litserve", "/explain", "/explain"),
    Row(EAGER, "eager", "/predict", "/predict"),
    Row(OPENVINO, "openvino", "/predict", "/predict"),
)
EXPLAINERS = tuple(
    row.name for row in ROWS if "/explain" in row.path and not row.server.startswith("camserve")
)
"""The rows of the peers that explain."""


def kinds(model: Model, int8: Path, more: Sequence[str] = ()) -> dict[str, Kind]:
    """How each server is started. int8: of the front. more: arguments of camserve serve."""
    return {
        "camserve": camserve(model, *more),
        "camserve-bf16": camserve(model, "--precision", "bf16", *more),
        "camserve-int8": camserve(model, "--int8", f"bench={int8}", *more),
        "camserve-narrow": camserve(model, "--single-request-threads", "1", *more),
        "gradcam": fastapi("fastapi_gradcam", model),
        "gradcam-tuned": fastapi("fastapi_gradcam", model, BENCH_TUNED="1"),
        "torchcam": fastapi("fastapi_torchcam", model),
        "captum": fastapi("fastapi_captum", model),
        "litserve": litserve("litserve_torchcam", model),
        "eager": fastapi("fastapi_eager", model),
        "openvino": fastapi("fastapi_openvino", model),
    }


def random_weights(name: str, folder: Path) -> Path:
    """A weights file of torchvision's `name`, made once. Speed does not depend on them."""
    file = folder / f"{name}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch_random.manual_seed(0)
        save_file(torchvision.models.get_model(name, weights=None).state_dict(), file)
    return file


def calibrate(model: Model, front: Path) -> None:
    """Make an int8 front with `camserve calibrate`; where it is refused, that is said.

    Random weights and images that are mostly drawn do for its speed, and say nothing about
    its price in agreement.
    """
    folder = front.parent / "photographs"
    folder.mkdir()
    for number, photo in enumerate(photographs(*SIZES["640x480"], count=48)):
        (folder / f"{number}.jpg").write_bytes(photo)
    weights = f"@{model.weights}" if model.weights else ""
    command = [sys.executable, "-m", "service", "calibrate", f"{model.builder}{weights}"]
    subprocess.run([*command, str(folder), "--out", str(front)], check=False)  # noqa: S603 - ours


@dataclass(frozen=True, slots=True)
class Said:
    """What a server answered about one image: the best class, and the map of explainers."""

    class_id: int
    cam: NDArray[np.float32] | None


def ask(server: Server, path: str, photo: bytes) -> Said:
    """Ask once."""
    kind, body = multipart(photo)
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", body, {"content-type": kind}
    )
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        return read(json.load(response))


def read(answer: Any) -> Said:
    """What an answer of the service or of a peer says. Raises ValueError without an image."""
    answer = answer["results"][0] if "results" in answer else answer
    explained = (answer.get("explanations") or [answer])[0]
    drawn = explained.get("overlay")
    if drawn is None:
        return Said(answer["predictions"][0]["class_id"], None)
    encoded = base64.b64decode(drawn if isinstance(drawn, str) else drawn["data"])
    picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if picture is None or picture.shape[0] < 16:
        raise ValueError("the overlay is no image")
    return Said(answer["predictions"][0]["class_id"], _grid(explained["grid"]))


def _grid(said: Any) -> NDArray[np.float32]:
    if isinstance(said, list):
        return np.asarray(said, np.float32)
    values = np.frombuffer(base64.b64decode(said["data"]), "<f4")
    return np.asarray(values.reshape(said["shape"]), np.float32)


def check(said: Sequence[Said], ours: Sequence[Said]) -> str | None:
    """What is wrong with a server's answers; None where they agree with ours."""
    for one, own in zip(said, ours, strict=True):
        if one.class_id != own.class_id:
            return f"class {one.class_id} instead of {own.class_id}"
        if one.cam is None or own.cam is None:
            continue
        found = agreement(one.cam[None], own.cam[None])
        if not found >= AGREES:
            return f"its map correlates with ours at {found:.3f}"
    return None


class Race:
    """The servers, started; paused but for the one that is measured."""

    def __init__(self, servers: Mapping[str, Server], photos: Mapping[str, list[bytes]]) -> None:
        self.servers = servers
        self.photos = photos
        self.rows = [row for row in ROWS if row.server in servers]
        for server in servers.values():
            server.pause()

    def check(self) -> dict[str, str | None]:
        """What is wrong with each row's answers."""
        photos = self.photos["640x480"][:3]
        said: dict[str, list[Said]] = {}
        found: dict[str, str | None] = {}
        for row in self.rows:
            server = self.servers[row.server]
            server.resume()
            try:
                said[row.name] = [ask(server, row.checked, photo) for photo in photos]
            except (OSError, ValueError, KeyError) as error:
                found[row.name] = repr(error)
            server.pause()
        first = next(iter(said.values()), [])
        return found | {name: check(each, first) for name, each in said.items()}

    def measure(self, row: Row, load: str, seconds: float) -> dict[str, Any]:
        """One server under one load."""
        size, clients = load.split("/")
        server, seen = self.servers[row.server], list[Usage]()
        server.resume()
        try:
            found = run(
                Load(server.port, row.path, int(clients), seconds),
                self.photos[size],
                begins=lambda: seen.append(server.usage()),
                ends=lambda: seen.append(server.usage()),
            )
        finally:
            server.pause()
        count = len(found.latencies)
        if found.failures or not count:
            return {"failures": found.failures or ["no answer in time"]}
        return {
            "rate": found.rate,
            **{f"p{share}": quantile(found.latencies, share / 100) for share in (50, 95, 99)},
            "cpu": (seen[1].cpu - seen[0].cpu) / count,
            "client_cpu": found.client_cpu / count,
            "peak": seen[1].peak,
            "size": found.size,
            "count": count,
        }


def series(results: Results, load: str, name: str, figure: str) -> dict[int, float]:
    """A figure of a row under a load, round by round; without the rounds in which it failed."""
    found = {}
    for part in results.parts:
        kind, _, rest = part.partition("/")
        number, _, its_load = rest.partition("/")
        if kind == "http" and its_load == load:
            value = results.found(part).get(name, {}).get(figure)
            if value is not None:
                found[int(number)] = value
    return found


def against(
    results: Results, load: str, figure: str, over: str, under: str, *, under_load: str = ""
) -> Ratio | None:
    """A figure of one row in units of another's, over the rounds that have both."""
    above = series(results, load, over, figure)
    below = series(results, under_load or load, under, figure)
    both = sorted(above.keys() & below.keys())
    if not both:
        return None
    return ratio([above[each] for each in both], [below[each] for each in both])


def table(results: Results, load: str) -> str:
    """All rows under one load, medians over the rounds."""
    header = ["", "requests/s", "camserve is", "p50 ms", "p95", "p99", "CPU ms per request"]
    header += ["peak MiB", "kB per response", "client's CPU ms"]
    rows = []
    for row in ROWS:
        figures = ("rate", "p50", "p95", "p99", "cpu", "peak", "size", "client_cpu")
        found = {figure: series(results, load, row.name, figure) for figure in figures}
        if not found["rate"]:
            continue
        middle = {name: statistics.median(each.values()) for name, each in found.items()}
        times = against(results, load, "rate", OURS, row.name)
        rows.append(
            [
                row.name,
                f"{middle['rate']:.1f}",
                "–" if times is None else f"{times.median:.2f} times",
                *(f"{1000 * middle[name]:.0f}" for name in ("p50", "p95", "p99", "cpu")),
                f"{middle['peak']:.0f}",
                f"{middle['size'] / 1000:.0f}",
                f"{1000 * middle['client_cpu']:.1f}",
            ]
        )
    return markdown(header, rows)


def start(wanted: Mapping[str, Kind], cores: Sequence[int], stack: ExitStack) -> dict[str, Server]:
    """Start the servers one after the other; one that does not start is said and left out."""
    servers = {}
    for name, kind in wanted.items():
        print(f"http: starting {name}", flush=True)
        try:
            servers[name] = stack.enter_context(serving(kind, cores))
        except RuntimeError as error:
            print(f"http: without {name}: {error}", file=sys.stderr, flush=True)
    return servers


def rounds(
    race: Race, results: Results, options: argparse.Namespace, chosen: Iterable[Row]
) -> None:
    """Measure what the results do not have yet."""
    order = list(chosen)
    names = [row.name for row in order]
    settings = {"seconds": options.seconds, "model": options.model, "rows": names}
    for number in range(options.rounds):
        for load in options.loads:
            part = f"http/{number}/{options.mark}{load}"
            if results.has(part, settings):
                continue
            print(f"http: round {number + 1}, {load}", flush=True)
            random.Random(part).shuffle(order)  # noqa: S311 - not for secrets
            rows = [row for row in order if load in (row.loads or options.loads)]
            found = {row.name: race.measure(row, load, options.seconds) for row in rows}
            results.keep(part, settings, found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the servers, check them, measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="torchvision/resnet50")
    parser.add_argument("--layer", default="layer4")
    parser.add_argument("--weights", type=Path, help="of --model; made where not given")
    parser.add_argument("--mark", default="", help="in front of the loads among the results")
    parser.add_argument("--servers", nargs="+", help="names as printed; default: all")
    parser.add_argument("--loads", nargs="+", default=LOADS, help="photograph/clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--cores", nargs="+", type=int, default=(), help="that servers may use")
    parser.add_argument("--serve", default="", help="more arguments of camserve serve, in quotes")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--again", action="store_true", help="measure also what --out has")
    options = parser.parse_args(arguments)
    weights = options.weights
    builder, _, name = options.model.partition("/")
    if weights is None and builder == "torchvision":
        weights = random_weights(name, options.out.parent)
    results = Results(options.out, again=options.again)
    model = Model(options.model, weights, options.layer)
    sizes = {load.split("/")[0] for load in (*options.loads, "640x480")}
    photos = {size: photographs(*SIZES[size], count=8) for size in sizes}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ["CAMSERVE_CACHE_DIR"] = folder  # of this run alone
        front = Path(folder) / "int8"
        all_kinds = kinds(model, front, shlex.split(options.serve))
        wanted = {name: all_kinds[name] for name in options.servers or all_kinds}
        if "camserve-int8" in wanted:
            calibrate(model, front)
        race = Race(start(wanted, options.cores, stack), photos)
        wrong = race.check()
        results.keep(f"http-check{options.mark}", {}, wrong)
        for name, what in wrong.items():
            print(f"http: {name}: {what or 'answers right'}", flush=True)
        rounds(race, results, options, [row for row in race.rows if wrong[row.name] is None])
    print(f"\n{results.found('machine')}")
    for load in options.loads:
        print(f"\n{load} clients\n\n{table(results, options.mark + load)}")


if __name__ == "__main__":
    end_when_told()
    main()
