"""From a batch of questions to answers, some at once and some in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from service.errors import CamserveError
from service.inference.batch import finish, forward, forward_compiled
from service.inference.captures import Part
from service.inference.methods import STEPS
from service.inference.perturbation import Steps
from service.inference.questions import Answer, Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica


class Unfinished:
    """A question whose method runs the model again, one chunk at a time."""

    def __init__(self, part: Part, steps: Steps) -> None:
        self._part = part
        self._steps = steps
        next(steps)

    def step(self, replica: Replica) -> Answer | None:
        """Work off one chunk on a leased replica; the answer after the last one."""
        try:
            self._steps.send(replica)
        except StopIteration as end:
            return finish(self._part, end.value)
        return None


def run(
    replica: Replica, questions: Sequence[Question]
) -> list[Answer | CamserveError | Unfinished]:
    """Answer a batch of questions that share one input size.

    An image that cannot be answered has its error in its place; what needs more passes is
    `Unfinished` and wants a replica for each step.
    """
    return [_continued(part) for part in forward(replica, questions)]


def run_compiled(
    model: LoadedModel, questions: Sequence[Question], *, wide: bool = False
) -> list[Answer | CamserveError]:
    """`run` in the compiled lane, whose questions are all answered by one pass."""
    assert model.compiled is not None
    precision = model.compiled.precision
    return [
        part
        if isinstance(part, CamserveError)
        else replace(finish(part, part.maps), precision=precision)
        for part in forward_compiled(model, questions, wide=wide)
    ]


def _continued(part: Part | CamserveError) -> Answer | CamserveError | Unfinished:
    if isinstance(part, CamserveError):
        return part
    method = STEPS.get(part.question.method or "")
    if not part.targets or method is None:
        return finish(part, part.maps)
    return Unfinished(part, method(part))
