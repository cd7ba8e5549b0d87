"""The maps of the images that shared a forward pass, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from service.cam.formulas import LAYER_METHODS, Cam, fuse, precise
from service.inference.forward_pass import ForwardPass, feature_layout
from service.inference.questions import Question
from service.models.head import head_weights

Cams = dict[tuple[int, int, str], Tensor]
"""By image, target position and layer: the map (h, w) of one target at one layer."""


def maps_at_layers(
    forward_pass: ForwardPass, positions: range, gradients: Mapping[str, Tensor]
) -> Cams:
    """The maps, on the CPU, of all images at the layers whose gradients are given.

    positions: which targets of each image.
    gradients: (len(positions), B, ...) of each layer's last call, the one nearest to the output.
               Without any: the maps of methods that need none.

    All maps of one method at one layer are computed, and copied from a GPU, together.
    """
    groups: dict[tuple[Cam, str], list[tuple[int, int]]] = {}
    for image, question in enumerate(forward_pass.questions):
        function = _cam_of(question)
        if function is None or question.needs_gradients != bool(gradients):
            continue
        stop = min(positions.stop, len(forward_pass.targets[image]))
        for path, position in product(question.layers, range(positions.start, stop)):
            groups.setdefault((function, path), []).append((image, position))
    cams: Cams = {}
    for (function, path), pairs in groups.items():
        if gradients:
            maps: Sequence[Tensor] = _maps_with_gradient(
                forward_pass, function, path, pairs, gradients[path], positions.start
            )
        else:
            maps = _maps_without_gradient(forward_pass, function, path, pairs)
        cams |= {(*pair, path): cam for pair, cam in zip(pairs, maps, strict=True)}
    return cams


def fuse_layers(forward_pass: ForwardPass, cams: Cams) -> Mapping[tuple[int, int], Tensor]:
    """The map (h, w) of each (image, target position), fused over the layers of its question."""
    questions = forward_pass.questions
    return {
        (image, position): fuse([cams[image, position, path] for path in questions[image].layers])
        for image, position in dict.fromkeys((image, position) for image, position, _ in cams)
    }


def _cam_of(question: Question) -> Cam | None:
    """The function from activation and gradient to the map at a layer, if the method has one."""
    record = question.method_record
    return None if record is None or "head" in record.needs else LAYER_METHODS.get(record.name)


def _maps_with_gradient(  # noqa: PLR0917 - one call
    forward_pass: ForwardPass,
    function: Cam,
    path: str,
    pairs: Sequence[tuple[int, int]],
    gradient: Tensor,
    first: int,
) -> Sequence[Tensor]:
    """Maps (h, w) on the CPU of N pairs (image, position); `gradient` begins at `first`."""
    layout = feature_layout(forward_pass.model, path)
    activation = target_activation(forward_pass, path)
    gradient = layout.by_image(gradient, leading=1)
    if pairs == [(image, first) for image in range(len(activation))]:  # the common batch: no copies
        gradient = gradient[0]
    else:
        images, positions = torch.tensor(pairs).T.to(activation.device)
        activation, gradient = activation[images], gradient[positions - first, images]
    maps = (precise(layout.as_map(values)) for values in (activation, gradient))
    return function(*maps).cpu().unbind()


def _maps_without_gradient(
    forward_pass: ForwardPass, function: Cam, path: str, pairs: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Maps (h, w) of a method that does not depend on the class, computed once for each image."""
    images = list(dict.fromkeys(image for image, _ in pairs))
    activation = target_activation(forward_pass, path)
    if len(images) < len(activation):
        activation = activation[torch.tensor(images).to(activation.device)]
    activation = precise(feature_layout(forward_pass.model, path).as_map(activation))
    maps = dict(zip(images, function(activation, activation).cpu(), strict=True))
    return [maps[image] for image, _ in pairs]


def head_map(
    forward_pass: ForwardPass,
    image: int,
    class_id: int,
    activations: Mapping[str, Tensor],
    logits: Tensor,
) -> Tensor:
    """The map (h, w) of one class by the linear head, fused over the layers, on the CPU.

    activations: of one image, (1, ...), by target layer. logits: (classes,) of that image.
    """
    question, model = forward_pass.questions[image], forward_pass.model
    function, row = LAYER_METHODS[question.method or ""], torch.zeros_like(logits)
    row[class_id] = 1
    if question.contrast is not None:
        row = question.contrast.at(logits, class_id).slope(logits, class_id)
    cams = []
    for path, values in activations.items():
        activation = precise(feature_layout(model, path).as_map(values))
        weights = head_weights(model, path, activation, logits)
        channels = row.to(weights) @ weights
        cams.append(function(activation, channels[None].to(activation))[0].cpu())
    return fuse(cams)


def target_activation(forward_pass: ForwardPass, path: str) -> Tensor:
    """The output of a target layer's last call, the images in front, detached."""
    layout = feature_layout(forward_pass.model, path)
    return layout.by_image(forward_pass.recording.targets[path][-1].detach())
