"""What every explanation says of its map, whatever the model's task is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from service.cam.formulas import scale
from service.inference.contrast import Contrast
from service.inference.forward_pass import read_only_array
from service.inference.method_table import cost
from service.inference.questions import Explanation, Question
from service.models.loaded import LoadedModel

LOW_RESOLUTION = 7
"""A map whose shorter side has fewer cells than this is flagged `low_resolution`."""

SATURATED = 0.9999
"""A score above this is flagged `saturated`: its gradient says little."""


def explanation_of(
    model: LoadedModel, question: Question, cam: Tensor, flags: dict[str, bool], **fields: Any
) -> Explanation:
    """The explanation by a map (h, w). flags: those that not every task has; fields: the others."""
    method, scaled = question.method_record, scale(cam)
    assert method is not None
    all_flags = {
        "all_zero": not bool(scaled.grid.any()),
        "target_not_predicted": False,
        "saturated": False,
        "low_resolution": min(scaled.grid.shape) < LOW_RESOLUTION,
        "random_weights": model.random_weights,
        "module_called_n_times": False,
        "not_deterministic": not model.behaviour.deterministic,
        **flags,
    }
    return Explanation(
        method=method.name,
        grid=read_only_array(scaled.grid),
        low=scaled.low,
        high=scaled.high,
        flags=tuple(flag for flag, is_set in all_flags.items() if is_set),
        cost=cost(model, question),
        **{"layers": question.layers if method.has_layer else (), "contrast": {}} | fields,
    )


def contrast_fields(
    contrast: Contrast | None, logits: Tensor | None, class_id: int
) -> dict[str, Any]:
    """The weights of a contrast at a row of logits (classes,), and the lead over it."""
    if contrast is None or logits is None:
        return {}
    at = contrast.at(logits, class_id)
    lead = float(at.lead(logits, class_id))
    return {"contrast": at.as_mapping(logits), "logit_difference": lead}
