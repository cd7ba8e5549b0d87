"""Where the logits are in what a model returns, and whether they are logits at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from service.models.catalog import Select

OutputActivation = Literal["softmax", "sigmoid", "log_softmax"]
"""An activation that is part of a model, so that it returns probabilities or their logarithms."""

SMALLEST = 1e-7
"""Probabilities are kept this far from 0 and 1 before their logarithm is taken: the resolution of
float32 just below 1."""


def logits_in(output: Any, select: Select) -> Tensor:
    """The logits, float32, of a model's output: itself, or the element that `select` names.

    Raises TypeError that says what the output is and what could be selected.
    """
    try:
        found = _element(output, select)
    except (LookupError, AttributeError, TypeError) as error:
        raise TypeError(
            f"forward() returns {_described(output)}, which has no {select!r}; `output.select` "
            "says where the logits are"
        ) from error
    if not isinstance(found, Tensor):
        raise TypeError(
            f"forward() returns {_described(output)} where logits (batch, classes) are needed; "
            "say with `output.select` which place or key holds them"
        )
    return found.float()


def output_activation(rows: Tensor) -> OutputActivation | None:
    """Which activation some outputs (N, classes) went through, by their values; None for logits.

    One output a row is a sigmoid's where it lies in 0..1; a softmax of one would always be 1.
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
    """Probabilities p (N, classes), or their logarithms, as log p − log(1 − p).

    A sigmoid of that is p again, so that scores are those that the model gave.
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
