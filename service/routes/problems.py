"""Errors as responses: one table from exception class to status, one body for all (RFC 9457).

On the paths of an integration the body is that of its protocol (`service.routes.integration`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from api_schemas.answers import Problem
from api_schemas.options import (
    CommonOptions,
    ExperimentOptions,
    ExplainOptions,
    PredictOptions,
)
from service import errors
from service.errors import CamserveError, Refused, nearest
from service.routes.integration import integrations_of

_log = structlog.get_logger(__name__)

STATUS: dict[type[CamserveError], int] = {
    errors.MalformedRequest: 400,
    errors.HostNotAllowed: 421,
    errors.EmptyBody: 400,
    errors.InvalidOption: 422,
    errors.HeadTooLarge: 431,
    errors.BodyTooLarge: 413,
    errors.SlowUpload: 408,
    errors.UnsupportedMediaType: 415,
    errors.NotAcceptable: 406,
    errors.UnknownModel: 404,
    errors.UnknownVersion: 404,
    errors.UnknownLayer: 404,
    errors.UnknownClass: 404,
    errors.InvalidImageData: 400,
    errors.EmptyImage: 400,
    errors.UnsupportedImage: 415,
    errors.CorruptImage: 400,
    errors.ImageTooLarge: 413,
    errors.Unauthorized: 401,
    errors.ImageUrlRefused: 400,
    errors.ImageUrlFailed: 424,
    errors.QueueFull: 429,
    errors.KeyLimit: 429,
    errors.ShuttingDown: 503,
    errors.OutOfMemory: 503,
    errors.ModelNotReady: 503,
    errors.ConfigurationError: 503,
    errors.DeadlineExceeded: 504,
    errors.InferenceFailed: 500,
    errors.NonFiniteOutput: 500,
    errors.RenderFailed: 500,
    errors.CamserveError: 500,
}

_SHOWN = 200
"""Characters of the client's text that an error repeats at most."""

_OPTIONS: Mapping[str, type[CommonOptions | ExperimentOptions]] = {
    "/explain": ExplainOptions,
    "/predict": PredictOptions,
    "/experiments": ExperimentOptions,
}
"""The options of the routes that have some, for suggestions."""

_WITH_INPUT = {"value_error", "missing", "list_type", "json_invalid"}
"""Errors of pydantic whose message names what was sent, or that are about something else."""

_CODES = {404: "not_found", 405: "method_not_allowed"}

PROBLEM_MEDIA_TYPE = "application/problem+json"

CHALLENGE = 'Bearer realm="camserve", Basic realm="camserve", charset="UTF-8"'
"""Header of every 401. A browser then prompts for a password, which is the key."""


NOT_LOADABLE = "The model cannot be loaded; GET /models and the log of the service have the reason."


def status_of(error: CamserveError) -> int:
    """The status of an error's class, or of its nearest base in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def problem(request: Request, error: CamserveError) -> JSONResponse:
    """The response for an error; a server-side error is logged with its cause."""
    if isinstance(error, errors.ConfigurationError):
        # Of a model that is loaded on demand: the detail may name files.
        _log.error(error.code, detail=error.detail)
        error = errors.ConfigurationError(NOT_LOADABLE)
    status = status_of(error)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error(error.code, exc_info=error)
    headers = {}
    if isinstance(error, Refused):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = CHALLENGE
    return _response(request, status, error.code, error.detail, headers)


def describe(issues: Sequence[Any], known: Iterable[str] = ()) -> str:
    """The errors of pydantic as one sentence: each option and its accepted values.

    known: the names that are accepted here, for suggestions.
    """
    text = "; ".join(_sentence(issue, list(known)) for issue in issues[:5])
    return text if text.endswith("?") else f"{text}."


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem body."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, CamserveError)
        return problem(request, error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        form = _OPTIONS.get(_path(request), ExplainOptions)
        return problem(request, errors.InvalidOption(describe(error.errors(), form.model_fields)))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        # Not `request.url`: the standard library keeps the last 128 addresses it has split.
        path = request.scope["path"][:_SHOWN]
        detail = {
            404: f"There is no route {path}; /docs lists all routes.",
            405: _wrong_method(request, path, error),
        }.get(error.status_code, str(error.detail))
        code = _CODES.get(error.status_code, "http_error")
        return _response(request, error.status_code, code, detail, dict(error.headers or {}))

    app.add_exception_handler(CamserveError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)


def _wrong_method(request: Request, path: str, error: HTTPException) -> str:
    allowed = (error.headers or {}).get("Allow")
    detail = f"{path} does not accept {request.method[:_SHOWN]}"
    detail += f"; it accepts {allowed}." if allowed else "; see /docs."
    if "access-control-request-method" in request.headers:
        detail += " Pages of other origins may call it if CAMSERVE_CORS_ORIGINS lists them."
    return detail


def unexpected(request: Request) -> JSONResponse:
    """The response for an unexpected exception; the caller logs it."""
    detail = "The server failed unexpectedly; its log has the cause under this request id."
    return _response(request, 500, "internal_error", detail, {})


def _response(
    request: Request, status: int, code: str, detail: str, headers: dict[str, str]
) -> JSONResponse:
    for integration in integrations_of(request.scope):
        error = integration.error(_path(request), status, code, detail)
        if error is not None:
            return JSONResponse(error[1], status_code=error[0], headers=headers)
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        code=code,
        detail=detail,
        request_id=request.scope.get("request_id", ""),
    )
    return JSONResponse(
        body.model_dump(), status_code=status, headers=headers, media_type=PROBLEM_MEDIA_TYPE
    )


def _path(request: Request) -> str:
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))


def _sentence(issue: Any, known: Sequence[str]) -> str:
    *around, name = [_shown(part) for part in issue["loc"] if part not in ("query", "body")] or [""]
    location = ".".join((*around, name))
    if issue["type"] == "extra_forbidden":
        if around:
            return f"{'.'.join(around)} has no field {name!r}"
        route = next((route for route, form in _OPTIONS.items() if name in form.model_fields), None)
        if route is not None:
            return f"{name!r} is an option of {route}, which this route does not accept"
        return f"there is no option {name!r}.{nearest(name, known)}".rstrip(".")
    message, given = str(issue["msg"]).removeprefix("Value error, "), _shown(issue["input"])
    message = message[:1].lower() + message[1:]
    if given and issue["type"] not in _WITH_INPUT:
        message += f", not {given!r}" if isinstance(issue["input"], str) else f", not {given}"
    if issue["type"] == "literal_error":
        choices = re.findall("'([^']*)'", issue["ctx"]["expected"])
        several = given.split(",")
        if around and len(several) > 1 and set(several) <= set(choices):
            repeated = "&".join(f"{around[0]}={value}" for value in several)
            return f"{around[0]}: repeat the parameter: {repeated}, or send a list in JSON"
        message += f".{nearest(given, choices)}".rstrip(".")
    if issue["type"] == "list_type" and isinstance(issue["input"], str | int) and name != "images":
        message += f"; send [{json.dumps(given)}]"
    return f"{location}: {message}" if location else message


def _shown(value: object) -> str:
    """A name or value that a client sent, shortened."""
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64):
        return str(value)
    return value[:_SHOWN] if isinstance(value, str) else ""
