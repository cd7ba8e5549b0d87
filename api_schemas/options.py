"""The options of a request: query parameters for multipart and raw bodies, fields for JSON."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, Self

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

Method = Literal[
    "gradcam",
    "gradcampp",
    "hirescam",
    "layercam",
    "xgradcam",
    "eigencam",
    "cam",
    "scorecam",
    "ablationcam",
    "guided_backprop",
    "guided_gradcam",
    "input_gradient",
    "integrated_gradients",
    "expected_gradients",
    "occlusion",
    "rise",
    "attention_rollout",
    "gae",
]
Task = Literal["classification", "detection", "segmentation"]
Of = Literal["class", "x1", "y1", "x2", "y2"]
Fit = Literal["crop", "squash", "pad"]
Verify = Literal["false", "true", "search"]
Correction = Literal["none", "libra"]
Include = Literal["heatmap", "overlay", "grid", "regions", "none"]
Size = Literal["source", "model", "native"]
OverlayFormat = Literal["jpeg", "png", "webp"]
Colormap = Literal[
    "turbo",
    "jet",
    "viridis",
    "inferno",
    "magma",
    "plasma",
    "cividis",
    "hot",
    "bone",
    "gray",
    "bwr",
]
ActivationForm = Literal["stats", "channels", "image", "array"]
ActivationKind = Literal["output", "input", "grad_output", "grad_input"]
LayerPath = Annotated[str, Field(min_length=1, max_length=500)]
Box = tuple[float, float, float, float]


MAX_WILDCARDS = 16
"""Maximum number of wildcards in one pattern of `activations`: runs of `*`, and `?`."""

MAX_MASK_QUOTES = 100
"""Maximum number of quotation marks in the text of a mask; checked before it is parsed."""

MAX_PATTERN_CHARACTERS = 2000
"""Maximum length of all patterns with wildcards in one request: matching a layer takes time in
proportion to it."""


def _few_wildcards(patterns: list[str]) -> list[str]:
    """Return the patterns. Raises ValueError for patterns that would take long to match."""
    globs = [pattern for pattern in patterns if "*" in pattern or "?" in pattern]
    for pattern in globs:
        if pattern.replace("**", "*").count("*") + pattern.count("?") > MAX_WILDCARDS:
            raise ValueError(
                f"a pattern has at most {MAX_WILDCARDS} wildcards, not as many as {pattern!r}"
            )
    if sum(map(len, globs)) > MAX_PATTERN_CHARACTERS:
        raise ValueError(
            f"patterns with wildcards have at most {MAX_PATTERN_CHARACTERS} characters together; "
            "name fewer, or use `**`"
        )
    return patterns


def _text(value: object) -> object:
    """Return a class id that JSON gives as a number, `"targets": [281]`, as `id:281`."""
    return f"id:{value}" if isinstance(value, int) and not isinstance(value, bool) else value


Target = Annotated[str, Field(min_length=1, max_length=200), BeforeValidator(_text)]


Place = Annotated[str, Field(min_length=1, max_length=1_000_000)]
"""A point, a box or a mask in `at`, as text."""

ContrastWeight = Annotated[float, Field(ge=0, le=100)]


def _listed(value: object) -> object:
    """Return one value as a list: a JSON request may give it alone."""
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _place_text(value: object) -> object:
    """A place that a JSON request gives as numbers or an object as text."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else value


def _places(value: object) -> object:
    """Several places as a list of texts; a JSON request may give one alone, as numbers."""
    if isinstance(value, (list, tuple)) and any(isinstance(each, (int, float)) for each in value):
        value = [value]
    return (
        [_place_text(each) for each in value]
        if isinstance(value, (list, tuple))
        else ([] if value is None else [_place_text(value)])
    )


class RunLengths(BaseModel):
    """A mask as COCO run-length encoding: size is [height, width], counts compressed or plain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[int, int]
    counts: str | Annotated[list[int], Field(fail_fast=True)]


def _place(text: str) -> tuple[float, ...] | RunLengths:
    """A point, a box or a mask. Raises ValueError for anything else."""
    if text.lstrip().startswith("{"):
        try:
            return RunLengths.model_validate_json(text)
        except ValueError as error:
            raise ValueError('a mask in `at` is {"size": [h, w], "counts": …}') from error
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in {2, 4} or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"`at` is a point x,y or a box x,y,w,h in source pixels, not {text[:80]!r}"
        )
    if len(numbers) == 4 and min(numbers[2:]) <= 0:
        raise ValueError(f"the box {text[:80]!r} in `at` has no width or no height")
    return numbers


class Mask(BaseModel):
    """A part of the image to hide, in upright source pixels: one of `rle` and `boxes`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rle: RunLengths | None = None
    boxes: Annotated[list[Box], Field(fail_fast=True)] | None = Field(
        None, max_length=1000, description="x, y, w, h of each."
    )
    fill: Literal["mean", "blur", "grey"] = "mean"
    hide: Literal["region", "rest"] = "region"

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.rle is None) == (self.boxes is None):
            raise ValueError("give either `rle` or `boxes`")
        return self


def _switch(value: object) -> object:
    """A JSON request may give true or false; everywhere else they are words."""
    return str(value).lower() if isinstance(value, bool) else value


def _json_text(value: object) -> object:
    """Return a mask that a JSON request gives as an object as JSON text."""
    return json.dumps(value) if isinstance(value, dict) else value


class CommonOptions(BaseModel):
    """Options of both `/explain` and `/predict`. An unknown option is an error.

    `min_score` is for models that detect, `uncertainty` for models that classify; others refuse
    them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None, max_length=200, description="A name from /models; default: the first model."
    )
    top_k: int = Field(
        5,
        ge=1,
        le=1000,
        description="Number of predictions to list; of detections, the default is 100.",
    )
    min_score: float | None = Field(
        None, ge=0, le=1, description="Lowest score of a detection that is listed; default 0.5."
    )
    uncertainty: bool = Field(
        False,
        description="Adds `margin` and `entropy` of the probabilities of all classes: how "
        "undecided the model is.",
    )
    fit: Fit | None = Field(
        None,
        description="How the image is fitted to the model input: `crop` is a center crop, `squash` "
        "ignores the aspect ratio, `pad` keeps the whole image; default: as in training. Detectors "
        "take the whole image and refuse it.",
    )
    activations: Annotated[
        list[LayerPath], Field(fail_fast=True), AfterValidator(_few_wildcards)
    ] = Field(
        [],
        max_length=100,
        description="Layers to capture, by dotted path or glob: `*` and `?` stop at a dot, `**` "
        "crosses it, `type:Conv2d` matches classes. At most 16 wildcards in a pattern, and 2,000 "
        "characters in all patterns.",
    )
    activation_as: list[ActivationForm] = Field(
        ["stats"],
        min_length=1,
        max_length=16,
        description="`stats`: five numbers, `channels`: mean and maximum of each channel, `image`: "
        "a PNG grid of the channels, `array`: float16 (gradients float32).",
    )


class PredictOptions(CommonOptions):
    """Options of `/predict`."""

    activation_kind: Literal["output", "input"] = Field(
        "output", description="What is captured of a layer."
    )


class ExplainOptions(CommonOptions):
    """Options of `/explain`."""

    activation_kind: ActivationKind = Field(
        "output",
        description="What is captured of a layer; gradients are those of the target's logit.",
    )
    targets: list[Target] = Field(
        [],
        max_length=100,
        description="Classes to explain, by id or exact label; only digits is an id. `id:3` and "
        "`label:3` are explicit. Default: the top-1 prediction.",
    )
    explain_top: int = Field(
        1,
        ge=1,
        le=100,
        description="Explain the top n predictions. Of a detector: the n best boxes, of `targets` "
        "if there are any; of a segmenter: the n largest regions but the background.",
    )
    at: Annotated[list[Place], BeforeValidator(_places)] = Field(
        [],
        max_length=100,
        description="Boxes to explain, each as x,y,w,h or a point x,y in source pixels: the "
        "detection with the largest overlap (IoU of .5 at least), or the best one around the "
        "point. Of a segmenter: the region at the point, or the box or RLE to sum over.",
    )
    of: Of = Field(
        "class",
        description="What of a detection is explained: its `class`, or the position of an edge "
        "of its box in the image, `x1`, `y1`, `x2` or `y2`.",
    )
    contrast: Annotated[list[Target], BeforeValidator(_listed)] = Field(
        [],
        max_length=16,
        description="Explain each target minus this class: why A rather than B. Several classes, "
        "or `nearest:3` for the three with the nearest logits, are weighted by their "
        "probabilities (Finer-CAM).",
    )
    contrast_weight: Annotated[list[ContrastWeight], BeforeValidator(_listed)] = Field(
        [],
        max_length=16,
        description="The weight of each class of `contrast`; default: their probabilities among "
        "each other, 1 for one class.",
    )
    method: Method = Field(
        "gradcam",
        description="How the map is computed. Default: `gradcam` of classifiers, `hirescam` of "
        "detectors and segmenters.",
    )
    layer: list[LayerPath] = Field(
        [],
        max_length=16,
        description="Target layer by dotted path; several are fused. "
        "Default: the model's target_layer; of a detector, the level of the feature pyramid that "
        "the box comes from.",
    )
    include: list[Include] = Field(
        ["heatmap"],
        min_length=1,
        max_length=16,
        description="What to return: `heatmap` (indexed PNG), `overlay` (image and map), `grid` "
        "(the map itself, float32), `regions` (mask, boxes, polygons, peak); `none` for numbers "
        "only.",
    )
    threshold: float = Field(0.5, ge=0, le=1, description="Map level at which `regions` are cut.")
    samples: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="Number of masks of `rise` (default 1,000) or of baselines of "
        "`expected_gradients` (default 100).",
    )
    steps: int = Field(50, ge=1, le=1000, description="Number of steps of `integrated_gradients`.")
    seed: int = Field(0, ge=0, lt=1 << 63, description="Random seed; it determines the map.")
    correction: Correction = Field(
        "none",
        description="`libra`: gradients of a transformer by the rules of LibraGrad, for "
        "`input_gradient` and the methods from gradients at a layer; experimental.",
    )
    verify: Annotated[Verify, BeforeValidator(_switch)] = Field(
        "false",
        description="`true`: test each map with 40 further forward passes and add the verdict; "
        "`search`: where it is inconclusive, try maps of earlier, finer layers, too.",
    )
    size: Size = Field(
        "source",
        description="Pixel grid of the images: the upright `source`, the part that the `model` "
        "received at its input size, or `native`, one pixel per grid cell.",
    )
    colormap: Colormap = Field(
        "turbo",
        description="Colors of heatmap and overlay. `bwr` keeps the sign: blue is against the "
        "class, white no evidence, red for it; all others show the absolute value.",
    )
    format: OverlayFormat = Field("jpeg", description="Encoding of the overlay.")
    opacity: float = Field(0.5, ge=0, le=1, description="Opacity of the colors in the overlay.")
    mask: Annotated[str | None, BeforeValidator(_json_text)] = Field(
        None,
        max_length=1_000_000,
        description='JSON text: {"rle"|"boxes": …, "fill": "mean"|"blur"|"grey", "hide": "region"|'
        '"rest"}, in source pixels. Adds the result for the image with that part hidden.',
    )

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if self.contrast_weight and len(self.contrast_weight) != len(self.contrast):
            raise ValueError(
                f"`contrast_weight` has {len(self.contrast_weight)} numbers and `contrast` "
                f"{len(self.contrast)} classes; give one number for each class, or none"
            )
        if "none" in self.include and len(self.include) > 1:
            raise ValueError("`include=none` stands alone; leave out the other values or `none`")
        several = len(self.targets) > 1 or self.explain_top > 1
        if self.activations and self.activation_kind.startswith("grad") and several:
            raise ValueError("gradients are captured for exactly one target; name one")
        if self.mask is not None:
            self.hidden()
        self.places()
        return self

    def places(self) -> list[tuple[float, ...] | RunLengths]:
        """Return `at`: points (x, y), boxes (x, y, w, h) and masks. Raises ValueError."""
        return [_place(text) for text in self.at]

    def hidden(self) -> Mask | None:
        """Return the parsed mask. Raises ValueError for an invalid one."""
        if self.mask is None:
            return None
        if self.mask.count('"') > MAX_MASK_QUOTES:
            raise ValueError("`mask` has more names than `rle`, `boxes`, `fill` and `hide`")
        try:
            mask: Any = json.loads(self.mask)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`mask` is not JSON: {error}") from error
        if not isinstance(mask, dict):
            raise ValueError('`mask` is an object, such as {"boxes": [[x, y, w, h]]}')  # noqa: TRY004 - pydantic reports ValueErrors
        return Mask.model_validate(mask)


class ImageSource(BaseModel):
    """One image of a JSON request: base64 (or a data: URI) in `data`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = Field(None, description="Base64 of the image file, or a data: URI.")
    url: str | None = Field(None, description="Off until hosts are allowed by configuration.")


class PredictRequest(PredictOptions):
    """The JSON form of `POST /predict`."""

    images: Annotated[list[ImageSource], Field(fail_fast=True)] = Field(min_length=1)


class ExplainRequest(ExplainOptions):
    """The JSON form of `POST /explain`."""

    images: Annotated[list[ImageSource], Field(fail_fast=True)] = Field(min_length=1)


# ---- experiments

MAX_EDITS = 32
MAX_CONTROLS = 64
MAX_CHANNELS = 4096
"""Bounds of one experiment: channels are those of one edit, named or `top`."""

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


def _channel(value: object) -> str:
    """A channel as text; JSON may give a number. Raises ValueError."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str):
        numbers = text.split("-", 2)
        plain = all(each.isascii() and each.isdecimal() and len(each) < 6 for each in numbers)
        if text == "*" or (plain and len(numbers) < 3):
            return text
    raise ValueError('a channel is a number, a range such as "3-7", or "*" for all')


_CHANNEL_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": 99_999},
        {"type": "string", "pattern": "^([*]|[0-9]{1,5}(-[0-9]{1,5})?)$"},
    ]
}
ChannelNumbers = Annotated[str, BeforeValidator(_channel), WithJsonSchema(_CHANNEL_SCHEMA)]
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
    at: Annotated[list[Place], BeforeValidator(_places)] = Field(
        [],
        max_length=100,
        description="Boxes or regions whose changes are listed, each as x,y,w,h or a point x,y in "
        "source pixels, as in /explain; for models that detect or segment. Default: the best "
        "detection of each of `targets`, or of all; the largest region.",
    )
    min_score: float | None = Field(
        None, ge=0, le=1, description="Lowest score of a detection, default 0.5, as in /explain."
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

    @model_validator(mode="after")
    def _readable(self) -> Self:
        self.places()
        return self

    def places(self) -> list[tuple[float, ...] | RunLengths]:
        """Return `at`: points (x, y), boxes (x, y, w, h) and masks. Raises ValueError."""
        return [_place(text) for text in self.at]


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
