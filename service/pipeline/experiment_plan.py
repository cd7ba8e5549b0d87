"""From the edits of a request to what they mean for a model: names resolved, prices, no image yet.

plan = plan_edits(model, options, edits, limits, images=2)       # refuses, prices
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from api_schemas import options as wire
from api_schemas.methods import BACKWARD, METHODS
from service.errors import InvalidOption
from service.inference.method_table import check_method, cost
from service.inference.questions import MIN_SCORE, ChannelEdit, GradientEdit, Question
from service.models.loaded import LoadedModel
from service.pipeline.service import Limits


@dataclass(frozen=True, slots=True)
class ExperimentPlan:
    """What a request means for a model.

    targets: class ids; empty means the top-1 prediction of each unedited image.
    inside:  of each edit of the model what is done, but for the image; None for one of the image.
    marks:   what is asked of each map that a region is drawn from.
    price:   in forward passes, for each image.
    """

    model: LoadedModel
    options: wire.ExperimentOptions
    edits: Sequence[wire.Edit]
    targets: tuple[int, ...]
    inside: Sequence[ChannelEdit | GradientEdit | None]
    marks: Mapping[wire.Region, Question]
    price: float

    @property
    def min_score(self) -> float:
        """The lowest score of a detection."""
        given = self.options.min_score
        return MIN_SCORE if given is None else given


def plan_edits(
    model: LoadedModel,
    options: wire.ExperimentOptions,
    edits: Sequence[wire.Edit],
    limits: Limits,
    images: int,
) -> ExperimentPlan:
    """Everything that can be refused before an image is looked at.

    Raises UnknownLayer, UnknownClass, and InvalidOption for what does not fit this model or these
    images, or costs more than the service allows.
    """
    _check_task(model, options)
    targets = tuple(dict.fromkeys(map(model.class_id, options.targets)))
    # Where the boxes are is found before the edits are made, so that controls can lie in them.
    price, marks = 1.0 if model.task == "classification" else 2.0, dict[wire.Region, Question]()
    inside: list[ChannelEdit | GradientEdit | None] = []
    for number, edit in enumerate(edits):
        place = f"edits.{number}.{edit.edit}"
        _check(model, edit, place, images)
        region = getattr(edit, "region", None)
        if isinstance(edit, wire.Channels):
            channels = _channel_edit(model, edit, options, targets, place)
            inside.append(channels)
            price += 1 + options.controls + _recording(model, channels)
        elif isinstance(edit, wire.Gradient):
            gradient = _gradient_edit(model, edit, options, targets, place)
            inside.append(gradient)
            price += cost(model, gradient.question)
        else:
            inside.append(None)
            price += 1 + (options.controls if region is not None else 0)
        if region is not None and region.of is not None and region not in marks:
            marks[region] = _marking(model, region)
            price += cost(model, marks[region])
    if price > limits.cost:
        raise InvalidOption(
            f"These edits cost {price:g} forward passes an image; at most {limits.cost:g} are "
            "allowed. Send fewer edits, or ask for fewer `controls`."
        )
    return ExperimentPlan(model, options, edits, targets, inside, marks, price)


def _check_task(model: LoadedModel, options: wire.ExperimentOptions) -> None:
    """Raise InvalidOption for options that the model's task does not have."""
    given = None
    if model.task != "detection" and options.min_score is not None:
        given = "min_score"
    elif model.task == "classification" and options.at:
        given = "at"
    elif model.task == "detection" and options.fit is not None:
        given = "fit"
    elif model.task == "segmentation" and options.fit == "crop":
        given = "fit=crop"
    if given is not None:
        raise InvalidOption(
            f"`{given}` is not for models of the task {model.task}, and {model.name!r} is one; "
            "leave it out."
        )


def _check_tracked(model: LoadedModel, edit: wire.Edit, place: str) -> None:
    """Raise InvalidOption for edits whose effect on a box or a region is not measured."""
    if edit.edit in {"shift", "flip", "scale"}:
        raise InvalidOption(
            f"{place}: the boxes and regions of model {model.name!r} are found again by their "
            f"place, which `{edit.edit}` changes; use hide, keep, background, paste or recolour."
        )
    if isinstance(edit, wire.Channels | wire.Gradient):
        raise InvalidOption(
            f"{place}: edits of layers are for models that classify, and the task of model "
            f"{model.name!r} is {model.task}; use hide, keep, background, paste or recolour."
        )
    if (region := getattr(edit, "region", None)) is not None and region.of is not None:
        raise InvalidOption(
            f"{place}.region.of is for models that classify; give `boxes`, or the `rle` that "
            "/explain?include=regions returns for a box or a region."
        )


def _check(model: LoadedModel, edit: wire.Edit, place: str, images: int) -> None:
    """Raise InvalidOption where an edit does not fit the request or the model."""
    if model.task != "classification":
        _check_tracked(model, edit, place)
    for field, donor in donors(edit):
        if donor >= images:
            sent = "1 image, which is 0" if images == 1 else f"{images} images, 0 to {images - 1}"
            raise InvalidOption(
                f"{place}.{field}: there is no image {donor}; the request has {sent}."
            )
    if isinstance(edit, wire.Recolour) and model.preprocessing.channels > 3:
        raise InvalidOption(
            f"{place}: model {model.name!r} takes {model.preprocessing.channels} channels, which "
            "are no colors; leave the edit out."
        )


def _channel_edit(
    model: LoadedModel,
    edit: wire.Channels,
    options: wire.ExperimentOptions,
    targets: Sequence[int],
    place: str,
) -> ChannelEdit:
    """Raises UnknownLayer, UnknownClass, and InvalidOption for channels that the layer has not."""
    _check_layers(model, place)
    (layer,) = model.target_layers((edit.layer,))
    shape, layout = model.layer(layer).shape, model.layer(layer).layout
    assert shape is not None
    assert layout is not None
    count, top, of = shape[layout.channel_axis], 0, None
    chosen: tuple[int, ...] = ()
    if isinstance(edit.channels, wire.Top):
        top = edit.channels.top
        of = targets[0] if targets else None
        if edit.channels.of is not None:
            of = model.class_id(edit.channels.of)
        if model.no_gradients is not None:
            raise InvalidOption(
                f"{place}.channels.top: model {model.name!r} has no gradients, by which channels "
                f"contribute: {model.no_gradients}. Name the channels by number."
            )
    else:
        chosen = tuple(sorted({n for each in edit.channels for n in _numbers(each, count)}))
    if top > count or (chosen and chosen[-1] >= count) or not (top or chosen):
        raise InvalidOption(
            f"{place}.channels: layer {layer!r} has {count} channels, 0 to {count - 1}."
        )
    made = ChannelEdit(layer, "zero", chosen, top, of, controls=options.controls, seed=options.seed)
    if isinstance(edit.set, wire.ByFactor):
        return replace(made, to="scale", factor=edit.set.scale)
    return replace(made, to="donor" if isinstance(edit.set, wire.FromImage) else edit.set)


def _check_layers(model: LoadedModel, place: str) -> None:
    if model.no_layers is not None:
        raise InvalidOption(
            f"{place}: the layers of model {model.name!r} cannot be edited: {model.no_layers}. "
            "Edit the image instead."
        )


def _numbers(text: str, count: int) -> range:
    """The channels of a number, a range or `*`; at most one that is not there."""
    if text == "*":
        return range(count)
    first, _, last = text.partition("-")
    return range(int(first), min(int(last or first), count) + 1)


def _recording(model: LoadedModel, edit: ChannelEdit) -> float:
    """What an edit of channels runs before it: a pass each for image and donor, and two trials."""
    price = 4.0 if edit.to == "donor" else 3.0
    if edit.top:
        price += BACKWARD * (1 - model.layer(edit.layer).share)
    return round(price, 2)


def _gradient_edit(
    model: LoadedModel,
    edit: wire.Gradient,
    options: wire.ExperimentOptions,
    targets: Sequence[int],
    place: str,
) -> GradientEdit:
    """Raises UnknownLayer, UnknownClass, and InvalidOption for a map without this gradient."""
    _check_layers(model, place)
    asked, record = edit.explain, METHODS[edit.explain.method]
    check_method(model, asked.method)
    if "gradients" not in record.needs:
        raise InvalidOption(
            f"{place}.explain.method: `{asked.method}` uses no gradient; take one that does, such "
            "as gradcam."
        )
    if asked.layer is not None and not record.has_layer:
        raise InvalidOption(
            f"{place}.explain.layer: `{asked.method}` has no layer; leave out `layer`."
        )
    layers: tuple[str, ...] = ()
    if record.has_layer:
        layers = model.target_layers(() if asked.layer is None else (asked.layer,))
    layer = model.layer(edit.layer)
    if not layer.given:
        raise InvalidOption(f"{place}.layer: {edit.layer!r} returns no tensor in a forward pass.")
    if any(model.layer(path).share > layer.share for path in layers):
        raise InvalidOption(
            f"{place}.layer: the gradient at {edit.layer!r} has no part in a map at {layers[0]!r}, "
            "which comes later; name this layer or a later one."
        )
    chosen = targets[:1] if asked.target is None else (model.class_id(asked.target),)
    question = Question(
        torch.empty(0),
        options.top_k,
        targets=tuple(chosen),
        method=asked.method,
        layers=layers,
        steps=asked.steps,
        seed=options.seed,
    )
    if isinstance(edit.set, wire.ByFactor):
        return GradientEdit(edit.layer, "scale", question, edit.set.scale)
    if isinstance(edit.set, wire.Clipped):
        return GradientEdit(edit.layer, "clip", question, edit.set.clip)
    return GradientEdit(edit.layer, edit.set, question)


def donors(edit: wire.Edit) -> Iterator[tuple[str, int]]:
    """The other images that an edit takes something from, each with the field that says so."""
    if isinstance(edit, wire.Paste | wire.Background):
        yield "image", edit.image
    fill = getattr(edit, "fill", None)
    if isinstance(fill, wire.FromImage):
        yield "fill.image", fill.image
    if isinstance(edit, wire.Channels) and isinstance(edit.set, wire.FromImage):
        yield "set.image", edit.set.image


def _marking(model: LoadedModel, region: wire.Region) -> Question:
    """What is asked to find the region that a map marks."""
    assert region.of is not None
    check_method(model, region.method)
    has_layer = METHODS[region.method].has_layer
    if region.layer is not None and not has_layer:
        raise InvalidOption(f"`{region.method}` has no layer; leave out `layer` of the region.")
    named = () if region.layer is None else (region.layer,)
    return Question(
        torch.empty(0),
        top_k=1,
        targets=(model.class_id(region.of),),
        method=region.method,
        layers=model.target_layers(named) if has_layer else (),
    )
