"""From options to a question: resolve names and check bounds, before any image is opened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from api_schemas.methods import METHODS
from api_schemas.options import (
    CommonOptions,
    ExplainOptions,
    PredictOptions,
    RunLengths,
)
from service.errors import InvalidOption
from service.images.upload import Hiding
from service.inference.contrast import Contrast
from service.inference.method_table import check_method, cost, default_method
from service.inference.questions import ActivationKind, Place, Question
from service.models.loaded import LoadedModel
from service.pipeline.service import Limits

TOP_DETECTIONS = 100
"""Predictions that are listed of a detector by default."""

MAX_NEAREST = 16
"""Classes of `contrast=nearest:16`."""

COST_PER_MEGAPIXEL = 0.05
COST_PER_MEBIBYTE = 0.02
"""The cost of images drawn and of activations captured, in forward passes of a resnet50: measured
by `benchmarks/round_the_model.py` and rounded up."""


@dataclass(frozen=True, slots=True)
class ResolvedOptions:
    """What options mean for a model.

    template: the question of any image; its pixels are empty.
    hiding:   the part of each image to hide for a second inference, if any.
    price:    what all images cost a key, in forward passes, with what is drawn and captured.
    """

    template: Question
    hiding: Hiding | None
    price: float

    def question(self, pixels: Tensor, **seen: Any) -> Question:
        """The question of an image, from its pixels and the fields that say what it shows."""
        return replace(self.template, pixels=pixels, **seen)


def resolve_options(
    model: LoadedModel, options: CommonOptions, limits: Limits, images: int
) -> ResolvedOptions:
    """Resolve the options of a request with this many images.

    Raises UnknownLayer, UnknownClass, and InvalidOption for options that do not fit this model or
    cost more than the service allows.
    """
    _check_task(model, options)
    paths, kind = _activation_paths(model, options, limits, images)
    question = Question(
        torch.empty(0), _listed(model, options), method=None, activations=paths, kinds=(kind,)
    )
    if options.min_score is not None:
        question = replace(question, min_score=options.min_score)
    if isinstance(options, ExplainOptions):
        question = _with_explanation(model, options, question)
    passes = _passes(model, options, question)
    if isinstance(options, ExplainOptions) and options.mask is not None:
        passes += _passes(model, options, replace(question, activations=()))
    if passes > limits.cost:
        raise InvalidOption(
            f"This explanation costs {passes:g} forward passes for an image; at most "
            f"{limits.cost:g} are allowed. Request fewer samples, steps or targets, a later "
            "layer or another method."
        )
    mebibytes = model.activation_bytes(paths, inputs=kind.endswith("input")) / 2**20
    passes += _drawn_megapixels(options, question, limits) * COST_PER_MEGAPIXEL
    passes += mebibytes * COST_PER_MEBIBYTE
    return ResolvedOptions(question, _hiding(options), passes * images)


def _contrast(model: LoadedModel, options: ExplainOptions) -> Contrast | None:
    """What the targets are compared with. Raises UnknownClass and InvalidOption."""
    names, weights = options.contrast, tuple(options.contrast_weight)
    counts = [_nearest(model, name) for name in names]
    if not any(counts):
        classes = tuple(model.class_id(name) for name in names)
        if len(set(classes)) < len(classes):
            raise InvalidOption(f"`contrast` names a class twice: {', '.join(names)}.")
        return Contrast(classes, weights=weights) if classes else None
    if len(names) > 1 or weights:
        raise InvalidOption(
            "`contrast=nearest:…` stands alone, without other classes and without weights; or "
            "name the classes."
        )
    return Contrast(nearest=counts[0])


def _listed(model: LoadedModel, options: CommonOptions) -> int:
    """How many predictions are listed: by default TOP_DETECTIONS of a detector."""
    is_default = "top_k" not in options.model_fields_set
    return TOP_DETECTIONS if model.task == "detection" and is_default else options.top_k


def method_of(model: LoadedModel, options: ExplainOptions) -> str:
    """The method of a request: the named one, or the default of the model's task."""
    is_named = "method" in options.model_fields_set
    return options.method if is_named else default_method(model)


def samples_of(options: ExplainOptions, method: str) -> int:
    """The number of samples: the given one, or the method's default."""
    return options.samples or METHODS[method].samples


def _libra(options: ExplainOptions) -> bool:
    """Whether gradients are corrected. Raises InvalidOption where that changes nothing."""
    if options.correction == "none":
        return False
    if not METHODS[options.method].is_correctable:
        *others, last = [name for name, record in METHODS.items() if record.is_correctable]
        raise InvalidOption(
            f"`correction={options.correction}` does not change `{options.method}`; it is for "
            f"{', '.join(others)} and {last}."
        )
    if options.activations and options.activation_kind.startswith("grad"):
        raise InvalidOption(
            "Captured gradients are the model's own; leave out `activations` or `correction`."
        )
    return True


def _nearest(model: LoadedModel, name: str) -> int:
    """The number of `nearest:3`; 0 for the name of a class. Raises InvalidOption."""
    word, _, count = name.partition(":")
    if word != "nearest" or name in model.labels:
        return 0
    most = min(MAX_NEAREST, len(model.labels) - 1)
    if count.isascii() and count.isdecimal() and len(count) < 4 and 1 <= int(count) <= most:
        return int(count)
    raise InvalidOption(
        f"`contrast={name}` is no number of classes: give nearest:1 to nearest:{most}, or the id "
        "or label of a class."
    )


def _passes(model: LoadedModel, options: CommonOptions, question: Question) -> float:
    """The most forward passes that a question takes, with the search for a finer layer."""
    passes = cost(model, question)
    if isinstance(options, ExplainOptions) and options.verify == "search":
        for layer in model.finer_layers(question.layers):
            again = replace(question, layers=(layer,), activations=(), verify=False)
            passes += cost(model, again)
    return passes


def _hiding(options: CommonOptions) -> Hiding | None:
    mask = options.hidden() if isinstance(options, ExplainOptions) else None
    if mask is None:
        return None
    return Hiding(
        boxes=mask.boxes,
        rle=None if mask.rle is None else (mask.rle.size, mask.rle.counts),
        fill=mask.fill,
        rest=mask.hide == "rest",
    )


def _drawn_megapixels(options: CommonOptions, question: Question, limits: Limits) -> float:
    """The most that is drawn for one image, whose size is not known yet."""
    if not isinstance(options, ExplainOptions) or options.size != "source":
        return 0.0
    drawings = len({"heatmap", "overlay"}.intersection(options.include))
    maps = question.target_count * (2 if options.mask is not None else 1)
    return drawings * maps * limits.render_side**2 / 1e6


def _activation_paths(
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
            f"The requested activations take {size} bytes; at most {limits.activation_bytes} are "
            "allowed in one request. Name fewer layers, or send fewer images."
        )
    return paths, kind


def place_of(place: tuple[float, ...] | RunLengths) -> Place:
    """A place in `at` as questions have it."""
    if not isinstance(place, RunLengths):
        return place
    counts = place.counts
    return place.size, counts if isinstance(counts, str) else tuple(counts)


def _check_task(model: LoadedModel, options: CommonOptions) -> None:
    """Raise InvalidOption for options that the model's task does not have."""
    if model.task == "classification":
        given = [] if options.min_score is None else ["min_score"]
    else:
        given = _unsupported(model, options)
    if given:
        raise InvalidOption(
            f"`{given[0]}` is not for models of the task {model.task}, and {model.name!r} is one; "
            "leave it out."
        )
    if isinstance(options, ExplainOptions) and model.task == "classification":
        _check_targets(model, options)
    if isinstance(options, ExplainOptions) and model.task == "detection" and options.contrast:
        model.check_rows()
    if isinstance(options, ExplainOptions) and model.task != "classification":
        _check_verdict(options)


def _check_verdict(options: ExplainOptions) -> None:
    """Raise InvalidOption for what of a box or a region has no verdict."""
    given = "contrast" if options.contrast else f"of={options.of}" if options.of != "class" else ""
    if options.verify != "false" and given:
        raise InvalidOption(
            f"`verify` tests the score of a box or a region, which `{given}` does not explain; "
            "leave one of them out."
        )


def _unsupported(model: LoadedModel, options: CommonOptions) -> list[str]:
    """The given options that a detector or a segmenter does not have."""
    given = ["activations"] if options.activations else []
    given += ["uncertainty"] if options.uncertainty else []
    is_detector = model.task == "detection"
    if options.fit is not None and (is_detector or options.fit == "crop"):
        given.append("fit" if is_detector else "fit=crop")
    if options.min_score is not None and not is_detector:
        given.append("min_score")
    if isinstance(options, ExplainOptions):
        given += ["of"] if options.of != "class" and not is_detector else []
        given += ["mask"] if options.mask is not None else []
        given += ["verify=search"] if options.verify == "search" else []
        given += ["correction"] if options.correction != "none" else []
    return given


def _check_targets(model: LoadedModel, options: ExplainOptions) -> None:
    """Raise InvalidOption for targets that a classifier does not have."""
    if options.targets and options.explain_top > 1:
        raise InvalidOption(
            f"`targets` and `explain_top` exclude each other for model {model.name!r}, which "
            "classifies; give one of them."
        )
    given = "at" if options.at else "of" if options.of != "class" else None
    if given is not None:
        raise InvalidOption(
            f"`{given}` is for models that detect or segment, and model {model.name!r} "
            "classifies; leave it out."
        )


def _with_explanation(model: LoadedModel, options: ExplainOptions, question: Question) -> Question:
    targets = tuple(dict.fromkeys(map(model.class_id, options.targets)))
    contrast = _contrast(model, options)
    for class_id in () if contrast is None else contrast.classes:
        if class_id in targets:
            raise InvalidOption(
                f"The class {class_id} is both a target and `contrast`; their difference is zero."
            )
    method = method_of(model, options)
    check_method(model, method)
    has_layer = METHODS[method].has_layer
    if options.layer and not has_layer:
        raise InvalidOption(f"`{method}` has no layer; leave out `layer`.")
    if options.of != "class" and method != "hirescam":
        raise InvalidOption(
            f"`of={options.of}` is explained by hirescam, not by `{method}`; leave out `method`."
        )
    layers = model.target_layers(options.layer) if has_layer else ()
    return replace(
        question,
        targets=targets,
        explain_top=min(options.explain_top, len(model.labels)),
        contrast=contrast,
        method=method,
        layers=layers,
        samples=samples_of(options, method),
        steps=options.steps,
        seed=options.seed,
        libra=_libra(options),
        verify=options.verify != "false",
        places=tuple(place_of(place) for place in options.places()),
        of=options.of,
    )
