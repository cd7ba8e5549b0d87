"""An int8 front for a model, made and measured on its user's own photographs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.errors import CamserveError, ConfigurationError
from service.inference.batch import run_compiled
from service.inference.questions import InferenceResult, Question
from service.models.compiled import openvino_front
from service.models.compiled.cut import split
from service.models.compiled.lane import identity
from service.models.loaded import LoadedModel

LEAST_PICTURES = 40
"""Half of them calibrate, and a tenth percentile of the other half says nothing below that."""

LEAST_AGREEMENT = 0.95
"""Of the maps' rank correlation: the tenth percentile on pictures that did not calibrate."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near the answers of another front are to those in float32, on pictures.

    pictures:     how many.
    same_class:   the share of them with the same first prediction.
    median, tenth: of Spearman's rank correlation between the maps of one class, −1..1.
    same_peak:    the share of maps whose largest cell is the same.
    """

    pictures: int
    same_class: float
    median: float
    tenth: float
    same_peak: float


def calibrate(model: LoadedModel, pictures: Sequence[Tensor], folder: Path) -> Agreement:
    """Write an int8 front of a model to a folder, where its answers agree with float32.

    pictures: uint8 (C, h, w) at the model's input size, as varied as what it will see; every second
              one calibrates, the others measure.

    Raises ConfigurationError where the model has no compiled lane, the pictures are too few, or
    the agreement is below LEAST_AGREEMENT; nothing is written then.
    """
    if model.compiled is None:
        raise ConfigurationError(
            f"model {model.name!r} has no compiled lane to calibrate: {model.not_compiled}"
        )
    if len(pictures) < LEAST_PICTURES:
        raise ConfigurationError(
            f"{len(pictures)} pictures are too few to calibrate with and to measure the result on; "
            f"give at least {LEAST_PICTURES}, of the kind that the model will see."
        )
    front, _ = split(model.module, model.compiled.layer)
    graph = openvino_front.graph_of(model, front, None, identity(model))
    quantised = _quantised(graph, pictures[::2])
    lane = replace(model.compiled, front=openvino_front.OpenVinoFront(quantised), precision="int8")
    found = agreement(model, replace(model, compiled=lane), pictures[1::2])
    if found.tenth < LEAST_AGREEMENT:
        raise ConfigurationError(
            f"the int8 front of {model.name!r} is refused: on a tenth of {found.pictures} pictures "
            f"its maps agree with float32 by a rank correlation below {found.tenth:.3f}, and "
            f"{LEAST_AGREEMENT} is the least; {found.same_class:.0%} of the predictions agree. "
            "More pictures, of the kind that the model will see, may help."
        )
    openvino_front.write(quantised, folder, {"identity": identity(model), **asdict(found)})
    return found


def _quantised(graph: openvino_front.Graph, pictures: Sequence[Tensor]) -> openvino_front.Graph:
    # It reports its use to its makers over the network, unless it believes to be in their CI.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        import nncf  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(
            "calibrating needs the extra int8: pip install 'camserve[int8]'."
        ) from error
    nncf.set_log_level(logging.ERROR)
    return nncf.quantize(
        graph,
        nncf.Dataset([picture.numpy()[None] for picture in pictures]),
        subset_size=len(pictures),
    )


def agreement(exact: LoadedModel, other: LoadedModel, pictures: Sequence[Tensor]) -> Agreement:
    """How near the compiled lane of another form of a model is to that of the exact one."""
    layers = exact.target_layers(())
    same_class, same_peak, correlations = 0, 0, []
    for picture in pictures:
        one = _answer(exact, Question(picture, layers=layers))
        asked = Question(picture, layers=layers, targets=(one.predictions[0].class_id,))
        two = _answer(other, asked)
        same_class += one.predictions[0].class_id == two.predictions[0].class_id
        maps = one.explanations[0].grid, two.explanations[0].grid
        same_peak += int(maps[0].argmax() == maps[1].argmax())
        correlations.append(rank_correlation(*maps))
    return Agreement(
        len(pictures),
        same_class / len(pictures),
        float(np.median(correlations)),
        float(np.quantile(correlations, 0.1)),
        same_peak / len(pictures),
    )


def _answer(model: LoadedModel, question: Question) -> InferenceResult:
    (answer,) = run_compiled(model, [question])
    if isinstance(answer, CamserveError):
        raise answer
    return answer


def rank_correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing theirs; 1 for equal maps."""
    ranks = [_ranks(each.ravel()) for each in (one, other)]
    if any(float(each.std()) == 0 for each in ranks):
        return float(np.array_equal(ranks[0], ranks[1]))
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = last - (counts - 1) / 2
    return means[places]
