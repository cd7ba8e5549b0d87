"""`camserve check`: load every model, and run it once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from service.errors import CamserveError
from service.evaluation.method_sensitivity import measure_all
from service.inference.batch import run
from service.inference.method_table import default_method
from service.inference.questions import Question
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes.condition import Condition
from service.models.probes.sensitivity import Sensitivity


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result for one model: `model` and its time per image, or why it failed.

    problem: a sentence, None if the model works.
    sensitivity: how much the maps of each method depend on the weights.
    """

    spec: ModelSpec
    model: LoadedModel | None = None
    milliseconds: float = 0.0
    problem: str | None = None
    sensitivity: tuple[Sensitivity, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return 0 if self.model is None else sum(p.numel() for p in self.model.module.parameters())

    @property
    def mebibytes(self) -> float:
        """Memory of its parameters and buffers, in MiB."""
        if self.model is None:
            return 0.0
        tensors = (*self.model.module.parameters(), *self.model.module.buffers())
        return sum(tensor.nbytes for tensor in tensors) / (1 << 20)


def check_models(
    specs: Iterable[ModelSpec],
    load: Callable[[ModelSpec], LoadedModel],
    *,
    all_methods: bool = False,
) -> Iterator[CheckResult]:
    """Load each model and explain an image of noise with it; a failure does not stop the rest.

    all_methods: measure the sensitivity of every method, not only of those measured at load.
    """
    for spec in specs:
        try:
            model = load(spec)
            measured = all_methods and model.task == "classification"
            sensitivity = measure_all(model) if measured else model.sensitivity
            yield CheckResult(spec, model, 1000 * _seconds(model), sensitivity=sensitivity)
        except CamserveError as error:
            yield CheckResult(spec, problem=error.detail)
        except Exception as error:  # noqa: BLE001 - the user's model may raise anything
            yield CheckResult(spec, problem=f"{type(error).__name__}: {error}")


WARM_RUNS = 5
"""Explanations whose median is the time per image, after a first one that is not counted."""


def _seconds(model: LoadedModel) -> float:
    """Return the median seconds of warm explanations, or of predictions if it has no maps."""
    module = model.replicate()
    replica = Replica(model, module, Condition.of(module))
    shape = (model.preprocessing.channels, *model.preprocessing.crop)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    layers = () if model.target_layer is None or model.no_gradients else model.target_layers(())
    method = default_method(model) if layers else None
    question = Question(noise.to(torch.uint8), method=method, layers=layers)
    seconds = []
    for _ in range(1 + WARM_RUNS):
        started = time.perf_counter()
        (outcome,) = run(replica, [question])
        seconds.append(time.perf_counter() - started)
        if isinstance(outcome, CamserveError):
            raise outcome
    return statistics.median(seconds[1:])
