"""What `POST /experiments` takes and answers: named edits of an image or of the model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from api_schemas.answers import (
    Change,
    Explanation,
    ImageFailure,
    ImageInfo,
    ModelVersion,
    Prediction,
    Rect,
    Timing,
)
from api_schemas.options import (
    Box,
    Colormap,
    Fit,
    ImageSource,
    LayerPath,
    Method,
    RunLengths,
    Size,
    Target,
)

MAX_EDITS = 32
MAX_CONTROLS = 64
MAX_CHANNELS = 4096

Fill = Literal["mean", "blur", "grey"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _kind(value: object) -> str | None:
    """Which form of a value that is a word or an object named by a field; None for neither."""
    if isinstance(value, dict):
        return next((name for name in _NAMED if name in value), None)
    if isinstance(value, _Part):
        return next(iter(type(value).model_fields))
    return "value"


_NAMED = ("image", "hue", "scale", "clip", "top")


def _forms(accepted: str) -> Discriminator:
    """Tells a word from an object by its field; `accepted` is what the error says."""
    return Discriminator(
        _kind, custom_error_type="unknown_form", custom_error_message=f"give {accepted}"
    )


class FromImage(_Part):
    """Another image of the request, by its place, from 0."""

    image: int = Field(ge=0, le=1000)


class ByFactor(_Part):
    """Multiplied by a number."""

    scale: float = Field(ge=-1000, le=1000)


class Clipped(_Part):
    """Cut at this absolute value."""

    clip: float = Field(ge=0, le=1e6)


class Hue(_Part):
    """Hues turned by so many degrees."""

    hue: float = Field(ge=-360, le=360)


FillOrImage = Annotated[
    Annotated[Fill, Tag("value")] | Annotated[FromImage, Tag("image")],
    _forms('"mean", "blur", "grey" or {"image": 1}'),
]


class Region(_Part):
    """A part of an image, in upright source pixels: one of `boxes`, `rle` and `of`.

    `of` is what the map of a class marks: the part at or above `threshold` of its maximum.
    """

    boxes: Annotated[list[Box], Field(fail_fast=True)] | None = Field(
        None, max_length=1000, description="x, y, w, h of each."
    )
    rle: RunLengths | None = None
    of: Target | None = Field(None, description="A class, by id or exact label.")
    threshold: float = Field(0.5, ge=0, le=1)
    method: Method = "gradcam"
    layer: LayerPath | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(each is not None for each in (self.boxes, self.rle, self.of)) != 1:
            raise ValueError("give one of `boxes`, `rle` and `of`")
        if self.of is None and self.model_fields_set & {"threshold", "method", "layer"}:
            raise ValueError("`threshold`, `method` and `layer` belong to `of`")
        return self


class _Edit(_Part):
    name: str = Field(min_length=1, max_length=100, description="Unique in the request.")


class Hide(_Edit):
    """The region replaced by a fill, or by the same part of another image."""

    edit: Literal["hide"]
    region: Region
    fill: FillOrImage = "mean"


class Keep(_Edit):
    """Everything outside the region replaced by a fill, or from another image."""

    edit: Literal["keep"]
    region: Region
    fill: FillOrImage = "mean"


class Background(_Edit):
    """Everything outside the region from another image, stretched to this one's size."""

    edit: Literal["background"]
    region: Region
    image: int = Field(ge=0, le=1000)


class Paste(_Edit):
    """A region of another image, pasted pixel by pixel.

    `region` is in pixels of `image`. `at` is where the upper left corner of its bounding box lies
    in this image; the default is the same place.
    """

    edit: Literal["paste"]
    image: int = Field(ge=0, le=1000)
    region: Region
    at: (
        tuple[
            Annotated[int, Field(ge=-100_000, le=100_000)],
            Annotated[int, Field(ge=-100_000, le=100_000)],
        ]
        | None
    ) = None


class Recolour(_Edit):
    """Other colors: `grey`, the channels in another order such as `bgr`, or hues turned."""

    edit: Literal["recolour"]
    to: Annotated[
        Annotated[Literal["grey", "rgb", "rbg", "grb", "gbr", "brg", "bgr"], Tag("value")]
        | Annotated[Hue, Tag("hue")],
        _forms('"grey", an order such as "bgr", or {"hue": 90}'),
    ]
    region: Region | None = Field(None, description="Default: the whole image.")


class Shift(_Edit):
    """The whole image moved by source pixels, to the right and down."""

    edit: Literal["shift"]
    x: int = Field(0, ge=-100_000, le=100_000)
    y: int = Field(0, ge=-100_000, le=100_000)
    fill: Fill = Field("mean", description="What is shown where nothing is left.")


class Flip(_Edit):
    """The whole image mirrored."""

    edit: Literal["flip"]
    axis: Literal["horizontal", "vertical"] = Field(
        "horizontal", description="`horizontal` swaps left and right."
    )


class Scale(_Edit):
    """The whole image enlarged or reduced about its center; its size stays."""

    edit: Literal["scale"]
    factor: float = Field(ge=0.05, le=20)
    fill: Fill = Field("mean", description="What is shown around a reduced image.")


class Top(_Part):
    """The channels that contribute most to a class: gradient × activation, summed over places."""

    top: int = Field(ge=1, le=MAX_CHANNELS)
    of: Target | None = Field(None, description="Default: the first target.")


def _digits(value: object) -> object:
    """JSON may give a channel as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_CHANNELS = r"^(\*|[0-9]{1,5}(-[0-9]{1,5})?)$"
_CHANNELS_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _CHANNELS}]
}
ChannelNumbers = Annotated[
    str,
    BeforeValidator(_digits),
    Field(pattern=_CHANNELS),
    WithJsonSchema(_CHANNELS_SCHEMA),
]
"""A channel's number, a range such as `3-7`, or `*` for all."""


class Channels(_Edit):
    """Channels of a layer's output set to something else, for the whole image.

    `set`: `zero`, the channel's own `mean`, `noise` of the channel's own mean and deviation,
    multiplied by `{"scale": 0.5}`, or as they are for another image of the request,
    `{"image": 1}`. Controls are as many other channels of the layer.
    """

    edit: Literal["channels"]
    layer: LayerPath
    channels: Annotated[
        Annotated[
            list[ChannelNumbers],
            Field(fail_fast=True, min_length=1, max_length=MAX_CHANNELS),
            Tag("value"),
        ]
        | Annotated[Top, Tag("top")],
        _forms('a list of numbers and ranges, such as [3, "7-9"], or {"top": 10}'),
    ]
    set: Annotated[
        Annotated[Literal["zero", "mean", "noise"], Tag("value")]
        | Annotated[ByFactor, Tag("scale")]
        | Annotated[FromImage, Tag("image")],
        _forms('"zero", "mean", "noise", {"scale": 0.5} or {"image": 1}'),
    ] = "zero"


class GradientMap(_Part):
    """The map that is drawn with the gradient changed: options of `/explain`."""

    target: Target | None = Field(None, description="Default: the first target.")
    method: Method = "gradcam"
    layer: LayerPath | None = None
    include: list[Literal["heatmap", "grid", "regions", "none"]] = Field(
        ["heatmap"], min_length=1, max_length=4
    )
    threshold: float = Field(0.5, ge=0, le=1)
    size: Size = "source"
    colormap: Colormap = "turbo"
    steps: int = Field(50, ge=1, le=1000)


class Gradient(_Edit):
    """The gradient at a layer's output changed on its way back; the map changes, the scores do not.

    `set`: `zero`, multiplied by `{"scale": 0.5}`, or cut at `{"clip": 0.01}`.
    """

    edit: Literal["gradient"]
    layer: LayerPath
    set: Annotated[
        Annotated[Literal["zero"], Tag("value")]
        | Annotated[ByFactor, Tag("scale")]
        | Annotated[Clipped, Tag("clip")],
        _forms('"zero", {"scale": 0.5} or {"clip": 0.01}'),
    ]
    explain: GradientMap = GradientMap()


Edit = Annotated[
    Hide | Keep | Background | Paste | Recolour | Shift | Flip | Scale | Channels | Gradient,
    Field(discriminator="edit"),
]


class ExperimentOptions(_Part):
    """Options of `/experiments`: query parameters of a form, fields of JSON."""

    model: str | None = Field(
        None, max_length=200, description="A name from /models; default: the first model."
    )
    targets: list[Target] = Field(
        [],
        max_length=100,
        description="Classes whose changes are listed, by id or exact label. Default: the top-1 "
        "prediction of each unedited image.",
    )
    top_k: int = Field(5, ge=1, le=1000, description="Number of predictions to list.")
    fit: Fit | None = Field(
        None, description="How the image is fitted to the model input, as in /explain."
    )
    controls: int = Field(
        8, ge=0, le=MAX_CONTROLS, description="Other places at which each edit is repeated."
    )
    seed: int = Field(
        0, ge=0, lt=1 << 63, description="Random seed of the controls' places and of noise."
    )


def _unique(edits: list[Edit]) -> list[Edit]:
    """Raises ValueError where two edits have one name."""
    seen: set[str] = set()
    for edit in edits:
        if edit.name in seen:
            raise ValueError(f"two edits have the name {edit.name!r}; give each its own")
        seen.add(edit.name)
    return edits


EditList = Annotated[
    list[Edit],
    Field(fail_fast=True, min_length=1, max_length=MAX_EDITS),
    AfterValidator(_unique),
]

EDITS: TypeAdapter[list[Edit]] = TypeAdapter(EditList)
"""Reads the part `edits` of a form, a JSON list."""


class ExperimentRequest(ExperimentOptions):
    """The JSON form of `POST /experiments`."""

    images: Annotated[list[ImageSource], Field(fail_fast=True)] = Field(min_length=1)
    edits: EditList = Field(description="What is changed, each by itself.")


class Control(BaseModel):
    """The change of the logit in the controls: the same edit at other places of the same size.

    `smaller` is how many of the `n` controls changed the logit less than the edit itself, in
    absolute value. Without controls, `mean`, `low` and `high` are null.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    smaller: int


class EditChange(Change):
    """The change of one class: the value with the edit minus without."""

    control: Control | None = Field(
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
    control: Control | None = None
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
