"""Images a second on one card: explanations beside forward passes, and where the time goes.

    .venv/bin/python benchmarks/gpu.py                         # a CUDA device; else it says so
    .venv/bin/python benchmarks/gpu.py --device cpu --model torchvision/resnet18 --batches 1 2

Three tables. The service's lanes, from uint8 pixels on the CPU to finished answers, beside forward
passes of the same batch, all in turn; ratios are medians over the rounds. What an explanation is
made of in the compiled lane, each stage waited for, so that their sum is more than the whole. And
what stands round the model, done by the CPU as the service does it and done by the card.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from measuring import ROOT, Results, in_turn, machine, markdown, photograph, ratio
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from service.cam.formulas import gradcam
from service.cam.heatmap import COLORMAPS, Style, render_overlay
from service.images.decode import decode, fit_to_model, preview
from service.inference.batch import run, run_compiled
from service.inference.questions import Question
from service.models.catalog import Floating, parse_model
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool

PRECISIONS: tuple[Floating, ...] = ("float32", "bf16")
LIMIT = 64_000_000
EAGER = "forward, eager"
STAGES = ("to the card", "front", "tail", "gradient", "map", "back")

Variants = Mapping[str, Callable[[], object]]


def loaded(name: str, device: str, largest: int) -> dict[Floating, LoadedModel]:
    """The model with its compiled lane in each precision. Raises SystemExit where it has none."""
    found: dict[Floating, LoadedModel] = {}
    for precision in PRECISIONS:
        model = load_model(
            parse_model(name),
            device=device,
            allow_random_weights=True,
            compiler=Compiler(largest=largest, precision=precision),
        )
        if model.compiled is None:
            raise SystemExit(f"{name} has no compiled lane: {model.not_compiled}")
        if model.compiled.precision == precision:
            found[precision] = model
        else:
            print(f"Without {precision}: {model.compiled.instead}")
    return found


def pictures(model: LoadedModel, count: int) -> list[Tensor]:
    """uint8 (3, h, w), as many as asked for."""
    height, width = model.preprocessing.crop
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))


def lanes(models: Mapping[Floating, LoadedModel], pool: ModelPool, batch: int) -> Variants:
    """What is compared for one batch size; each waits until its results are on the CPU."""
    exact = models["float32"]
    pixels = pictures(exact, batch)
    found: dict[str, Callable[[], object]] = {}
    module = exact.replicate()

    def forward(autocast: bool) -> None:
        rounded = torch.autocast(exact.device.type, torch.bfloat16, enabled=autocast)
        with torch.inference_mode(), rounded:
            module(exact.normalised(exact.batch(pixels))).argmax(1).cpu()

    def hooked() -> None:
        with pool.lease(exact, folded=True) as replica:
            run(replica, asked)

    asked = [Question(each, layers=exact.target_layers(())) for each in pixels]
    plain = [Question(each, method=None) for each in pixels]
    for precision, model in models.items():
        found[f"{EAGER}, {precision}"] = partial(forward, precision == "bf16")
        found[f"/predict, compiled, {precision}"] = partial(run_compiled, model, plain)
        found[f"/explain, compiled, {precision}"] = partial(run_compiled, model, asked)
    return found | {"/explain, hooked, float32": hooked}


def stages(model: LoadedModel, batch: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the stages of an explanation in the compiled lane, the card waited for."""
    lane = model.compiled
    assert lane is not None
    layout = model.layer(lane.layer).layout
    assert layout is not None
    pixels = pictures(model, batch)
    times: dict[str, list[float]] = {name: [] for name in STAGES}
    begun = 0.0

    def ended(name: str) -> None:
        nonlocal begun
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times[name].append(1000 * (time.perf_counter() - begun))
        begun = time.perf_counter()

    for _ in range(rounds + 2):
        begun = time.perf_counter()
        model.batch(pixels).to(model.device, non_blocking=True)
        ended("to the card")
        activation, *beside = lane.front(model.batch(pixels))
        activation.requires_grad_()
        ended("front")
        logits = model.logits(lane.tail(activation.clone(), *beside))
        ended("tail")
        (gradient,) = torch.autograd.grad(logits.amax(dim=1).sum(), activation)
        ended("gradient")
        maps = [layout.as_map(each.detach()).float() for each in (activation, gradient)]
        cam = gradcam(*maps)
        ended("map")
        cam.cpu()
        logits.detach().cpu()
        ended("back")
    return {name: statistics.median(each[2:]) for name, each in times.items()}


def around(model: LoadedModel, batch: int) -> dict[str, Variants]:
    """By task: the CPU as the service does it, and the card where torch has it; `batch` images."""
    file = photograph(0)
    source = decode(file, max_pixels=LIMIT)
    fitted = fit_to_model(source, model.preprocessing)
    photo, cam = preview(source, 640), np.random.default_rng(0).random((7, 7), np.float32)
    device, size = model.device, [model.preprocessing.resize]
    hwc = np.ascontiguousarray(fitted.pixels.permute(1, 2, 0).numpy())
    table = torch.from_numpy(np.array(COLORMAPS["turbo"])).to(device)
    grids = torch.from_numpy(cam).expand(batch, 1, 7, 7).to(device)
    encoded = torch.frombuffer(bytearray(file), dtype=torch.uint8)

    def resized_there() -> None:
        whole = model.batch([torch.from_numpy(source.pixels).permute(2, 0, 1)] * batch)
        small = transforms.resize(whole.to(device, non_blocking=True), size, antialias=True)
        transforms.center_crop(small, list(model.preprocessing.crop)).sum().cpu()

    def coloured_there() -> None:
        whole = model.batch([torch.from_numpy(photo).permute(2, 0, 1)] * batch).to(device)
        shape = (photo.shape[0], photo.shape[1])
        levels = torch.nn.functional.interpolate(grids, size=shape, mode="bilinear")
        colours = table[(levels[:, 0] * 255).long()].permute(0, 3, 1, 2)
        mixed = (colours.float() * 0.5 + whole.float() * 0.5).to(torch.uint8)
        for each in mixed.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            cv2.imencode(".jpg", each)

    def here(step: Callable[[], object]) -> Callable[[], None]:
        def all_of_them() -> None:
            for _ in range(batch):
                step()

        return all_of_them

    overlay = partial(render_overlay, cam, fitted.geometry, Style(), photo, hwc)
    found: dict[str, dict[str, Callable[[], object]]] = {
        "JPEG to pixels": {"CPU": here(partial(decode, file, max_pixels=LIMIT))},
        "pixels to model input": {
            "CPU": here(partial(fit_to_model, source, model.preprocessing)),
            "card": resized_there,
        },
        "map to overlay, JPEG": {"CPU": here(overlay), "card": coloured_there},
    }
    if device.type == "cuda":
        found["JPEG to pixels"]["card"] = lambda: [
            each.sum().cpu()
            for each in torchvision.io.decode_jpeg([encoded] * batch, device=device)
        ]
    return dict(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every batch size and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="torchvision/resnet50")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 2, 4, 8, 16, 32, 64))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each batch size")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was measured.")
        return
    torch.set_num_threads(1)
    models = loaded(options.model, options.device, max(options.batches))
    pool = ModelPool([models["float32"]], replicas=1)
    results = Results(options.out, again=True)
    rates, parts = [], []
    for batch in options.batches:
        times = in_turn(lanes(models, pool, batch), options.seconds)
        results.keep(f"gpu/{batch}", {}, {name: each.wall for name, each in times.items()})
        for name, each in times.items():
            own = "bf16" if "bf16" in name else "float32"
            beside = (f"{EAGER}, {own}", f"/predict, compiled, {own}")
            ratios = [str(ratio(each.wall, times[other].wall)) for other in beside]
            rate = batch / statistics.median(each.wall)
            rates.append([str(batch), name, f"{rate:.1f}", *ratios])
        for precision, model in models.items():
            took = stages(model, batch, 5)
            row = [str(batch), precision, *(f"{took[name]:.2f}" for name in STAGES)]
            parts.append(row)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"{options.model} on {card}; {machine()}\n")
    header = ["batch", "", "images/s", "÷ eager forward, in time", "÷ compiled /predict"]
    print(markdown(header, rates))
    print(f"\n{markdown(['batch', 'front', *(f'{stage}, ms' for stage in STAGES)], parts)}\n")
    rows = []
    for task, ways in around(models["float32"], max(options.batches)).items():
        took = {way: statistics.median(each.wall) for way, each in in_turn(ways, 1.0).items()}
        count = max(options.batches)
        each = [
            f"{1000 * took[way] / count:.3f}" if way in took else "–" for way in ("CPU", "card")
        ]
        rows.append([task, *each])
    print(markdown([f"ms an image, of {max(options.batches)}", "one core", "the card"], rows))


if __name__ == "__main__":
    main()
