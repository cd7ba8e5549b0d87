"""Errors as the protocols of other servers have them: on their paths, with their statuses.

KServe and the Open Inference Protocol answer {"error": text}, TorchServe {"code", "type",
"message"}, the remote server of X-AnyLabeling {"success": false, "error": {"code", "message"}}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Body = Callable[[int, str, str], Mapping[str, Any]]

_AS_BAD_REQUEST = frozenset({406, 415, 422, 424})
"""Ours tell apart what these protocols call a bad request."""

_TYPES = MappingProxyType(
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


def error(path: str, status: int, code: str, detail: str) -> tuple[int, Mapping[str, Any]] | None:
    """Status and body of an error at a path of a peer's; None where the path is our own."""
    for prefixes, body, statuses in _PEERS:
        if path.startswith(prefixes):
            status = 400 if status in _AS_BAD_REQUEST else statuses.get(status, status)
            return status, body(status, code, detail)
    return None


def _open_inference(_status: int, _code: str, detail: str) -> Mapping[str, Any]:
    return {"error": detail}


def _torchserve(status: int, code: str, detail: str) -> Mapping[str, Any]:
    kind = _TYPES.get(status, "InternalServerException")
    kind = {
        "unknown_model": "ModelNotFoundException",
        "unknown_version": "ModelVersionNotFoundException",
    }.get(code, kind)
    return {"code": status, "type": kind, "message": detail}


def _x_anylabeling(_status: int, code: str, detail: str) -> Mapping[str, Any]:
    return {"success": False, "error": {"code": code, "message": detail}}


_PEERS: tuple[tuple[tuple[str, ...], Body, Mapping[int, int]], ...] = (
    (("/v1/", "/v2/"), _open_inference, {}),
    # TorchServe knows one answer to too many requests.
    (("/predictions/", "/explanations/", "/ping"), _torchserve, {429: 503}),
    (("/integrations/x-anylabeling/",), _x_anylabeling, {}),
)
