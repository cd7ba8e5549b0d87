"""Compare layers by the faithfulness of their maps: insertion and deletion curves.

Deletion hides the pixels of an image in order of importance, and the score of the predicted class
falls; insertion shows them in the same order on an empty image, and it rises. Empty is the mean
colour. A map is faithful if insertion rises fast and deletion falls fast: faithfulness is the area
under the first curve minus that under the second, −1..1.

Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.cam.formulas import over_input
from service.errors import CamserveError
from service.inference.batch import run
from service.inference.perturbation import chunk_size, logits_of, mean_colour
from service.inference.questions import InferenceResult, Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes.condition import Condition

STEPS = 16
"""Steps from nothing to the whole image."""

MAX_LAYERS = 12
"""How many layers are measured if none are named."""


@dataclass(frozen=True, slots=True)
class LayerScore:
    """A layer's Grad-CAM on some images: mean areas under the curves, and time per image."""

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
        """Faithfulness per millisecond."""
        return self.faithfulness / self.milliseconds


def candidates(model: LoadedModel, most: int = MAX_LAYERS) -> tuple[str, ...]:
    """At most `most` layers that a map can be drawn from, more of them the deeper they are.

    The model's target layer is always among them.
    """
    by_depth = sorted((layer for layer in model.layers if layer.target), key=lambda x: x.share)
    paths = [layer.path for layer in by_depth]
    if len(paths) > most:
        from_end = [(index / (most - 1)) ** 1.5 for index in range(most)]
        indices = {round((len(paths) - 1) * (1 - share)) for share in from_end}
        paths = [paths[index] for index in sorted(indices)]
    if model.target_layer is not None and model.target_layer not in paths:
        paths[0] = model.target_layer
    return tuple(paths)


def rank(
    model: LoadedModel,
    images: Sequence[Tensor],
    layers: Sequence[str],
    steps: int = STEPS,
    on_image: Callable[[], None] = lambda: None,
) -> list[LayerScore]:
    """Measure layers on images, uint8 (C, h, w) at the model's input size; the best first.

    on_image: called after each image of each layer.

    Raises the error of an image that cannot be explained.
    """
    module = model.replicate()
    replica = Replica(model, module, Condition.of(module))
    scores = [_score(replica, images, layer, steps, on_image) for layer in layers]
    return sorted(scores, key=lambda score: -score.faithfulness)


def _score(
    replica: Replica,
    images: Sequence[Tensor],
    layer: str,
    steps: int,
    on_image: Callable[[], None],
) -> LayerScore:
    insertion = deletion = seconds = 0.0
    for pixels in images:
        started = time.perf_counter()
        (result,) = run(replica, [Question(pixels, top_k=1, layers=(layer,))])
        seconds += time.perf_counter() - started
        if isinstance(result, CamserveError):
            raise result
        assert isinstance(result, InferenceResult)
        areas = _areas(replica, pixels, result, steps)
        insertion, deletion = insertion + areas[0], deletion + areas[1]
        on_image()
    count = len(images)
    return LayerScore(layer, insertion / count, deletion / count, 1000 * seconds / count)


def _areas(
    replica: Replica, pixels: Tensor, result: InferenceResult, steps: int
) -> tuple[float, float]:
    """The areas under the insertion and the deletion curve of the explained class."""
    (explanation,) = result.explanations
    model, size = replica.model, (pixels.shape[1], pixels.shape[2])
    covers = model.preprocessing.covers
    cam = over_input(torch.tensor(explanation.grid)[None], size, covers)[0]
    rank_of = torch.empty(cam.numel())
    order = cam.flatten().argsort(descending=True, stable=True)
    rank_of[order] = torch.arange(cam.numel(), dtype=rank_of.dtype)
    first = rank_of.reshape(size) < (torch.linspace(0, 1, steps + 1) * cam.numel())[:, None, None]
    visible = torch.cat([first, ~first])[:, None]
    shown = torch.where(visible, pixels, mean_colour(model))
    chunk = chunk_size(model)
    with torch.no_grad():
        chunks = [logits_of(model, replica, part) for part in shown.split(chunk)]
    logits = torch.cat(chunks)
    kind = model.output
    scores = logits.softmax(dim=1) if kind == "none" else model.scores(logits)
    curve = scores[:, explanation.class_id]
    area = torch.trapezoid(curve.reshape(2, -1), dx=1 / steps)
    return float(area[0]), float(area[1])
