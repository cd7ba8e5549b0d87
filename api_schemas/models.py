"""The wire form of models: the responses of `/models` and of the health probes.

A class that shares its name with one of `service` is its wire form.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class InputSize(BaseModel):
    """The model input in pixels, and the shorter side that an image is resized to before it."""

    width: int
    height: int
    resize: int | list[int] = Field(
        description="The shorter side before the crop, or the [height, width] to cover."
    )
    fit: str = Field("crop", description="How images are fitted by default.")
    mean: list[float]
    std: list[float]
    interpolation: str
    channels: int = Field(3, description="3: RGB; 1: gray; any other number: that of TIFF pages.")


class Lane(BaseModel):
    """A way to run the model.

    `precision` is its numeric precision; `reason` says why it is off or has another precision.
    """

    name: str
    ready: bool
    reason: str | None = None
    precision: str | None = None


class Probe(BaseModel):
    """The result of one probe when the model was loaded.

    `passed` is false if the model is served with a restriction; `follows` describes the
    restriction, or what to consider.
    """

    name: str = Field(
        description="isolation, batch, determinism, output, gradients, places or input."
    )
    passed: bool
    result: str
    follows: str | None = None


class Sensitivity(BaseModel):
    """How alike the maps of a method stay when weights of the model are randomised.

    Rank correlations of absolute maps, −1..1, at the default target layer; null: not measured when
    the model was loaded (`camserve check --sensitivity` measures every method).
    """

    method: str
    head: float | None = Field(description="The last layer with weights is randomised.")
    half: float | None = Field(description="The last half of the model's operations is.")
    all: float | None = Field(description="All weights are.")
    weights_hardly_matter: bool | None = Field(
        description="Whether `half` or `all` is .6 or more: the map shows the image, not what the "
        "model has learned. Its explanations carry the flag `weights_hardly_matter`."
    )


class Model(BaseModel):
    """A model of the service. Fields that are unknown before loading are absent until then."""

    name: str
    builder: str
    state: str = Field(description="loading, ready, failed or unloaded.")
    reason: str | None = Field(None, description="Why it failed, is not loaded or not the newest.")
    progress: str | None = Field(None, description="The current step while it loads.")
    default: bool
    version: str | None = Field(None, description="First 12 digits of the weights' sha256.")
    classes: int | None = None
    input: InputSize | None = None
    transform: str | None = Field(None, description="How images are preprocessed, and the source.")
    task: Literal["classification", "detection", "segmentation"] | None = Field(
        None, description="What the model predicts: classes, boxes, or a class for each pixel."
    )
    target_layer: str | None = None
    lanes: list[Lane] | None = None
    random_weights: bool | None = None
    replicas: int | None = None
    stateful: list[str] | None = Field(
        None,
        description="What the model changes in each forward pass; restored after each request.",
    )


class ModelMethod(BaseModel):
    """A method; `reason` says why it cannot run at the default target layer, null if it can."""

    name: str
    reason: str | None


class ModelDetails(Model):
    """A model with its labels, in order of class id, and the results of its probes."""

    knows: str | None = Field(
        None, description="Its classes in a few words: `5 flowers: daisy, …`, `1,000 classes`."
    )
    labels: list[str] | None = None
    methods: list[ModelMethod] | None = None
    probes: list[Probe] | None = None
    sensitivity: list[Sensitivity] | None = Field(
        None, description="How much the maps of each method depend on the weights."
    )


class Models(BaseModel):
    """All served models; the first is the default."""

    models: list[Model]


class Layer(BaseModel):
    """A module of a model; `shape` is its output's for one image, null if that is not a tensor."""

    path: str
    type: str
    shape: list[int] | None
    parameters: int
    target: bool = Field(description="Whether it can be the `layer` of an explanation.")
    kernels: bool = Field(False, description="Whether its weights can be drawn as `kernels`.")


class Layers(BaseModel):
    """Every module in definition order."""

    layers: list[Layer]


class Health(BaseModel):
    """The response of a health probe."""

    status: str
    states: dict[str, str] = Field(
        {}, description="Models that are not served, or not in their newest version."
    )
    reasons: dict[str, str] = Field(
        {}, description="The reasons; only in the response to a request with an API key."
    )
