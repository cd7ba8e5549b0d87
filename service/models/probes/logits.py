"""Find the logits in the output of a model, and undo an output activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from service.models.catalog import Select

OutputActivation = Literal["softmax", "sigmoid", "log_softmax"]
"""An activation inside the model: it returns probabilities or their logarithms."""

SMALLEST = 1e-7
"""Smallest distance of probabilities from 0 and 1 before the logarithm: the resolution of float32
just below 1."""


def logits_in(output: Any, select: Select) -> Tensor:
    """The logits, float32, of a model's output: the output, or the element that `select` names.

    Raises TypeError with the type and the elements of the output.
    """
    try:
        element = _element(output, select)
    except (LookupError, AttributeError, TypeError) as error:
        raise TypeError(
            f"forward() returns {_described(output)}, which has no {select!r}; set "
            "`output.select` to the element with the logits"
        ) from error
    if not isinstance(element, Tensor):
        raise TypeError(
            f"forward() returns {_described(output)} where logits (batch, classes) are needed; "
            "set `output.select` to their index or key"
        )
    return element.float()


def output_activation(rows: Tensor) -> OutputActivation | None:
    """The activation of some outputs (N, classes), inferred from their values; None for logits.

    A single output per row is that of a sigmoid if it lies in 0..1; a softmax would always be 1.
    """
    if not rows.numel() or rows.ndim != 2 or not bool(rows.isfinite().all()):
        return None
    inside = bool((rows >= 0).all() and (rows <= 1).all())
    if rows.shape[1] > 1:
        if inside and _sum_to_one(rows):
            return "softmax"
        if bool((rows <= 0).all()) and _sum_to_one(rows.exp()):
            return "log_softmax"
    return "sigmoid" if inside else None


def _sum_to_one(rows: Tensor) -> bool:
    return bool(((rows.sum(dim=1) - 1).abs() < 1e-3).all())


def as_logits(output: Tensor, kind: OutputActivation) -> Tensor:
    """Convert probabilities p (N, classes), or their logarithms, to log p − log(1 − p).

    A sigmoid of the result is p, so that scores are those of the model.
    """
    chances = output.exp() if kind == "log_softmax" else output
    return chances.clamp(SMALLEST, 1 - SMALLEST).logit()


def _element(output: Any, select: Select) -> Any:
    if select is None:
        return output
    if isinstance(output, Tensor):
        raise TypeError
    if isinstance(select, int) or isinstance(output, Mapping):
        return output[select]
    return getattr(output, select)


def _described(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with the keys {', '.join(map(str, output))}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    if isinstance(output, Tensor):
        return f"one tensor {tuple(output.shape)}"
    return f"a {type(output).__name__}"
