"""What is computed for one image (`Question`), and what comes of it (`InferenceResult`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from api_schemas.methods import METHODS, MethodRecord
from service.cam.verdict import WHOLE, Evidence, Verdict
from service.errors import CamserveError
from service.images.decode import Rect
from service.inference.contrast import Contrast
from service.models.catalog import Output
from service.models.compiled.front import Precision
from service.models.loaded import LoadedModel

Of = Literal["class", "x1", "y1", "x2", "y2"]
Place = tuple[float, ...] | tuple[tuple[int, int], str | tuple[int, ...]]
"""A point (x, y), a box (x, y, w, h), or run lengths: a size (height, width) and its counts."""

MIN_SCORE = 0.5
"""The lowest score of a detection that counts, by default."""

ActivationKind = Literal["output", "input", "grad_output", "grad_input"]
Lane = Literal["compiled", "folded", "hooked"]


_NEED_GRADIENTS = frozenset(record.name for record in METHODS.values() if record.walks)


@dataclass(frozen=True, slots=True, eq=False)
class ImageEdit:
    """An edit of the image, and its controls: the same edit at other places.

    count: how many images that is. make: one of them, uint8 (C, h, w) at the model's input size;
           0 is the edit itself.
    """

    count: int
    make: Callable[[int], Tensor]

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that it needs as the model has them: none."""
        return ()


@dataclass(frozen=True, slots=True, eq=False)
class ChannelEdit:
    """Channels of a layer's output set to something else, and as many others as a control.

    channels: their numbers; empty means the `top` ones by contribution to the class `of` (None:
              the best prediction).
    to:       `zero`, `mean`, `noise`, `scale` by `factor`, or `donor`: what they are for that
              image, uint8 (C, h, w).
    """

    layer: str
    to: Literal["zero", "mean", "noise", "scale", "donor"]
    channels: tuple[int, ...] = ()
    top: int = 0
    of: int | None = None
    factor: float = 1.0
    donor: Tensor | None = None
    controls: int = 0
    seed: int = 0

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.layer,)


@dataclass(frozen=True, slots=True, eq=False)
class GradientEdit:
    """The gradient at a layer's output changed on its way back: what `question` is explained by.

    to: `zero`, `scale` by `amount`, or `clip` at ± `amount`. question: of one target, of the image
    itself.
    """

    layer: str
    to: Literal["zero", "scale", "clip"]
    question: Question
    amount: float = 0.0

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.layer, *self.question.layers)


Edit = ImageEdit | ChannelEdit | GradientEdit


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """What an edit and its controls do, float32 on the CPU.

    logits:   (1 + controls, classes), the edit's own first.
    unedited: (classes,), in the same lane.
    channels: those that were set. explanation: the map of a changed gradient.
    """

    logits: Tensor
    unedited: Tensor
    channels: tuple[int, ...] = ()
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TrackedEffect:
    """What an edit and its controls do to boxes or regions, float32 on the CPU.

    values:   (1 + controls, 2, K), the score and the overlap of each target, the edit's own first.
    unedited: (2, K). predictions: of the edited image.
    """

    values: Tensor
    unedited: Tensor
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What is computed for one image.

    pixels:      uint8 (3, h, w), at the model's input size.
    top_k:       how many predictions to list.
    targets:     the class ids to explain; empty explains the `explain_top` best predictions.
    contrast:    what each target's logit is compared with.
    method:      None for predictions alone.
    layers:      the target layers; several are fused.
    activations: the layers to capture, in each of `kinds`; gradients are of the first target.
    samples:     masks of RISE, baselines of expected gradients. steps: of integrated gradients.
    seed:        of what is random.
    libra:       whether gradients follow the rules of LibraGrad.
    verify:      whether each map gets a verdict, from further forward passes; `evidence`: what
                 these gave for the same image, if they have run.
    seen:        the part of `pixels`, x, y, w, h as fractions, that shows the image.
    places, of, min_score: of detectors and segmenters, see `api_schemas.options`; `source` is the
                 (width, height) of the upright image that `places` refer to.
    shown:       the part of it, x, y, w, h in its pixels, that `pixels` show; None: all of it.
    edits:       whose effects are measured, from further forward passes; `tracks`: whether it says
                 on which boxes or regions.
    """

    pixels: Tensor
    top_k: int = 5
    targets: tuple[int, ...] = ()
    explain_top: int = 1
    contrast: Contrast | None = None
    method: str | None = "gradcam"
    layers: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    kinds: tuple[ActivationKind, ...] = ("output",)
    samples: int = 1000
    steps: int = 50
    seed: int = 0
    libra: bool = False
    verify: bool = False
    evidence: Evidence | None = None
    seen: Rect = WHOLE
    edits: tuple[Edit, ...] = ()
    places: tuple[Place, ...] = ()
    of: Of = "class"
    min_score: float = MIN_SCORE
    source: tuple[int, int] = (0, 0)
    shown: Rect | None = None
    tracks: bool = False

    @property
    def method_record(self) -> MethodRecord | None:
        """The record of the method; None for predictions alone."""
        record = METHODS[self.method] if self.method else None
        return record if record and (self.layers or not record.has_layer) else None

    @property
    def explains(self) -> bool:
        """Whether there is an explanation to compute."""
        return self.method_record is not None

    @property
    def needs_gradients(self) -> bool:
        """Whether the maps need the gradient of every target at the target layers."""
        return bool(self.layers) and self.method in _NEED_GRADIENTS

    @property
    def needs_graph(self) -> bool:
        """Whether the forward pass that predicts needs a graph."""
        captured = self.activations and {"grad_output", "grad_input"} & set(self.kinds)
        return self.needs_gradients or bool(captured)

    @property
    def target_count(self) -> int:
        """How many targets are explained at most; a model of fewer classes explains fewer.

        Of a detector, each of `targets` has `explain_top` boxes.
        """
        return len(self.places) or max(1, len(self.targets)) * self.explain_top


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class: its score by the model's output activation, and the logit behind it.

    detection, box: of a detector, its position and x, y, w, h in pixels of the model input.
    mask: bool (h, w) over the model input, of a detection or of a segmenter's class.
    The wire's form is `api_schemas.answers.Prediction`.
    """

    class_id: int
    score: float
    logit: float
    detection: int | None = None
    box: Rect | None = None
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """One map: `grid` float32 (h, w) in −1..1, `low` and `high` its range before the division.

    The CAM family is not negative and has the shape of its layer; input-level methods have the
    shape of the model input and no layer. `contrast`: the weight of each class that the target is
    compared with, at the image's logits; `logit_difference`: the logit minus theirs, weighted.
    `cost` is in forward passes. `tried`: the verdicts on maps of earlier layers, if its own is
    inconclusive. detection, box, of: what is explained of a detector, the box in pixels of the
    model input; region: of a segmenter, bool (h, w) over the model input. window: the part that the
    map covers, in pixels of the model input, if the model pads it. The wire's form is
    `api_schemas.answers.Explanation`.
    """

    class_id: int
    score: float
    logit: float
    contrast: Mapping[int, float]
    method: str
    layers: tuple[str, ...]
    grid: NDArray[np.float32]
    low: float
    high: float
    flags: tuple[str, ...]
    cost: float
    logit_difference: float | None = None
    verdict: Verdict | None = None
    libra: bool = False
    tried: tuple[tuple[str, Verdict], ...] = ()
    detection: int | None = None
    box: Rect | None = None
    of: Of | None = None
    region: NDArray[np.bool_] | None = None
    window: Rect | None = None


@dataclass(frozen=True, slots=True)
class Activation:
    """One input, output or gradient of one call of one layer, float32, without batch dimension.

    `part` names it where the layer takes or returns several tensors: "[0]", "[hidden]". The wire's
    form is `api_schemas.answers.Activation`.
    """

    layer: str
    kind: ActivationKind
    call: int
    part: str
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """All that inference gives about one image. Its arrays are read-only and share no memory.

    precision: of the engine that computed it: `float32`, or the operator's choice (`bf16`, `int8`).
    evidence:  what the verdicts rest on; None without verdicts.
    effects:   of each edit, in order, or why it has none.
    tracked:   the boxes or regions that effects are measured on.
    logits:    of all classes, on the CPU; None of a detector or a segmenter.
    The wire's form is `api_schemas.answers.Result`.
    """

    predictions: tuple[Prediction, ...]
    explanations: tuple[Explanation, ...]
    activations: tuple[Activation, ...]
    precision: Precision = "float32"
    evidence: Evidence | None = None
    effects: tuple[Effect | TrackedEffect | CamserveError, ...] = ()
    tracked: tuple[Prediction, ...] = ()
    logits: Tensor | None = None
    output: Output = "softmax"

    @property
    def margin(self) -> float:
        """The `margin` of the two best classes: 0 undecided; computed when it is read."""
        return 0.0 if self.logits is None else margin(self.logits, self.output)

    @property
    def entropy(self) -> float:
        """The `entropy` of the classes' probabilities: 0 certain, 1 undecided; as `margin`."""
        return 0.0 if self.logits is None else entropy(self.logits, self.output)


def margin(logits: Tensor, output: Output) -> float:
    """The probability of the best class minus that of the second best, 0..1: Settles 2009, §3.1.

    Sigmoids are a distribution each, of the class and of its absence; the smallest of their margins
    |2p - 1| counts (Brinker 2006). Without an output activation the probabilities are the softmax.
    One class has the margin 1.
    """
    if output == "sigmoid":
        return float((2 * logits.sigmoid() - 1).abs().min())
    best = logits.softmax(dim=-1).topk(min(2, len(logits))).values.tolist()
    return float(best[0] - sum(best[1:]))


def entropy(logits: Tensor, output: Output) -> float:
    """The entropy of the classes' probabilities by its largest value, 0..1: Settles 2009, §3.1.

    Of one distribution over all classes it is divided by the logarithm of their number. Sigmoids
    are a distribution each, and the mean of their entropies counts, in bits. Without an output
    activation the probabilities are the softmax.
    """
    if output == "sigmoid":
        both = torch.stack([functional.logsigmoid(logits), functional.logsigmoid(-logits)])
        return float(-(both.exp() * both).sum(dim=0).mean() / math.log(2))
    logs = logits.log_softmax(dim=-1)
    return float(-(logs.exp() * logs).sum() / math.log(max(2, len(logits))))


def lane_of(model: LoadedModel, question: Question) -> Lane:
    """The lane of a question, chosen by the question and the model alone, never by the load.

    So the same request always gets the same numbers. `compiled` predicts, and explains the target
    layer from its activation and gradient; `folded` is the hooked lane on replicas whose batch
    normalisations are folded, or parts compiled if the model is no classifier; `hooked` is the
    model as it is.
    """
    lane = model.compiled
    right_size = tuple(question.pixels.shape[1:]) == model.preprocessing.crop
    if lane is not None and right_size and not question.activations:
        record = question.method_record
        at_the_cut = question.layers in ((), (lane.layer,))
        at_the_cut = at_the_cut and (not question.libra or lane.calls_functions)
        if record is None or (record.is_forward_only and at_the_cut):
            return "compiled"
    edited = (layer for edit in question.edits for layer in edit.layers)
    named = {*question.layers, *question.activations, *edited}
    return "folded" if model.folded and not named & model.folded.layers else "hooked"
