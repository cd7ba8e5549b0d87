"""Middleware: request id, timing and log line, host, key, bounds, and unread bodies."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    HeadTooLarge,
    HostNotAllowed,
    InvalidOption,
    KeyLimit,
    QueueFull,
    ShuttingDown,
    Unauthorized,
)
from service.metrics import Metrics, RequestLabels
from service.routes.access import is_open, path_of, sent_key, why_unauthorized
from service.routes.hosts import HostRule
from service.routes.problems import problem, unexpected
from service.scheduling.admission import Admission, RequestPermits
from service.security.keys import KeyFile
from service.security.quotas import Quotas
from service.tracing import Traces

_log = structlog.get_logger("camserve.requests")
CLIENT_CLOSED_REQUEST = 499
"""Status in log and metrics of a request whose client disconnected; no client reads it."""

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""The pages at `/` and `/docs` use only scripts and styles that this service serves."""

SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every response."""

_SECURITY_HEADERS = tuple(
    (name.lower().encode("latin-1"), value.encode("latin-1"))
    for name, value in SECURITY_HEADERS.items()
)

CORS: Mapping[str, Any] = {
    "allow_methods": ["GET", "HEAD", "POST"],
    "allow_headers": [
        *("Accept", "Authorization", "Content-Encoding", "Content-Type"),
        *("Inference-Header-Content-Length", "Token", "traceparent", "tracestate"),
        *("X-API-Key", "X-Request-ID", "X-Request-Timeout"),
    ],
    "expose_headers": [
        *("Inference-Header-Content-Length", "Retry-After", "Server-Timing", "WWW-Authenticate"),
        *("X-Kernels", "X-Kernels-Left-Out", "X-Request-ID"),
    ],
    "max_age": 600,
}
"""What pages of other origins may send and read, if any are allowed. Cookies are ignored."""

MAX_PATH = 4 << 10
"""Characters of a path."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Gives each request an id (its own `X-Request-ID`, or a new one), logs and counts it.

    What the request holds is released once its response is sent: `send` returns from the last
    message when the socket has taken it (`service.routes.server.outbox`).
    An unhandled exception becomes a 500 problem body here, without its text.

    routes: those that a request is counted under if it was refused before it reached its own.
    """

    app: ASGIApp
    metrics: Metrics
    traces: Traces | None = None
    routes: Sequence[BaseRoute] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        scope["request_id"] = sent if _ID.fullmatch(sent) else uuid.uuid4().hex
        scope["started"] = started = time.monotonic()
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=scope["request_id"])
        status = 0
        answered = 0.0

        async def send_with_id(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, scope["request_id"])
            answered = time.monotonic()
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                held.release()

        held: RequestPermits = scope.setdefault("held", RequestPermits())
        try:
            with held:
                await self.app(scope, receive, send_with_id)
        except ClientDisconnect:  # while it sent its body: no client is left to answer
            status = CLIENT_CLOSED_REQUEST
        except Exception as error:  # noqa: BLE001 - the last stop before the server
            _log.error("internal_error", exc_info=error)
            if not status:
                await unexpected(Request(scope))(scope, receive, send_with_id)
        finally:
            self._report(scope, status, (answered or time.monotonic()) - started)

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        route, noted = self._route_of(scope), scope.get("log", {})
        labels = RequestLabels(
            noted.get("model", ""), noted.get("explained_by", ""), scope.get("key_name", "")
        )
        self.metrics.count_request(route, status, seconds, labels)
        is_probe = route.startswith(("/health", "/metrics"))
        method = scope.get("sent_method", scope["method"])
        fields = {"method": method, "route": route, **noted}
        log = _log.debug if is_probe else _log.info
        log("request", status=status, ms=round(seconds * 1000, 1), **fields)
        if self.traces is not None and not is_probe:
            fields["request_id"] = scope["request_id"]
            self.traces.record(Headers(scope=scope), seconds, fields, status)

    def _route_of(self, scope: Scope) -> str:
        """The path template of the route that a request is for, or "unmatched".

        A request that the middleware refused has not reached its route, which is looked up here.
        """
        route = scope.get("route")
        if route is None and len(scope["path"]) <= MAX_PATH:
            fitting = (each for each in self.routes if each.matches(scope)[0] == Match.FULL)
            route = next(fitting, None)
        return getattr(route, "path", "unmatched")


def _add_headers(message: Message, request_id: str) -> None:
    """Set the headers of every response."""
    added = ((b"x-request-id", request_id.encode("latin-1")), *_SECURITY_HEADERS)
    replaced = {name for name, _ in added}
    kept = (header for header in message.get("headers", ()) if header[0].lower() not in replaced)
    message["headers"] = [*kept, *added]


@dataclass(frozen=True, slots=True)
class HeadAsGet:
    """Answers HEAD like GET, without the body."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == HTTPStatus.METHOD_NOT_ALLOWED:
                    _name_head(MutableHeaders(scope=message))
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        if is_head:
            scope = {**scope, "method": "GET", "sent_method": "HEAD"}
        await self.app(scope, receive, send_head)


def _name_head(headers: MutableHeaders) -> None:
    """Add HEAD to a list of allowed methods that has GET."""
    methods = [method.strip() for method in headers.get("allow", "").split(",")]
    if "GET" in methods and "HEAD" not in methods:
        headers["allow"] = ", ".join([*methods, "HEAD"])


@dataclass(frozen=True, slots=True)
class BehindPrefix:
    """Serves the same paths with and without the prefix that a proxy adds.

    Some proxies strip the prefix and some forward it; mounted files are found only if the path
    begins with `root_path`.
    """

    app: ASGIApp
    prefix: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            path = scope["path"]
            if path != self.prefix and not path.startswith(f"{self.prefix}/"):
                path = self.prefix + path
            scope = {**scope, "root_path": self.prefix, "path": path}
        await self.app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class BoundedHeaders:
    """Refuses too many or too long header fields, and too long paths.

    Cookies are removed: the service does not use them, and the framework would parse those of every
    request with a regular expression whose time grows with the square of their length.
    """

    app: ASGIApp
    fields: int = 100
    characters: int = 16 << 10
    path: int = MAX_PATH

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            longest = max((len(value) for _, value in headers), default=0)
            long_path = len(scope["path"]) > self.path
            if len(headers) > self.fields or longest > self.characters or long_path:
                error = HeadTooLarge(
                    f"A request has a path of at most {self.path} characters and at most "
                    f"{self.fields} header fields of {self.characters} bytes each; send options in "
                    "the query, or as fields of a JSON body."
                )
                bare = Request({**scope, "headers": [], "path": scope["path"][: self.path]})
                await problem(bare, error)(scope, receive, send)
                return
            scope["headers"] = [header for header in headers if header[0] != b"cookie"]
        await self.app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class HostCheck:
    """Answers 421 to a request whose `Host` the rule does not accept.

    A request without one passes: browsers always send it, and HTTP/1.1 requires it.
    """

    app: ASGIApp
    rule: HostRule

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = Headers(scope=scope).getlist("host") if scope["type"] == "http" else []
        strange = next((host for host in sent if not self.rule.accepts(host)), None)
        if strange is None:
            await self.app(scope, receive, send)
            return
        error = HostNotAllowed(
            f"The Host header is {strange[:100]!r}, and this service accepts {self.rule}. "
            "Add the name to that setting if clients should use it."
        )
        await problem(Request(scope), error)(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Access:
    """Authenticates a request by its key: Bearer, `X-API-Key`, or the password of Basic.

    keys:         None: no authentication.
    open_metrics: whether `/metrics` needs no key.
    """

    app: ASGIApp
    keys: KeyFile | None
    quotas: Quotas
    open_metrics: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.keys is None or scope["type"] != "http" or self._is_open(scope):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = self.keys.owner(sent_key(headers))
        if key is None:
            refusal = Unauthorized(why_unauthorized(headers))
            await problem(Request(scope), refusal)(scope, receive, send)
            return
        structlog.contextvars.bind_contextvars(key=key.name)
        scope["key_name"] = key.name
        try:
            with self.quotas.visit(key) as visit:
                scope["visit"] = visit
                await self.app(scope, receive, send)
        except KeyLimit as error:  # of `visit`; those of the routes are handled by the app
            await problem(Request(scope), error)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return self.open_metrics if path_of(scope) == "/metrics" else is_open(scope)


@dataclass(frozen=True, slots=True)
class BoundedQuery:
    """Refuses a query of more than `names` parameters before they are parsed."""

    app: ASGIApp
    names: int = 1000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["query_string"].count(b"&") >= self.names:
            error = InvalidOption(f"The query has more than {self.names} options; send fewer.")
            await problem(Request(scope), error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class RefusedWhenFull:
    """Refuses a request to one of `routes`, by path, if admission has no place for it.

    The routes check admission too. But an overloaded service refuses most requests, and before a
    route runs, its options are validated, which takes longer than the rest of a refusal.
    """

    app: ASGIApp
    admission: Admission
    routes: Mapping[str, BaseRoute]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get(path_of(scope)) if scope["type"] == "http" else None
        if route is not None and scope["method"] == "POST":
            try:
                self.admission.check()
            except (QueueFull, ShuttingDown) as error:
                scope["route"] = route
                await problem(Request(scope), error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class DrainUnreadBody:
    """Reads the rest of a body, for at most `seconds`, before an early response is sent.

    Otherwise the server closes the connection while the client is sending, and the client reports
    a reset instead of the response. A client that waits for `100 Continue` has sent no body yet: it
    gets the response at once.
    """

    app: ASGIApp
    seconds: float = 1.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(headers := Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        unread = True
        holds_back = headers.get("expect", "").lower() == "100-continue"

        async def receive_and_note() -> Message:
            nonlocal unread, holds_back
            holds_back = False
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def drain() -> None:
            while unread:
                await receive_and_note()

        async def send_after_draining(message: Message) -> None:
            if message["type"] == "http.response.start" and unread:
                try:
                    await asyncio.wait_for(drain(), 0 if holds_back else self.seconds)
                except TimeoutError:
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.app(scope, receive_and_note, send_after_draining)


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
