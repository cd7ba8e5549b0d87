"""One batch on one leased replica: forward, gradients, maps; frozen results on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.cam.hooks import Recording, gradients, record
from service.cam.methods import METHODS, fuse, scale
from service.errors import NonFiniteOutput
from service.models.loaded import LoadedModel
from service.models.pool import Replica

LOW_RESOLUTION = 7
"""A map whose shorter side has fewer cells than this is flagged `low_resolution`."""

SATURATED = 0.9999
"""A score above this is flagged `saturated`: its gradient says little."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about one image.

    pixels:      uint8 (3, h, w), at the model's input size.
    top_k:       how many predictions to list.
    targets:     the class ids to explain; empty explains the `explain_top` best predictions.
    layers:      the target layers; several are fused. Empty asks for predictions alone.
    activations: the layers whose output is wanted.
    """

    pixels: Tensor
    top_k: int = 5
    targets: tuple[int, ...] = ()
    explain_top: int = 1
    method: str = "gradcam"
    layers: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class: score in 0..1 (softmax) and the logit behind it."""

    class_id: int
    score: float
    logit: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """One map: `grid` float32 (h, w) in 0..1, `low` and `high` its range before the division."""

    class_id: int
    score: float
    method: str
    layers: tuple[str, ...]
    grid: NDArray[np.float32]
    low: float
    high: float
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Activation:
    """What one call of one layer returned for this image, float32, without the batch dimension."""

    layer: str
    kind: str
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything about one image. Its arrays are read-only and belong to nobody else."""

    predictions: tuple[Prediction, ...]
    explanations: tuple[Explanation, ...]
    activations: tuple[Activation, ...]


@dataclass(frozen=True, slots=True)
class _Batch:
    """One forward pass: `logits` (B, C) float32 on the CPU, the targets and the maps of each image.

    `maps` has the unscaled map (h, w) of each (image, place in its targets), on the CPU.
    """

    model: LoadedModel
    questions: Sequence[Question]
    logits: Tensor
    targets: Sequence[tuple[int, ...]]
    maps: Mapping[tuple[int, int], Tensor]
    seen: Recording


def run(replica: Replica, questions: Sequence[Question]) -> list[Answer | NonFiniteOutput]:
    """Answer a batch of questions that share one input size.

    One forward pass serves all of them, whatever their targets, layers and captures; one walk of
    the graph serves all gradients. An image whose logits are not finite gets its error in its
    place and does not spoil the others.
    """
    batch = _forward(replica, questions)
    return [
        _answer(batch, image)
        if bool(batch.logits[image].isfinite().all())
        else NonFiniteOutput(
            "The model answered this image with NaN or infinity, so there is nothing to explain; "
            "check the weights and the precision of the model."
        )
        for image in range(len(questions))
    ]


def _forward(replica: Replica, questions: Sequence[Question]) -> _Batch:
    pixels = normalise(torch.stack([question.pixels for question in questions]), replica.model)
    layers = _union(question.layers for question in questions)
    outputs = _union(question.activations for question in questions)
    with (
        nullcontext() if layers else torch.no_grad(),
        record(replica.module, targets=layers, outputs=outputs) as seen,
    ):
        logits = replica.module(pixels)
        targets = [_targets(question, row) for question, row in zip(questions, logits, strict=True)]
        maps = _maps(questions, logits, targets, seen) if layers else {}
    return _Batch(replica.model, questions, logits.detach().float().cpu(), targets, maps, seen)


def normalise(pixels: Tensor, model: LoadedModel) -> Tensor:
    """uint8 (B, C, h, w) → float32 on the model's device, as torchvision's presets do."""
    device = next((p.device for p in model.module.parameters()), torch.device("cpu"))
    preprocessing = model.preprocessing
    batch = pixels.to(device).to(torch.float32).div_(255)
    mean = torch.tensor(preprocessing.mean, device=device)[:, None, None]
    std = torch.tensor(preprocessing.std, device=device)[:, None, None]
    return batch.sub_(mean).div_(std)


def _union(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(groups)))


def _targets(question: Question, logits: Tensor) -> tuple[int, ...]:
    if not question.layers:
        return ()
    if question.targets:
        return question.targets
    count = min(question.explain_top, logits.shape[0])
    return tuple(int(index) for index in logits.detach().topk(count).indices)


def _maps(
    questions: Sequence[Question],
    logits: Tensor,
    chosen: Sequence[tuple[int, ...]],
    seen: Recording,
) -> dict[tuple[int, int], Tensor]:
    most = max(len(ids) for ids in chosen)
    weights = torch.zeros(most, *logits.shape, dtype=logits.dtype, device=logits.device)
    for image, ids in enumerate(chosen):
        for place, class_id in enumerate(ids):
            weights[place, image, class_id] = 1
    # A module that ran several times is explained at its last call, the one nearest to the output.
    leaves = {path: calls[-1] for path, calls in seen.targets.items()}
    found = dict(zip(leaves, gradients(logits, list(leaves.values()), weights), strict=True))
    cams: dict[tuple[int, int], Tensor] = {}
    for image, (question, ids) in enumerate(zip(questions, chosen, strict=True)):
        for place in range(len(ids)):
            cams[image, place] = fuse(
                [
                    METHODS[question.method](
                        leaves[path].detach()[image : image + 1].float(),
                        found[path][place, image : image + 1].float(),
                    )[0].cpu()
                    for path in question.layers
                ]
            )
    return cams


def _answer(batch: _Batch, image: int) -> Answer:
    question, logits = batch.questions[image], batch.logits[image]
    scores = logits.softmax(dim=0)
    best = logits.topk(min(question.top_k, logits.shape[0])).indices.tolist()
    return Answer(
        tuple(Prediction(i, float(scores[i]), float(logits[i])) for i in best),
        tuple(
            _explanation(batch, image, place, float(scores[class_id]))
            for place, class_id in enumerate(batch.targets[image])
        ),
        tuple(
            Activation(path, "output", _frozen(_own_part(call, image, len(batch.questions))))
            for path in question.activations
            for call in batch.seen.outputs.get(path, ())
        ),
    )


def _explanation(batch: _Batch, image: int, place: int, score: float) -> Explanation:
    question, class_id = batch.questions[image], batch.targets[image][place]
    grid, low, high = scale(batch.maps[image, place])
    flags = {
        "all_zero": not bool(grid.any()),
        "target_not_predicted": class_id != int(batch.logits[image].argmax()),
        "saturated": score > SATURATED,
        "low_resolution": min(grid.shape) < LOW_RESOLUTION,
        "random_weights": batch.model.random_weights,
        "module_called_n_times": any(len(batch.seen.targets[path]) > 1 for path in question.layers),
    }
    return Explanation(
        class_id=class_id,
        score=score,
        method=question.method,
        layers=question.layers,
        grid=_frozen(grid),
        low=low,
        high=high,
        flags=tuple(flag for flag, is_so in flags.items() if is_so),
    )


def _own_part(values: Tensor, index: int, batch_size: int) -> Tensor:
    """One image's part of a recorded tensor.

    Its first dimension is the batch, or a multiple of it where the model cuts images into windows;
    a tensor that has less than one row an image is the same for all of them.
    """
    rows = values.shape[0] // batch_size if values.ndim else 0
    if rows == 0:
        return values
    part = values[index * rows : (index + 1) * rows]
    return part[0] if rows == 1 else part


def _frozen(values: Tensor) -> NDArray[np.float32]:
    """A read-only float32 copy on the CPU, so that no result keeps a whole batch alive."""
    array = np.array(values.detach().float().cpu().numpy(), dtype=np.float32, order="C")
    array.flags.writeable = False
    return array
