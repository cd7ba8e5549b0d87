"""HTTP/1.1 connections with the bounds that uvicorn does not set.

On a request's head, on its framing, on pipelined requests, and on the time that a client may take
to send and to read.
"""

from __future__ import annotations

import asyncio
import enum
from http import HTTPStatus
from typing import Any

import httptools
import structlog
from fastapi import Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import CamserveError, HeadTooLarge, MalformedRequest, QueueFull
from service.routes.middleware import SECURITY_HEADERS
from service.routes.problems import problem
from service.routes.server.framing import Framing, fault_in
from service.routes.server.outbox import Message, Outbox
from service.scheduling.admission import RequestPermits
from service.scheduling.transfers import Transfer, Transfers

_log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 256 << 10
"""Of request line and headers; send a mask of many run lengths in a JSON body."""

HEAD_SECONDS = 20.0
"""From the first byte of a head, or from the connection's start, to the end of the head."""

LINGER_SECONDS = 1.0
"""How long a refused client may still send; if the connection were closed at once, the client would
report a reset instead of the error."""

MAX_BLANK_BYTES = 1024
"""Of empty lines before a request; old clients send one."""

MAX_PIPELINED = 16
"""Requests on one connection that wait for the response to an earlier one."""

MAX_DROPPED_BYTES = 1 << 20
"""Read and discarded after the last request that a connection accepts; then reading stops."""

HTTP_2 = (
    "The request is HTTP/2, and this service accepts HTTP/1.1; let the client use HTTP/1.1, or "
    "put a proxy before the service that accepts HTTP/2."
)
"""For a client that starts with HTTP/2. A request to upgrade is ignored instead."""


class _Phase(enum.Enum):
    BETWEEN = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class _Enough(Exception):
    """The connection accepts no further request. Stops the parser."""


class BoundedConnection(HttpToolsProtocol):
    """Refuses input beyond the bounds or with broken framing, after answering earlier requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._transfers: Transfers = self.config.app.state.service.transfers  # type: ignore[union-attr]
        self._phase = _Phase.BETWEEN
        self._head_bytes = 0
        self._last = b""
        self._blank_bytes = 0
        self._dropped_bytes = 0
        self._framing = Framing()
        self._without_upgrade = b""
        self._arriving: Transfer | None = None
        self._running: RequestResponseCycle | None = None
        self._is_deaf = False
        self._farewell = b""
        self._give_up: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None

    # ---- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._outbox = Outbox(transport, self.flow, self._transfers, self._address)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._outbox.lost()
        if self._linger is not None:
            self._linger.cancel()
        # uvicorn notifies only the last request, which may not have started.
        for cycle in (self._running, *(waiting for waiting, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                _disconnect(cycle)
        self.pipeline.clear()
        super().connection_lost(exc)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    # ---- input

    def data_received(self, data: bytes) -> None:
        """Replaces uvicorn's, which resets the keep-alive timer with every byte."""
        if self._phase is _Phase.BETWEEN and not self._is_deaf:
            data = self._after_blank_lines(data)
        if self._is_deaf:
            self._drop(data)
        elif data and not self._head_is_too_long(data):
            framing, before = self._framing, self._framing.content
            self._feed(data)
            self._count(data, framing, before)

    def _after_blank_lines(self, data: bytes) -> bytes:
        rest = data.lstrip(b"\r\n")
        self._blank_bytes += len(data) - len(rest)
        if self._blank_bytes > MAX_BLANK_BYTES:
            self._reject(
                MalformedRequest(
                    f"More than {MAX_BLANK_BYTES} bytes of empty lines before a request; send none."
                )
            )
        return rest

    def _head_is_too_long(self, data: bytes) -> bool:
        if self._phase is _Phase.BODY:
            return False
        end = (self._last + data if self._last else data).find(b"\r\n\r\n")
        self._head_bytes += len(data) if end < 0 else end
        self._last = data[-3:]  # the end may come in two pieces
        if self._arriving is not None:
            self._arriving.moved = self._head_bytes
        if self._head_bytes <= MAX_HEAD_BYTES:
            return False
        self._reject(
            HeadTooLarge(
                f"Request line and headers together have more than {MAX_HEAD_BYTES} bytes; send "
                "long options as fields of a JSON body."
            )
        )
        return True

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser expects another protocol from here on. The service ignores the upgrade: a
            # new parser reads the head without it, and then the body.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._feed(self._without_upgrade + data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, MalformedRequest):
                self._reject(error.__context__)
            elif not isinstance(error.__context__, _Enough):
                is_http_2 = self.parser.get_method() == b"PRI"
                self._reject(MalformedRequest(HTTP_2 if is_http_2 else _reason(error)))

    def _count(self, data: bytes, framing: Framing, before: int) -> None:
        """Check the bytes that were just parsed against the bounds."""
        if self._is_deaf:
            return
        is_of_body = self._phase is _Phase.BODY and framing is self._framing
        if self._phase is _Phase.HEAD:
            self._head_bytes = self._head_bytes or len(data)  # or it began in these bytes
            self._last = data[-3:]
            self._begin_to_arrive()
        elif is_of_body and framing.is_excessive(len(data), framing.content - before):
            self._reject(
                MalformedRequest(
                    "The chunk sizes, extensions and trailers of the body have too many bytes for "
                    "its content; send larger chunks without extensions and trailers."
                )
            )

    def _begin_to_arrive(self) -> None:
        if self._arriving is not None:
            return
        try:
            self._arriving = self._transfers.receive(self._address, end=self._give_up_on_head)
            self._arriving.moved = self._head_bytes
        except QueueFull as error:
            self._reject(error)

    def _drop(self, data: bytes) -> None:
        self._dropped_bytes += len(data)
        if self._dropped_bytes > MAX_DROPPED_BYTES:
            self.flow.pause_reading()

    # ---- callbacks of the parser

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            # The client sends unanswered requests again when the connection closes.
            self.pipeline[0][0].keep_alive = False
            self._is_deaf = True
            raise _Enough
        super().on_message_begin()
        self.scope["held"] = RequestPermits()  # type: ignore[typeddict-unknown-key]
        self._unset_keepalive_if_required()
        self._phase = _Phase.HEAD
        self._blank_bytes = 0
        self._begin_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is _Phase.HEAD:  # otherwise it is a trailer, which is ignored
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        if self.parser.should_upgrade():
            self._without_upgrade = self._head_without_upgrade(version)
            return
        fault = fault_in(version, self.headers)
        if fault is not None:
            raise MalformedRequest(fault)
        super().on_headers_complete()
        self._end_head()
        self._phase = _Phase.BODY
        self._framing = Framing()

    def _head_without_upgrade(self, version: str) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise MalformedRequest(
                "CONNECT requests a tunnel, and this service is not a proxy; send GET or POST."
            )
        lines = [b"%b %b HTTP/%b" % (method, self.url, version.encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_body(self, body: bytes) -> None:
        self._framing.content += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._phase is _Phase.HEAD:  # of an upgrade request: its body follows
            return
        self._phase = _Phase.BETWEEN
        super().on_message_complete()
        self._is_deaf = self._is_deaf or not self.cycle.keep_alive

    # ---- output

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        cycle.transport = self._outbox.packet
        if getattr(self.config.app.state, "is_retiring", False):  # type: ignore[union-attr]
            cycle.keep_alive = False  # the next request goes to another process

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def put(message: Message) -> None:
                await self._outbox.put(send, message, scope["held"])

            await self._outbox.emptied()  # of the responses before it
            await app(scope, receive, put)

        super()._start_asgi_task(cycle, answer)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase is _Phase.HEAD:  # which has its own timer
            self._unset_keepalive_if_required()
        if self._farewell and not self._is_answering:
            self._part()

    @property
    def _is_answering(self) -> bool:
        running = self._running
        return bool(self.pipeline) or not (
            running is None or running.response_complete or running.disconnected
        )

    # ---- refusals

    def _reject(self, error: CamserveError) -> None:
        """Answer earlier requests; then send this error; then close."""
        self._end_head()
        self._is_deaf = True
        # No middleware sees this error, so it is logged here.
        _log.info(error.code, client=self._address)
        self._farewell = _answer_to(error)
        if self._phase is _Phase.BODY:
            self._withdraw(self.cycle)
        if not self._is_answering:
            self._part()

    def _withdraw(self, cycle: RequestResponseCycle) -> None:
        """The body of this request will never be complete."""
        if self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()
        elif cycle.response_started or cycle.response_complete:
            self._farewell = b""
            cycle.keep_alive = False
            if cycle.response_complete:
                self.transport.close()
        else:
            _disconnect(cycle)

    def _part(self) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self._linger = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        self.transport.write(self._farewell)
        self._farewell = b""
        self._outbox.watch()

    # ---- the timer of a head

    def _begin_head(self) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
        self._give_up = self.loop.call_later(HEAD_SECONDS, self._give_up_on_head)

    def _end_head(self) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None
        if self._arriving is not None:
            self._arriving.close()
            self._arriving = None
        self._head_bytes, self._last = 0, b""

    def _give_up_on_head(self) -> None:
        self._end_head()
        self._is_deaf = True
        if not self._is_answering:
            self.transport.close()
        elif self.pipeline:
            self.pipeline[0][0].keep_alive = False
        elif self._running is not None:
            self._running.keep_alive = False


def _disconnect(cycle: RequestResponseCycle) -> None:
    cycle.disconnected = True
    cycle.message_event.set()


def _reason(error: httptools.HttpParserError) -> str:
    reason = str(error).rstrip(".")[:200] or "it cannot be parsed"
    if isinstance(error, httptools.HttpParserCallbackError):
        reason = "its target cannot be read"
    return f"The request is not HTTP/1.1: {reason}."


def _answer_to(error: CamserveError) -> bytes:
    """The whole response to input that was refused before it was a complete request."""
    # The path is unknown: the request has not been read to its end.
    response = problem(Request({"type": "http", "path": "/"}), error)
    response.headers.update(SECURITY_HEADERS)
    lines = [f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"connection: close", b"", bytes(response.body)])
