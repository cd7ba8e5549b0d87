"""The maps of the images that shared a forward pass, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from service.cam.methods import Cam, fuse, precise
from service.inference.captures import Pass, layout_of_layer
from service.inference.methods import AT_LAYER
from service.inference.questions import Question
from service.models.head import head_weights

Cams = dict[tuple[int, int, str], Tensor]
"""By image, place and layer: the map (h, w) of one target at one layer."""


def maps_at_layers(done: Pass, places: range, gradients: Mapping[str, Tensor]) -> Cams:
    """The maps, on the CPU, of all images at the layers whose gradients are given.

    places:    which targets of each image.
    gradients: (len(places), B, ...) of each layer's last call, the one nearest to the output.
               Without any: the maps of methods that need none.

    All maps of one method at one layer are made, and brought from a GPU, together.
    """
    groups: dict[tuple[Cam, str], list[tuple[int, int]]] = {}
    for image, question in enumerate(done.questions):
        function = _cam_of(question)
        if function is None or question.walks != bool(gradients):
            continue
        own = range(places.start, min(places.stop, len(done.targets[image])))
        for path, place in product(question.layers, own):
            groups.setdefault((function, path), []).append((image, place))
    cams: Cams = {}
    for (function, path), asked in groups.items():
        if gradients:
            made: Sequence[Tensor] = _maps_of(
                done, function, path, asked, gradients[path], places.start
            )
        else:
            made = _without_gradient(done, function, path, asked)
        cams |= {(*key, path): map_ for key, map_ in zip(asked, made, strict=True)}
    return cams


def fused(done: Pass, cams: Cams) -> Mapping[tuple[int, int], Tensor]:
    """The map (h, w) of each (image, place), fused over the layers of its question."""
    return {
        (image, place): fuse([cams[image, place, path] for path in done.questions[image].layers])
        for image, place in dict.fromkeys((image, place) for image, place, _ in cams)
    }


def _cam_of(question: Question) -> Cam | None:
    """What makes the map at a layer of its activation and gradient, where the method has it."""
    record = question.explained_by
    return None if record is None or "head" in record.needs else AT_LAYER.get(record.name)


def _maps_of(  # noqa: PLR0917 - one call
    done: Pass,
    function: Cam,
    path: str,
    asked: Sequence[tuple[int, int]],
    gradient: Tensor,
    first: int,
) -> Sequence[Tensor]:
    """Maps (h, w) on the CPU of N pairs (image, place); `gradient` begins with place `first`."""
    layout = layout_of_layer(done.model, path)
    activation, gradient = by_image(done, path), layout.by_image(gradient, leading=1)
    if asked == [(image, first) for image in range(len(activation))]:  # the common batch: no copies
        gradient = gradient[0]
    else:
        images, places = torch.tensor(asked).T.to(activation.device)
        activation, gradient = activation[images], gradient[places - first, images]
    maps = (precise(layout.as_map(values)) for values in (activation, gradient))
    return function(*maps).cpu().unbind()


def _without_gradient(
    done: Pass, function: Cam, path: str, asked: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Maps (h, w) of a method that knows no class, made once an image."""
    images = list(dict.fromkeys(image for image, _ in asked))
    activation = by_image(done, path)
    if len(images) < len(activation):
        activation = activation[torch.tensor(images).to(activation.device)]
    activation = precise(layout_of_layer(done.model, path).as_map(activation))
    made = dict(zip(images, function(activation, activation).cpu(), strict=True))
    return [made[image] for image, _ in asked]


def from_head(
    done: Pass, image: int, class_id: int, own: Mapping[str, Tensor], logits: Tensor
) -> Tensor:
    """The map (h, w) of one class by the linear head, fused over its layers, on the CPU."""
    question = done.questions[image]
    contrast, function = question.contrast, AT_LAYER[question.method or ""]
    cams = []
    for path, values in own.items():
        activation = precise(layout_of_layer(done.model, path).as_map(values))
        weights = head_weights(done.model, path, activation, logits)
        row = weights[class_id] if contrast is None else weights[class_id] - weights[contrast]
        cams.append(function(activation, row[None].to(activation))[0].cpu())
    return fuse(cams)


def by_image(done: Pass, path: str) -> Tensor:
    """What a layer's last call gave, the images in front, detached."""
    return layout_of_layer(done.model, path).by_image(done.seen.targets[path][-1].detach())
