"""Where the logits are in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from service.models.catalog import Select


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
