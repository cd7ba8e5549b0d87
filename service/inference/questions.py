"""What can be asked about one image, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from api_schemas.methods import METHODS, MethodRecord
from service.models.compiled.front import Precision
from service.models.loaded import LoadedModel

Kind = Literal["output", "input", "grad_output", "grad_input"]
Lane = Literal["compiled", "folded", "hooked"]


_WALKING = frozenset(record.name for record in METHODS.values() if record.walks)


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
    def explained_by(self) -> MethodRecord | None:
        """The record of the method; None where predictions alone are asked for."""
        record = METHODS[self.method] if self.method else None
        return record if record and (self.layers or not record.has_layer) else None

    @property
    def explains(self) -> bool:
        """Whether an explanation is asked for."""
        return self.explained_by is not None

    @property
    def walks(self) -> bool:
        """Whether the maps need the gradient of every target at the target layers."""
        return bool(self.layers) and self.method in _WALKING

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
        record = question.explained_by
        if record is None or (not record.runs and question.layers == (lane.layer,)):
            return "compiled"
    named = {*question.layers, *question.activations}
    return "folded" if model.folded and not named & model.folded.layers else "hooked"
