"""Do the maps depend on the weights? Rank correlations with maps of randomised weights.

    .venv/bin/python benchmarks/sensitivity.py --data ../shared/data

Cascading randomisation as at load (`service.models.probes.sensitivity`), each image with other
random weights: photographs and 1/f noise for the methods with few passes, noise alone for the
others. What is finished stands in the JSON file; a second run resumes there. At the end the table
in docs/explanation/methods.md is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from api_schemas.methods import METHODS
from service.evaluation.method_sensitivity import maps_by_depth
from service.images.decode import decode, fit_to_model
from service.models.catalog import parse_model
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.probes.sensitivity import HARDLY, States, alike, natural_noise

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "explanation" / "methods.md"
BEGIN, END = "<!-- sensitivity:begin -->", "<!-- sensitivity:end -->"

MODELS: Mapping[str, str] = {
    "builtin": "builtin",
    "mobilenet_v2": "torchvision/mobilenet_v2@{data}/weights/mobilenet_v2.fp16.safetensors",
    "squeezenet1_1": "torchvision/squeezenet1_1@{data}/weights/squeezenet1_1.fp16.safetensors",
    "resnet18, random": "torchvision/resnet18",
}
SLOW = ("ablationcam", "scorecam", "occlusion", "rise", "integrated_gradients")
DEPTHS = ("head", "half", "all")
NOTHING = "–"

Correlations = dict[str, dict[str, list[float]]]
"""By method and depth: of each image."""


def main() -> int:
    """Measure what is missing, then write the page."""
    options = _options()
    torch.set_num_threads(options.threads)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.models or MODELS:
        builder = MODELS[name].format(data=options.data)
        model = load_model(parse_model(builder), allow_random_weights=True)
        shape = (model.preprocessing.channels, *model.preprocessing.crop)
        noise = list(natural_noise(shape, options.images))
        fast = [method for method in METHODS if method not in SLOW]
        for kind, images, methods in (
            ("photographs", _photographs(model, options), fast),
            ("noise", noise, fast),
            ("slow", noise[: options.slow], SLOW),
        ):
            if images and f"{name}/{kind}" not in done:
                done[f"{name}/{kind}"] = correlations(maps_by_depth(model, images, methods))
                options.out.write_text(json.dumps(done))
                print(name, kind, flush=True)
    if not options.models:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        table = f"{BEGIN}\n\n{_table(done)}\n\n{END}"
        PAGE.write_text(before + table + after, encoding="utf-8")
    return 0


def correlations(states: States) -> Correlations:
    """The rank correlation of each map with that of the randomised model."""
    found: Correlations = {}
    for method, maps in states[None].items():
        for depth in DEPTHS:
            pairs = zip(maps, states[depth].get(method, []), strict=True)  # type: ignore[index]
            values = [alike([one], [other]) for one, other in pairs]
            known = [value for value in values if value is not None]
            found.setdefault(method, {})[depth] = known
    return found


def _photographs(model: LoadedModel, options: argparse.Namespace) -> list[Tensor]:
    paths = sorted((options.data / "demo_images").glob("*.jpg"))[: options.images]
    sources = [decode(path.read_bytes(), max_pixels=1 << 28) for path in paths]
    return [fit_to_model(source, model.preprocessing, "crop").pixels for source in sources]


def _table(done: Mapping[str, Correlations]) -> str:
    lines = [
        f"| method | {' | '.join(MODELS)} |",
        f"|---|{'---|' * len(MODELS)}",
    ]
    for method in METHODS:
        cells = [_cell(done, name, method) for name in MODELS]
        if any(cell != NOTHING for cell in cells):
            lines += [f"| `{method}` | {' | '.join(cells)} |"]
    return "\n".join(lines)


def _cell(done: Mapping[str, Correlations], name: str, method: str) -> str:
    values: dict[str, list[float]] = {depth: [] for depth in DEPTHS}
    for kind in ("photographs", "noise", "slow"):
        for depth, found in done.get(f"{name}/{kind}", {}).get(method, {}).items():
            values[depth] += found
    if not values["half"]:
        return NOTHING
    head, half, whole = (float(np.median(values[depth])) for depth in DEPTHS)
    cell = f"{_number(head)} / {_number(half)} {_spread(values['half'])} / {_number(whole)}"
    return f"**{cell}**" if max(half, whole) >= HARDLY else cell


def _spread(values: Sequence[float]) -> str:
    low, high = np.quantile(values, [0.1, 0.9])
    return f"[{_number(low)} to {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".", 1).replace("-", "−").replace("−.00", ".00")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="photographs and weights")
    add("--out", type=Path, default=Path("build/sensitivity.json"), help="results")
    add("--models", nargs="+", choices=list(MODELS), help="these alone, and no page")
    add("--images", type=int, default=10, help="images of each kind")
    add("--slow", type=int, default=0, help="images for methods of many passes; 0: leave them out")
    add("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
