"""What Grad-CAM at the last layer costs in one thread: the service's lanes, its peers, the limits.

    .venv/bin/python benchmarks/core.py                        # five models, batch 1 and 4
    .venv/bin/python benchmarks/core.py --models torchvision/resnet50 --batches 1 --seconds 10

All contenders of one model take turns in this process, each on its own copy of the model. A part
(one model at one batch size) is written to --out when it is finished, and not measured again.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # both are read when NumPy and torch are imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import contenders
import torch
from contenders import Contender, Lane, agreement
from measuring import ROOT, Ratio, Results, in_turn, markdown, ratio

from service.models.loaded import LoadedModel

MODELS = (
    "torchvision/resnet50",
    "torchvision/mobilenet_v3_large",
    "torchvision/efficientnet_b0",
    "torchvision/convnext_tiny",
    "torchvision/vit_b_16",
)
LANES: tuple[Lane, ...] = ("hooked", "compiled")
LIMITS = ("eager forward", "OpenVINO forward")
HOOKED, COMPILED = (f"camserve, {lane}" for lane in LANES)
OUT = ROOT / "build" / "bench.json"


def measure(model: LoadedModel, batch: int, seconds: float, least: int) -> dict[str, Any]:
    """Times of every contender, and how far the peers' maps agree with those of the hooked lane."""
    generator = torch.Generator().manual_seed(0)
    height, width = model.preprocessing.crop
    pixels = (torch.rand(batch, 3, height, width, generator=generator) * 255).byte()
    with ExitStack() as stack:
        lanes: dict[str, Contender] = {
            f"camserve, {lane}": contenders.ours(model, lane, pixels, stack)
            for lane in LANES
            if contenders.has(model, lane)
        }
        peers = contenders.Peers(model, pixels, stack).all()
        own = lanes[HOOKED]()
        assert own is not None
        agrees = {
            name: agreement(own, maps)
            for name, explain in (lanes | peers).items()
            if (maps := explain()) is not None
        }
        times = in_turn(lanes | peers, seconds, least)
    return {
        "layer": model.target_layer,
        "agreement": agrees,
        "times": {name: asdict(each) for name, each in times.items()},
    }


def key(builder: str, batch: int) -> str:
    """The part's name in the results."""
    return f"core/{builder.rpartition('/')[2]}/{batch}"


def against(found: Mapping[str, Any], over: str, under: str, clock: str = "wall") -> Ratio | None:
    """One contender's time in units of another's; None where one is absent."""
    times = found["times"]
    if over not in times or under not in times:
        return None
    return ratio(times[over][clock], times[under][clock])


COLUMNS = {
    "OpenVINO forward": LIMITS[::-1],
    "eager, channels last": ("eager forward, tuned", LIMITS[0]),
    "hooked": (HOOKED, LIMITS[0]),
    "compiled": (COMPILED, LIMITS[0]),
    "compiled ÷ OpenVINO": (COMPILED, LIMITS[1]),
    **{
        name: (name, LIMITS[0])
        for name in (
            *("TorchCAM", "TorchCAM, tuned", "Captum, class known", "Captum"),
            *("pytorch-grad-cam", "pytorch-grad-cam, tuned"),
        )
    },
}
"""What the table shows: a contender, and in units of which other one."""


def table(results: Results, clock: str = "wall") -> str:
    """Every part that was measured, as a row of ratios with their intervals."""
    parts = {part: kept for part, kept in results.parts.items() if part.startswith("core/")}
    rows = [
        [
            part.split("/", 1)[1].replace("/", ", "),
            *(_shown(kept["found"], pair, clock) for pair in COLUMNS.values()),
        ]
        for part, kept in parts.items()
    ]
    return markdown(["model, batch", *COLUMNS], rows)


def _shown(found: Mapping[str, Any], pair: tuple[str, str], clock: str) -> str:
    known = against(found, *pair, clock)
    return "–" if known is None else str(known)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="as of camserve serve")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4))
    parser.add_argument("--seconds", type=float, default=25.0, help="of each part")
    parser.add_argument("--rounds", type=int, default=7, help="of each part at least")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of the table")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--again", action="store_true", help="measure also what --out has")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")  # of tracing, for OpenVINO
    results = Results(options.out, again=options.again)
    settings = {"seconds": options.seconds, "rounds": options.rounds}
    for builder in options.models:
        missing = [n for n in options.batches if not results.has(key(builder, n), settings)]
        model = contenders.load(builder) if missing else None
        for batch in missing:
            assert model is not None
            print(f"core: {builder}, batch {batch}", flush=True)
            found = measure(model, batch, options.seconds, options.rounds)
            results.keep(key(builder, batch), settings, found)
    print(f"\n{results.found('machine')}\n\n{table(results, options.clock)}")


if __name__ == "__main__":
    main()
