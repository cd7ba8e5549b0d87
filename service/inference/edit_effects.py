"""Experiments: what each edit of an image or of the model changes, in steps."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from service.cam.hooks import altering_gradients, gradients, record
from service.errors import CamserveError, InvalidOption
from service.inference.forward_pass import ImagePass, feature_layout
from service.inference.method_table import MULTI_PASS_METHODS
from service.inference.perturbation import Steps, chunked_logits, normalised_image, replaced_logits
from service.inference.pixel_edits import (
    changed_channels,
    changed_gradient,
    other_channels,
    with_channels,
)
from service.inference.questions import (
    ChannelEdit,
    Effect,
    GradientEdit,
    ImageEdit,
    InferenceResult,
    Question,
)
from service.models.pool import Replica

Forward = Callable[[Replica, Sequence[Question]], Sequence[ImagePass | CamserveError]]
Finish = Callable[[ImagePass, Sequence[Tensor]], InferenceResult]


def measured_effects(
    image_pass: ImagePass, forward: Forward, finish: Finish
) -> Generator[None, Replica, tuple[Effect | CamserveError, ...]]:
    """The effect of each edit of a question; yields where it needs a replica.

    An edit that the model cannot answer has its error in its position.

    forward: runs a batch once. finish: makes the result of a pass and its maps.
    """
    edits, found = image_pass.question.edits, list[Effect | CamserveError]()
    images = [edit for edit in edits if isinstance(edit, ImageEdit)]
    of_images = iter((yield from _of_images(image_pass, images)))
    for edit in edits:
        if isinstance(edit, ImageEdit):
            found.append(next(of_images))
        elif isinstance(edit, GradientEdit):
            found.append((yield from _of_gradient(image_pass, edit, forward, finish)))
        else:
            found.append((yield from _of_channels(image_pass, edit)))
    return tuple(map(_checked, found))


def _of_images(
    image_pass: ImagePass, edits: Sequence[ImageEdit]
) -> Generator[None, Replica, tuple[Effect, ...]]:
    """All variants of all edits of the image, in batches that do not care which is whose."""
    variants = [(edit, number) for edit in edits for number in range(edit.count)]
    unchanged: list[int] = []

    def images(some: slice) -> Tensor:
        made = [edit.make(number) for edit, number in variants[some]]
        own = image_pass.question.pixels
        unchanged.extend(some.start + i for i, each in enumerate(made) if torch.equal(each, own))
        return torch.stack(made)

    logits = yield from chunked_logits(image_pass.model, len(variants), images)
    # Batches of another size may differ in the last bits; an image that is the same does not.
    logits[unchanged] = image_pass.logits
    rows = logits.split([edit.count for edit in edits])
    return tuple(Effect(each, image_pass.logits) for each in rows)


def _of_channels(image_pass: ImagePass, edit: ChannelEdit) -> Generator[None, Replica, Effect]:
    """The model runs from the layer on, where its graph can be cut there; see `replaced_logits`."""
    layout = feature_layout(image_pass.model, edit.layer)
    axis = 1 + layout.channel_axis
    replica = yield
    values, logits, gradient = _recorded(replica, image_pass, edit)
    donor = None
    if edit.donor is not None:
        replica = yield
        shown = replace(image_pass, question=replace(image_pass.question, pixels=edit.donor))
        donor, _, _ = _recorded(replica, shown, replace(edit, top=0))
    chosen = edit.channels
    if gradient is not None:
        contribution = (gradient * values).movedim(axis, 0).flatten(1).sum(dim=1)
        most = min(edit.top, len(contribution))
        chosen = tuple(sorted(contribution.topk(most).indices.tolist()))
    controls = other_channels(chosen, values.shape[axis], edit.controls, edit.seed)
    sets = [chosen, *controls]
    changed = changed_channels(values, axis, edit, donor)

    def outputs(some: range) -> Tensor:
        return with_channels(values, changed, axis, [sets[number] for number in some])

    found = yield from replaced_logits(
        replace(image_pass, logits=logits), edit.layer, values, len(sets), outputs
    )
    same = (changed == values).movedim(axis, 0).flatten(1).all(dim=1)
    unchanged = [number for number, each in enumerate(sets) if bool(same[list(each)].all())]
    found[unchanged] = logits
    return Effect(found, logits, channels=chosen)


def _of_gradient(
    image_pass: ImagePass, edit: GradientEdit, forward: Forward, finish: Finish
) -> Generator[None, Replica, Effect | CamserveError]:
    """The map with the gradient changed, of the pass that predicts and of those that follow."""
    change = partial(changed_gradient, edit=edit)
    replica = yield
    with altering_gradients(replica.module, edit.layer, change):
        (found,) = forward(replica, [edit.question])
    if isinstance(found, CamserveError):
        return found
    maps, method = found.maps, MULTI_PASS_METHODS.get(edit.question.method or "")
    if method is not None:
        maps = yield from _altered(method(found), edit.layer, change)
    (explanation,) = finish(found, maps).explanations
    return Effect(image_pass.logits[None], image_pass.logits, explanation=explanation)


def _altered(
    steps: Steps, layer: str, change: Callable[[Tensor], Tensor]
) -> Generator[None, Replica, Sequence[Tensor]]:
    """A method of several passes, with a layer's gradient changed in each."""
    next(steps)
    while True:
        replica = yield
        try:
            with altering_gradients(replica.module, layer, change):
                steps.send(replica)
        except StopIteration as end:
            maps: Sequence[Tensor] = end.value
            return maps


def _recorded(
    replica: Replica, image_pass: ImagePass, edit: ChannelEdit
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A layer's output (1, ...) by image, the logits (classes,) on the CPU, and a gradient.

    The gradient is that of a class's logit at the layer, where the top channels are wanted.
    """
    model, path = image_pass.model, edit.layer
    layout = feature_layout(model, path)
    if not edit.top:
        with torch.no_grad(), record(replica.module, outputs=(path,)) as seen:
            logits = model.logits(replica.module(normalised_image(image_pass)))
        return layout.by_image(seen.outputs[path][-1]), logits[0].cpu(), None
    with record(replica.module, targets=(path,)) as seen:
        logits = model.logits(replica.module(normalised_image(image_pass)))
        leaf = seen.targets[path][-1]
        weights = torch.zeros(1, *logits.shape, dtype=logits.dtype, device=logits.device)
        weights[0, 0, int(logits[0].argmax()) if edit.of is None else edit.of] = 1
        (gradient,) = gradients(logits, [leaf], weights)
    values = layout.by_image(leaf.detach())
    return values, logits[0].detach().cpu(), layout.by_image(gradient[0])


def _checked(effect: Effect | CamserveError) -> Effect | CamserveError:
    if isinstance(effect, CamserveError) or effect.logits.isfinite().all():
        return effect
    return InvalidOption(
        "The model answers this edit with NaN or infinity, so there is no change to report; send a "
        "weaker edit."
    )
