"""The remote server of X-AnyLabeling, at `/integrations/x-anylabeling`.

The desktop program appends `/v1/models` and `/v1/predict` to the configured address. A task defines
the shapes: of a detector its boxes, of a segmenter the outlines of its regions, and of every model
the evidence for the best class, box or region: polygons, rectangles or the peak. "Confidence" is
the threshold of the map, or the lowest score of a box or region; mask fineness the simplification
of outlines, and the class filter selects the classes that get shapes. The program's own switch
decides whether older shapes stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from fastapi import APIRouter, Request, Response

from api_schemas import answers as wire
from api_schemas.answers import verdict_summary
from api_schemas.options import CommonOptions, ExplainOptions, PredictOptions, Task
from api_schemas.protocols import LabelingParameters, LabelingRequest
from service.cam.regions import TOLERANCE_SHARE, mask_polygons
from service.errors import InvalidOption, nearest
from service.integrations.protocol_requests import (
    ImageRequest,
    Plan,
    Reply,
    answer,
    file_in,
    json_response,
    parsed,
)
from service.models.loaded import LoadedModel
from service.pipeline.response import image_result
from service.routes import docs
from service.routes.examples import JPEG
from service.routes.integration import Integration
from service.routes.state import service_of


def _error(_status: int, code: str, detail: str) -> dict[str, Any]:
    return {"success": False, "error": {"code": code, "message": detail}}


router = APIRouter(
    prefix="/integrations/x-anylabeling/v1",
    tags=["X-AnyLabeling"],
    responses=docs.protocol_errors(_error),
)

INTEGRATION = Integration(
    routers=(router,),
    description="The remote server of the labeling program.",
    schemas=(LabelingRequest,),
    prefixes=("/integrations/x-anylabeling/",),
    error_body=_error,
)

_EXAMPLE_REQUEST = {
    "model": "builtin",
    "image": f"data:image/jpeg;base64,{JPEG}",
    "params": {"conf_threshold": 0.5, "current_task": "cam_polygon"},
}
_EXAMPLE_SHAPE = {
    "label": "sunflower",
    "shape_type": "polygon",
    "points": [[140.0, 120.0], [320.0, 120.0], [320.0, 285.0]],
    "score": 0.9968,
    "description": "gradcam",
    "attributes": {},
    "flags": {},
    "group_id": 1,
}

Points = list[tuple[float, float]]

_WIDGETS = ("button_run", "button_classes_filter", "toggle_preserve_existing_annotations")
_CUT = ("input_conf", "edit_conf")
_FINENESS = ("mask_fineness_slider", "mask_fineness_value_label")
_START = {"edit_conf": 0.5, "mask_fineness_slider": 10}


@dataclass(frozen=True, slots=True)
class _Task:
    """A task as the program lists it: title, widgets, and the shapes that it returns.

    outlines: of the evidence's regions; None: the shapes are what was found. verify: whether the
    map is tested; the program has no widget for it. of: the only task of a model that has it.
    """

    title: str
    shape: str
    widgets: tuple[str, ...]
    outlines: Callable[[wire.Regions, float], list[Points]] | None
    verify: bool = False
    of: Task | None = None


@router.get(
    "/models",
    responses=docs.example(
        {"success": True, "data": {"builtin": {"display_name": "builtin: class and evidence"}}}
    ),
)
async def models(request: Request) -> dict[str, Any]:
    """Every loaded model with its tasks and widgets."""
    loaded = service_of(request).pool.models
    return {"success": True, "data": {name: _described(loaded[name]) for name in loaded}}


@router.post(
    "/predict",
    responses=docs.example(
        {"success": True, "data": {"shapes": [_EXAMPLE_SHAPE], "description": "sunflower 1.00"}}
    ),
    openapi_extra=docs.json_body(LabelingRequest, _EXAMPLE_REQUEST),
)
async def predict(request: Request) -> Response:
    """The shapes of the evidence in one image."""
    received: list[LabelingRequest] = []

    def name_of(body: bytes) -> str:
        received.append(parsed(LabelingRequest, body))
        return received[0].model

    def read(model: LoadedModel, _body: bytes) -> Plan:
        labeling_request = received[0]
        task = _task(labeling_request.params, model)
        chosen = _options(task, labeling_request.params)
        image = ImageRequest(file_in(labeling_request.image), chosen)
        return Plan([image], lambda replies: _respond(task, labeling_request.params, replies[0]))

    return await answer(request, name_of, read)


def _options(task: _Task, params: LabelingParameters) -> CommonOptions:
    """Those of `/explain`, or of `/predict` where no map is needed."""
    if task.outlines is None:
        least = params.conf_threshold if task.of == "detection" else None
        return PredictOptions(min_score=least)
    return ExplainOptions(
        include=["regions"],
        threshold=params.conf_threshold,
        verify="true" if task.verify else "false",
    )


def _tasks(model: LoadedModel) -> Mapping[str, _Task]:
    """The tasks of a model, the first one the program's default."""
    return {name: task for name, task in _TASKS.items() if task.of in {None, model.task}}


def _described(model: LoadedModel) -> dict[str, Any]:
    tasks = _tasks(model)
    widgets = dict.fromkeys(name for task in tasks.values() for name in task.widgets)
    return {
        "display_name": f"{model.name}: class and evidence",
        "batch_processing_mode": "default",
        "params": {},
        "capabilities": {},
        "classes": list(model.labels),
        "widgets": [{"name": name, "value": _START.get(name)} for name in widgets],
        "available_tasks": [
            {
                "id": name,
                "name": task.title,
                "batch_processing_mode": "default",
                "active_widgets": {widget: {} for widget in task.widgets},
            }
            for name, task in tasks.items()
        ],
    }


def _task(params: LabelingParameters, model: LoadedModel) -> _Task:
    tasks = _tasks(model)
    name = params.current_task or next(iter(tasks))
    if name not in tasks:
        raise InvalidOption(f"Model {model.name!r} has no task {name!r}.{nearest(name, tasks)}")
    return tasks[name]


def _respond(task: _Task, params: LabelingParameters, reply: Reply) -> Response:
    rendered = image_result(reply.model, reply.options, reply.render_side, reply.answered)
    shapes: list[dict[str, Any]] = []
    if task.outlines is None:
        kept = _kept(reply, rendered.predictions or [], params)
        for number, (prediction, outlines) in enumerate(kept, start=1):
            kind = "polygon" if prediction.box is None else "rectangle"
            shapes += [_shape(prediction, kind, points, number) for points in outlines]
        description = f"{len(kept)} found"
    elif rendered.explanations:
        shapes, description = _evidence(task, params, rendered.explanations[0])
    else:
        description = "nothing found"
    return json_response({"success": True, "data": {"shapes": shapes, "description": description}})


def _kept(
    reply: Reply, listed: Sequence[wire.Prediction], params: LabelingParameters
) -> list[tuple[wire.Prediction, list[Points]]]:
    """What is found of the wanted classes, sure enough, with its outlines.

    Those are the corners of a box, or the parts of a segmenter's region; its class 0 is the
    background.
    """
    geometry = reply.answered.upload.model_input.geometry
    found: list[tuple[wire.Prediction, list[Points]]] = []
    for prediction, each in zip(listed, reply.answered.inference.predictions, strict=True):
        if params.filter_classes and prediction.label not in params.filter_classes:
            continue
        if prediction.score < params.conf_threshold or not (each.box or each.class_id):
            continue
        if prediction.box is not None:
            found.append((prediction, [_corners(prediction.box)]))
        elif each.mask is not None:
            polygons = mask_polygons(each.mask, geometry)
            simple = [_simplified(polygon, params.epsilon_factor) for polygon in polygons]
            found.append((prediction, simple))
    return found


def _evidence(
    task: _Task, params: LabelingParameters, explanation: wire.Explanation
) -> tuple[list[dict[str, Any]], str]:
    """The shapes of a map, and what the program says of them."""
    assert explanation.regions is not None
    assert task.outlines is not None
    wanted = not params.filter_classes or explanation.label in params.filter_classes
    outlines = task.outlines(explanation.regions, params.epsilon_factor) if wanted else []
    verdict = "" if explanation.verify is None else f", {verdict_summary(explanation.verify)}"
    attributes = {} if explanation.verify is None else {"verdict": explanation.verify.verdict}
    shapes = [
        _shape(explanation, task.shape, points, 1)
        | {"description": f"{explanation.method}{verdict}", "attributes": attributes}
        for points in outlines
    ]
    return shapes, f"{explanation.label} {explanation.score:.2f}{verdict}"


def _shape(
    of: wire.Prediction | wire.Explanation, kind: str, points: Points, group: int
) -> dict[str, Any]:
    return {
        "label": of.label,
        "shape_type": kind,
        "points": points,
        "score": of.score,
        "description": "",
        "attributes": {},
        "flags": {},
        "group_id": group,
    }


def _polygons(regions: wire.Regions, fineness: float) -> list[Points]:
    return [_simplified(polygon, fineness) for polygon in regions.polygons]


def _simplified(polygon: Points, share: float) -> Points:
    """The outline without points that are within this share of its length."""
    if share <= TOLERANCE_SHARE:  # no further than it already is
        return polygon
    points = np.array(polygon, dtype=np.float32)
    fewer = cv2.approxPolyDP(points, share * cv2.arcLength(points, closed=True), closed=True)
    return polygon if len(fewer) < 3 else [(float(x), float(y)) for ((x, y),) in fewer]


def _rectangles(regions: wire.Regions, _fineness: float) -> list[Points]:
    """Four corners of each, clockwise, as the program draws them."""
    return [_corners(box) for box in regions.boxes]


def _corners(box: wire.Rect) -> Points:
    x, y, w, h = box
    return [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]


def _peak(regions: wire.Regions, _fineness: float) -> list[Points]:
    return [] if regions.peak is None else [[regions.peak]]


_TASKS: Mapping[str, _Task] = MappingProxyType(
    {
        "boxes": _Task("Boxes", "rectangle", _WIDGETS + _CUT, None, of="detection"),
        "regions": _Task(
            "Regions", "polygon", _WIDGETS + _CUT + _FINENESS, None, of="segmentation"
        ),
        "cam_polygon": _Task(
            "Evidence as polygons", "polygon", _WIDGETS + _CUT + _FINENESS, _polygons
        ),
        "cam_rectangle": _Task("Evidence as rectangles", "rectangle", _WIDGETS + _CUT, _rectangles),
        "cam_point": _Task("Peak of the evidence", "point", _WIDGETS, _peak),
        "cam_verified": _Task(
            "Evidence as polygons, with verdict",
            "polygon",
            _WIDGETS + _CUT + _FINENESS,
            _polygons,
            verify=True,
        ),
    }
)
