"""What an explanation of five boxes costs beside a prediction, for detectors of torchvision.

    python benchmarks/detectors_speed.py fasterrcnn_resnet50_fpn fcos_resnet50_fpn

Random weights, with the last layer of the head scaled up so that some scores pass the threshold of
the detector. One thread, an image of 480 × 640 pixels; predictions and explanations in the hooked
and in the compiled lane take turns, and the least processor time of each counts. Prints a JSON line
per model: seconds, `boxes`, the `parts` that are compiled. --write puts the table of all into
docs/reference/detectors.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchvision
import verdict_tables
from measuring import markdown
from torch import Tensor, nn

from service.inference.batch import run
from service.inference.questions import InferenceResult, Question
from service.models.catalog import ModelSpec
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "detectors.md"
MARKS = "<!-- speed:begin -->", "<!-- speed:end -->"

SPREAD = 3.0
"""Standard deviation of the class logits."""


def sharpened(name: str) -> nn.Module:
    """A detector with random weights whose class logits differ."""
    torch.manual_seed(0)
    module: Any = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    last = _last(module)
    seen: list[Tensor] = []
    handle = last[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.no_grad():
        module([_image().float() / 255])
        handle.remove()
        spread = torch.cat([each.flatten() for each in seen]).std()
        for part in last:
            part.weight.mul_(SPREAD / float(spread))
    return module  # type: ignore[no-any-return]


def _last(module: Any) -> list[nn.Module]:
    """The layers that give the class logits."""
    if hasattr(module, "roi_heads"):
        return [module.roi_heads.box_predictor.cls_score]
    head = module.head.classification_head
    if hasattr(head, "cls_logits"):
        return [head.cls_logits]
    last = [part for part in head.module_list.modules() if isinstance(part, nn.Conv2d)]
    return [part for part in last if part.kernel_size in {(1, 1), (3, 3)} and part.bias is not None]


def _image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (480, 640), mode="bicubic")
    return (255 * smooth[0].clamp(0, 1)).to(torch.uint8)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Processor seconds of a prediction and of an explanation of five boxes, in each lane."""
    spec = ModelSpec(name, "detectors_speed:sharpened", arguments={"name": name})
    model = load_model(spec, compiler=Compiler())
    lanes = {"hooked": _replica(model)}
    if model.is_compiled:
        lanes["compiled"] = _replica(model, folded=True)
    common: dict[str, Any] = {"top_k": 100, "min_score": 0.0}
    questions = {
        "predict": Question(_image(), method=None, **common),
        "explain": Question(
            _image(), method="hirescam", layers=model.default_layers, explain_top=5, **common
        ),
    }
    least: dict[str, float] = {}
    result: Any = None
    for _ in range(repeats):
        for (lane, replica), kind in product(lanes.items(), questions):
            started = time.process_time()
            (result,) = run(replica, [questions[kind]])
            seconds = time.process_time() - started
            least[f"{kind}, {lane}"] = min(least.get(f"{kind}, {lane}", seconds), seconds)
    assert isinstance(result, InferenceResult)
    return {
        "model": name,
        "boxes": len(result.explanations),
        "levels": sorted({layer for each in result.explanations for layer in each.layers}),
        "parts": model.folded.compiled if model.folded else model.not_compiled,
        **{kind: round(seconds, 3) for kind, seconds in least.items()},
    }


def _replica(model: LoadedModel, *, folded: bool = False) -> Replica:
    module = model.replicate(folded=folded)
    return Replica(model, module, Condition.of(module), folded)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table, with the ratios."""
    header = (
        "model",
        "compiled modules",
        "predict: hooked, compiled (s)",
        "compiled ÷ hooked",
        "explain ÷ predict, hooked",
        "explain ÷ predict, compiled",
        "boxes",
    )
    return markdown(header, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> list[str]:
    hooked, compiled = row["predict, hooked"], row.get("predict, compiled")
    if compiled is None:
        ratio = f"{row['explain, hooked'] / hooked:.2f}"
        return [row["model"], row["parts"], f"{hooked}", "", ratio, "", f"{row['boxes']}"]
    return [
        row["model"],
        ", ".join(f"`{part}`" for part in row["parts"]),
        f"{hooked}, {compiled}",
        f"{compiled / hooked:.2f}",
        f"{row['explain, hooked'] / hooked:.2f}",
        f"{row['explain, compiled'] / compiled:.2f}",
        f"{row['boxes']}",
    ]


def main() -> None:
    """Measure the named models, print a line each and, with --write, their table into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names of detectors of torchvision")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="the table into the documentation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.models:
        rows.append(measure(name, arguments.repeats))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
        if arguments.write:
            verdict_tables.write(PAGE, table(rows), MARKS)


if __name__ == "__main__":
    main()
