"""One batch on one leased replica: forward, gradients, maps; frozen results on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from service.cam.hooks import Calls, Recording, calls_of, gradients, record
from service.cam.methods import scale
from service.errors import CamserveError, InvalidOption, NonFiniteOutput
from service.inference.captures import Part, Pass, Place, captures, frozen
from service.inference.maps import by_image, from_head, fused, maps_at_layers
from service.inference.methods import cost
from service.inference.questions import Answer, Explanation, Kind, Prediction, Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica

LOW_RESOLUTION = 7
"""A map whose shorter side has fewer cells than this is flagged `low_resolution`."""

SATURATED = 0.9999
"""A score above this is flagged `saturated`: its gradient says little."""

WALK_BYTES = 4 << 20
"""Bytes of gradients at the target layers that one walk of the graph gives: as many targets as fit
share a walk, and their maps are made before the next one.

A walk holds many times that on its way. A hundred targets at resnet18's conv1 peak 92 MiB above
rest, all in one walk 1,544 MiB; in processor time it is not slower."""


def forward(replica: Replica, questions: Sequence[Question]) -> list[Part | CamserveError]:
    """Run a batch of questions that share one input size through the model, once.

    One forward pass serves all of them, whatever their targets, layers and captures; one walk of
    the graph serves all gradients. An image whose logits are not finite, or that its method does
    not suit, gets its error in its place and does not spoil the others.
    """
    model = replica.model
    pixels = model.normalised(model.batch([question.pixels for question in questions]))
    kinds = {kind: _captured(questions, kind) for kind in _KINDS}
    layers = _union(question.layers for question in questions if question.explains)
    differentiated = (*layers, *kinds["grad_output"])
    graph = any(question.differentiates for question in questions)
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
        logits = model.logits(replica.module(pixels))
    return _parts(model, questions, logits, seen)


def forward_compiled(
    model: LoadedModel, questions: Sequence[Question], *, wide: bool = False
) -> list[Part | CamserveError]:
    """`forward` in the compiled lane, for questions that `questions.lane_of` sends there.

    Needs no replica: nothing is hooked, and the front and the tail keep nothing between calls.
    wide: whether nothing else runs, so that the batch may have all cores.
    """
    lane = model.compiled
    assert lane is not None
    activation = lane.front(model.batch([question.pixels for question in questions]), wide=wide)
    explains = any(question.explains for question in questions)
    graph = any(question.differentiates for question in questions)
    with nullcontext() if graph else torch.no_grad():
        activation.requires_grad_(graph)
        # A clone: the tail may overwrite the very activation that is to be explained.
        logits = model.logits(lane.tail(activation.clone() if explains else activation))
    seen = Recording(targets={lane.layer: [activation]})
    return _parts(model, questions, logits, seen)


def _parts(
    model: LoadedModel, questions: Sequence[Question], logits: Tensor, seen: Recording
) -> list[Part | CamserveError]:
    """What one forward pass gave each image."""
    # Once for the batch: each look at a value on a GPU waits until that has done all before it.
    rows = logits.detach().cpu()
    finite = rows.isfinite().all(dim=1).tolist()
    targets = [
        _targets(question, row) if is_finite else ()
        for question, row, is_finite in zip(questions, rows, finite, strict=True)
    ]
    done = Pass(model, questions, targets, seen, {})
    weights = _weights(done, logits)
    done = replace(done, found=_captured_gradients(done, logits, weights[:1]))
    maps = _differentiate(done, logits, weights)
    return [_part(done, image, rows[image], finite[image], maps) for image in range(len(questions))]


def finish(part: Part, maps: Sequence[Tensor]) -> Answer:
    """The answer for one image, with the map (h, w) of each of its targets."""
    model, logits = part.model, part.logits
    scores = model.scores(logits)
    best = logits.topk(min(part.question.top_k, logits.shape[0]))
    best_scores = scores[best.indices]
    return Answer(
        tuple(map(Prediction, best.indices.tolist(), best_scores.tolist(), best.values.tolist())),
        tuple(
            _explanation(part, class_id, float(scores[class_id]), made)
            for class_id, made in zip(part.targets, maps, strict=True)
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


def _weights(done: Pass, logits: Tensor) -> Tensor:
    """What is differentiated, (K, B, classes): each image's targets, less its contrast."""
    most = max(1, *(len(ids) for ids in done.targets))
    weights = torch.zeros((most, *logits.shape), dtype=logits.dtype)
    for image, (question, ids) in enumerate(zip(done.questions, done.targets, strict=True)):
        for place, class_id in enumerate(ids):
            weights[place, image, class_id] += 1
            if question.contrast is not None:
                weights[place, image, question.contrast] -= 1
    return weights.to(logits.device)


def _captured_gradients(done: Pass, logits: Tensor, weights: Tensor) -> dict[Place, Tensor]:
    """The gradient of the first target at what is captured; the graph is kept."""
    sides: dict[Kind, Calls] = {
        "grad_output": done.seen.targets,
        "grad_input": done.seen.input_targets,
    }
    points: dict[Place, Tensor] = {
        (kind, path + part, call): tensor
        for kind, calls in sides.items()
        for path in _captured(done.questions, kind)
        for part, call, tensor in calls_of(calls, path)
        if tensor.requires_grad  # class ids and masks have no gradient
    }
    found = gradients(logits, list(points.values()), weights, keep_graph=True)
    return dict(zip(points, found, strict=True))


def _differentiate(done: Pass, logits: Tensor, weights: Tensor) -> Mapping[tuple[int, int], Tensor]:
    """The map (h, w) of each (image, place) that this pass explains, on the CPU."""
    cams = maps_at_layers(done, range(weights.shape[0]), {})
    paths = _union(q.layers for q in done.questions if q.walks)
    at = [done.seen.targets[path][-1] for path in paths]
    most = max(
        (len(ids) for q, ids in zip(done.questions, done.targets, strict=True) if q.walks),
        default=0,
    )
    together = max(1, WALK_BYTES // max(1, sum(tensor.nbytes for tensor in at)))
    for start in range(0, most, together):
        places = range(start, min(start + together, most))
        found = gradients(
            logits,
            at,
            weights[start : places.stop],
            keep_graph=places.stop < most,
            together=done.model.behaviour.vectorised,
        )
        cams |= maps_at_layers(done, places, dict(zip(paths, found, strict=True)))
    return fused(done, cams)


def _part(
    done: Pass,
    image: int,
    logits: Tensor,
    finite: bool,
    made: Mapping[tuple[int, int], Tensor],
) -> Part | CamserveError:
    if not finite:
        return NonFiniteOutput(
            "The model answered this image with NaN or infinity, so there is nothing to explain; "
            "check the weights and the precision of the model."
        )
    question, targets = done.questions[image], done.targets[image]
    layers = question.layers if question.explains else ()
    own = {path: by_image(done, path)[image : image + 1] for path in layers}
    maps = [made[image, place] for place in range(len(targets)) if (image, place) in made]
    try:
        if (method := question.explained_by) is not None and "head" in method.needs:
            maps = [from_head(done, image, class_id, own, logits) for class_id in targets]
    except InvalidOption as error:
        return error
    return Part(
        model=done.model,
        question=question,
        logits=logits,
        targets=targets if question.explains else (),
        activations=own,
        maps=maps,
        captured=tuple(captures(done, image)),
        repeated=any(len(done.seen.targets[path]) > 1 for path in layers),
    )


def _explanation(part: Part, class_id: int, score: float, made: Tensor) -> Explanation:
    question, (grid, low, high) = part.question, scale(made)
    method = question.explained_by
    assert method is not None
    flags = {
        "all_zero": not bool(grid.any()),
        "target_not_predicted": class_id != int(part.logits.argmax()),
        "saturated": part.model.output != "none" and score > SATURATED,
        "low_resolution": min(grid.shape) < LOW_RESOLUTION,
        "random_weights": part.model.random_weights,
        "module_called_n_times": part.repeated,
        "not_deterministic": not part.model.behaviour.deterministic,
        "activation_in_model": part.model.behaviour.output_activation is not None,
        "places_unclear": not part.model.unclear.isdisjoint(question.layers),
    }
    return Explanation(
        class_id=class_id,
        score=score,
        logit=float(part.logits[class_id]),
        contrast=question.contrast,
        method=method.name,
        layers=question.layers if method.has_layer else (),
        grid=frozen(grid),
        low=low,
        high=high,
        flags=tuple(flag for flag, is_so in flags.items() if is_so),
        cost=cost(part.model, question),
    )
