"""HTTP/1.1 connections with the bounds that uvicorn does not set.

On a request's head, on what comes beside its content, on requests that arrive before their turn,
and on the time that a client may take to send and to read.
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
from service.scheduling.admission import Held
from service.scheduling.transfers import Transfer, Transfers

_log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 256 << 10
"""Of request line and headers: a mask of many run lengths belongs into a JSON body."""

HEAD_SECONDS = 20.0
"""From the first byte of a head, or from the connection, to the head's end."""

LINGER_SECONDS = 1.0
"""For the client of a refused request to send the rest and read why; closed at once, it would be
told of a reset instead."""

MAX_BLANK_BYTES = 1024
"""Of empty lines before a request, where old clients send one."""

MAX_PIPELINED = 16
"""Requests on one connection that wait for the answer to an earlier one."""

MAX_DROPPED_BYTES = 1 << 20
"""Read and thrown away after a request that cannot be followed by another; then nothing is read."""

HTTP_2 = (
    "The client speaks HTTP/2, and this service speaks HTTP/1.1; let the client use HTTP/1.1, or "
    "put a proxy before the service that speaks HTTP/2."
)
"""For a client that does not ask first. An upgrade, which can be declined, is ignored instead."""


class _Phase(enum.Enum):
    BETWEEN = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class _Enough(Exception):
    """No further request is taken from a connection. Stops the parser."""


class BoundedConnection(HttpToolsProtocol):
    """Refuses what breaks the bounds or the framing; answers what came before it."""

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
        # uvicorn says so to the last request alone, which may not have begun.
        for cycle in (self._running, *(waiting for waiting, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                _disconnect(cycle)
        self.pipeline.clear()
        super().connection_lost(exc)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    # ---- what comes

    def data_received(self, data: bytes) -> None:
        """In place of uvicorn's, which takes every byte for a sign of life."""
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
            self._reject(MalformedRequest("Too many empty lines came before a request; send none."))
        return rest

    def _head_is_too_long(self, data: bytes) -> bool:
        if self._phase is _Phase.BODY:
            return False
        end = (self._last + data).find(b"\r\n\r\n")
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
            # The parser takes what follows for another protocol, of which we speak none: a fresh
            # one reads the same head without it, and then the body.
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
        """Hold what has just been parsed against the bounds."""
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
                    "The body has too many bytes of chunk sizes, extensions and trailers beside "
                    "its content; send larger chunks without them."
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

    # ---- what the parser finds

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            # The client sends again what is not answered when the connection closes.
            self.pipeline[0][0].keep_alive = False
            self._is_deaf = True
            raise _Enough
        super().on_message_begin()
        self.scope["held"] = Held()  # type: ignore[typeddict-unknown-key]
        self._unset_keepalive_if_required()
        self._phase = _Phase.HEAD
        self._blank_bytes = 0
        self._begin_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is _Phase.HEAD:  # else it is a trailer, and those are not read
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
            raise MalformedRequest("CONNECT asks for a tunnel; this service is no proxy.")
        lines = [b"%b %b HTTP/%b" % (method, self.url, version.encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_body(self, body: bytes) -> None:
        self._framing.content += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._phase is _Phase.HEAD:  # of a request for an upgrade: its body comes yet
            return
        self._phase = _Phase.BETWEEN
        super().on_message_complete()
        self._is_deaf = self._is_deaf or not self.cycle.keep_alive

    # ---- what goes

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def put(message: Message) -> None:
                await self._outbox.put(send, message, scope["held"])

            await self._outbox.emptied()  # of the answers before it
            await app(scope, receive, put)

        super()._start_asgi_task(cycle, answer)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase is _Phase.HEAD:  # which has a clock of its own
            self._unset_keepalive_if_required()
        if self._farewell and not self._is_answering:
            self._part()

    @property
    def _is_answering(self) -> bool:
        running = self._running
        return bool(self.pipeline) or not (
            running is None or running.response_complete or running.disconnected
        )

    # ---- what is refused

    def _reject(self, error: CamserveError) -> None:
        """Answer what came before; then this, with an error; then close."""
        self._end_head()
        self._is_deaf = True
        # No middleware sees it, which would have logged it.
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

    # ---- the clock of a head

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
    return f"What was sent is not HTTP/1.1: {reason}."


def _answer_to(error: CamserveError) -> bytes:
    """All of the answer to what was refused before it was a request."""
    # What the request was for is not known: it has not been read to its end.
    response = problem(Request({"type": "http", "path": "/"}), error)
    response.headers.update(SECURITY_HEADERS)
    lines = [f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"connection: close", b"", bytes(response.body)])
