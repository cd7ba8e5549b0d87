"""Requests of other programs' protocols: KServe V1, Open Inference V2, and labeling tools'.

Field names and shapes are the protocols'; what is free text or free form there is so here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Instances(BaseModel):
    """The body of V1's `:predict` and `:explain`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instances: list[Any] | None = Field(None, description="Images: base64 or nested numbers.")
    inputs: list[Any] | None = Field(None, description="Another name of `instances`.")
    parameters: dict[str, Any] = Field({}, description="Options of /explain, and `values`.")
    signature_name: str | None = Field(None, description="Sent by TensorFlow's clients; ignored.")


class InferInput(BaseModel):
    """A tensor of a V2 request; its values are in `data` or after the JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=200)
    shape: list[int] = Field(min_length=1, max_length=8, fail_fast=True)
    datatype: str = Field(max_length=20)
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = Field(None, description="Flat or nested, row-major.")


class RequestedOutput(BaseModel):
    """A tensor that a V2 request asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=200)
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    """The body of V2's `infer` and `explain`, or its JSON part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | None = Field(None, max_length=1000, description="Returned unchanged.")
    model_name: str | None = Field(
        None, description="Sent by KServe's client; ignored, the path is used."
    )
    parameters: dict[str, Any] | None = None
    inputs: list[InferInput] = Field(min_length=1, fail_fast=True)
    outputs: list[RequestedOutput] | None = Field(None, fail_fast=True)


class LabelingParameters(BaseModel):
    """The values of X-AnyLabeling's widgets; other fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    conf_threshold: float = Field(0.5, ge=0, le=1, description="Level at which a map is cut.")
    epsilon_factor: float = Field(
        0.001, ge=0, le=1, description="How much polygons are simplified."
    )
    current_task: str | None = Field(None, max_length=200)
    filter_classes: list[str] | None = Field(None, fail_fast=True)


class LabelingRequest(BaseModel):
    """The body of X-AnyLabeling's `/v1/predict`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str = Field(max_length=200)
    image: str = Field(description="A data: URI.")
    params: LabelingParameters = LabelingParameters()


class LabelStudioSetup(BaseModel):
    """The body of a Label Studio backend's `/setup`; its host and token are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    project: str = Field("", max_length=200)
    label_config: str = Field(alias="schema", max_length=1 << 20)
    extra_params: dict[str, Any] | str | None = Field(
        None, description="Options of /explain, and `labels`: classes to labels."
    )


class LabelStudioTask(BaseModel):
    """A task: the value of `$image` in its label_config is in `data`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: int | Annotated[str, Field(max_length=200)] | None = None
    data: dict[str, Any]


class LabelStudioContext(BaseModel):
    """The regions of the page after a click; the click is the last."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    result: list[dict[str, Any]] = Field([], fail_fast=True)


class LabelStudioParams(BaseModel):
    """`context` is null for a selection of tasks."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    context: LabelStudioContext | None = None


class LabelStudioRequest(BaseModel):
    """The body of a Label Studio backend's `/predict`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    tasks: list[LabelStudioTask] = Field(fail_fast=True)
    project: str = Field("", max_length=200)
    label_config: str = Field(max_length=1 << 20)
    params: LabelStudioParams = LabelStudioParams()
