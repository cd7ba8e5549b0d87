"""HTTP/1.1 connections with the bounds that uvicorn does not set: on a request's head."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import HeadTooLarge
from service.routes.middleware import SECURITY_HEADERS
from service.routes.problems import problem

_log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 256 << 10
"""Of request line and headers: a mask of many run lengths belongs into a JSON body."""

HEAD_SECONDS = 20.0
"""From the first byte of a head, or from the connection, to the head's end."""

LINGER_SECONDS = 1.0
"""For the client of a refused head to send the rest and read why; closed at once, it would be told
of a reset instead."""


class BoundedHead(HttpToolsProtocol):
    """Refuses a head that is too long, and closes where one does not come to its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._last = b""
        self._give_up: asyncio.TimerHandle | None = None
        self._refused: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        if self._refused is not None:
            self._refused.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused is not None:
            return
        if self._give_up is not None:
            end = (self._last + data).find(b"\r\n\r\n")
            self._head_bytes += len(data) if end < 0 else end
            self._last = data[-3:]  # the end may come in two pieces
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse()
                return
        super().data_received(data)
        if self._give_up is not None and not self._head_bytes:  # a head began in it
            self._head_bytes, self._last = len(data), data[-3:]

    def _refuse(self) -> None:
        self._end_head()
        # No middleware sees it, which would have logged it.
        _log.info("head_too_large", client=self.client and self.client[0])
        self._refused = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        if self.cycle is None or self.cycle.response_complete:  # else it would cut into an answer
            self.transport.write(_refusal())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _begin_head(self) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
        self._give_up = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_head(self) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None
        self._head_bytes, self._last = 0, b""


def _refusal() -> bytes:
    """All of the answer to a head that is too long."""
    error = HeadTooLarge(
        f"Request line and headers together have more than {MAX_HEAD_BYTES} bytes; send long "
        "options as fields of a JSON body."
    )
    # What the request was for is not known: it has not been read to its end.
    response = problem(Request({"type": "http", "path": "/"}), error)
    response.headers.update(SECURITY_HEADERS)
    lines = [f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"connection: close", b"", bytes(response.body)])
