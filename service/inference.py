"""One batch on one leased replica: forward, gradients, maps; frozen results on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.cam.hooks import Calls, Recording, calls_of, gradients, record
from service.cam.layouts import Layout
from service.cam.methods import GRADIENT_CAMS, fuse, precise, scale, weighted
from service.errors import CamserveError, InvalidOption, NonFiniteOutput
from service.models.head import head_weights
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.questions import (
    CAM_METHODS,
    LAYER_METHODS,
    Activation,
    Answer,
    Explanation,
    Kind,
    Prediction,
    Question,
    cost,
)

LOW_RESOLUTION = 7
"""A map whose shorter side has fewer cells than this is flagged `low_resolution`."""

SATURATED = 0.9999
"""A score above this is flagged `saturated`: its gradient says little."""


@dataclass(frozen=True, slots=True)
class Part:
    """What the shared forward pass gave one image.

    logits:      (classes,) float32 on the CPU.
    targets:     the class ids to explain, empty where nothing is to be explained.
    activations: each target layer's output (1, ...) in its own layout, detached.
    maps:        the CAM of each target (h, w) on the CPU; empty for methods that go on from here.
    captured:    what was asked to be captured.
    repeated:    whether a target layer ran several times in this pass.
    """

    model: LoadedModel
    question: Question
    logits: Tensor
    targets: tuple[int, ...]
    activations: Mapping[str, Tensor]
    maps: Sequence[Tensor]
    captured: tuple[Activation, ...]
    repeated: bool

    def value(self, logits: Tensor, place: int) -> Tensor:
        """What is explained for a target, of any logits (..., classes): its logit, or its lead."""
        value = logits[..., self.targets[place]]
        contrast = self.question.contrast
        return value if contrast is None else value - logits[..., contrast]


_Place = tuple[Kind, str, int]
"""A point to differentiate at: which side of which layer (and part), at which call."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass: `found` has the gradient (K, B, ...) at each recorded point."""

    model: LoadedModel
    questions: Sequence[Question]
    targets: Sequence[tuple[int, ...]]
    seen: Recording
    found: Mapping[_Place, Tensor]


def forward(replica: Replica, questions: Sequence[Question]) -> list[Part | CamserveError]:
    """Run a batch of questions that share one input size through the model, once.

    One forward pass serves all of them, whatever their targets, layers and captures; one walk of
    the graph serves all gradients. An image whose logits are not finite, or that its method does
    not suit, gets its error in its place and does not spoil the others.
    """
    pixels = normalise(torch.stack([question.pixels for question in questions]), replica.model)
    kinds = {kind: _captured(questions, kind) for kind in _KINDS}
    layers = _union(question.layers for question in questions if question.explains)
    differentiated = (*layers, *kinds["grad_output"])
    graph = bool(differentiated or kinds["grad_input"])
    with (
        nullcontext() if graph else torch.no_grad(),
        record(
            replica.module,
            targets=differentiated,
            outputs=kinds["output"],
            inputs=kinds["input"],
            input_targets=kinds["grad_input"],
        ) as seen,
    ):
        logits = replica.model.logits(replica.module(pixels))
        targets = [_targets(question, row) for question, row in zip(questions, logits, strict=True)]
        found = _differentiate(logits, questions, targets, seen, layers) if graph else {}
    rows = logits.detach().cpu()
    done = _Pass(replica.model, questions, targets, seen, found)
    return [_part(done, image, rows[image]) for image in range(len(questions))]


def normalise(pixels: Tensor, model: LoadedModel) -> Tensor:
    """uint8 (B, C, h, w) → the model's dtype on its device, as torchvision's presets do."""
    device = next((p.device for p in model.module.parameters()), torch.device("cpu"))
    preprocessing = model.preprocessing
    batch = pixels.to(device).to(torch.float32).div_(255)
    mean = torch.tensor(preprocessing.mean, device=device)[:, None, None]
    std = torch.tensor(preprocessing.std, device=device)[:, None, None]
    return batch.sub_(mean).div_(std).to(model.dtype)


def finish(part: Part, maps: Sequence[Tensor]) -> Answer:
    """The answer for one image, with the map (h, w) of each of its targets."""
    model, question = part.model, part.question
    scores = model.scores(part.logits)
    best = part.logits.topk(min(question.top_k, part.logits.shape[0])).indices.tolist()
    return Answer(
        tuple(Prediction(i, float(scores[i]), float(part.logits[i])) for i in best),
        tuple(
            _explanation(part, class_id, float(scores[class_id]), cam)
            for class_id, cam in zip(part.targets, maps, strict=True)
        ),
        part.captured,
    )


_KINDS: tuple[Kind, ...] = ("output", "input", "grad_output", "grad_input")


def _captured(questions: Sequence[Question], kind: Kind) -> tuple[str, ...]:
    return _union(question.activations for question in questions if kind in question.kinds)


def _union(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(groups)))


def _targets(question: Question, logits: Tensor) -> tuple[int, ...]:
    """The classes to explain, or the one whose gradient is captured."""
    if question.targets:
        return question.targets
    if not question.explains and not {"grad_output", "grad_input"} & set(question.kinds):
        return ()
    count = min(question.explain_top, logits.shape[0])
    return tuple(int(index) for index in logits.detach().topk(count).indices)


def _differentiate(
    logits: Tensor,
    questions: Sequence[Question],
    targets: Sequence[tuple[int, ...]],
    seen: Recording,
    layers: Sequence[str],
) -> dict[_Place, Tensor]:
    """The gradient of every target at the target layers, of the first at what is captured."""
    most = max(1, *(len(ids) for ids in targets))
    weights = logits.new_zeros((most, *logits.shape)).detach()
    for image, (question, ids) in enumerate(zip(questions, targets, strict=True)):
        for place, class_id in enumerate(ids):
            weights[place, image, class_id] += 1
            if question.contrast is not None:
                weights[place, image, question.contrast] -= 1
    sides: dict[Kind, Calls] = {"grad_output": seen.targets, "grad_input": seen.input_targets}
    points: dict[_Place, Tensor] = {
        (kind, key, call): tensor
        for kind, calls in sides.items()
        for key, tensors in calls.items()
        for call, tensor in enumerate(tensors)
        if tensor.requires_grad  # class ids and masks have no gradient
    }
    explained = [place for place in points if place[0] == "grad_output" and place[1] in layers]
    captured = [place for place in points if place not in explained]
    found: dict[_Place, Tensor] = {}
    for places, sums in ((explained, weights), (captured, weights[:1])):
        at = [points[place] for place in places]
        again = places is explained and bool(captured)
        found |= zip(places, gradients(logits, at, sums, keep_graph=again), strict=True)
    return found


def _part(done: _Pass, image: int, logits: Tensor) -> Part | CamserveError:
    if not bool(logits.isfinite().all()):
        return NonFiniteOutput(
            "The model answered this image with NaN or infinity, so there is nothing to explain; "
            "check the weights and the precision of the model."
        )
    question, targets = done.questions[image], done.targets[image]
    layers = question.layers if question.explains else ()
    own = {path: done.seen.targets[path][-1].detach()[image : image + 1] for path in layers}
    maps: list[Tensor] = []
    try:
        if question.explains and question.method in CAM_METHODS | {"guided_gradcam"}:
            maps = [_cam(done, image, place, own, logits) for place in range(len(targets))]
    except InvalidOption as error:
        return error
    return Part(
        model=done.model,
        question=question,
        logits=logits,
        targets=targets if question.explains else (),
        activations=own,
        maps=maps,
        captured=tuple(_captures(done, image)),
        repeated=any(len(done.seen.targets[path]) > 1 for path in layers),
    )


def _cam(done: _Pass, image: int, place: int, own: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """The map (h, w) of one target, fused over its layers, on the CPU.

    A layer that ran several times is explained at its last call, the one nearest to the output.
    """
    question = done.questions[image]
    cams = []
    for path, values in own.items():
        layout = layout_of_layer(done.model, path)
        activation = precise(layout.as_map(values))
        if question.method == "cam":
            weights = head_weights(done.model, path, activation, logits)
            row = weights[done.targets[image][place]]
            if question.contrast is not None:
                row = row - weights[question.contrast]
            cams.append(weighted(activation, row[None].to(activation))[0].cpu())
            continue
        last = len(done.seen.targets[path]) - 1
        gradient = done.found["grad_output", path, last][place, image : image + 1]
        method = GRADIENT_CAMS.get(question.method or "", GRADIENT_CAMS["gradcam"])
        cams.append(method(activation, precise(layout.as_map(gradient)))[0].cpu())
    return fuse(cams)


def layout_of_layer(model: LoadedModel, path: str) -> Layout:
    """The layout of a layer that was checked to have one."""
    layout = model.layer(path).layout
    assert layout is not None
    return layout


def _captures(done: _Pass, image: int) -> Iterator[Activation]:
    question = done.questions[image]
    sides: dict[Kind, Calls] = {
        "output": done.seen.outputs,
        "input": done.seen.inputs,
        "grad_output": done.seen.targets,
        "grad_input": done.seen.input_targets,
    }
    for path, kind in product(question.activations, question.kinds):
        layer = done.model.layer(path)
        for part, call, values in calls_of(sides[kind], path):
            alone = (layer.taken if kind.endswith("input") else layer.given).get((part, call))
            if not kind.startswith("grad"):
                own = _own_part(values, image, len(done.questions), alone)
            elif (kind, path + part, call) in done.found:
                if len(done.questions) > 1 and values.shape == alone:
                    # Its gradient is the sum over all images. The scheduler then asks one by one.
                    raise RuntimeError(f"{path}{part} has no dimension that tells images apart")
                found = done.found[kind, path + part, call][0]
                own = _own_part(found, image, len(done.questions), alone)
            else:
                continue
            yield Activation(path, kind, call, part, _frozen(own))


def _explanation(part: Part, class_id: int, score: float, cam: Tensor) -> Explanation:
    question, (grid, low, high) = part.question, scale(cam)
    assert question.method is not None
    flags = {
        "all_zero": not bool(grid.any()),
        "target_not_predicted": class_id != int(part.logits.argmax()),
        "saturated": part.model.output != "none" and score > SATURATED,
        "low_resolution": min(grid.shape) < LOW_RESOLUTION,
        "random_weights": part.model.random_weights,
        "module_called_n_times": part.repeated,
    }
    return Explanation(
        class_id=class_id,
        score=score,
        logit=float(part.logits[class_id]),
        contrast=question.contrast,
        method=question.method,
        layers=question.layers if question.method in LAYER_METHODS else (),
        grid=_frozen(grid),
        low=low,
        high=high,
        flags=tuple(flag for flag, is_so in flags.items() if is_so),
        cost=cost(part.model, question),
    )


def _own_part(values: Tensor, index: int, batch_size: int, alone: tuple[int, ...] | None) -> Tensor:
    """One image's part of a recorded tensor, as if the image had been alone in the pass.

    alone: its shape then. In a batch one dimension is that many times as long (where the model cuts
    images into windows, the first is a multiple of the batch), or none: such a tensor, a table of
    positions for instance, is the same for all images. Where a model's shapes depend on what it
    sees, the first dimension is taken to be the batch.
    """
    if batch_size > 1 and values.ndim and values.shape != alone:
        axis = _batch_axis(tuple(values.shape), batch_size, alone)
        rows, rest = divmod(values.shape[axis], batch_size)
        values = values if rest else values.narrow(axis, index * rows, rows)
    return values[0] if values.ndim and values.shape[0] == 1 else values


def _batch_axis(shape: tuple[int, ...], batch_size: int, alone: tuple[int, ...] | None) -> int:
    alone = alone or ()
    for axis, length in enumerate(alone):
        if shape == (*alone[:axis], length * batch_size, *alone[axis + 1 :]):
            return axis
    return 0


def _frozen(values: Tensor) -> NDArray[np.float32]:
    """A read-only float32 copy on the CPU, so that no result keeps a whole batch alive."""
    array = np.array(values.detach().float().cpu().numpy(), dtype=np.float32, order="C")
    array.flags.writeable = False
    return array
