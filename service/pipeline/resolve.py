"""From options to a question: names resolved, bounds kept, before any image is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from api_schemas.methods import METHODS
from api_schemas.options import CommonOptions, ExplainOptions, PredictOptions
from service.errors import InvalidOption
from service.images.upload import Hiding
from service.inference.method_table import check_method, cost
from service.inference.questions import ActivationKind, Question
from service.models.loaded import LoadedModel
from service.pipeline.service import Limits

DRAWN_MEGAPIXEL = 0.05
ACTIVATION_MEBIBYTE = 0.02
"""What a key is charged for pictures and activations, in forward passes: of a resnet50, measured by
`benchmarks/round_the_model.py` and rounded up."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What options mean for a model; `prices`: what they cost its key, in forward passes."""

    question: Callable[[Tensor], Question]
    hiding: Hiding | None
    prices: Sequence[float]


def resolved(model: LoadedModel, options: CommonOptions, limits: Limits, images: int) -> Resolved:
    """Everything that can be refused before an image is looked at. Raises as `question` does."""
    prices: list[float] = []
    return Resolved(
        question(model, options, limits, images, prices.append), hiding(options), prices
    )


def question(
    model: LoadedModel,
    options: CommonOptions,
    limits: Limits,
    images: int,
    charge: Callable[[float], None] | None = None,
) -> Callable[[Tensor], Question]:
    """What to ask of each of so many images, once its pixels are there.

    charge: told what all of them cost, in forward passes, with what is drawn and captured; it may
            refuse.
    Raises UnknownLayer, UnknownClass, and InvalidOption for what does not fit this model or costs
    more than the service allows.
    """
    paths, kind = _captures(model, options, limits, images)
    asked = Question(torch.empty(0), options.top_k, method=None, activations=paths, kinds=(kind,))
    if isinstance(options, ExplainOptions):
        asked = _explaining(model, options, asked)
    price = cost(model, asked)
    if isinstance(options, ExplainOptions) and options.mask is not None:
        price += cost(model, replace(asked, activations=()))
    if price > limits.cost:
        raise InvalidOption(
            f"This explanation costs {price:g} forward passes an image; at most "
            f"{limits.cost:g} are allowed. Ask for fewer samples, steps or targets, a later "
            "layer or another method."
        )
    if charge is not None:
        captured = model.activation_bytes(paths, inputs=kind.endswith("input")) / 2**20
        extra = _drawn(options, asked, limits) * DRAWN_MEGAPIXEL + captured * ACTIVATION_MEBIBYTE
        charge((price + extra) * images)
    return lambda pixels: replace(asked, pixels=pixels)


def hiding(options: CommonOptions) -> Hiding | None:
    """The part of each image to hide, if any."""
    mask = options.hidden() if isinstance(options, ExplainOptions) else None
    if mask is None:
        return None
    return Hiding(
        boxes=mask.boxes,
        rle=None if mask.rle is None else (mask.rle.size, mask.rle.counts),
        fill=mask.fill,
        rest=mask.hide == "rest",
    )


def _drawn(options: CommonOptions, asked: Question, limits: Limits) -> float:
    """Megapixels that may have to be drawn for one image, whose own size is not known yet."""
    if not isinstance(options, ExplainOptions) or options.size != "source":
        return 0.0
    pictures = len({"heatmap", "overlay"}.intersection(options.include))
    maps = asked.target_count * (2 if options.mask is not None else 1)
    return pictures * maps * limits.render_side**2 / 1e6


def _captures(
    model: LoadedModel, options: CommonOptions, limits: Limits, images: int
) -> tuple[tuple[str, ...], ActivationKind]:
    assert isinstance(options, (PredictOptions, ExplainOptions))
    kind = options.activation_kind
    reason = model.no_layers or (model.no_gradients if kind.startswith("grad") else None)
    if options.activations and reason is not None:
        raise InvalidOption(f"Model {model.name!r} shows no {kind} of its layers: {reason}.")
    paths = model.captured_layers(options.activations)
    size = images * model.activation_bytes(paths, inputs=kind.endswith("input"))
    if size > limits.activation_bytes:
        raise InvalidOption(
            f"The activations asked for take {size} bytes; at most {limits.activation_bytes} are "
            "allowed in one request. Name fewer layers, or send fewer images."
        )
    return paths, kind


def _explaining(model: LoadedModel, options: ExplainOptions, asked: Question) -> Question:
    targets = tuple(dict.fromkeys(map(model.class_id, options.targets)))
    contrast = None if options.contrast is None else model.class_id(options.contrast)
    if contrast is not None and contrast in targets:
        raise InvalidOption(
            f"The class {contrast} is both a target and `contrast`; its lead over itself is zero."
        )
    check_method(model, options.method)
    has_layer = METHODS[options.method].has_layer
    if options.layer and not has_layer:
        raise InvalidOption(f"`{options.method}` has no layer; leave out `layer`.")
    layers = model.target_layers(options.layer) if has_layer else ()
    return replace(
        asked,
        targets=targets,
        explain_top=min(options.explain_top, len(model.labels)),
        contrast=contrast,
        method=options.method,
        layers=layers,
        samples=options.samples,
        steps=options.steps,
        seed=options.seed,
    )
