"""Authentication: an API key on every route except the open ones, each key within its limits."""

from __future__ import annotations

import base64
import binascii

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from service.routes.integration import integrations_of
from service.routes.state import service_of
from service.security.keys import KeyFile
from service.security.quotas import Visit

OPEN = frozenset(
    {
        "/",
        "/docs",
        "/favicon.ico",
        "/openapi.json",
        "/health/live",
        "/health/ready",
    }
)
"""Paths without secrets and without cost: probes, the page, and the description of the routes.
Integrations add their own (`Integration.open_paths`)."""

OPEN_BELOW = ("/docs/static/", "/page/")


def is_open(scope: Scope) -> bool:
    """Whether the path of a request needs no API key."""
    path = path_of(scope)
    is_generic = path in OPEN or path.startswith(OPEN_BELOW)
    return is_generic or any(integration.is_open(path) for integration in integrations_of(scope))


def sent_key(headers: Headers) -> str:
    """The key of a request, or "": from Authorization if it is there, else from X-API-Key.

    A labeling program sends it as Token.
    """
    scheme, _, value = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(value.strip(), validate=True).decode("latin-1")
        except (binascii.Error, ValueError):
            return ""
        return pair.partition(":")[2]
    return headers.get("x-api-key") or headers.get("token", "")


def why_unauthorized(headers: Headers) -> str:
    """Why the key of a request is not accepted, and how to send one; never the key itself."""
    how = "Authorization: Bearer KEY, X-API-Key: KEY, or as the password of Basic"
    if sent_key(headers):
        return (
            "The API key that was sent is not one of this service: it is incomplete, or was "
            f"replaced. Ask the operator for a valid key, and send it as {how}."
        )
    if "authorization" in headers:
        return f"The Authorization header contains no API key; send one of this service: {how}."
    return f"No API key was sent; send one of this service: {how}."


def is_admin(headers: Headers, keys: KeyFile | None) -> bool:
    """Whether a request carries an admin key.

    Not as the password of Basic: a browser would send it with requests of other pages.
    """
    basic = headers.get("authorization", "").strip().lower().startswith("basic")
    return keys is not None and not basic and keys.owner(sent_key(headers)) is not None


def may_see_reasons(request: Request) -> bool:
    """Whether the response may contain the reason why a model is not served (paths, exceptions).

    With API keys: yes for a request with one, on open routes too. Without: yes if only this machine
    can connect, except on open routes, which a proxy may forward for any client.
    """
    service = service_of(request)
    if service.api_keys is not None:
        return service.api_keys.owner(sent_key(request.headers)) is not None
    return service.is_near and not is_open(request.scope)


def path_of(scope: Scope) -> str:
    """The path of a request without the prefix of a proxy."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def reserve(request: Request, cost: float) -> None:
    """Count the cost of a request, in forward passes, among what its key may use at once.

    Raises KeyLimit, InvalidOption.
    """
    visit = request.scope.get("visit")
    if isinstance(visit, Visit):
        visit.reserve(cost)
