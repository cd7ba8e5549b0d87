"""The wire form of answers: responses of `/explain` and `/predict`, error bodies (RFC 9457).

A class that shares its name with one of `service` or `api_schemas.client` is its wire form.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol

from pydantic import BaseModel, Field

Rect = tuple[float, float, float, float]
Of = Literal["class", "x1", "y1", "x2", "y2"]
"""What of a detection is explained: its class, or the position of an edge of its box."""


class Encoded(BaseModel):
    """An image: standard base64 (RFC 4648 §4) of a file of `media_type`."""

    media_type: str
    width: int
    height: int
    data: str


class Grid(BaseModel):
    """A map as numbers: base64 of little-endian values in row-major order."""

    shape: list[int]
    dtype: str = "float32"
    data: str


class Array(BaseModel):
    """Activations as numbers: base64 of little-endian values in row-major order."""

    dtype: str
    data: str


class Stats(BaseModel):
    """Five statistics of a layer's values; `zero_fraction` is the share that is exactly 0."""

    min: float
    max: float
    mean: float
    std: float
    zero_fraction: float


class ChannelStats(BaseModel):
    """Mean and maximum of each channel, in order: a gradient's mean is its Grad-CAM weight."""

    mean: list[float]
    max: list[float]


class ChannelGrid(Encoded):
    """A grid of all channels, each normalized separately; `channels_left_out` did not fit."""

    channels_left_out: int


class Activation(BaseModel):
    """The output of a layer for one image. `call` counts the calls of one forward pass from 0."""

    layer: str
    kind: str
    call: int = 0
    part: str | None = Field(
        None, description="Which tensor, if the layer has several inputs or outputs: [0], [hidden]."
    )
    shape: list[int]
    dtype: str = "float32"
    stats: Stats | None = None
    channels: ChannelStats | None = None
    image: ChannelGrid | None = None
    array: Array | None = None


class MaskRLE(BaseModel):
    """A mask as compressed COCO RLE; size is [height, width] of the source."""

    size: tuple[int, int]
    counts: str


class Prediction(BaseModel):
    """One class: its score and the logit behind it; of a detector, one box.

    A detection has `detection`, `box` and, if the model gives one, `mask`; its `logit` is that of
    the class where the head gives one, and otherwise log s − log(1 − s) of the score. A region has
    `mask` and `area`; its `score` and `logit` are means over the region.
    """

    class_id: int
    label: str
    score: float
    logit: float
    detection: int | None = Field(
        None, description="Position among the detections of the image, best score first, from 0."
    )
    box: Rect | None = Field(None, description="x, y, w, h in upright source pixels.")
    mask: MaskRLE | None = Field(None, description="The pixels of the detection, or of the class.")
    area: float | None = Field(
        None, description="Source pixels in which the class is the most probable one."
    )


class Uncertainty(BaseModel):
    """How undecided a classifier is about an image (Settles 2009), not whether it is right.

    Of sigmoids each class is a distribution of its own: the smallest margin |2p − 1| and the mean
    entropy count. Without an output activation the probabilities are the softmax of the logits.
    """

    margin: float = Field(
        description="The probability of the best class minus that of the second best, 0..1: 0 is "
        "undecided."
    )
    entropy: float = Field(
        description="The entropy of the probabilities of all classes, divided by the logarithm of "
        "the number of classes, 0..1: 1 is undecided."
    )


class Cost(BaseModel):
    """The cost of the explanation, in forward passes of the model for one image."""

    forwards: float


class Regions(BaseModel):
    """Where the map is at least `threshold` of its maximum, in upright source pixels.

    `peak` is [x, y]; boxes are x, y, w, h, largest region first; polygons are the outlines.
    """

    threshold: float
    peak: tuple[float, float] | None
    boxes: list[Rect]
    polygons: list[list[tuple[float, float]]]
    rle: MaskRLE


class Fills(BaseModel):
    """The agreement with the runs of each fill, −1..1."""

    mean: float
    blur: float


class Elsewhere(BaseModel):
    """The agreement of the map's mirrored, turned and shifted copies, −1..1."""

    median: float
    best: float


class Baselines(BaseModel):
    """The agreement of maps that know nothing of the model, −1..1: the best of each kind.

    `centre`: blobs in the middle; `contrast`: the image's edges, colors and texture.
    """

    centre: float
    contrast: float


class Tried(BaseModel):
    """The verdict on the map of an earlier layer."""

    layer: str
    verdict: Literal["supported", "inconclusive", "refuted"]
    agreement: float


class Verification(BaseModel):
    """Whether the class depends on what the map marks, measured on this image.

    `supported`: hiding what the map marks lowers the logit more than hiding the same shape in 95 %
    of all other places. `refuted`: half of all other places explain the logit at least as well.
    """

    verdict: Literal["supported", "inconclusive", "refuted"] = Field(
        description="Whether the logit depends on what the map marks."
    )
    reason: (
        Literal["flat_map", "flat_score", "elsewhere_as_good", "centre_as_good", "fills_disagree"]
        | None
    ) = Field(None, description="Why the verdict is `inconclusive`.")
    agreement: float = Field(
        description="Correlation of the logit's drop with the hidden part of the map, −1..1."
    )
    agreement_by_fill: Fills
    elsewhere: Elsewhere
    p_place: float = Field(description="Share of copies that agree at least as well, 0..1.")
    p_centred: float = Field(
        description="The same, weighted by where photographers put objects, 0..1."
    )
    baselines: Baselines
    p_class: float | None = Field(
        None,
        description="Share of classes whose drops agree at least as well, 0..1; from 20 classes.",
    )
    forwards: int = Field(description="Forward passes of the test, shared by all maps of an image.")
    design: str = Field(description="Which parts are hidden in each pass; the same for all images.")
    try_layer: str | None = Field(
        None, description="An earlier layer with a finer map, if the verdict is inconclusive."
    )
    tried: list[Tried] | None = Field(
        None, description="With `verify=search`: the layers that were tried, in order."
    )


VERDICT_SENTENCES: Mapping[str, str] = MappingProxyType(
    {
        "supported": "Hiding what this map marks lowers the score of the class more than hiding "
        "the same shape in 95 % of all other places.",
        "refuted": "The class does not depend on what this map marks: half of all other places "
        "explain the score at least as well.",
        "flat_map": "The map is the same everywhere: it marks no place.",
        "flat_score": "The score hardly changes, whatever half of the image is hidden.",
        "elsewhere_as_good": "More than 5 % of all other places explain the score as well as this "
        "map.",
        "centre_as_good": "Places in the center, where photographers put objects, explain the "
        "score as well as this map.",
        "fills_disagree": "The score falls with one fill of the hidden parts, but not with the "
        "other.",
    }
)
"""What each verdict says; an inconclusive one has the sentence of its reason."""


class AnyVerdict(Protocol):
    """What the verdicts of the service and of its answers have in common."""

    @property
    def verdict(self) -> str: ...

    @property
    def reason(self) -> str | None: ...

    @property
    def agreement(self) -> float: ...


def verdict_summary(found: AnyVerdict) -> str:
    """The verdict with its agreement: "supported (agreement 0.71)"."""
    return f"{found.verdict} (agreement {found.agreement:z.2f})"


def verdict_sentence(found: AnyVerdict) -> str:
    """What the verdict says, in one sentence."""
    return VERDICT_SENTENCES[found.reason or found.verdict]


class Contrast(BaseModel):
    """A class that the target is compared with, and the weight of its logit."""

    class_id: int
    label: str
    weight: float


class Explanation(BaseModel):
    """One map with its metadata.

    `logit_difference` is the logit of the class minus those of the contrast, weighted; null without
    one. `range` is [min, max] of the map before it was divided by its largest absolute value;
    `flags` are its limitations: all_zero, target_not_predicted, saturated, low_resolution,
    random_weights, module_called_n_times and others. Of a detector an explanation is of one box,
    of a segmenter of one region.
    """

    class_id: int
    label: str
    score: float
    detection: int | None = Field(
        None, description="The position of the explained detection in `predictions`."
    )
    box: Rect | None = Field(
        None, description="The explained box, x, y, w, h in upright source pixels."
    )
    of: Of | None = Field(None, description="What of the detection is explained.")
    region: MaskRLE | None = Field(
        None, description="The explained region of a segmenter: the target is its mean logit."
    )
    contrast: int | None = Field(None, description="The class of a contrast with one class.")
    contrasts: list[Contrast] | None = Field(
        None, description="The classes of a contrast with several or with a weight."
    )
    logit_difference: float | None = Field(
        None, description="The logit minus the weighted logits of the contrast."
    )
    method: str
    layer: str | list[str] | None
    correction: Literal["libra"] | None = Field(
        None, description="The rules of the gradients, if not the model's own."
    )
    range: tuple[float, float]
    flags: list[str]
    cost: Cost
    heatmap: Encoded | None = None
    overlay: Encoded | None = None
    grid: Grid | None = None
    regions: Regions | None = None
    verify: Verification | None = None


class ImageInfo(BaseModel):
    """The decoded upright image: EXIF orientation is applied, sha256 is of the upload."""

    width: int
    height: int
    format: str
    sha256: str


class ImageFailure(BaseModel):
    """Why one image of several failed."""

    code: str
    detail: str
    status: int


class Change(BaseModel):
    """The change of an explained class: the value with the part hidden minus without."""

    class_id: int
    label: str
    score: float
    logit: float
    score_change: float
    logit_change: float


class Masked(BaseModel):
    """The result for the image with `mask` hidden."""

    predictions: list[Prediction]
    changes: list[Change]
    explanations: list[Explanation]


class Result(BaseModel):
    """The result for one image; if it failed, only `error`.

    `seen` is the part of the source that the model saw: x, y, w, h in upright source pixels.
    """

    image: ImageInfo | None = None
    seen: Rect | None = None
    predictions: list[Prediction] | None = None
    uncertainty: Uncertainty | None = Field(
        None, description="With `uncertainty`: margin and entropy of all classes."
    )
    explanations: list[Explanation] | None = None
    activations: list[Activation] | None = None
    masked: Masked | None = None
    precision: Literal["bf16", "int8"] | None = Field(
        None, description="Precision of the computation, if it is not float32."
    )
    error: ImageFailure | None = None


class ModelVersion(BaseModel):
    """The model that was used; `version` is the first 12 digits of its weights' sha256."""

    name: str
    version: str


class Timing(BaseModel):
    """Milliseconds by stage; of several images, the sum of each stage. Also in Server-Timing."""

    decode: float = 0
    queue: float = 0
    inference: float = 0
    render: float = 0
    total: float = 0


class Answer(BaseModel):
    """One result per image, in the order they were sent."""

    id: str = Field(description="The request id, also in the header X-Request-ID.")
    model: ModelVersion
    results: list[Result]
    timing_ms: Timing


class EditControl(BaseModel):
    """The change of the logit in the controls: the same edit at other places of the same size.

    `smaller` is how many of the `n` controls changed the logit less than the edit itself, in
    absolute value. Without controls, `mean`, `low` and `high` are null. Of a box or a region all
    this is the change of the score, and `score_changes` has that of each control.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    smaller: int
    logit_changes: list[float] = Field(default_factory=list, description="Of each control.")
    score_changes: list[float] | None = Field(
        None, description="Of each control, of a box or a region."
    )


class EditChange(Change):
    """The change of one class: the value with the edit minus without.

    Of a detector it is one of a box: `score` is that of the best detection of the class whose IoU
    with the box is .5 or more, and 0 where there is none. Of a segmenter it is one of a region:
    `score` is the mean probability of the class over its pixels. `logit` is log s − log(1 − s).
    """

    detection: int | None = Field(
        None, description="Position of the box among the detections of the unedited image."
    )
    box: Rect | None = Field(
        None, description="The box in the unedited image, x, y, w, h in upright source pixels."
    )
    overlap: float | None = Field(
        None,
        description="Of a box, the IoU with the detection that is left of it; of a region, the "
        "share of its pixels that keeps the class; 0..1.",
    )
    stays: bool | None = Field(
        None,
        description="Whether a detection of `min_score` or more is left of a box, or half of a "
        "region's pixels keep the class.",
    )
    control: EditControl | None = Field(
        None, description="Null if the edit has no place, such as `flip`."
    )


class EditResult(BaseModel):
    """One edit of one image. `control` is that of the first of `changes`."""

    name: str
    edit: str
    predictions: list[Prediction] | None = None
    changes: list[EditChange] | None = None
    channels: list[int] | None = Field(None, description="The channels that were set.")
    explanation: Explanation | None = Field(
        None, description="The map with the gradient changed, of an edit `gradient`."
    )
    control: EditControl | None = None
    error: ImageFailure | None = Field(
        None, description="Why this edit failed, for instance because its other image did."
    )


class ExperimentResult(BaseModel):
    """The result for one image; `predictions` are of the unedited image."""

    image: ImageInfo | None = None
    seen: Rect | None = None
    predictions: list[Prediction] | None = None
    edits: list[EditResult] | None = None
    precision: Literal["bf16", "int8"] | None = Field(
        None, description="Precision of the computation, if it is not float32."
    )
    forwards: float | None = Field(
        None, description="The price of the experiment, in forward passes for this image."
    )
    error: ImageFailure | None = None


class ExperimentAnswer(BaseModel):
    """One result per image, in the order they were sent."""

    id: str = Field(description="The request id, also in the header X-Request-ID.")
    model: ModelVersion
    results: list[ExperimentResult]
    timing_ms: Timing


class Problem(BaseModel):
    """An `application/problem+json` body."""

    type: str = "about:blank"
    title: str
    status: int
    code: str = Field(description="Stable, snake_case; switch on this.")
    detail: str = Field(description="What is wrong and what to do.")
    request_id: str
