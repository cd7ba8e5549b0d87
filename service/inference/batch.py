"""One batch on one leased replica: forward, gradients, maps; read-only results on the CPU."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from service.cam.hooks import Calls, Recording, calls_of, gradients, record
from service.cam.libra import LibraMode
from service.errors import CamserveError, InvalidOption, NonFiniteOutput
from service.inference.detection import detect
from service.inference.edit_effects import measured_effects
from service.inference.explanations import SATURATED, explanation_of
from service.inference.forward_pass import (
    ForwardPass,
    GradientPoint,
    ImagePass,
    activations_of,
)
from service.inference.input_gradients import correction, without_rules
from service.inference.maps import fuse_layers, head_map, maps_at_layers, target_activation
from service.inference.method_table import MULTI_PASS_METHODS
from service.inference.questions import (
    ActivationKind,
    Explanation,
    InferenceResult,
    Prediction,
    Question,
)
from service.inference.segmentation import segment
from service.inference.verdicts import gather, judged
from service.models.compiled.front import Precision
from service.models.loaded import LoadedModel
from service.models.pool import Replica

BACKWARD_BYTES = 4 << 20
"""Bytes of gradients at the target layers that one backward pass returns: as many targets as fit
share a backward pass, and their maps are computed before the next one.

The memory in use meanwhile is many times that. A hundred targets at resnet18's conv1 peak 92 MiB
above idle, in one backward pass 1,544 MiB; the processor time is the same."""

_KINDS: tuple[ActivationKind, ...] = ("output", "input", "grad_output", "grad_input")


class Unfinished:
    """A question that runs the model again, one chunk at a time; `steps` has begun."""

    def __init__(self, steps: Generator[None, Replica, InferenceResult]) -> None:
        self._steps = steps

    def step(self, replica: Replica) -> InferenceResult | None:
        """Compute one chunk on a leased replica; the result after the last one."""
        try:
            self._steps.send(replica)
        except StopIteration as end:
            result: InferenceResult = end.value
            return result
        return None


def run(
    replica: Replica, questions: Sequence[Question]
) -> list[InferenceResult | CamserveError | Unfinished]:
    """Compute a batch of questions that share one input size.

    An image that cannot be computed has its error in its position; a method that needs more passes
    is `Unfinished` and needs a replica for each step.
    """
    if replica.model.task == "detection":
        return [_begun(steps) for steps in detect(replica, questions)]
    if replica.model.task == "segmentation":
        return [_begun(steps) for steps in segment(replica, questions)]
    return [_finish_or_continue(image_pass) for image_pass in forward(replica, questions)]


def run_compiled(
    model: LoadedModel, questions: Sequence[Question], *, wide: bool = False
) -> list[InferenceResult | CamserveError | Unfinished]:
    """`run` in the compiled lane.

    wide: whether nothing else runs, so that the batch may use all cores.
    """
    passes = forward_compiled(model, questions, wide=wide)
    return [_finish_or_continue(image_pass) for image_pass in passes]


def _finish_or_continue(
    image_pass: ImagePass | CamserveError,
) -> InferenceResult | CamserveError | Unfinished:
    return _begun(
        image_pass if isinstance(image_pass, CamserveError) else _further_passes(image_pass)
    )


def _begun(
    steps: Generator[None, Replica, InferenceResult] | CamserveError,
) -> InferenceResult | CamserveError | Unfinished:
    if isinstance(steps, CamserveError):
        return steps
    try:
        next(steps)
    except StopIteration as end:
        result: InferenceResult = end.value
        return result
    return Unfinished(steps)


def _further_passes(image_pass: ImagePass) -> Generator[None, Replica, InferenceResult]:
    """What a question runs behind the pass that predicts: nothing, or chunks."""
    question, maps = image_pass.question, image_pass.maps
    method = MULTI_PASS_METHODS.get(question.method or "") if image_pass.targets else None
    if method is not None:
        maps = yield from method(image_pass)
    result = finish(image_pass, maps)
    if question.edits:
        effects = yield from measured_effects(image_pass, forward, finish)
        result = replace(result, effects=effects)
    if question.verify and result.explanations:
        result = judged(result, question.evidence or (yield from gather(image_pass)))
    return result


def forward(replica: Replica, questions: Sequence[Question]) -> list[ImagePass | CamserveError]:
    """Run a batch of questions that share one input size through the model, once.

    One forward pass serves all of them, whatever their targets, layers and activations; one
    backward pass serves all gradients. An image whose logits are not finite, or that its method
    does not suit, gets an error in its position; the others are not affected.
    """
    model = replica.model
    pixels = model.normalised(model.batch([question.pixels for question in questions]))
    kinds = {kind: _activation_paths(questions, kind) for kind in _KINDS}
    layers = _union(question.layers for question in questions if question.explains)
    differentiated = (*layers, *kinds["grad_output"])
    graph = any(question.needs_graph for question in questions)
    with (
        nullcontext() if graph else torch.no_grad(),
        record(
            replica.module,
            targets=differentiated,
            outputs=kinds["output"],
            inputs=kinds["input"],
            input_targets=kinds["grad_input"],
        ) as recording,
        correction(questions[0]) as rules,
    ):
        logits = model.logits(replica.module(pixels))
    return _image_passes(model, questions, logits, recording, rules)


def forward_compiled(
    model: LoadedModel, questions: Sequence[Question], *, wide: bool = False
) -> list[ImagePass | CamserveError]:
    """`forward` in the compiled lane, for questions that `questions.lane_of` sends there.

    Needs no replica: nothing is hooked, and the front and the tail keep nothing between calls.
    wide: as of `run_compiled`.
    """
    lane = model.compiled
    assert lane is not None
    pixels = model.batch([question.pixels for question in questions])
    activation, *beside = lane.front(pixels, wide=wide)
    explains = any(question.explains for question in questions)
    graph = any(question.needs_graph for question in questions)
    with nullcontext() if graph else torch.no_grad(), correction(questions[0]) as rules:
        activation.requires_grad_(graph)
        # A clone: the tail may overwrite the very activation that is to be explained.
        kept = activation.clone() if explains else activation
        logits = model.logits(lane.tail(kept, *beside))
    recording = Recording(targets={lane.layer: [activation]})
    return _image_passes(model, questions, logits, recording, rules, lane.precision)


def _image_passes(  # noqa: PLR0917 - one call for each lane
    model: LoadedModel,
    questions: Sequence[Question],
    logits: Tensor,
    recording: Recording,
    rules: LibraMode | None,
    precision: Precision = "float32",
) -> list[ImagePass | CamserveError]:
    """What one forward pass, with the rules of a correction, gave each image."""
    if rules is not None and questions[0].needs_gradients and not rules.count:
        return [without_rules(model) for _ in questions]
    # Once for the batch: each read of a value on a GPU waits until all work before it is done.
    rows = logits.detach().cpu()
    finite = rows.isfinite().all(dim=1).tolist()
    targets = [
        _targets(question, row) if is_finite else ()
        for question, row, is_finite in zip(questions, rows, finite, strict=True)
    ]
    forward_pass = ForwardPass(model, questions, targets, recording, {}, precision)
    weights = _logit_weights(forward_pass, logits)
    forward_pass = replace(
        forward_pass, gradients=_activation_gradients(forward_pass, logits, weights[:1])
    )
    maps = _differentiate(forward_pass, logits, weights)
    return [
        _image_pass(forward_pass, image, row, maps) if finite[image] else _non_finite()
        for image, row in enumerate(rows)
    ]


def finish(image_pass: ImagePass, maps: Sequence[Tensor]) -> InferenceResult:
    """The result for one image, with the map (h, w) of each of its targets."""
    model, logits = image_pass.model, image_pass.logits
    scores = model.scores(logits)
    best = logits.topk(min(image_pass.question.top_k, logits.shape[0]))
    best_scores = scores[best.indices]
    return InferenceResult(
        tuple(map(Prediction, best.indices.tolist(), best_scores.tolist(), best.values.tolist())),
        tuple(
            _explanation(image_pass, class_id, float(scores[class_id]), cam)
            for class_id, cam in zip(image_pass.targets, maps, strict=True)
        ),
        image_pass.activations,
        image_pass.precision,
        logits=logits,
        output=model.output,
    )


def _activation_paths(questions: Sequence[Question], kind: ActivationKind) -> tuple[str, ...]:
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


def _logit_weights(forward_pass: ForwardPass, logits: Tensor) -> Tensor:
    """What is differentiated, (K, B, classes): the slope of each explained value by the logits."""
    most = max(1, *(len(ids) for ids in forward_pass.targets))
    weights, rows = torch.zeros((most, *logits.shape), dtype=logits.dtype), None
    pairs = zip(forward_pass.questions, forward_pass.targets, strict=True)
    for image, (question, ids) in enumerate(pairs):
        for position, class_id in enumerate(ids):
            if question.contrast is None:
                weights[position, image, class_id] = 1
                continue
            rows = logits.detach().cpu() if rows is None else rows
            contrast = question.contrast.at(rows[image], class_id)
            weights[position, image] = contrast.slope(rows[image], class_id)
    return weights.to(logits.device)


def _activation_gradients(
    forward_pass: ForwardPass, logits: Tensor, weights: Tensor
) -> dict[GradientPoint, Tensor]:
    """The gradient of the first target at each captured layer; the graph is kept."""
    sides: dict[ActivationKind, Calls] = {
        "grad_output": forward_pass.recording.targets,
        "grad_input": forward_pass.recording.input_targets,
    }
    points: dict[GradientPoint, Tensor] = {
        (kind, path + part, call): tensor
        for kind, calls in sides.items()
        for path in _activation_paths(forward_pass.questions, kind)
        for part, call, tensor in calls_of(calls, path)
        if tensor.requires_grad  # class ids and masks have no gradient
    }
    values = gradients(logits, list(points.values()), weights, keep_graph=True)
    return dict(zip(points, values, strict=True))


def _differentiate(
    forward_pass: ForwardPass, logits: Tensor, weights: Tensor
) -> Mapping[tuple[int, int], Tensor]:
    """The map (h, w) of each (image, target position) that this pass explains, on the CPU."""
    cams = maps_at_layers(forward_pass, range(weights.shape[0]), {})
    explained = [
        (question, len(ids))
        for question, ids in zip(forward_pass.questions, forward_pass.targets, strict=True)
        if question.needs_gradients
    ]
    paths = _union(question.layers for question, _ in explained)
    points = [forward_pass.recording.targets[path][-1] for path in paths]
    most = max((count for _, count in explained), default=0)
    together = max(1, BACKWARD_BYTES // max(1, sum(tensor.nbytes for tensor in points)))
    for start in range(0, most, together):
        positions = range(start, min(start + together, most))
        values = gradients(
            logits,
            points,
            weights[start : positions.stop],
            keep_graph=positions.stop < most,
            together=forward_pass.model.behaviour.vectorised,
        )
        cams |= maps_at_layers(forward_pass, positions, dict(zip(paths, values, strict=True)))
    return fuse_layers(forward_pass, cams)


def _non_finite() -> NonFiniteOutput:
    return NonFiniteOutput(
        "The model returned NaN or infinity for this image, so there is nothing to explain; "
        "check the weights and the precision of the model."
    )


def _image_pass(
    forward_pass: ForwardPass,
    image: int,
    logits: Tensor,
    cams: Mapping[tuple[int, int], Tensor],
) -> ImagePass | CamserveError:
    question, targets = forward_pass.questions[image], forward_pass.targets[image]
    layers = question.layers if question.explains else ()
    at_layers = {path: target_activation(forward_pass, path)[image : image + 1] for path in layers}
    maps = [cams[image, position] for position in range(len(targets)) if (image, position) in cams]
    try:
        if (method := question.method_record) is not None and "head" in method.needs:
            maps = [
                head_map(forward_pass, image, class_id, at_layers, logits) for class_id in targets
            ]
    except InvalidOption as error:
        return error
    return ImagePass(
        model=forward_pass.model,
        question=question,
        logits=logits,
        targets=targets if question.explains else (),
        target_activations=at_layers,
        maps=maps,
        activations=tuple(activations_of(forward_pass, image)),
        precision=forward_pass.precision,
        repeated=any(len(forward_pass.recording.targets[path]) > 1 for path in layers),
    )


def _explanation(image_pass: ImagePass, class_id: int, score: float, cam: Tensor) -> Explanation:
    question, model = image_pass.question, image_pass.model
    method, contrast = question.method_record, image_pass.contrast(class_id)
    assert method is not None
    weights = contrast.as_mapping(image_pass.logits) if contrast else {}
    logit = float(image_pass.logits[class_id])
    flags = {
        "target_not_predicted": class_id != int(image_pass.logits.argmax()),
        "saturated": model.output != "none" and score > SATURATED,
        "module_called_n_times": image_pass.repeated,
        "activation_in_model": model.behaviour.output_activation is not None,
        "weights_hardly_matter": model.weights_hardly_matter(method.name, question.layers),
        "experimental": question.libra,
        "class_blind": method.class_blind,
        "places_unclear": not model.unclear.isdisjoint(question.layers),
    }
    return explanation_of(
        model,
        question,
        cam,
        flags,
        class_id=class_id,
        score=score,
        logit=logit,
        contrast=weights,
        logit_difference=_difference(logit, weights, image_pass.logits),
        libra=question.libra,
    )


def _difference(logit: float, contrast: Mapping[int, float], logits: Tensor) -> float | None:
    """The logit minus the weighted logits of the classes it is compared with, if there are any."""
    against = sum(weight * float(logits[class_id]) for class_id, weight in contrast.items())
    return logit - against if contrast else None
