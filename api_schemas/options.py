"""The options of a request: query parameters for multipart and raw bodies, fields for JSON."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Method = Literal["gradcam"]
Fit = Literal["crop", "squash", "pad"]
Include = Literal["heatmap", "overlay", "grid", "none"]
Size = Literal["source", "model", "native"]
OverlayFormat = Literal["jpeg", "png", "webp"]
Colormap = Literal[
    "turbo", "jet", "viridis", "inferno", "magma", "plasma", "cividis", "hot", "bone", "gray"
]
ActivationForm = Literal["stats", "image", "array"]
Target = Annotated[str, Field(min_length=1, max_length=200)]
LayerPath = Annotated[str, Field(min_length=1, max_length=500)]


class PredictOptions(BaseModel):
    """Options of `/predict`; `/explain` takes them too. An unknown option is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description="A name from /models; default: the first model.")
    top_k: int = Field(5, ge=1, le=1000, description="How many predictions to list.")
    fit: Fit = Field(
        "crop",
        description="How the picture meets the model input: `crop` is the weights' own transform, "
        "`squash` resizes without keeping the aspect ratio, `pad` shows all of it.",
    )
    activations: list[LayerPath] = Field(
        [], max_length=100, description="Layers whose output is wanted, by dotted path."
    )
    activation_as: list[ActivationForm] = Field(
        ["stats"],
        min_length=1,
        description="`stats`: five numbers, `image`: a PNG grid of the channels, `array`: float16.",
    )


class ExplainOptions(PredictOptions):
    """Options of `/explain`."""

    targets: list[Target] = Field(
        [],
        max_length=100,
        description="Classes to explain, by id or exact label; all digits is an id. "
        "Default: the best prediction.",
    )
    explain_top: int = Field(1, ge=1, le=100, description="Explain the n best predictions.")
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
        description="What to send: `heatmap` (indexed PNG), `overlay` (photo and map), `grid` "
        "(the map itself, float32); `none` for numbers only.",
    )
    size: Size = Field(
        "source",
        description="Raster of the pictures: the upright `source`, the part that the `model` saw "
        "at its input size, or `native`, one pixel a grid cell.",
    )
    colormap: Colormap = Field("turbo", description="Colours of heatmap and overlay.")
    format: OverlayFormat = Field("jpeg", description="Encoding of the overlay.")
    opacity: float = Field(0.5, ge=0, le=1, description="Share of the colours in the overlay.")

    @field_validator("targets", mode="before")
    @classmethod
    def _ids_may_be_numbers(cls, value: object) -> object:
        """JSON may give class ids as numbers: `"targets": [281]`."""
        if isinstance(value, list):
            return [
                str(item) if isinstance(item, int) and not isinstance(item, bool) else item
                for item in value
            ]
        return value

    @model_validator(mode="after")
    def _no_contradictions(self) -> ExplainOptions:
        if self.targets and self.explain_top > 1:
            raise ValueError("`targets` and `explain_top` exclude each other; give one of them")
        if "none" in self.include and len(self.include) > 1:
            raise ValueError("`include=none` stands alone; leave out the other values or `none`")
        return self


class ImageSource(BaseModel):
    """One image of a JSON request: base64 (or a data: URI) in `data`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = Field(None, description="Base64 of the image file, or a data: URI.")
    url: str | None = Field(None, description="Off until hosts are allowed by configuration.")


class PredictRequest(PredictOptions):
    """The JSON form of `POST /predict`."""

    images: list[ImageSource] = Field(min_length=1)


class ExplainRequest(ExplainOptions):
    """The JSON form of `POST /explain`."""

    images: list[ImageSource] = Field(min_length=1)
