"""How many explanations go wrong when threads explain through one shared model.

    .venv/bin/python benchmarks/races.py                 # resnet18 at 96 px; 8, 16 and 64 threads

Every thread asks about other images, targets and layers, through pytorch-grad-cam, TorchCAM and
Captum as their documents show them, an object a call, and through both lanes of the service. An
answer is wrong where it is not the one that the same library gives to the same question alone.

Each race is run in a process of its own, because some of them kill it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contenders
import numpy as np
import torch
from captum.attr import LayerGradCam
from measuring import ROOT, Results, markdown
from numpy.typing import NDArray
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor
from torchcam.methods import GradCAM as TorchCAM

from service.inference.batch import run, run_compiled
from service.inference.questions import InferenceResult, Question, lane_of
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool

Map = NDArray[np.float32]
TOLERANCE = 1e-3
"""Largest difference of two maps, each divided by its maximum, that still counts as the same."""

LIBRARIES = (
    *("pytorch-grad-cam", "pytorch-grad-cam, weights frozen", "TorchCAM", "Captum"),
    *("camserve, hooked lane", "camserve, compiled lane"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One question: uint8 pixels (3, h, w), a target and a layer."""

    pixels: Tensor
    target: int
    layer: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of all answers; `left` says in what state the shared model was afterwards."""

    answers: int
    wrong: int
    raised: int
    left: str


class Shared:
    """One model, shared by all threads, and each library's way to explain through it."""

    def __init__(self, model: LoadedModel, pool: ModelPool) -> None:
        self.model = model
        self.pool = pool
        self.net = contenders.plain(model)

    def explain(self, library: str, case: Case) -> Map:
        """The map of one case, divided by its maximum."""
        ways: dict[str, Callable[[Case], Map]] = {
            "pytorch-grad-cam": self._gradcam,
            "pytorch-grad-cam, weights frozen": self._gradcam_frozen,
            "TorchCAM": self._torchcam,
            "Captum": self._captum,
            "camserve, hooked lane": self._hooked,
            "camserve, compiled lane": self._compiled,
        }
        found = ways[library](case)
        return found / max(float(np.abs(found).max()), 1e-12)

    def left(self) -> str:
        """What the threads left on the shared model."""
        modules = list(self.net.modules())
        hooks = sum(len(module._forward_hooks) for module in modules)  # noqa: SLF001
        grads = sum(p.grad is not None for p in self.net.parameters())
        found = [f"{hooks} hooks"] if hooks else []
        found += [f".grad of {grads} parameters"] if grads else []
        self.net.zero_grad(set_to_none=True)
        for module in modules:
            module._forward_hooks.clear()  # noqa: SLF001
        return ", ".join(found) or "nothing"

    def _input(self, case: Case) -> Tensor:
        return self.model.normalised(case.pixels[None]).contiguous()

    def _gradcam(self, case: Case) -> Map:
        layer = self.net.get_submodule(case.layer)
        with GradCAM(model=self.net, target_layers=[layer]) as cam:
            maps = cam(self._input(case), targets=[ClassifierOutputTarget(case.target)])
        return np.asarray(maps[0], np.float32)

    def _gradcam_frozen(self, case: Case) -> Map:
        """No parameter's `.grad` is shared: the graph begins at the call's own image."""
        layer = self.net.get_submodule(case.layer)
        with GradCAM(model=self.net, target_layers=[layer]) as cam:
            taken = self._input(case).requires_grad_()
            maps = cam(taken, targets=[ClassifierOutputTarget(case.target)])
        return np.asarray(maps[0], np.float32)

    def _torchcam(self, case: Case) -> Map:
        with TorchCAM(self.net, target_layer=case.layer) as extractor:
            logits = self.net(self._input(case))
            maps: Tensor = extractor(case.target, logits)[0]
        return maps[0].numpy()

    def _captum(self, case: Case) -> Map:
        method = LayerGradCam(self.net, self.net.get_submodule(case.layer))
        maps = method.attribute(self._input(case), target=case.target, relu_attributions=True)
        return np.asarray(maps.detach()[0, 0].numpy(), np.float32)

    def _hooked(self, case: Case) -> Map:
        question = Question(case.pixels, targets=(case.target,), layers=(case.layer,))
        folded = lane_of(self.model, question) == "folded"
        with self.pool.lease(self.model, folded=folded) as replica:
            (answer,) = run(replica, [question])
        assert isinstance(answer, InferenceResult), answer
        return answer.explanations[0].grid

    def _compiled(self, case: Case) -> Map:
        question = Question(case.pixels, targets=(case.target,), layers=(case.layer,))
        (answer,) = run_compiled(self.model, [question])
        assert isinstance(answer, InferenceResult), answer
        return answer.explanations[0].grid


def cases(model: LoadedModel, layers: Sequence[str], side: int, pictures: int) -> list[Case]:
    """Seeded images, each at every layer, for two targets."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(pictures, 3, side, side, generator=generator)
    classes = len(model.labels)
    return [
        Case((picture * 255).byte(), (7 * number + 3 * place) % classes, layer)
        for (number, picture), (place, layer) in product(enumerate(noise), enumerate(layers))
    ]


def race(shared: Shared, library: str, asked: Sequence[Case], threads: int, each: int) -> Outcome:
    """All threads start at once; each asks `each` of the cases, every one beginning elsewhere."""
    alone = [shared.explain(library, case) for case in asked]
    shared.left()
    start = threading.Barrier(threads)
    wrong, raised = [0] * threads, [0] * threads

    def ask(number: int) -> None:
        start.wait()
        for step in range(each):
            place = (5 * number + step) % len(asked)
            try:
                found = shared.explain(library, asked[place])
            except Exception:  # noqa: BLE001 - it is counted, whatever it is
                raised[number] += 1
                continue
            same = found.shape == alone[place].shape
            wrong[number] += not (same and np.abs(found - alone[place]).max() <= TOLERANCE)

    running = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return Outcome(threads * each, sum(wrong), sum(raised), shared.left())


def run_one(options: argparse.Namespace, library: str, threads: int) -> Outcome:
    """One race in this process."""
    compiled = library.endswith("compiled lane")
    model = contenders.load(options.model, compiled=compiled)
    assert model.target_layer is not None
    # The compiled lane knows one layer and one size; other questions go to the hooked one.
    layers = (model.target_layer,) if compiled else options.layers
    side = model.preprocessing.crop[0] if compiled else options.side
    shared = Shared(model, ModelPool([model], replicas=options.replicas))
    shared.net.requires_grad_("frozen" not in library)
    asked = cases(model, layers, side, pictures=24 // len(layers))
    found = race(shared, library, asked, threads, options.each)
    faults = shared.pool.faults()
    return replace(found, left=", ".join(faults)) if faults else found


def run_apart(arguments: Sequence[str], library: str, threads: int) -> Outcome | str:
    """One race in a process of its own; the signal that killed it where one did."""
    chosen = ["--only", library, "--threads", str(threads)]
    done = subprocess.run(  # noqa: S603 - this very file
        [sys.executable, __file__, *arguments, *chosen], stdout=subprocess.PIPE, check=False
    )
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    if done.returncode:
        sys.exit(f"the race of {library} cannot be run")
    return Outcome(**json.loads(done.stdout.decode().splitlines()[-1]))


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="torchvision/resnet18")
    parser.add_argument("--layers", nargs="+", default=("layer2", "layer3", "layer4"))
    parser.add_argument("--threads", nargs="+", type=int, default=(8, 16, 64))
    parser.add_argument("--each", type=int, default=6, help="answers of each thread")
    parser.add_argument("--side", type=int, default=96, help="of the images, in pixels")
    parser.add_argument("--replicas", type=int, default=4, help="in the service's pool")
    parser.add_argument("--only", choices=LIBRARIES, help="one library, in this process")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "races.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Race, print the table, and fail where an answer of the service was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = options_of(arguments)
    if options.only:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")  # the libraries' own, in every thread
        print(json.dumps(asdict(run_one(options, options.only, options.threads[0]))))
        return
    results, rows, failed = Results(options.out, again=True), [], 0
    for library, threads in product(LIBRARIES, options.threads):
        found = run_apart(arguments, library, threads)
        print(f"{library}, {threads} threads: {found}", flush=True)
        kept = found if isinstance(found, str) else asdict(found)
        results.keep(f"races/{library}/{threads}", {}, kept)
        rows.append([library, str(threads), *row(found)])
        if library.startswith("camserve"):
            failed += isinstance(found, str) or bool(found.wrong + found.raised)
    print(f"\n{results.found('machine')}; {options.model} at {options.side} px\n")
    print(markdown(["through", "threads", "answers", "wrong", "raised", "left behind"], rows))
    if failed:
        sys.exit(f"the service failed in {failed} races")


def row(found: Outcome | str) -> list[str]:
    """What the table says of one race."""
    if isinstance(found, str):
        return ["–", "–", "–", f"the process died ({found})"]
    return [str(found.answers), str(found.wrong), str(found.raised), found.left]


if __name__ == "__main__":
    main()
