"""The model repository extension of the Open Inference Protocol: list, load and unload models.

https://github.com/kserve/open-inference-protocol defines it. Loading a model that is
served reads its files again and replaces it without failing a request. All routes need an admin key
(`CAMSERVE_ADMIN_KEYS_FILE`), as `Authorization: Bearer KEY` or `X-API-Key: KEY`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from service.errors import CamserveError, ConfigurationError, EmptyBody
from service.integrations.protocol_requests import parsed
from service.models.library import Entry
from service.pipeline.process import result_of
from service.pipeline.service import Service
from service.routes import bodies, docs, encodings
from service.routes.access import is_admin
from service.routes.examples import VERSION
from service.routes.integration import Integration
from service.routes.problems import status_of
from service.routes.state import service_of
from service.scheduling.admission import Permit

_ERROR_BODY = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": _ERROR_BODY, "example": {"error": text}}},
    }
    for status, text in {
        400: "The body cannot be read, or the model cannot be loaded.",
        401: "No admin key, or one that is not known.",
        403: "No admin key is configured.",
        404: "No model of that name.",
        503: "The service is shutting down.",
    }.items()
}

router = APIRouter(prefix="/v2/repository", tags=["model repository"], responses=_ERRORS)

INTEGRATION = Integration(
    routers=(router,),
    description="Load and unload models, with an admin key.",
    open_below=(f"{router.prefix}/",),  # has admin keys, which its routes check
)

INDEX_BYTES, INDEX_SECONDS = 64 << 10, 10.0
"""Limits of the body of `index`, which has one field."""

STATES = {
    "loading": "LOADING",
    "ready": "READY",
    "failed": "UNAVAILABLE",
    "unloaded": "UNAVAILABLE",
}


class IndexRequest(BaseModel):
    """The body of `index`. ready: list only models that are ready."""

    ready: bool = False


_INDEX_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": _ERROR_BODY, "example": {"error": text}}},
    }
    for status, text in {
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "Too many requests arrive at once.",
    }.items()
}
_INDEX_SCHEMA = IndexRequest.model_json_schema()
_INDEX_BODY = {
    "content": {"application/json": {"schema": _INDEX_SCHEMA, "example": {"ready": True}}}
}
_LINES = [{"name": "builtin", "version": VERSION, "state": "READY", "reason": ""}]


@router.post(
    "/index",
    response_model=None,
    responses=docs.example(_LINES) | _INDEX_ERRORS,
    openapi_extra={"requestBody": _INDEX_BODY},
)
async def index(request: Request) -> Any:
    """Every model with its state and, if it is not served, the reason."""
    service = service_of(request)
    refused = _refused(request, service)
    if refused is not None:
        return refused
    index_request = await _index_request(request, service)
    entries = service.library.entries.values()
    return [
        _line(service, entry)
        for entry in entries
        if not index_request.ready or entry.state == "ready"
    ]


async def _index_request(request: Request, service: Service) -> IndexRequest:
    """The body, if there is one; read here, so that it is bounded, and read only for admins."""
    try:
        with Permit(service.admission) as permit:
            body = await bodies.read_body(request, permit, INDEX_BYTES, INDEX_SECONDS)
            body = await encodings.decoded(request, body, permit, INDEX_BYTES)
    except EmptyBody:
        return IndexRequest()
    return await result_of(service.scheduler.call(parsed, IndexRequest, body))


@router.post(
    "/models/{name}/load",
    response_model=None,
    responses=docs.example({"name": "builtin", "load": True}),
)
async def load(request: Request, name: str) -> Any:
    """Load a model, or a new version of it; responds when it is ready."""
    service = service_of(request)
    refused = _refused(request, service)
    if refused is not None:
        return refused
    try:
        await asyncio.shield(asyncio.wrap_future(service.library.load(name)))
    except CamserveError as error:
        return _error(error)
    return {"name": name, "load": True}


@router.post(
    "/models/{name}/unload",
    response_model=None,
    responses=docs.example({"name": "builtin", "unload": True}),
)
async def unload(request: Request, name: str) -> Any:
    """Unload a model; requests that use it finish first."""
    service = service_of(request)
    refused = _refused(request, service)
    if refused is not None:
        return refused
    try:
        service.library.unload(name)
    except CamserveError as error:
        return _error(error)
    return {"name": name, "unload": True}


def _line(service: Service, entry: Entry) -> dict[str, str]:
    model = service.pool.models.get(entry.spec.name)
    version = {} if model is None else {"version": model.version}
    reason = entry.reason or ""
    return {"name": entry.spec.name, **version, "state": STATES[entry.state], "reason": reason}


def _error(error: CamserveError) -> JSONResponse:
    status = 400 if isinstance(error, ConfigurationError) else status_of(error)
    return JSONResponse({"error": error.detail}, status_code=status)


def _refused(request: Request, service: Service) -> JSONResponse | None:
    """The response to an unauthorized request, or None."""
    if service.admin_keys is None:
        detail = "No admin key is configured: set CAMSERVE_ADMIN_KEYS_FILE to manage models."
        return JSONResponse({"error": detail}, status_code=403)
    if not is_admin(request.headers, service.admin_keys):
        detail = "Send an admin key: Authorization: Bearer KEY, or X-API-Key: KEY."
        return JSONResponse(
            {"error": detail}, status_code=401, headers={"WWW-Authenticate": "Bearer"}
        )
    return None
