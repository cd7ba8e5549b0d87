"""What each method costs, in forward passes of the model, and what layers and targets cost.

    python benchmarks/methods.py [ROUNDS]

One thread, one image, resnet50 with random weights (speed does not depend on them), attention
rollout on vit_b_16. Every figure is the median of ratios to an eager `inference_mode` forward pass
that runs in turn with it, in CPU seconds of this process, so that a busy neighbour counts little.
Of methods with hundreds of passes two chunks are timed and the rest is reckoned from them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from api_schemas.methods import METHODS
from service.inference.batch import Unfinished, run
from service.inference.method_table import cost
from service.inference.perturbation import CHUNK, windows
from service.inference.questions import Question
from service.models.catalog import parse_model
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool, Replica

CHUNKED = {
    "scorecam": 2048,
    "occlusion": len(windows(224)) ** 2,
    "rise": 1000,
    "integrated_gradients": 50,
}
"""Images in all passes of a method, on resnet50's layer4 and with the default options."""

WALKS = {
    "resnet18": ("layer4", "layer3", "layer2", "layer1", "conv1"),
    "resnet50": ("layer4", "layer3", "layer2"),
    "mobilenet_v3_large": ("features.16", "features.12", "features.6"),
}
"""Where the CAM family is priced, from the last layer to an early one, of each model."""


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def asked(replica: Replica, question: Question) -> float:
    """CPU seconds of one answer; of chunked methods two chunks, scaled up to all of them."""
    start = time.process_time()
    (answer,) = run(replica, [question])
    assert not isinstance(answer, Exception), answer
    images = CHUNKED.get(question.method or "")
    if images is None:
        while isinstance(answer, Unfinished):
            answer = answer.step(replica) or answer
        return time.process_time() - start
    begun = time.process_time() - start
    assert isinstance(answer, Unfinished)
    two = seconds(lambda: [answer.step(replica) for _ in range(2)])
    return begun + two * images / (2 * CHUNK)


def forward(replica: Replica, image: Tensor) -> float:
    """CPU seconds of an eager forward pass."""

    def once() -> None:
        with torch.inference_mode():
            replica.module(image)

    return seconds(once)


def ratios(model: LoadedModel, questions: list[Question], rounds: int) -> list[float]:
    """The median cost of each question in forward passes, all measured in turn."""
    with ModelPool([model], replicas=1).lease(model.name) as replica:
        image = model.normalised(questions[0].pixels[None])
        forward(replica, image)
        found: list[list[float]] = [[] for _ in questions]
        for _ in range(rounds):
            for each, question in zip(found, questions, strict=True):
                before = forward(replica, image)
                took = asked(replica, question)
                each.append(took / ((before + forward(replica, image)) / 2))
    return [statistics.median(each) for each in found]


def main(rounds: int) -> None:
    """Print both tables: at the default layer, and at other layers with several targets."""
    torch.set_num_threads(1)
    pixels = (torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(0)) * 255).byte()
    resnet = load_model(parse_model("torchvision/resnet50"), allow_random_weights=True)
    methods = [name for name, record in METHODS.items() if "attention" not in record.needs]
    plain = Question(pixels, targets=(0,))
    questions = [
        replace(plain, method=method, layers=("layer4",) if METHODS[method].has_layer else ())
        for method in methods
    ]
    print("| method | measured | announced |\n|---|---|---|")
    for question, found in zip(questions, ratios(resnet, questions, rounds), strict=True):
        print(f"| {question.method} | {found:.2f} | {cost(resnet, question):g} |")
    vit = load_model(parse_model("torchvision/vit_b_16"), allow_random_weights=True)
    rollout = replace(plain, method="attention_rollout")
    print(f"| attention_rollout (vit_b_16) | {ratios(vit, [rollout], rounds)[0]:.2f} | 2 |")

    print(
        "\n| model | method | layer | targets | measured | announced |\n|---|---|---|---|---|---|"
    )
    for name, layers in WALKS.items():
        model = load_model(parse_model(f"torchvision/{name}"), allow_random_weights=True)
        walks = [
            replace(plain, method=method, layers=(layer,), targets=tuple(range(targets)))
            for layer in layers
            for method, targets in (
                ("gradcam", 1),
                ("gradcam", 5),
                ("gradcam", 20),
                ("layercam", 5),
            )
        ]
        for each, found in zip(walks, ratios(model, walks, rounds), strict=True):
            said = f"{found:.2f} | {cost(model, each):g}"
            layer = each.layers[0]
            print(f"| {name} | {each.method} | {layer} | {len(each.targets)} | {said} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
