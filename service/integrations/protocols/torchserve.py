"""TorchServe's inference API: `/predictions`, `/explanations` and `/ping`.

https://pytorch.org/serve/inference_api.html. The image is the body, the part `data` (or `body`)
of a form, or base64 in JSON; the form's `target`, its other fields and the query are options of
`/explain`. A prediction is {label: score}, of a detector a list of {label: [x1, y1, x2, y2],
"score": score}, as TorchServe's object detector; an explanation is the map as (1, rows, columns)
nested lists, in the layer's shape, where TorchServe's default handler gave (channels, height,
width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from api_schemas.options import CommonOptions, ExplainOptions, PredictOptions
from service.errors import CamserveError, EmptyBody, InvalidOption
from service.images.upload import Sent
from service.inference.questions import Prediction
from service.integrations.protocol_requests import (
    ImageRequest,
    Plan,
    Reply,
    answer,
    json_of,
    json_response,
    named,
    options,
    query,
)
from service.integrations.protocols.kserve import image_of
from service.models.loaded import LoadedModel
from service.pipeline.answer_size import NUMBER_BYTES, AnswerSizes, Price
from service.routes import bodies, docs, forms, health
from service.routes.integration import Integration
from service.routes.state import service_of

_ERROR_TYPES = MappingProxyType(
    {
        400: "BadRequestException",
        401: "InvalidKeyException",
        403: "InvalidKeyException",
        404: "ResourceNotFoundException",
        405: "MethodNotAllowedException",
        408: "RequestTimeoutException",
        413: "RequestEntityTooLargeException",
        421: "BadRequestException",
        503: "ServiceUnavailableException",
    }
)
_ERROR_TYPES_OF_CODES = MappingProxyType(
    {
        "unknown_model": "ModelNotFoundException",
        "unknown_version": "ModelVersionNotFoundException",
    }
)


def _error(status: int, code: str, detail: str) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(status, "InternalServerException")
    return {
        "code": status,
        "type": _ERROR_TYPES_OF_CODES.get(code, kind),
        "message": detail,
    }


router = APIRouter(tags=["TorchServe"], responses=docs.protocol_errors(_error))

INTEGRATION = Integration(
    routers=(router,),
    description="For clients of TorchServe.",
    prefixes=("/predictions/", "/explanations/", "/ping"),
    error_body=_error,
    statuses={429: 503},  # TorchServe has one answer to too many requests
    open_paths=frozenset({"/ping"}),
)

_PREDICTIONS: dict[str, Any] = {
    "responses": docs.example({"sunflower": 0.9968, "dandelion": 0.0011}),
    "openapi_extra": docs.image_body(),
}
_EXPLANATIONS: dict[str, Any] = {
    "responses": docs.example([[[0.0, 0.4], [1.0, 0.2]]]),
    "openapi_extra": docs.image_body(),
}

_IMAGE_FIELDS = ("data", "body")
_MAX_FIELDS = 16
"""Fields of a form besides the images."""


@router.get("/ping", responses=docs.example({"status": "Healthy"}))
async def ping(request: Request) -> Response:
    """Whether requests are accepted and the models loaded."""
    try:
        await health.ready(request)
    except CamserveError:
        return json_response({"status": "Unhealthy"}, 500)
    return json_response({"status": "Healthy"})


# `curl -T` sends PUT.
@router.put("/predictions/{name}/{version}", include_in_schema=False)
@router.put("/predictions/{name}", include_in_schema=False)
@router.post("/predictions/{name}/{version}", **_PREDICTIONS)
@router.post("/predictions/{name}", **_PREDICTIONS)
async def predictions(request: Request, name: str, version: str | None = None) -> Response:
    """The top classes with their scores."""
    return await _answer(request, name, version, PredictOptions)


@router.put("/explanations/{name}/{version}", include_in_schema=False)
@router.put("/explanations/{name}", include_in_schema=False)
@router.post("/explanations/{name}/{version}", **_EXPLANATIONS)
@router.post("/explanations/{name}", **_EXPLANATIONS)
async def explanations(request: Request, name: str, version: str | None = None) -> Response:
    """The map of a class: the top-1 class, or `target`."""
    return await _answer(request, name, version, ExplainOptions)


async def _answer(
    request: Request, name: str, version: str | None, form: type[CommonOptions]
) -> Response:
    service, kind = service_of(request), bodies.media_type(request)
    given, content_type = query(request), request.headers.get("content-type", "")
    most = service.limits.images + _MAX_FIELDS

    def read(model: LoadedModel, body: bytes) -> Plan:
        images: Sequence[Sent] = [body]
        fields = given
        if kind == "multipart/form-data":
            parts = forms.form_parts(content_type, body, most, lambda _name: None)
            images = [data for name, data in parts if name in _IMAGE_FIELDS]
            texts = [(name, data) for name, data in parts if name not in _IMAGE_FIELDS]
            fields = given | {name: data.decode(errors="replace") for name, data in texts}
        elif bodies.is_json(kind):
            images = [image_of(model, json_of(body), {})]
        if not images:
            raise EmptyBody("The form has no part named 'data'; use curl -F data=@cat.jpg.")
        if form is PredictOptions:
            fields = {name: value for name, value in fields.items() if name != "target"}
        chosen = options(form, fields)
        if isinstance(chosen, ExplainOptions) and chosen.verify != "false":
            raise InvalidOption(
                "An answer of this protocol is the map alone, without a place for a verdict; use "
                f"/explain?verify={chosen.verify}."
            )
        if chosen.uncertainty:
            raise InvalidOption(
                "An answer of this protocol has no place for `uncertainty`; use POST /predict, or "
                "the output `margin` or `entropy` of the Open Inference Protocol."
            )
        return Plan([ImageRequest(image, chosen) for image in images], _respond, price=_price)

    return await answer(request, named(service, name, version), read)


def _respond(replies: Sequence[Reply]) -> Response:
    rendered = [
        _explanation(r) if isinstance(r.options, ExplainOptions) else _prediction(r)
        for r in replies
    ]
    return json_response(rendered[0] if len(rendered) == 1 else rendered)


def _price(sizes: AnswerSizes) -> Price:
    if isinstance(sizes.options, ExplainOptions):
        return lambda _: 256 + NUMBER_BYTES * sizes.maps * math.prod(sizes.cells)
    return lambda _: 256 + sizes.predictions()


def _prediction(reply: Reply) -> Any:
    """{label: score}; of a detector, for each box {label: [x1, y1, x2, y2], "score": score}."""
    labels = reply.model.labels
    best = reply.answered.inference.predictions
    if reply.model.task == "detection":
        return [_detection(labels, each) for each in best]
    return {_key(labels, prediction.class_id): prediction.score for prediction in best}


def _detection(labels: Sequence[str], found: Prediction) -> dict[str, Any]:
    assert found.box is not None
    x, y, w, h = found.box
    return {_key(labels, found.class_id): [x, y, x + w, y + h], "score": found.score}


def _key(labels: Sequence[str], class_id: int) -> str:
    """The label, with the id if other classes have the same label."""
    label = labels[class_id]
    return label if labels.count(label) == 1 else f"{label} ({class_id})"


def _explanation(reply: Reply) -> Any:
    """The maps (n, rows, columns). Raises InvalidOption if they differ in shape, or are none."""
    grids = [explanation.grid for explanation in reply.answered.inference.explanations]
    if len({grid.shape for grid in grids}) != 1:
        raise InvalidOption(
            f"An answer of this protocol is one array of maps, and there are {len(grids)} of "
            f"{len({grid.shape for grid in grids})} shapes; use POST /explain."
        )
    return np.stack(grids)
