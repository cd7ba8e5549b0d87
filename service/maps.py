"""The maps of the images that shared a forward pass, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from service.cam.layouts import Layout
from service.cam.methods import GRADIENT_CAMS, fuse, precise, weighted
from service.captures import Pass
from service.models.head import head_weights
from service.models.loaded import LoadedModel

GRADIENT_CAM_OF = {method: method for method in GRADIENT_CAMS} | {"guided_gradcam": "gradcam"}
"""The map that a method begins with, where that is one of an activation and its gradient."""


def gradient_maps(done: Pass) -> Mapping[tuple[int, int], Tensor]:
    """The map (h, w) of each (image, place) whose method is of GRADIENT_CAMS, on the CPU.

    All maps of one method at one layer are made, and brought from a GPU, together. A layer that ran
    several times is explained at its last call, the one nearest to the output.
    """
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for image, question in enumerate(done.questions):
        method = GRADIENT_CAM_OF.get(question.method or "") if question.explains else None
        if method is None:
            continue
        for path, place in product(question.layers, range(len(done.targets[image]))):
            groups.setdefault((method, path), []).append((image, place))
    cams: dict[tuple[int, int], dict[str, Tensor]] = {}
    for (method, path), asked in groups.items():
        made = _maps_of(done, method, path, asked)
        for key, cam in zip(asked, made, strict=True):
            cams.setdefault(key, {})[path] = cam
    return {
        (image, place): fuse([of_layer[path] for path in done.questions[image].layers])
        for (image, place), of_layer in cams.items()
    }


def _maps_of(done: Pass, method: str, path: str, asked: Sequence[tuple[int, int]]) -> Tensor:
    """Maps (N, h, w) on the CPU of N pairs (image, place)."""
    layout = layout_of_layer(done.model, path)
    calls = done.seen.targets[path]
    activation = calls[-1].detach()
    gradient = done.found["grad_output", path, len(calls) - 1]
    if asked == [(image, 0) for image in range(len(activation))]:  # the common batch: no copies
        gradient = gradient[0]
    else:
        images, places = torch.tensor(asked).T.to(activation.device)
        activation, gradient = activation[images], gradient[places, images]
    maps = (precise(layout.as_map(values)) for values in (activation, gradient))
    return GRADIENT_CAMS[method](*maps).cpu()


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


def layout_of_layer(model: LoadedModel, path: str) -> Layout:
    """The layout of a layer that was checked to have one."""
    layout = model.layer(path).layout
    assert layout is not None
    return layout
