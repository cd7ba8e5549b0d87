"""What the OpenAPI document says of a route, beyond its parameters."""

from __future__ import annotations

from typing import Any

from api_schemas.answers import Answer
from api_schemas.options import ExplainRequest, PredictRequest
from api_schemas.problems import Problem
from service.routes.problems import PROBLEM_MEDIA_TYPE

_PROBLEMS = {
    400: "The body or an image cannot be read.",
    401: "No API key, or one that is not known.",
    404: "No such model, layer or class; `detail` names the nearest ones.",
    406: "Several images cannot be answered by one picture.",
    408: "The body did not arrive in time.",
    413: "The body, an image or their number is over the limit.",
    415: "Not a content type or an image format that is read.",
    424: "An image could not be fetched from its URL.",
    422: "An option is unknown, out of range, or contradicts another.",
    429: "The queue is full, or the key has used what it may; try again after `Retry-After` seconds.",
    500: "The model or the drawing failed; the log has the cause under the request id.",
    503: "The service is shutting down or the model is not ready.",
    504: "The answer was not ready at its deadline.",
}


def explain() -> dict[str, Any]:
    """Keyword arguments of the route `/explain`."""
    pictures = {
        kind: {"schema": {"type": "string", "format": "binary"}}
        for kind in ("image/jpeg", "image/png", "image/webp")
    }
    return _described(ExplainRequest, pictures)


def predict() -> dict[str, Any]:
    """Keyword arguments of the route `/predict`."""
    return _described(PredictRequest, {})


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem responses that a route may give."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": _PROBLEMS[status], "content": {PROBLEM_MEDIA_TYPE: schema}}
        for status in statuses
    }


def peer_errors() -> dict[int | str, dict[str, Any]]:
    """What a route of another server's protocol may answer; the bodies are `routes.peers`'."""
    content = {"application/json": {"schema": {"type": "object"}}}
    return {
        kind: {"description": f"The error of {whose}, as the protocol has it.", "content": content}
        for kind, whose in (("4XX", "the request"), ("5XX", "the service"))
    }


def components() -> dict[str, Any]:
    """Schemas that routes refer to and FastAPI does not collect by itself."""
    found: dict[str, Any] = {}
    for model in (Problem, ExplainRequest, PredictRequest):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[model.__name__] = schema
    return found


def _described(form: type, pictures: dict[str, Any]) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    body = {
        "required": True,
        "description": "A form with parts named `image`, one raw image, or JSON with base64.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}}
                    },
                }
            },
            "image/*": binary,
            "application/octet-stream": binary,
            "application/json": {"schema": {"$ref": f"#/components/schemas/{form.__name__}"}},
        },
    }
    answer = {"model": Answer, "description": "One result an image.", "content": pictures}
    return {
        "response_model": None,
        "responses": {200: answer, **problems(*_PROBLEMS)},
        "openapi_extra": {"requestBody": body},
    }
