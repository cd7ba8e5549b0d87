"""Which of torchvision's classifiers get a compiled lane, how near it is and what it saves.

    .venv/bin/python benchmarks/compiled_models.py --out results.json

Each model in a process of its own, with random weights (speed and parity do not depend on them
much), one thread; times are of the processor, which other programs disturb less than the clock.
`--models` also takes `timm/NAME`. What is finished stands in the JSON file; a second run goes on
from there. At the end docs/reference/compiled-models.md is written again; what `probes.py` wrote on
it stays.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from models_page import PAGE, kept

from service.images.upload import open_upload
from service.inference.batch import run, run_compiled
from service.inference.questions import Question
from service.models.builders import build
from service.models.catalog import parse_model
from service.models.compiled.lane import Compiler, parity_on
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool

ROOT = Path(__file__).parent.parent
TOO_LARGE = ("vit_h_14", "regnet_y_128gf")
"""Half a billion parameters and more: minutes each, and 4 GB as float32."""


def main() -> int:
    """Measure every model that is not measured yet, then write the page."""
    options = _options()
    if options.one:
        print(json.dumps(_measure(options.one, options.photos, options.rounds)))
        return 0
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    names = options.models or sorted(
        torchvision.models.list_models(torchvision.models),
        key=lambda name: torchvision.models.get_model_weights(name)["DEFAULT"].meta["num_params"],
    )
    for name in names:
        if name not in done and name not in TOO_LARGE:
            done[name] = _in_a_process(name, options)
            options.out.write_text(json.dumps(done, indent=1))
            print(name, done[name], flush=True)
    if not options.models:
        PAGE.write_text(kept(_page(done), PAGE.read_text()))
    return 0


def _in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, "--rounds", str(options.rounds)]
    command += ["--photos", str(options.photos)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if ended.returncode:
        return {"reason": ended.stderr.strip().splitlines()[-1][:200]}
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def _measure(name: str, photos: Path, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    builder = name if "/" in name else f"torchvision/{name}"
    model = load_model(parse_model(builder), allow_random_weights=True)
    started = time.process_time()
    model = Compiler().compiled(model)
    seconds = time.process_time() - started
    result: dict[str, Any] = {"layer": model.target_layer}
    if model.compiled is None or model.compiled.parity is None:
        return result | {"reason": model.not_compiled}
    parity = model.compiled.parity
    result |= {"activation": parity.activation, "map": parity.map, "logits": parity.logits}
    pictures = _photographs(model, photos)
    if pictures:
        on_photos = parity_on(
            model, model.compiled, [torch.stack(pictures[i : i + 2]) for i in (0, 2)]
        )
        result |= {"photos_map": on_photos.map, "photos_logits": on_photos.logits}
    times = _times(model, rounds)
    forward = statistics.median(times["forward"])
    for kind in ("hooked", "compiled"):
        ratios = [a / b for a, b in zip(times[kind], times["forward"], strict=True)]
        result[kind] = statistics.median(ratios)
    return result | {"compile": seconds / forward}


def _times(model: LoadedModel, rounds: int) -> dict[str, list[float]]:
    """Processor seconds, in turns, of an eager forward pass and an explanation in both lanes."""
    size = (model.preprocessing.channels, *model.preprocessing.crop)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8)
    asked = [Question(pixels, layers=model.target_layers(()))]
    plain = build(model.spec, allow_random_weights=True).module.eval()
    image = torch.rand(1, *size)
    times: dict[str, list[float]] = {"forward": [], "hooked": [], "compiled": []}
    with ModelPool([model], replicas=1).lease(model, folded=True) as replica:

        def forward() -> None:
            with torch.inference_mode():
                plain(image)

        variants: dict[str, Callable[[], object]] = {
            "forward": forward,
            "hooked": lambda: run(replica, asked),
            "compiled": lambda: run_compiled(model, asked),
        }
        for number in range(rounds + 2):
            for kind, variant in variants.items():
                started = time.process_time()
                variant()
                if number > 1:
                    times[kind].append(time.process_time() - started)
    return times


def _photographs(model: LoadedModel, folder: Path) -> list[torch.Tensor]:
    files = sorted(folder.rglob("*.jp*g"))[:4] if folder.is_dir() else []
    read = [
        open_upload(
            file.read_bytes(), model.preprocessing, "crop", max_pixels=10**8, preview_side=None
        )
        for file in files
    ]
    return [upload.model_input.pixels for upload in read]


def _page(done: dict[str, Any]) -> str:
    good = {name: each for name, each in done.items() if "compiled" in each}
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "openvino"))
    lines = [
        "# Which models get a compiled lane",
        "",
        f"{len(good)} of {len(done)} classifiers of torchvision. Generated by",
        "`benchmarks/compiled_models.py`: one thread, batch 1, medians of ratios of processor",
        "time measured in turns, on cores shared with other programs;",
        f"Python {platform.python_version()}, {packages}. Random weights.",
        "",
        "*hooked* and *compiled*: an explanation in that lane ÷ torch's eager forward pass.",
        "*map*: the largest difference between the two lanes' Grad-CAM before its ReLU, as a share",
        "of the largest value, on noise; *on images* likewise on four images. *compile*: the cost",
        "of the first start, in forward passes. A model that is not in the list is tested in",
        "the same way when it is loaded, and `/models` reports the result.",
        "",
        "| model | cut at | hooked | compiled | activation | map | on images | compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in sorted(good.items()):
        photos = f"{each['photos_map']:.0e}" if "photos_map" in each else ""
        lines.append(
            f"| {name} | `{each['layer']}` | {each['hooked']:.2f} | {each['compiled']:.2f} | "
            f"{each['activation']:.0e} | {each['map']:.0e} | {photos} | {each['compile']:.0f} |"
        )
    refused = {name: each for name, each in done.items() if name not in good}
    lines += ["", "## Not compiled", "", "| model | why |", "|---|---|"]
    lines += [f"| {name} | {each['reason']} |" for name, each in sorted(refused.items())]
    lines += [f"| {name} | not tried: too large for the run |" for name in TOO_LARGE]
    return "\n".join(lines) + "\n"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("compiled_models.json"), help="results, model by model")
    add("--models", nargs="+", help="these alone, and no page")
    add("--photos", type=Path, default=ROOT.parent / "shared" / "data" / "demo_images")
    add("--rounds", type=int, default=7)
    add("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
