"""How much the maps of every method depend on the weights, on images of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from service.cam.formulas import LAYER_METHODS
from service.errors import CamserveError, InvalidOption
from service.evaluation.single_runs import result_of
from service.inference.method_table import MULTI_PASS_METHODS, check_method
from service.inference.questions import Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes.condition import Condition
from service.models.probes.sensitivity import (
    Sensitivity,
    States,
    cascade,
    natural_noise,
    note,
    private_copy,
    sensitivities,
)

EVERY_METHOD = tuple({**LAYER_METHODS, **MULTI_PASS_METHODS})

SAMPLES, STEPS = 200, 16
"""Of RISE and of integrated gradients: fewer than by default, since each map is made four times."""


def measure_all(model: LoadedModel, count: int = 4) -> tuple[Sensitivity, ...]:
    """The sensitivity of every method that the model allows, on `count` images of noise.

    Empty where the model cannot be copied or its maps vary.
    """
    behaves, shape = model.behaviour, (model.preprocessing.channels, *model.preprocessing.crop)
    if model.no_layers or not (behaves.isolated and behaves.deterministic):
        return ()
    with suppress(ValueError):  # it has a part that cannot be copied
        return sensitivities(maps_by_depth(model, list(natural_noise(shape, count)), EVERY_METHOD))
    return ()


def maps_by_depth(model: LoadedModel, images: Sequence[Tensor], methods: Sequence[str]) -> States:
    """The maps of each image's best class, by the model and with randomised weights.

    images: uint8 (C, h, w) at the model's input size, each with other random weights. Methods that
            the model refuses are left out.

    Raises ValueError where the model cannot be copied.
    """
    allowed = [method for method in methods if _is_allowed(model, method)]
    states: States = {}
    for seed, image in enumerate(images):
        module = private_copy(model.module)
        changeable = replace(model, module=module, folded=None, compiled=None)
        replica = Replica(changeable, module, Condition.of(module))
        best = result_of(replica, Question(image, method=None))
        if isinstance(best, CamserveError):
            raise best
        for depth in cascade(module, model.layers, seed):
            for method in allowed:
                cam = _map(replica, image, best.predictions[0].class_id, method)
                note(states, depth, {} if cam is None else {method: cam})
    return states


def _is_allowed(model: LoadedModel, method: str) -> bool:
    with suppress(InvalidOption):
        check_method(model, method)
        return True
    return False


def _map(replica: Replica, image: Tensor, class_id: int, method: str) -> Tensor | None:
    """The map of one class (h, w); None where the model refuses the method."""
    target = replica.model.target_layer
    layers = () if target is None else (target,)
    question = Question(
        image, targets=(class_id,), method=method, layers=layers, samples=SAMPLES, steps=STEPS
    )
    result = result_of(replica, question)
    if isinstance(result, CamserveError) or not result.explanations:
        return None
    return torch.tensor(result.explanations[0].grid)
