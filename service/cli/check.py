"""Every model loaded and run once, as a CI of those who own the models would want it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from service.errors import CamserveError
from service.inference.batch import run
from service.inference.questions import Question
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes.condition import Condition


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of one model: either `model` and its time per image, or why it failed.

    problem: a sentence; None where the model loaded and answered.
    """

    spec: ModelSpec
    model: LoadedModel | None = None
    milliseconds: float = 0.0
    problem: str | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the model holds."""
        return 0 if self.model is None else sum(p.numel() for p in self.model.module.parameters())

    @property
    def mebibytes(self) -> float:
        """What its parameters and buffers take."""
        if self.model is None:
            return 0.0
        tensors = (*self.model.module.parameters(), *self.model.module.buffers())
        return sum(tensor.nbytes for tensor in tensors) / (1 << 20)


def check_models(
    specs: Iterable[ModelSpec], load: Callable[[ModelSpec], LoadedModel]
) -> Iterator[Checked]:
    """Load each model and let it explain one picture of noise; a failure does not stop the rest."""
    for spec in specs:
        try:
            model = load(spec)
            yield Checked(spec, model, 1000 * _seconds(model))
        except CamserveError as error:
            yield Checked(spec, problem=error.detail)
        except Exception as error:  # noqa: BLE001 - the user's model may raise anything
            yield Checked(spec, problem=f"{type(error).__name__}: {error}")


def _seconds(model: LoadedModel) -> float:
    """How long one image takes when warm: explained where that works, else predicted."""
    module = model.replicate()
    replica = Replica(model, module, Condition.of(module))
    shape = (model.preprocessing.channels, *model.preprocessing.crop)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    layers = () if model.target_layer is None or model.no_gradients else (model.target_layer,)
    question = Question(noise.to(torch.uint8), method="gradcam" if layers else None, layers=layers)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        (outcome,) = run(replica, [question])
        seconds = time.perf_counter() - started
        if isinstance(outcome, CamserveError):
            raise outcome
    return seconds
