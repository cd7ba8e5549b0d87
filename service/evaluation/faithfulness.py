"""Which layer explains best: measured by hiding and showing what its maps point at.

Deletion hides the pixels of a picture from the most important on and watches the score of the
predicted class fall; insertion shows them in the same order on an empty picture and watches it
rise. Empty is the mean colour. A map is faithful where insertion rises fast and deletion falls
fast: the area under the one minus that under the other, −1..1.

Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.cam.formulas import over_input
from service.errors import CamserveError
from service.inference.batch import run
from service.inference.questions import InferenceResult, Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes.condition import Condition

STEPS = 16
"""Steps from nothing to the whole picture."""

MOST = 12
"""How many layers are measured where none are named."""

CHUNK = 8
"""Images in one forward pass."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A layer's Grad-CAM on some pictures: mean areas under the curves, and time per picture."""

    layer: str
    insertion: float
    deletion: float
    milliseconds: float

    @property
    def faithfulness(self) -> float:
        """Insertion minus deletion, −1..1."""
        return self.insertion - self.deletion

    @property
    def per_millisecond(self) -> float:
        """Faithfulness for its price."""
        return self.faithfulness / self.milliseconds


def candidates(model: LoadedModel, most: int = MOST) -> tuple[str, ...]:
    """Layers that a map can be drawn from, at most so many: the deeper, the denser.

    The model's own target layer is always among them.
    """
    mapping = sorted((layer for layer in model.layers if layer.target), key=lambda x: x.share)
    paths = [layer.path for layer in mapping]
    if len(paths) > most:
        backwards = [(place / (most - 1)) ** 1.5 for place in range(most)]
        places = {round((len(paths) - 1) * (1 - back)) for back in backwards}
        paths = [paths[place] for place in sorted(places)]
    if model.target_layer is not None and model.target_layer not in paths:
        paths[0] = model.target_layer
    return tuple(paths)


def rank(
    model: LoadedModel, pictures: Sequence[Tensor], layers: Sequence[str], steps: int = STEPS
) -> list[Measured]:
    """Measure layers on pictures, uint8 (C, h, w) at the model's input size; the best first.

    Raises the error of a picture that cannot be answered.
    """
    module = model.replicate()
    replica = Replica(model, module, Condition.of(module))
    found = [_measured(replica, pictures, layer, steps) for layer in layers]
    return sorted(found, key=lambda measured: -measured.faithfulness)


def _measured(replica: Replica, pictures: Sequence[Tensor], layer: str, steps: int) -> Measured:
    insertion = deletion = seconds = 0.0
    for picture in pictures:
        started = time.perf_counter()
        (answer,) = run(replica, [Question(picture, top_k=1, layers=(layer,))])
        seconds += time.perf_counter() - started
        if isinstance(answer, CamserveError):
            raise answer
        assert isinstance(answer, InferenceResult)
        areas = _areas(replica, picture, answer, steps)
        insertion, deletion = insertion + areas[0], deletion + areas[1]
    count = len(pictures)
    return Measured(layer, insertion / count, deletion / count, 1000 * seconds / count)


def _areas(
    replica: Replica, picture: Tensor, answer: InferenceResult, steps: int
) -> tuple[float, float]:
    """The areas under the insertion and the deletion curve of the explained class."""
    (explanation,) = answer.explanations
    image = replica.model.normalised(picture[None])[0]
    size = (int(image.shape[1]), int(image.shape[2]))
    covers = replica.model.preprocessing.covers
    cam = over_input(torch.tensor(explanation.grid)[None], size, covers)[0].to(image.device)
    rank_of = torch.empty(cam.numel(), device=image.device)
    order = cam.flatten().argsort(descending=True, stable=True)
    rank_of[order] = torch.arange(cam.numel(), device=image.device, dtype=rank_of.dtype)
    shares = torch.linspace(0, 1, steps + 1, device=image.device)
    first = rank_of.reshape(1, *size) < (shares * cam.numel())[:, None, None]
    shown = torch.cat([image * first[:, None], image * ~first[:, None]])
    chunk = CHUNK if replica.model.behaviour.batchable else 1
    with torch.no_grad():
        chunks = [
            replica.model.logits(replica.module(shown[start : start + chunk]))
            for start in range(0, len(shown), chunk)
        ]
    logits = torch.cat(chunks)
    kind = replica.model.output
    scores = logits.softmax(dim=1) if kind == "none" else replica.model.scores(logits)
    curve = scores[:, explanation.class_id].cpu()
    area = torch.trapezoid(curve.reshape(2, -1), dx=1 / steps)
    return float(area[0]), float(area[1])
