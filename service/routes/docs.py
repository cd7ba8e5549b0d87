"""The parts of the OpenAPI document that FastAPI does not write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any, Literal, get_args, get_origin

from fastapi.routing import APIRoute
from pydantic import BaseModel

from api_schemas import options
from api_schemas.answers import Answer, ExperimentAnswer, Problem
from api_schemas.options import ExperimentRequest, ExplainRequest, PredictRequest
from service.routes import examples
from service.routes.access import OPEN
from service.routes.integration import ErrorBody, Integration
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

_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of this service."},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "basic": {
        "type": "http",
        "scheme": "basic",
        "description": "Any user name, with an API key as the password.",
    },
}
"""The ways to send an API key; a service without keys accepts requests without one."""

_TAGS = {
    "classify": "Predictions for images, and the evidence for them.",
    "models": "The served models, and the layers that requests may name.",
    "operations": "Probes and metrics.",
}


def explain() -> dict[str, Any]:
    """Keyword arguments of the route `/explain`."""
    images = dict.fromkeys(("image/jpeg", "image/png", "image/webp"), _BINARY)
    return _classifying(ExplainRequest, examples.EXPLAIN, examples.EXPLAINED, images)


def predict() -> dict[str, Any]:
    """Keyword arguments of the route `/predict`."""
    return _classifying(PredictRequest, examples.PREDICT, examples.PREDICTED, {})


def experiments() -> dict[str, Any]:
    """Keyword arguments of the route `/experiments`."""
    described = _classifying(ExperimentRequest, examples.EXPERIMENT, examples.EXPERIMENTED, {})
    described["responses"][200]["model"] = ExperimentAnswer
    body = described["openapi_extra"]["requestBody"]
    body["description"] = "A form with parts named `image` and a part `edits`, or JSON with base64."
    for raw in ("image/*", "application/octet-stream"):
        del body["content"][raw]
    form = body["content"]["multipart/form-data"]["schema"]
    form["required"].append("edits")
    form["properties"]["edits"] = {
        "type": "string",
        "contentMediaType": "application/json",
        "description": "A JSON list, as `edits` of a JSON body.",
    }
    return described


def example(answer: Any) -> dict[int | str, dict[str, Any]]:
    """The responses of a route: an example of the JSON that it answers with status 200."""
    return {200: {"content": {"application/json": {"example": answer}}}}


def json_body(form: type[BaseModel], request: Any) -> dict[str, Any]:
    """The body of a route that parses it itself: its model, and an example."""
    return _body({"application/json": _json(form, request)})


def image_body() -> dict[str, Any]:
    """The body of a route that takes one image file."""
    return _body(dict.fromkeys(("image/*", "application/octet-stream"), _BINARY))


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


def protocol_errors(body: ErrorBody) -> dict[int | str, dict[str, Any]]:
    """The errors of a route whose protocol has its own error body, with examples."""
    return {
        kind: {
            "description": f"An error of {whose}, in the format of the protocol.",
            "content": {
                "application/json": {
                    "schema": {"type": "object"},
                    "example": body(status, _CODES[status], _PROBLEMS[status]),
                }
            },
        }
        for kind, status, whose in (("4XX", 404, "the request"), ("5XX", 503, "the service"))
    }


def complete(document: dict[str, Any], integrations: Sequence[Integration]) -> dict[str, Any]:
    """The document that FastAPI wrote, with servers, tags, and the schemas that it does not know.

    Servers are relative to the document's own address, so it is right behind any proxy's prefix.
    """
    document.setdefault("servers", [{"url": "."}])
    tags = _TAGS | {
        str(integration.routers[0].tags[0]): integration.description for integration in integrations
    }
    document["tags"] = [{"name": name, "description": text} for name, text in tags.items()]
    document["security"] = [{}, *({name: []} for name in _SECURITY)]
    components = document.setdefault("components", {})
    components["securitySchemes"] = _SECURITY
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete_operation(operation)
            is_open = path in OPEN or any(each.is_open(path) for each in integrations)
            if is_open and "401" not in operation["responses"]:
                operation["security"] = []
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # of FastAPI's own errors
        schemas.pop(name, None)
    for name, schema in _components(integrations):
        schemas.setdefault(name, schema)
    _name_enums(document)
    schemas.update(
        {name: {"type": "string", "enum": list(values)} for values, name in ENUMS.items()}
    )
    text = json.dumps(document).replace(json.dumps(examples.NULL), "null")
    whole: dict[str, Any] = json.loads(text)
    return whole


def operation_id(route: APIRoute) -> str:
    """A stable name of an operation for generated clients, such as `explain` or `kernels`.

    That of its function, with the protocol before it and `_version` behind it where it has those.
    """
    tag = str(route.tags[0]) if route.tags else ""
    words = tag.lower().replace("-", " ").split()
    protocol = "" if tag in ("", *_TAGS) else "_".join((*words, ""))
    return f"{protocol}{route.name}{'_version' if '{version}' in route.path else ''}"


ENUMS = {
    get_args(each): name
    for name, each in vars(options).items()
    if get_origin(each) is Literal and len(get_args(each)) > 1
}
"""The values of each option that has a name, by which schemas share one definition."""


def _name_enums(node: Any) -> None:
    """Replace each enumeration that has a name by a reference to it, wherever it is."""
    for key, inner in list(node.items() if isinstance(node, dict) else enumerate(node)):
        name = ENUMS.get(tuple(inner.get("enum", ()))) if isinstance(inner, dict) else None
        if name:
            more = {k: v for k, v in inner.items() if k not in ("enum", "type", "title")}
            node[key] = {"$ref": f"#/components/schemas/{name}", **more}
        elif isinstance(inner, dict | list):
            _name_enums(inner)


def _complete_operation(operation: dict[str, Any]) -> None:
    first, _, rest = operation.pop("description", "").partition("\n\n")
    if first:
        operation["summary"] = " ".join(first.split()).rstrip(".")
    if rest:
        operation["description"] = " ".join(rest.split())
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":  # is never null, though its function may be called without
            parameter["schema"] = _not_null(parameter["schema"])
    responses = operation["responses"]
    if "4XX" not in responses:  # any route may get too long a head, or a wrong host
        responses |= {str(status): of for status, of in problems(421, 431).items()}
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = [each for each in schema.get("anyOf", []) if each.get("type") != "null"]
    return {**kinds[0], "title": schema["title"]} if kinds else schema


def _components(integrations: Sequence[Integration]) -> Iterator[tuple[str, Any]]:
    """Schemas that routes refer to and FastAPI does not collect by itself."""
    models: list[type[BaseModel]] = [Problem, ExplainRequest, PredictRequest, ExperimentRequest]
    models += [schema for integration in integrations for schema in integration.schemas]
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        yield from schema.pop("$defs", {}).items()
        yield model.__name__, schema


def _json(form: type[BaseModel], request: Any) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{form.__name__}"}, "example": request}


def _body(content: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The keyword argument `openapi_extra` of a route that takes a body of these types."""
    return {"requestBody": {"required": True, **more, "content": content}}


def _classifying(
    form: type[BaseModel], request: Any, response: Any, images: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of a route that takes images in three ways, with examples."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    content = {
        "multipart/form-data": {
            "schema": {"type": "object", "required": ["image"], "properties": {"image": files}}
        },
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
        "application/json": _json(form, request),
    }
    text = "A form with parts named `image`, one raw image, or JSON with base64."
    result = {
        "model": Answer,
        "description": "One result an image.",
        "content": {"application/json": {"example": response}, **images},
    }
    return {
        "response_model": None,
        "responses": {200: result, **problems(*_PROBLEMS)},
        "openapi_extra": _body(content, description=text),
    }
