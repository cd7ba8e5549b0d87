"""What programs of a fixed batch size save the fronts of compiled models, and what they take.

    .venv/bin/python benchmarks/fixed_sizes.py            # two minutes

The same front with them and without (`openvino_front.FIXED_UP_TO`), in turn: a full batch on one
thread, and a single image on all cores. Random weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import contenders
import psutil
import torch
from measuring import Ratio, cores, in_turn, machine, markdown, ratio

from service.models.compiled import openvino_front
from service.models.compiled.cut import split
from service.models.compiled.lane import layer_to_cut

MODELS = (
    "builtin",
    *(
        f"torchvision/{name}"
        for name in (
            *("squeezenet1_1", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"),
            *("regnet_y_800mf", "densenet121", "efficientnet_b3", "resnet18", "resnet50"),
            "convnext_tiny",
        )
    ),
)
LARGEST = 4
MEBIBYTE = 1 << 20


def made(graph: openvino_front.Graph, up_to: int) -> tuple[openvino_front.OpenVinoFront, float]:
    """A front with fixed sizes up to so many bytes of weights, and the MiB that it took."""
    process = psutil.Process()
    openvino_front.FIXED_UP_TO, before = up_to, process.memory_info().rss
    front = openvino_front.OpenVinoFront(graph, cores(), cores(), largest=LARGEST)
    return front, (process.memory_info().rss - before) / MEBIBYTE


def row(builder: str, seconds: float) -> list[str]:
    """A line of the table."""
    model = contenders.load(builder, compiled=False)
    front, _ = split(model.module, layer_to_cut(model))
    graph = openvino_front.graph_of(model, front, None, "")
    weights = openvino_front.bytes_of_weights(graph) / MEBIBYTE
    (plain, without), (fixed, taken) = made(graph, 0), made(graph, 1 << 40)
    preprocessing = model.preprocessing
    pixels = torch.randint(
        0, 256, (LARGEST, preprocessing.channels, *preprocessing.crop), dtype=torch.uint8
    )

    def saved(batch: torch.Tensor, *, wide: bool) -> Ratio:
        fronts = {"plain": plain, "fixed": fixed}
        times = in_turn(
            {name: lambda f=each: f(batch, wide=wide) for name, each in fronts.items()}, seconds
        )
        return ratio(times["fixed"].wall, times["plain"].wall)

    return [
        builder.rpartition("/")[2],
        f"{weights:.0f}",
        str(saved(pixels, wide=False)),
        str(saved(pixels[:1], wide=True)),
        f"{taken - without:.0f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="as of camserve serve")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each comparison")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    header = ["model", "weights, MiB", "full batch", "single image", "additional MiB"]
    print(f"{machine()}\n\n{markdown(header, [row(m, options.seconds) for m in options.models])}")


if __name__ == "__main__":
    main()
