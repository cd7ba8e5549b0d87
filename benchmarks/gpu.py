"""Images a second on one card: explanations beside forward passes, and where the time goes.

    .venv/bin/python benchmarks/gpu.py                         # a CUDA device; else it says so
    .venv/bin/python benchmarks/gpu.py --device cpu --model torchvision/resnet18 --batches 1 2

Explained is what the service does on a GPU: uint8 pixels in pinned memory to the card, normalised
there, forward, gradient at the target layer, map, and the maps back. Stages are timed by CUDA
events (on a CPU by the clock), both forms in turn, and ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from measuring import ROOT, Results, machine, markdown, ratio
from torch import Tensor

from service.cam.hooks import record
from service.cam.methods import GRADIENT_CAMS
from service.models.catalog import parse_model
from service.models.loaded import LoadedModel
from service.models.loading import load_model

STAGES = ("to the card", "normalise", "forward", "gradient", "map", "back")


class Clock:
    """Milliseconds of each stage of one pass, on the card or on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, object, object]] = []

    def _now(self) -> object:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is queued inside."""
        begun = self._now()
        yield
        self._marks.append((name, begun, self._now()))

    def read(self) -> dict[str, float]:
        """Wait for the card; milliseconds by stage."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for name, begun, ended in self._marks:
            if isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
                found[name] = begun.elapsed_time(ended)
            elif isinstance(begun, float) and isinstance(ended, float):
                found[name] = (ended - begun) * 1000
        return found


class Card:
    """One model on one device, in one precision."""

    def __init__(self, model: LoadedModel, device: torch.device, *, bf16: bool) -> None:
        assert model.target_layer is not None
        layout = model.layer(model.target_layer).layout
        assert layout is not None
        self.model, self.device, self.bf16 = model, device, bf16
        self.layer, self.layout, self.net = model.target_layer, layout, model.replicate()

    def precision(self) -> AbstractContextManager[object]:
        """bf16 autocast, where it is wanted."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def pixels(self, batch: int) -> Tensor:
        """uint8 (batch, 3, h, w) on the CPU, pinned where there is a card."""
        height, width = self.model.preprocessing.crop
        made = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        return made.pin_memory() if self.device.type == "cuda" else made

    def forward(self, pixels: Tensor) -> dict[str, float]:
        """A prediction alone."""
        clock = Clock(self.device)
        with clock.stage("forward"), torch.inference_mode(), self.precision():
            values = self.model.normalised(pixels.to(self.device, non_blocking=True))
            self.net(values).argmax(1).cpu()
        return clock.read()

    def explain(self, pixels: Tensor) -> dict[str, float]:
        """A prediction and the Grad-CAM of its best class."""
        clock = Clock(self.device)
        with clock.stage("to the card"):
            there = pixels.to(self.device, non_blocking=True)
        with clock.stage("normalise"):
            values = self.model.normalised(there)
        with record(self.net, targets=[self.layer]) as seen:
            with clock.stage("forward"), self.precision():
                logits = self.model.logits(self.net(values))
            with clock.stage("gradient"):
                at = seen.targets[self.layer][-1]
                (gradient,) = torch.autograd.grad(logits.amax(dim=1).sum(), at)
        with clock.stage("map"):
            maps = [self.layout.as_map(each.detach()).float() for each in (at, gradient)]
            cam = GRADIENT_CAMS["gradcam"](*maps)
        with clock.stage("back"):
            cam.cpu()
            logits.argmax(1).cpu()
        return clock.read()


def measure(card: Card, batch: int, rounds: int) -> tuple[list[float], dict[str, list[float]]]:
    """Milliseconds of forward passes, and of every stage of an explanation, in turn."""
    pixels = card.pixels(batch)
    for _ in range(3):
        card.forward(pixels)
        card.explain(pixels)
    forward: list[float] = []
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    for _ in range(rounds):
        forward.append(_wall(card, lambda: card.forward(pixels)))
        for name, taken in card.explain(pixels).items():
            stages[name].append(taken)
        stages.setdefault("all", []).append(_wall(card, lambda: card.explain(pixels)))
    return forward, stages


def _wall(card: Card, work: Callable[[], object]) -> float:
    """Milliseconds until the card is done."""
    start = time.perf_counter()
    work()
    if card.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every batch size in both precisions and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="torchvision/resnet50")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 2, 4, 8, 16, 32, 64))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was measured.")
        return
    model = load_model(parse_model(options.model), device=options.device, allow_random_weights=True)
    results, rows = Results(options.out, again=True), []
    for bf16 in (False, True):
        card = Card(model, device, bf16=bf16)
        for batch in options.batches:
            forward, stages = measure(card, batch, options.rounds)
            results.keep(f"gpu/{'bf16' if bf16 else 'f32'}/{batch}", {}, [forward, stages])
            middle = {name: statistics.median(each) for name, each in stages.items()}
            rates = [1000 * batch / each for each in (statistics.median(forward), middle["all"])]
            rows.append(
                [
                    "bf16" if bf16 else "float32",
                    str(batch),
                    *(f"{each:.1f}" for each in rates),
                    str(ratio(stages["all"], forward)),
                    *(f"{middle[name]:.2f}" for name in STAGES),
                ]
            )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"{options.model} on {name}; {machine()}\n")
    header = ["precision", "batch", "forward/s", "explained/s", "explain ÷ forward"]
    print(markdown([*header, *(f"{stage}, ms" for stage in STAGES)], rows))


if __name__ == "__main__":
    main()
