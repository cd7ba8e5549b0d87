"""What the generic routes know of another program's protocol: a record that its module makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.types import Scope

ErrorBody = Callable[[int, str, str], Mapping[str, Any]]
"""Makes the JSON body of an error from its status, code and detail."""

_AS_BAD_REQUEST = frozenset({406, 415, 422, 424})
"""Statuses that these protocols do not distinguish from 400."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Integration:
    """One protocol: its routes, and what other routes and the middleware need to know of it.

    routers:     its routes.
    description: of their tag in the OpenAPI document.
    schemas:     models of the bodies that its routes parse themselves, for that document.
    prefixes:    beginnings of the paths on which errors have the protocol's own body.
    error_body:  makes that body; None: errors are problems (RFC 9457), as on all other paths.
    statuses:    statuses of errors that the protocol replaces by others.
    open_paths:  paths that need no API key. open_below: beginnings of such paths.
    """

    routers: tuple[APIRouter, ...]
    description: str
    schemas: tuple[type[BaseModel], ...] = ()
    prefixes: tuple[str, ...] = ()
    error_body: ErrorBody | None = None
    statuses: Mapping[int, int] = field(default_factory=dict)
    open_paths: frozenset[str] = frozenset()
    open_below: tuple[str, ...] = ()

    def error(
        self, path: str, status: int, code: str, detail: str
    ) -> tuple[int, Mapping[str, Any]] | None:
        """Status and body of an error at a path; None if the body is not the protocol's."""
        if self.error_body is None or not path.startswith(self.prefixes):
            return None
        status = 400 if status in _AS_BAD_REQUEST else self.statuses.get(status, status)
        return status, self.error_body(status, code, detail)

    def is_open(self, path: str) -> bool:
        """Whether a path of this protocol needs no API key."""
        return path in self.open_paths or path.startswith(self.open_below)


def integrations_of(scope: Scope) -> Sequence[Integration]:
    """The integrations of the app that a request came to; none before it came to one."""
    integrations: Sequence[Integration] = ()
    if "app" in scope:
        integrations = scope["app"].state.integrations
    return integrations
