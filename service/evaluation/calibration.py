"""Calibrate an int8 front of a model on images, and measure its agreement with float32."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from service.cam.rank_correlation import rank_correlation
from service.errors import CamserveError, ConfigurationError, install_hint
from service.inference.batch import run_compiled
from service.inference.questions import InferenceResult, Question
from service.models.compiled import openvino_front
from service.models.compiled.cut import split
from service.models.compiled.lane import identity
from service.models.loaded import LoadedModel

MIN_IMAGES = 40
"""Half of them calibrate; with fewer, a tenth percentile of the other half means nothing."""

MIN_AGREEMENT = 0.95
"""The least tenth percentile of the maps' rank correlation, on images that did not calibrate."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well the results of another front agree with those in float32.

    images:       how many were compared.
    same_class:   the share of them with the same first prediction.
    median, tenth: percentiles of Spearman's rank correlation of the maps of one class, −1..1.
    same_peak:    the share of maps whose largest cell is the same.
    """

    images: int
    same_class: float
    median: float
    tenth: float
    same_peak: float


def calibrate(model: LoadedModel, images: Sequence[Tensor], folder: Path) -> Agreement:
    """Write an int8 front of a model to a folder, if its results agree with float32.

    images: uint8 (C, h, w) at the model's input size, as varied as those it will be used on; every
            second one calibrates, the others measure.

    Raises ConfigurationError if the model has no compiled lane, there are too few images, or the
    agreement is below MIN_AGREEMENT; nothing is written then.
    """
    if model.compiled is None:
        raise ConfigurationError(
            f"model {model.name!r} has no compiled lane to calibrate: {model.not_compiled}"
        )
    if len(images) < MIN_IMAGES:
        raise ConfigurationError(
            f"{len(images)} images are too few to calibrate and to measure the result; "
            f"give at least {MIN_IMAGES}, of the kind that the model will be used on."
        )
    front, _ = split(model.module, model.compiled.layer)
    graph = openvino_front.graph_of(model, front, None, identity(model), fuse=False)
    quantised = _quantised(graph, images[::2])
    lane = replace(model.compiled, front=openvino_front.OpenVinoFront(quantised), precision="int8")
    measured = agreement(model, replace(model, compiled=lane), images[1::2])
    if measured.tenth < MIN_AGREEMENT:
        raise ConfigurationError(
            f"the int8 front of {model.name!r} is refused: on a tenth of {measured.images} images "
            f"the rank correlation of its maps with float32 is below {measured.tenth:.3f}, and at "
            f"least {MIN_AGREEMENT} is required; {measured.same_class:.0%} of the predictions "
            "agree. More images, of the kind that the model will be used on, may help."
        )
    openvino_front.write(quantised, folder, {"identity": identity(model), **asdict(measured)})
    return measured


def _quantised(graph: openvino_front.Graph, images: Sequence[Tensor]) -> openvino_front.Graph:
    # It reports its use to its developers over the network, unless it runs in their CI.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        import nncf  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(
            f"calibrating needs the extra int8: {install_hint('int8')}."
        ) from error
    nncf.set_log_level(logging.ERROR)
    return nncf.quantize(
        graph,
        nncf.Dataset([image.numpy()[None] for image in images]),
        subset_size=len(images),
    )


def agreement(exact: LoadedModel, other: LoadedModel, images: Sequence[Tensor]) -> Agreement:
    """How well the compiled lane of another form of a model agrees with that of the exact one."""
    layers = exact.target_layers(())
    same_class, same_peak, correlations = 0, 0, []
    for image in images:
        one = _infer(exact, Question(image, layers=layers))
        targeted = Question(image, layers=layers, targets=(one.predictions[0].class_id,))
        two = _infer(other, targeted)
        same_class += one.predictions[0].class_id == two.predictions[0].class_id
        maps = one.explanations[0].grid, two.explanations[0].grid
        same_peak += int(maps[0].argmax() == maps[1].argmax())
        correlations.append(rank_correlation(*maps))
    return Agreement(
        len(images),
        same_class / len(images),
        float(np.median(correlations)),
        float(np.quantile(correlations, 0.1)),
        same_peak / len(images),
    )


def _infer(model: LoadedModel, question: Question) -> InferenceResult:
    (result,) = run_compiled(model, [question])
    if isinstance(result, CamserveError):
        raise result
    assert isinstance(result, InferenceResult)
    return result
