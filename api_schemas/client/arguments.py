"""The options of a client's calls, for editors and type checkers; see `api_schemas.options`.

An option for a list also takes a single value. A test compares the names with the service's.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from api_schemas.options import (
    ActivationForm,
    Colormap,
    Correction,
    Fit,
    Include,
    Mask,
    Method,
    Of,
    OverlayFormat,
    RunLengths,
    Size,
    Verify,
)

Place = tuple[float, float] | tuple[float, float, float, float] | dict[str, Any] | RunLengths


class _Common(TypedDict, total=False):
    model: str
    top_k: int
    min_score: float
    uncertainty: bool
    fit: Fit
    activations: str | list[str]
    activation_as: ActivationForm | list[ActivationForm]


class PredictArguments(_Common, total=False):
    """Options of `predict`."""

    activation_kind: Literal["output", "input"]


class ExplainArguments(_Common, total=False):
    """Options of `explain` and `explain_many`."""

    activation_kind: Literal["output", "input", "grad_output", "grad_input"]
    targets: int | str | list[int | str]
    explain_top: int
    at: str | Place | list[str | Place]
    of: Of
    contrast: int | str | list[int | str]
    contrast_weight: float | list[float]
    method: Method
    layer: str | list[str]
    include: Include | list[Include]
    threshold: float
    samples: int
    steps: int
    seed: int
    correction: Correction
    verify: Verify | bool
    size: Size
    colormap: Colormap
    format: OverlayFormat
    opacity: float
    mask: str | dict[str, Any] | Mask


class ExperimentArguments(TypedDict, total=False):
    """Of `experiments`."""

    model: str
    targets: int | str | list[int | str]
    at: str | Place | list[str | Place]
    min_score: float
    top_k: int
    fit: Fit
    controls: int
    seed: int
