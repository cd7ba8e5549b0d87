"""What an explanation of five boxes costs beside a prediction, for detectors of torchvision.

    python benchmarks/detectors_speed.py fasterrcnn_resnet50_fpn fcos_resnet50_fpn

Random weights, with the last layer of the head scaled up so that some scores pass the threshold of
the detector. One thread, an image of 480 × 640 pixels; predictions and explanations alternate, and
the least time of each counts. Prints a JSON line per model: seconds, `boxes`, and `ratio`,
explain ÷ predict.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from service.inference.batch import run
from service.inference.questions import InferenceResult, Question
from service.models.catalog import ModelSpec
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition

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
    """Seconds of a prediction and of an explanation of five boxes."""
    spec = ModelSpec(name, "detectors_speed:sharpened", arguments={"name": name})
    model = load_model(spec)
    module = model.replicate()
    replica = Replica(model, module, Condition.of(module))
    common: dict[str, Any] = {"top_k": 100, "min_score": 0.0}
    predict = Question(_image(), method=None, **common)
    explain = Question(
        _image(), method="hirescam", layers=model.default_layers, explain_top=5, **common
    )
    least = {"predict": float("inf"), "explain": float("inf")}
    result: Any = None
    for _ in range(repeats):
        for kind, question in (("predict", predict), ("explain", explain)):
            started = time.perf_counter()
            (result,) = run(replica, [question])
            least[kind] = min(least[kind], time.perf_counter() - started)
    assert isinstance(result, InferenceResult)
    return {
        "model": name,
        "boxes": len(result.explanations),
        "levels": sorted({layer for each in result.explanations for layer in each.layers}),
        **{kind: round(seconds, 3) for kind, seconds in least.items()},
        "ratio": round(least["explain"] / least["predict"], 2),
    }


def main() -> None:
    """Measure the named models and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names of detectors of torchvision")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        sys.stdout.write(json.dumps(measure(name, arguments.repeats)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
