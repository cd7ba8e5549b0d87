"""The outputs of a model under the Open Inference Protocol V2.

output      datatype  shape                      what
class_ids   INT64     (n, top_k)                 the best classes, best first
labels      BYTES     (n, top_k)                 their labels
scores      FP32      (n, classes)               the score of every class, by id
logits      FP32      (n, classes)               the logit of every class, by id
targets     INT64     (n, targets)               the explained classes
grid        FP32      (n, targets, rows, cols)   their maps, in the layer's shape
heatmap     BYTES     (n, targets)               their maps in colors, at image size, PNG files
overlay     BYTES     (n, targets)               the heatmap over the image
explain     BYTES     (n, targets)               the explanations of `/explain`, JSON
margin      FP32      (n)                        as `uncertainty` of `/predict`, 0 undecided
entropy     FP32      (n)                        as `uncertainty` of `/predict`, 1 undecided

Those of a detector have `num_detections` entries for an image, and zeros or empty texts behind them
up to the most of an image:

num_detections INT64  (n)                        how many boxes are found
boxes       FP32      (n, most, 4)               x1, y1, x2, y2 in source pixels, best score first
class_ids   INT64     (n, most)                  their classes
labels      BYTES     (n, most)                  the labels of these
scores      FP32      (n, most)                  their scores
explain     BYTES     (n, most explained)        the explanations of `/explain`, JSON
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson

from api_schemas.options import ExplainOptions
from service.cam.file_sizes import base64_bytes
from service.cam.heatmap import render_heatmap
from service.errors import InvalidOption
from service.images.declared_size import Size
from service.inference.questions import Explanation, Prediction
from service.integrations.protocol_requests import Reply
from service.integrations.protocols.tensors import Output
from service.models.loaded import LoadedModel
from service.pipeline.answer_size import NUMBER_BYTES, AnswerSizes, Price
from service.pipeline.response import image_result, overlay, style_of

OF_INFER = ("class_ids", "labels", "scores", "logits")
OF_EXPLAIN = ("explain", "targets", "grid", "class_ids", "labels", "scores")
EXPLAINING = frozenset({"targets", "grid", "heatmap", "overlay", "explain"})


def makers(model: LoadedModel) -> Mapping[str, Callable[[Sequence[Reply]], Output]]:
    """The outputs of a model by name. Raises InvalidOption for a segmenter."""
    if model.task == "segmentation":
        raise InvalidOption(
            f"Model {model.name!r} segments, and this protocol has no output for regions; use "
            "POST /predict or POST /explain."
        )
    return OF_DETECTOR if model.task == "detection" else MAKERS


def defaults(model: LoadedModel, of_classifier: Sequence[str]) -> Sequence[str]:
    """The outputs of a request that names none: OF_INFER or OF_EXPLAIN, or a detector's."""
    if model.task == "classification":
        return of_classifier
    found = [name for name in makers(model) if name != "explain"]
    return ["explain", *found] if "explain" in of_classifier else found


def described(model: LoadedModel) -> list[dict[str, Any]]:
    """Every output as the metadata of a model lists it; none of a segmenter."""
    if model.task == "segmentation":
        return []
    if model.task == "detection":
        kinds = {"boxes": "FP32", "scores": "FP32", "num_detections": "INT64", "class_ids": "INT64"}
        dimensions = {"num_detections": [-1], "boxes": [-1, -1, 4]}
        return [
            {
                "name": name,
                "datatype": kinds.get(name, "BYTES"),
                "shape": dimensions.get(name, [-1, -1]),
            }
            for name in OF_DETECTOR
        ]
    classes = len(model.labels)
    shapes = {"scores": [-1, classes], "logits": [-1, classes], "grid": [-1, -1, -1, -1]}
    shapes |= {"margin": [-1], "entropy": [-1]}
    types = {"class_ids": "INT64", "targets": "INT64", "scores": "FP32", "logits": "FP32"}
    types |= dict.fromkeys(("grid", "margin", "entropy"), "FP32")
    return [
        {"name": name, "datatype": types.get(name, "BYTES"), "shape": shapes.get(name, [-1, -1])}
        for name in MAKERS
    ]


def classification(output: Output, model: LoadedModel, count: int) -> Output:
    """Triton's classification extension: the largest values as "value:id:label".

    Raises InvalidOption for an output without a value per class.
    """
    if not isinstance(output.values, np.ndarray) or output.values.shape[1:] != (len(model.labels),):
        raise InvalidOption(f"`classification` applies to scores and logits, not to {output.name}.")
    rows = output.values
    best = np.argsort(-rows, axis=1, kind="stable")[:, :count]
    texts = [
        f"{row[index]:f}:{index}:{model.labels[index]}"
        for row, ids in zip(rows, best, strict=True)
        for index in ids
    ]
    return Output(output.name, "BYTES", best.shape, texts)


def price(wanted: Sequence[tuple[str, int, bool]], sizes: AnswerSizes) -> Price:
    """Bytes of the requested outputs at most; each with `classification`, and whether in binary."""

    def bytes_of(source: Size) -> int:
        return 256 + sum(
            256 + _bytes_of(name, classes, sizes, source, binary=binary)
            for name, classes, binary in wanted
        )

    return bytes_of


def _bytes_of(name: str, classes: int, sizes: AnswerSizes, source: Size, *, binary: bool) -> int:
    number = 8 if binary else NUMBER_BYTES
    is_detector = sizes.model.task == "detection"
    count = 4 * sizes.question.top_k if is_detector else len(sizes.model.labels)
    if classes:
        return sizes.predictions(classes)
    if name in {"heatmap", "overlay"}:
        file = sizes.heatmap(source) if name == "heatmap" else sizes.overlay(source)
        return sizes.maps * (8 + (file if binary else base64_bytes(file)))
    if name == "explain":  # JSON within JSON: its quotes are escaped
        return sizes.maps * int(1.3 * sizes.explanation(source))
    if name == "grid":
        return sizes.maps * math.prod(sizes.cells) * number
    if name in {"targets", "margin", "entropy"}:
        return sizes.maps * number
    return count * number if name in {"boxes", "scores", "logits"} else sizes.predictions()


def _class_ids(replies: Sequence[Reply]) -> Output:
    ids = np.array([_best(reply) for reply in replies], dtype=np.int64)
    return Output("class_ids", "INT64", ids.shape, ids)


def _labels(replies: Sequence[Reply]) -> Output:
    best = [_best(reply) for reply in replies]
    texts = [replies[0].model.labels[index] for ids in best for index in ids]
    return Output("labels", "BYTES", (len(best), len(best[0])), texts)


def _best(reply: Reply) -> list[int]:
    predictions = reply.answered.inference.predictions[: reply.options.top_k]
    return [prediction.class_id for prediction in predictions]


def _scores(replies: Sequence[Reply]) -> Output:
    return _by_class("scores", replies)


def _logits(replies: Sequence[Reply]) -> Output:
    return _by_class("logits", replies)


def _by_class(name: str, replies: Sequence[Reply]) -> Output:
    values = np.zeros((len(replies), len(replies[0].model.labels)), dtype=np.float32)
    for row, reply in zip(values, replies, strict=True):
        for prediction in reply.answered.inference.predictions:
            value = prediction.score if name == "scores" else prediction.logit
            row[prediction.class_id] = value
    return Output(name, "FP32", values.shape, values)


def _targets(replies: Sequence[Reply]) -> Output:
    ids = np.array(
        [[shown.class_id for shown in reply.answered.inference.explanations] for reply in replies],
        dtype=np.int64,
    )
    return Output("targets", "INT64", ids.shape, ids)


def _grid(replies: Sequence[Reply]) -> Output:
    grids = np.stack(
        [
            np.stack([shown.grid for shown in reply.answered.inference.explanations])
            for reply in replies
        ]
    )
    return Output("grid", "FP32", grids.shape, grids)


def _heatmap(replies: Sequence[Reply]) -> Output:
    files = [
        render_heatmap(
            explanation.grid,
            reply.answered.upload.model_input.geometry,
            style_of(options),
            reply.render_side,
        ).data
        for reply, options, explanation in _explained(replies)
    ]
    return _files("heatmap", replies, files)


def _overlay(replies: Sequence[Reply]) -> Output:
    files = [
        overlay(reply.answered.upload, explanation, style_of(options)).data
        for reply, options, explanation in _explained(replies)
    ]
    return _files("overlay", replies, files)


def _explain(replies: Sequence[Reply]) -> Output:
    texts: list[str] = []
    for reply in replies:
        texts += _explanations(reply)
    return _files("explain", replies, texts)


def _explanations(reply: Reply) -> list[str]:
    rendered = image_result(reply.model, reply.options, reply.render_side, reply.answered)
    explanations = rendered.model_dump(exclude_unset=True)["explanations"]
    return [orjson.dumps(explanation).decode() for explanation in explanations]


def _margin(replies: Sequence[Reply]) -> Output:
    return _of_image("margin", [reply.answered.inference.margin for reply in replies])


def _entropy(replies: Sequence[Reply]) -> Output:
    return _of_image("entropy", [reply.answered.inference.entropy for reply in replies])


def _of_image(name: str, numbers: Sequence[float]) -> Output:
    return Output(name, "FP32", (len(numbers),), np.array(numbers, dtype=np.float32))


def _explained(replies: Sequence[Reply]) -> Iterator[tuple[Reply, ExplainOptions, Explanation]]:
    for reply in replies:
        assert isinstance(reply.options, ExplainOptions)
        for explanation in reply.answered.inference.explanations:
            yield reply, reply.options, explanation


def _files(name: str, replies: Sequence[Reply], values: Sequence[Any]) -> Output:
    return Output(name, "BYTES", (len(replies), len(values) // len(replies)), values)


MAKERS: Mapping[str, Callable[[Sequence[Reply]], Output]] = MappingProxyType(
    {
        "class_ids": _class_ids,
        "labels": _labels,
        "scores": _scores,
        "logits": _logits,
        "targets": _targets,
        "grid": _grid,
        "heatmap": _heatmap,
        "overlay": _overlay,
        "explain": _explain,
        "margin": _margin,
        "entropy": _entropy,
    }
)


def _found(reply: Reply) -> Sequence[Prediction]:
    return reply.answered.inference.predictions


def _num_detections(replies: Sequence[Reply]) -> Output:
    counts = np.array([len(_found(reply)) for reply in replies], dtype=np.int64)
    return Output("num_detections", "INT64", counts.shape, counts)


def _boxes(replies: Sequence[Reply]) -> Output:
    values = np.zeros((len(replies), _most(replies), 4), dtype=np.float32)
    for rows, reply in zip(values, replies, strict=True):
        for row, found in zip(rows, _found(reply), strict=False):
            assert found.box is not None
            x, y, w, h = found.box
            row[:] = x, y, x + w, y + h
    return Output("boxes", "FP32", values.shape, values)


def _detected_ids(replies: Sequence[Reply]) -> Output:
    ids = np.array(_padded(replies, lambda found: found.class_id, 0), dtype=np.int64)
    return Output("class_ids", "INT64", (len(replies), _most(replies)), ids)


def _detected_labels(replies: Sequence[Reply]) -> Output:
    labels = replies[0].model.labels
    texts = _padded(replies, lambda found: labels[found.class_id], "")
    return Output(
        "labels", "BYTES", (len(replies), _most(replies)), [text for row in texts for text in row]
    )


def _detected_scores(replies: Sequence[Reply]) -> Output:
    scores = np.array(_padded(replies, lambda found: found.score, 0.0), dtype=np.float32)
    return Output("scores", "FP32", (len(replies), _most(replies)), scores)


def _explained_boxes(replies: Sequence[Reply]) -> Output:
    texts = [_explanations(reply) for reply in replies]
    most = max(map(len, texts))
    padded = [text for row in texts for text in [*row, *[""] * (most - len(row))]]
    return Output("explain", "BYTES", (len(replies), most), padded)


def _most(replies: Sequence[Reply]) -> int:
    return max(len(_found(reply)) for reply in replies)


def _padded(
    replies: Sequence[Reply], value: Callable[[Prediction], Any], nothing: Any
) -> list[list[Any]]:
    """A value of each detection, every row as long as the longest."""
    most = _most(replies)
    rows = [[value(found) for found in _found(reply)] for reply in replies]
    return [[*row, *[nothing] * (most - len(row))] for row in rows]


OF_DETECTOR: Mapping[str, Callable[[Sequence[Reply]], Output]] = MappingProxyType(
    {
        "num_detections": _num_detections,
        "boxes": _boxes,
        "class_ids": _detected_ids,
        "labels": _detected_labels,
        "scores": _detected_scores,
        "explain": _explained_boxes,
    }
)
