"""The options of a request: query parameters for multipart and raw bodies, fields for JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
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
    "occlusion",
    "rise",
    "attention_rollout",
]
Fit = Literal["crop", "squash", "pad"]
Verify = Literal["false", "true", "search"]
Include = Literal["heatmap", "overlay", "grid", "regions", "none"]
Size = Literal["source", "model", "native"]
OverlayFormat = Literal["jpeg", "png", "webp"]
Colormap = Literal[
    "turbo", "jet", "viridis", "inferno", "magma", "plasma", "cividis", "hot", "bone", "gray"
]
ActivationForm = Literal["stats", "image", "array"]
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


class RunLengths(BaseModel):
    """A mask as COCO run-length encoding: size is [height, width], counts compressed or plain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[int, int]
    counts: str | Annotated[list[int], Field(fail_fast=True)]


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
    """Options of both `/explain` and `/predict`. An unknown option is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None, max_length=200, description="A name from /models; default: the first model."
    )
    top_k: int = Field(5, ge=1, le=1000, description="Number of predictions to list.")
    fit: Fit | None = Field(
        None,
        description="How the image is fitted to the model input: `crop` is a center crop, `squash` "
        "ignores the aspect ratio, `pad` keeps the whole image; default: as in training.",
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
        description="`stats`: five numbers, `image`: a PNG grid of the channels, `array`: float16 "
        "(gradients float32).",
    )


class PredictOptions(CommonOptions):
    """Options of `/predict`."""

    activation_kind: Literal["output", "input"] = Field(
        "output", description="What is captured of a layer."
    )


class ExplainOptions(CommonOptions):
    """Options of `/explain`."""

    activation_kind: Literal["output", "input", "grad_output", "grad_input"] = Field(
        "output",
        description="What is captured of a layer; gradients are those of the target's logit.",
    )
    targets: list[Target] = Field(
        [],
        max_length=100,
        description="Classes to explain, by id or exact label; only digits is an id. `id:3` and "
        "`label:3` are explicit. Default: the top-1 prediction.",
    )
    explain_top: int = Field(1, ge=1, le=100, description="Explain the top n predictions.")
    contrast: Target | None = Field(
        None, description="Explain each target minus this class: why A rather than B."
    )
    method: Method = Field("gradcam", description="How the map is computed.")
    layer: list[LayerPath] = Field(
        [],
        max_length=16,
        description="Target layer by dotted path; several are fused. "
        "Default: the model's target_layer.",
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
    samples: int = Field(1000, ge=1, le=100_000, description="Number of masks of `rise`.")
    steps: int = Field(50, ge=1, le=1000, description="Number of steps of `integrated_gradients`.")
    seed: int = Field(0, ge=0, lt=1 << 63, description="Random seed; it determines the map.")
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
    colormap: Colormap = Field("turbo", description="Colors of heatmap and overlay.")
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
        if self.targets and self.explain_top > 1:
            raise ValueError("`targets` and `explain_top` exclude each other; give one of them")
        if "none" in self.include and len(self.include) > 1:
            raise ValueError("`include=none` stands alone; leave out the other values or `none`")
        several = len(self.targets) > 1 or self.explain_top > 1
        if self.activations and self.activation_kind.startswith("grad") and several:
            raise ValueError("gradients are captured for exactly one target; name one")
        if self.mask is not None:
            self.hidden()
        return self

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
