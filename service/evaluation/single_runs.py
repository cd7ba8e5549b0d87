"""Questions one at a time on a replica of their own: neither a batch nor a lane changes numbers."""

from __future__ import annotations

from service.errors import CamserveError
from service.inference.batch import Unfinished, run
from service.inference.questions import InferenceResult, Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes.condition import Condition


def replica_of(model: LoadedModel) -> Replica:
    """Return a replica of the model as it was built, outside any pool."""
    module = model.replicate()
    return Replica(model, module, Condition.of(module))


def result_of(replica: Replica, question: Question) -> InferenceResult | CamserveError:
    """Return the result of one question, however many passes its method needs; or its error."""
    (outcome,) = run(replica, [question])
    try:
        while isinstance(outcome, Unfinished):
            outcome = outcome.step(replica) or outcome
    except CamserveError as error:
        return error
    return outcome
