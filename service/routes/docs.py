"""What the OpenAPI document says of a route, beyond its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from api_schemas.answers import Answer, Problem
from api_schemas.options import ExplainRequest, PredictRequest
from api_schemas.protocols import (
    InferRequest,
    Instances,
    LabelingRequest,
    LabelStudioRequest,
    LabelStudioSetup,
)
from service.routes import examples, peers
from service.routes.problems import PROBLEM_MEDIA_TYPE

_PROBLEMS = {
    400: "The body or an image cannot be read.",
    401: "Missing or unknown API key.",
    404: "Unknown model, layer or class; `detail` names the nearest ones.",
    406: "One image cannot be the response for several images.",
    408: "The body did not arrive in time.",
    413: "The body, an image or the number of images exceeds the limit.",
    415: "Unsupported content type or image format.",
    421: "The `Host` header names a host that this service does not accept.",
    424: "An image could not be fetched from its URL.",
    422: "An option is unknown, out of range, or contradicts another.",
    429: "The queue is full, or the key exceeds its limit; retry after `Retry-After`.",
    431: "Request line and headers together exceed the limit; send options in a JSON body.",
    500: "Inference or rendering failed; the log has the cause under the request id.",
    503: "The service is shutting down or the model is not ready.",
    504: "The deadline passed before the response was ready.",
}

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}

_CODES = {
    400: "corrupt_image",
    401: "unauthorized",
    404: "unknown_layer",
    406: "not_acceptable",
    408: "slow_upload",
    413: "body_too_large",
    415: "unsupported_image",
    421: "host_not_allowed",
    424: "image_url_failed",
    422: "invalid_option",
    429: "queue_full",
    431: "head_too_large",
    500: "inference_failed",
    503: "model_not_ready",
    504: "deadline_exceeded",
}
"""One of the codes of each status."""

_TAGS = {
    "classify": "Predictions for images, and the evidence for them.",
    "models": "The served models, and the layers that requests may name.",
    "operations": "Probes and metrics.",
    "model repository": "Load and unload models, with an admin key.",
    "Open Inference Protocol V2": "For clients of KServe, Triton and MLServer.",
    "KServe V1": "For clients of KServe's first protocol and of TensorFlow Serving.",
    "TorchServe": "For clients of TorchServe.",
    "X-AnyLabeling": "The remote server of the labeling program.",
    "Label Studio": "The machine learning backend of the labeling program.",
}

_BODIES: dict[str, type[BaseModel]] = {
    "POST /v1/models/{name}:predict": Instances,
    "POST /v1/models/{name}:explain": Instances,
    "POST /v2/models/{name}/infer": InferRequest,
    "POST /v2/models/{name}/explain": InferRequest,
    "POST /integrations/x-anylabeling/v1/predict": LabelingRequest,
    "POST /integrations/label-studio/setup": LabelStudioSetup,
    "POST /integrations/label-studio/predict": LabelStudioRequest,
}
"""What routes read that take their body apart themselves."""


def explain() -> dict[str, Any]:
    """Keyword arguments of the route `/explain`."""
    pictures = dict.fromkeys(("image/jpeg", "image/png", "image/webp"), _BINARY)
    return _described(ExplainRequest, pictures)


def predict() -> dict[str, Any]:
    """Keyword arguments of the route `/predict`."""
    return _described(PredictRequest, {})


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem responses that a route may give."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": _PROBLEMS[status],
            "content": {PROBLEM_MEDIA_TYPE: {"schema": schema, "example": _problem(status)}},
        }
        for status in statuses
    }


def _problem(status: int) -> dict[str, Any]:
    return Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        code=_CODES[status],
        detail=_PROBLEMS[status],
        request_id="4bf59e975b3c466190679cd8b4c403f5",
    ).model_dump()


def peer_errors() -> dict[int | str, dict[str, Any]]:
    """What a route of another server's protocol may answer; the bodies are `routes.peers`'."""
    content = {"application/json": {"schema": {"type": "object"}}}
    return {
        kind: {
            "description": f"An error of {whose}, in the format of the protocol.",
            "content": content,
        }
        for kind, whose in (("4XX", "the request"), ("5XX", "the service"))
    }


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """What FastAPI wrote, with what it does not know: schemas, bodies, examples, tags, servers.

    Servers are relative to where the document lies, so it holds behind any proxy's prefix.
    """
    document.setdefault("servers", [{"url": "."}])
    document["tags"] = [{"name": name, "description": text} for name, text in _TAGS.items()]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete_operation(method, path, operation)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # of FastAPI's own errors
        schemas.pop(name, None)
    for name, schema in _components():
        schemas.setdefault(name, schema)
    return document


def _complete_operation(method: str, path: str, operation: dict[str, Any]) -> None:
    first, _, rest = operation.pop("description", "").partition("\n\n")
    if first:
        operation["summary"] = " ".join(first.split()).rstrip(".")
    if rest:
        operation["description"] = " ".join(rest.split())
    responses = operation["responses"]
    if "4XX" not in responses:  # every route may be sent a head without end, or to a wrong host
        responses |= {str(status): of for status, of in problems(421, 431).items()}
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    _describe_body(method, path, operation)
    answer = examples.of(examples.ANSWERS, method, path)
    if answer is not None:
        responses["200"]["content"]["application/json"]["example"] = answer
    for kind, status in (("4XX", 404), ("5XX", 503)):
        theirs = peers.error(f"{path}/", status, _CODES[status], _PROBLEMS[status])
        if theirs is not None and kind in responses:
            responses[kind]["content"]["application/json"]["example"] = theirs[1]


def _describe_body(method: str, path: str, operation: dict[str, Any]) -> None:
    form = examples.of(_BODIES, method, path)
    if form is not None:
        schema = {"$ref": f"#/components/schemas/{form.__name__}"}
        content: dict[str, Any] = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    elif operation["tags"] == ["TorchServe"] and method == "post":
        pictures = dict.fromkeys(("image/*", "application/octet-stream"), _BINARY)
        operation["requestBody"] = {"required": True, "content": pictures}
    example = examples.of(examples.REQUESTS, method, path)
    if example is not None:
        operation["requestBody"]["content"]["application/json"]["example"] = example


def _components() -> Iterator[tuple[str, Any]]:
    """Schemas that routes refer to and FastAPI does not collect by itself."""
    models: list[type[BaseModel]] = [Problem, ExplainRequest, PredictRequest, *_BODIES.values()]
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        yield from schema.pop("$defs", {}).items()
        yield model.__name__, schema


def _described(form: type, pictures: dict[str, Any]) -> dict[str, Any]:
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
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
            "application/json": {"schema": {"$ref": f"#/components/schemas/{form.__name__}"}},
        },
    }
    answer = {"model": Answer, "description": "One result an image.", "content": pictures}
    return {
        "response_model": None,
        "responses": {200: answer, **problems(*_PROBLEMS)},
        "openapi_extra": {"requestBody": body},
    }
