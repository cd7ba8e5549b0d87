"""The methods of the table as functions: what each computes and costs, and what models allow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from api_schemas.methods import BACKWARD, DEFAULTS, METHODS, MethodRecord
from service.cam.verdict import RUNS
from service.errors import InvalidOption
from service.inference import attention_maps, input_gradients, perturbation
from service.inference.forward_pass import ImagePass
from service.inference.perturbation import Steps, windows
from service.inference.questions import Question
from service.models.loaded import LoadedModel
from service.models.probes.attention import TokenAttention

MULTI_PASS_METHODS: Mapping[str, Callable[[ImagePass], Steps]] = {
    "scorecam": perturbation.scorecam,
    "ablationcam": perturbation.ablationcam,
    "occlusion": perturbation.occlusion,
    "rise": perturbation.rise,
    "integrated_gradients": input_gradients.integrated_gradients,
    "expected_gradients": input_gradients.expected_gradients,
    "input_gradient": input_gradients.input_gradient,
    "guided_backprop": input_gradients.guided_backprop,
    "guided_gradcam": input_gradients.guided_gradcam,
    "attention_rollout": attention_maps.attention_rollout,
    "gae": attention_maps.gae,
}
"""The methods that need more passes than the shared forward pass; that one is enough for others."""


ATTENTION_BYTES = 1 << 30
"""Bytes that a method may take for the attention of one image."""


def default_method(model: LoadedModel) -> str:
    """The method of a request that names none, by the model's task."""
    return DEFAULTS[model.task]


def check_method(model: LoadedModel, method: str) -> None:
    """Raise InvalidOption where what the model is, or its size, does not allow the method."""
    record = METHODS[method]
    if model.task not in record.tasks:
        *others, last = [name for name, each in METHODS.items() if model.task in each.tasks]
        raise InvalidOption(
            f"`{method}` is not for models of the task {model.task}, and {model.name!r} is one; "
            f"use {', '.join(others)} or {last}."
        )
    reason = _lack(model, record)
    if reason is None and "attention" in record.needs:
        _check_attention(model, method)
    if reason is None:
        return
    *others, last = [name for name, record in METHODS.items() if not record.needs]
    raise InvalidOption(
        f"Model {model.name!r} cannot be explained by `{method}`: {reason}. It predicts, and can "
        f"be explained by {', '.join(others)} and {last}."
    )


def why_not(model: LoadedModel, method: str) -> str | None:
    """Why a model does not allow a method at its default target layer; None if it does."""
    record = METHODS[method]
    if model.task not in record.tasks:
        return f"it is not for the task {model.task}"
    if record.has_layer and not any(layer.target for layer in model.layers):
        return "none of its layers returns a feature map"
    missing = next((model.missing[need] for need in record.needs if need in model.missing), None)
    if missing is None and "attention" in record.needs:
        missing = _why_no_attention(model.attention, record)
    return _lack(model, record) or missing


def _lack(model: LoadedModel, record: MethodRecord) -> str | None:
    """Why hooks or gradients that a method needs are missing; None if they work."""
    needs = {*record.needs}
    reason = model.no_layers if needs & {"layer", "attention"} else None
    if reason is None and needs & {"layer", "gradients"}:
        reason = model.no_gradients
    return reason


def _check_attention(model: LoadedModel, method: str) -> None:
    reason = _why_no_attention(model.attention, METHODS[method])
    if reason is not None:
        raise InvalidOption(
            f"Model {model.name!r} cannot be explained by `{method}`: {reason}. Use another "
            "method, such as gradcam or occlusion."
        )


def _why_no_attention(attention: TokenAttention | str, record: MethodRecord) -> str | None:
    """Why a method that follows attention is refused; None if it is not."""
    if isinstance(attention, str):
        return attention
    if "class token" in record.needs and not attention.class_token:
        return (
            "its head reads the mean of all tokens or pools them, and the method is defined for a "
            "class token"
        )
    # Attention, its gradient and their product; without gradients one layer at a time.
    layers = len(attention.calls) if "gradients" in record.needs else 1
    size = 3 * layers * attention.layer_bytes
    if size <= ATTENTION_BYTES:
        return None
    return (
        f"the attention of an image takes {size >> 20} MiB, and {ATTENTION_BYTES >> 20} MiB are "
        "allowed; serve the model with smaller images"
    )


def cost(model: LoadedModel, question: Question) -> float:
    """What a question costs, in forward passes of this model for one image, before it runs.

    The pass that predicts counts 1. A backward pass counts BACKWARD times the share of the model's
    operations behind the earliest layer that it reaches: one for each target of a method that needs
    the gradient there, one for all captured gradients. A forward pass with the gradient at the
    input counts 1 + BACKWARD, and BACKWARD for each further target; a tail of the model
    (ablationcam) its share of the operations. Verdicts count their forward passes.

    Raises UnknownLayer, and InvalidOption for a layer without a feature map.
    """
    price = 1 + _activation_gradients(model, question)
    if question.verify and question.evidence is None:
        price += RUNS
    if question.needs_gradients:
        behind = max(1 - model.layer(path).share for path in question.layers)
        price += BACKWARD * question.target_count * behind
    if (record := question.method_record) is not None:
        price += _further_passes(model, question, record)
    return round(price, 2)


def _activation_gradients(model: LoadedModel, question: Question) -> float:
    """The one backward pass that gives all captured gradients."""
    layers = [model.layer(path) for path in question.activations]
    behind = [1 - layer.share for layer in layers if "grad_output" in question.kinds]
    behind += [1 - layer.before for layer in layers if "grad_input" in question.kinds]
    return BACKWARD * max(behind, default=0.0)


def _further_passes(model: LoadedModel, question: Question, record: MethodRecord) -> float:
    """What a method runs after the pass that predicts."""
    channels = [_channels(model, path) for path in question.layers if record.times == "channels"]
    if record.runs == "tail":  # and one pass for each layer that tries how to run it
        shares = (1 - model.layer(path).share for path in question.layers)
        return sum(1 + count * share for count, share in zip(channels, shares, strict=True))
    if not record.runs:  # the common case, for which the squares would be counted for nothing
        return 0
    height, width = model.preprocessing.canvas
    times = {
        "once": 1,
        "channels": sum(channels),
        "squares": len(windows(height)) * len(windows(width)),
        "samples": question.samples,
        "steps": question.steps,
    }
    price = {"forward": 1, "gradient": 1 + BACKWARD * question.target_count}
    return price[record.runs] * times[record.times]


def _channels(model: LoadedModel, path: str) -> int:
    layer = model.layer(path)
    if layer.layout is None or layer.shape is None:
        raise InvalidOption(f"Layer {path!r} gives no feature map.")
    return layer.shape[layer.layout.channel_axis]
