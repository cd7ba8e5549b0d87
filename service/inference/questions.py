"""What can be asked about one image, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.errors import InvalidOption
from service.models.compiled.front import Precision
from service.models.loaded import LoadedModel

Kind = Literal["output", "input", "grad_output", "grad_input"]

CAM_METHODS = frozenset(
    {"gradcam", "gradcampp", "hirescam", "layercam", "xgradcam", "eigencam", "cam"}
)
"""A map in the shape of the target layer, from the forward pass that also predicts."""

Lane = Literal["compiled", "folded", "hooked"]

LAYER_METHODS = CAM_METHODS | {"scorecam", "ablationcam", "guided_gradcam"}
"""Methods that have a target layer."""

WALKING_METHODS = CAM_METHODS - {"eigencam", "cam"} | {"guided_gradcam"}
"""Methods that walk the graph of the pass that predicts back to the target layer, each target."""

GRADIENT_METHODS = LAYER_METHODS | {
    "guided_backprop",
    "input_gradient",
    "integrated_gradients",
}
"""Methods that a model without gradients refuses; at a layer these are all."""

FORWARD_AND_BACKWARD = 2.5
"""What a forward pass with the gradient at the input costs, in forward passes.

Measured on resnet50 (`benchmarks/methods.py`): 2.3, with guided ReLUs 2.9, 1.8 an image in chunks.
Each further target walks back through the same graph."""

BACKWARD = FORWARD_AND_BACKWARD - 1
"""What a walk back through the whole model costs; through the part behind a layer, its share."""

WINDOW, STRIDE = 32, 16
"""Occlusion's square and its step, in pixels of the model input."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about one image.

    pixels:      uint8 (3, h, w), at the model's input size.
    top_k:       how many predictions to list.
    targets:     the class ids to explain; empty explains the `explain_top` best predictions.
    contrast:    explain the target's logit minus this class's.
    method:      None asks for predictions alone.
    layers:      the target layers; several are fused.
    activations: the layers to capture, in each of `kinds`; gradients are of the first target.
    samples:     masks of RISE. steps: of integrated gradients. seed: of what is random.
    """

    pixels: Tensor
    top_k: int = 5
    targets: tuple[int, ...] = ()
    explain_top: int = 1
    contrast: int | None = None
    method: str | None = "gradcam"
    layers: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ("output",)
    samples: int = 1000
    steps: int = 50
    seed: int = 0

    @property
    def explains(self) -> bool:
        """Whether an explanation is asked for."""
        return self.method is not None and (bool(self.layers) or self.method not in LAYER_METHODS)

    @property
    def walks(self) -> bool:
        """Whether the maps need the gradient of every target at the target layers."""
        return self.explains and self.method in WALKING_METHODS

    @property
    def differentiates(self) -> bool:
        """Whether the forward pass that predicts needs a graph."""
        captured = self.activations and {"grad_output", "grad_input"} & set(self.kinds)
        return self.walks or bool(captured)

    @property
    def count(self) -> int:
        """How many targets are explained at most; a model of fewer classes explains fewer."""
        return len(self.targets) or self.explain_top


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class: its score by the model's output activation, and the logit behind it."""

    class_id: int
    score: float
    logit: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """One map: `grid` float32 (h, w) in −1..1, `low` and `high` its range before the division.

    The CAM family is not negative and has the shape of its layer; input-level methods have the
    shape of the model input and no layer. `cost` is in forward passes.
    """

    class_id: int
    score: float
    logit: float
    contrast: int | None
    method: str
    layers: tuple[str, ...]
    grid: NDArray[np.float32]
    low: float
    high: float
    flags: tuple[str, ...]
    cost: float


@dataclass(frozen=True, slots=True)
class Activation:
    """One tensor that one call of one layer took or gave, float32, without the batch dimension.

    `part` says which, where the layer takes or gives several: "[0]", "[hidden]".
    """

    layer: str
    kind: Kind
    call: int
    part: str
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything about one image. Its arrays are read-only and belong to nobody else.

    precision: of what computed it: `float32`, or what the operator chose (`bf16`, `int8`).
    """

    predictions: tuple[Prediction, ...]
    explanations: tuple[Explanation, ...]
    activations: tuple[Activation, ...]
    precision: Precision = "float32"


def lane_of(model: LoadedModel, question: Question) -> Lane:
    """Which lane answers a question: by the question and the model alone, never by the load.

    So the same request always gets the same numbers. `compiled` predicts, and explains the target
    layer from its activation and gradient; `folded` is the hooked lane on replicas whose batch
    normalisations are folded away; `hooked` is the model as it is.
    """
    lane = model.compiled
    right_size = tuple(question.pixels.shape[1:]) == model.preprocessing.crop
    if lane is not None and right_size and not question.activations:
        at_cut = question.method in CAM_METHODS and question.layers == (lane.layer,)
        if at_cut or not question.explains:
            return "compiled"
    named = {*question.layers, *question.activations}
    return "folded" if model.folded and not named & model.folded.layers else "hooked"


def check_method(model: LoadedModel, method: str) -> None:
    """Raise InvalidOption where the model, compiled or quantised, does not allow the method."""
    needs_layers = method in LAYER_METHODS or method == "attention_rollout"
    reason = model.no_layers if needs_layers else None
    if reason is None and method in GRADIENT_METHODS:
        reason = model.no_gradients
    if reason is None:
        return
    raise InvalidOption(
        f"Model {model.name!r} cannot be explained by `{method}`: {reason}. It predicts, and can "
        "be explained by occlusion and rise."
    )


def cost(model: LoadedModel, question: Question) -> float:
    """What a question costs, in forward passes of this model for one image, before it runs.

    The pass that predicts counts 1. A walk back through its graph counts BACKWARD times the share
    of the model's operations behind the earliest layer that it reaches: one walk for each target of
    a method that needs the gradient there, one for all gradients that are captured. A forward pass
    with the gradient at the input counts FORWARD_AND_BACKWARD, and BACKWARD for each further
    target; a tail of the model (ablationcam) its share of the operations.

    Raises UnknownLayer, and InvalidOption for a layer without a feature map.
    """
    price = 1 + _captured(model, question)
    if question.walks:
        behind = max(1 - model.layer(path).share for path in question.layers)
        price += BACKWARD * question.count * behind
    if question.explains:
        price += _further_passes(model, question)
    return round(price, 2)


def _captured(model: LoadedModel, question: Question) -> float:
    """The one walk that gives all captured gradients."""
    layers = [model.layer(path) for path in question.activations]
    behind = [1 - layer.share for layer in layers if "grad_output" in question.kinds]
    behind += [1 - layer.before for layer in layers if "grad_input" in question.kinds]
    return BACKWARD * max(behind, default=0.0)


def _further_passes(model: LoadedModel, question: Question) -> float:
    """What a method runs behind the pass that predicts."""
    gradients = 1 + BACKWARD * question.count
    channels = [_channels(model, path) for path in question.layers]
    height, width = model.preprocessing.crop
    passes: dict[str | None, float] = {
        "scorecam": sum(channels),
        "ablationcam": sum(
            1 + count * (1 - model.layer(path).share)
            for path, count in zip(question.layers, channels, strict=True)
        ),
        "input_gradient": gradients,
        "guided_backprop": gradients,
        "guided_gradcam": gradients,
        "integrated_gradients": gradients * question.steps,
        "occlusion": len(windows(height)) * len(windows(width)),
        "rise": question.samples,
        "attention_rollout": 1,
    }
    return passes.get(question.method, 0.0)


def windows(length: int) -> list[tuple[int, int]]:
    """Where occlusion's squares begin and end along a side; the last may be cut short."""
    starts = range(0, max(length - WINDOW, 0) + STRIDE, STRIDE)
    return [(start, min(start + WINDOW, length)) for start in starts if start < length]


def _channels(model: LoadedModel, path: str) -> int:
    layer = model.layer(path)
    if layer.layout is None or layer.shape is None:
        raise InvalidOption(f"Layer {path!r} gives no feature map.")
    return layer.shape[layer.layout.channel_axis]
