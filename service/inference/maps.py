"""The maps of the images that shared a forward pass, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from service.cam.layouts import Layout
from service.cam.methods import GRADIENT_CAMS, fuse, precise, weighted
from service.inference.captures import Pass
from service.models.head import head_weights
from service.models.loaded import LoadedModel

GRADIENT_CAM_OF = {method: method for method in GRADIENT_CAMS} | {"guided_gradcam": "gradcam"}
"""The map that a method begins with, where that is one of an activation and its gradient."""

Cams = dict[tuple[int, int, str], Tensor]
"""By image, place and layer: the map (h, w) of one target at one layer."""


def maps_at_layers(done: Pass, places: range, gradients: Mapping[str, Tensor]) -> Cams:
    """The maps, on the CPU, of all images at the layers whose gradients are given.

    places:    which targets of each image.
    gradients: (len(places), B, ...) of each layer's last call, the one nearest to the output.
               Without any: the maps of methods that need none.

    All maps of one method at one layer are made, and brought from a GPU, together.
    """
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for image, question in enumerate(done.questions):
        method = GRADIENT_CAM_OF.get(question.method or "") if question.explains else None
        if method is None or question.walks != bool(gradients):
            continue
        own = range(places.start, min(places.stop, len(done.targets[image])))
        for path, place in product(question.layers, own):
            groups.setdefault((method, path), []).append((image, place))
    cams: Cams = {}
    for (method, path), asked in groups.items():
        if gradients:
            made: Sequence[Tensor] = _maps_of(
                done, method, path, asked, gradients[path], places.start
            )
        else:
            made = _without_gradient(done, method, path, asked)
        cams |= {(*key, path): map_ for key, map_ in zip(asked, made, strict=True)}
    return cams


def fused(done: Pass, cams: Cams) -> Mapping[tuple[int, int], Tensor]:
    """The map (h, w) of each (image, place), fused over the layers of its question."""
    return {
        (image, place): fuse([cams[image, place, path] for path in done.questions[image].layers])
        for image, place in dict.fromkeys((image, place) for image, place, _ in cams)
    }


def _maps_of(  # noqa: PLR0917 - one call
    done: Pass,
    method: str,
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
    return GRADIENT_CAMS[method](*maps).cpu().unbind()


def _without_gradient(
    done: Pass, method: str, path: str, asked: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Maps (h, w) of a method that knows no class, made once an image."""
    images = list(dict.fromkeys(image for image, _ in asked))
    activation = by_image(done, path)
    if len(images) < len(activation):
        activation = activation[torch.tensor(images).to(activation.device)]
    activation = precise(layout_of_layer(done.model, path).as_map(activation))
    made = dict(zip(images, GRADIENT_CAMS[method](activation, activation).cpu(), strict=True))
    return [made[image] for image, _ in asked]


def cam(done: Pass, image: int, class_id: int, own: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """CAM's map (h, w) of one class, fused over its layers, on the CPU."""
    contrast = done.questions[image].contrast
    cams = []
    for path, values in own.items():
        activation = precise(layout_of_layer(done.model, path).as_map(values))
        weights = head_weights(done.model, path, activation, logits)
        row = weights[class_id] if contrast is None else weights[class_id] - weights[contrast]
        cams.append(weighted(activation, row[None].to(activation))[0].cpu())
    return fuse(cams)


def by_image(done: Pass, path: str) -> Tensor:
    """What a layer's last call gave, the images in front, detached."""
    return layout_of_layer(done.model, path).by_image(done.seen.targets[path][-1].detach())


def layout_of_layer(model: LoadedModel, path: str) -> Layout:
    """The layout of a layer that was checked to have one."""
    layout = model.layer(path).layout
    assert layout is not None
    return layout
