"""One of several server processes on shared listening sockets.

All processes accept from the same queue of the kernel, so a connection that nobody has accepted
yet is not lost when one of them ends.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, MutableSequence
from contextlib import suppress
from typing import Any

import structlog
from fastapi import FastAPI

from service.routes.server.draining import DrainingServer

_log = structlog.get_logger(__name__)

YIELD_SECONDS = 0.002
"""How long a process with more connections than another one leaves a new connection to it."""

NOT_SERVING = -1
"""In place of a process's number of connections."""


class SharedSocket:
    """A listening socket that several processes accept from, one connection at a time.

    asyncio's own server takes all connections that wait, and would leave none to the others.

    connected: called with each connection. has_more: whether this process has more connections
    than another one, which then gets the first chance.
    """

    def __init__(
        self,
        listener: socket.socket,
        connected: Callable[[socket.socket], object],
        has_more: Callable[[], bool],
    ) -> None:
        self._listener = listener
        self._connected = connected
        self._has_more = has_more
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._watch()

    def close(self) -> None:
        """Accept no more here; the other processes do."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()

    def _watch(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener.fileno(), self._ready)

    def _ready(self) -> None:
        if not self._has_more():
            self._accept()
            return
        self._loop.remove_reader(self._listener.fileno())
        self._pause = self._loop.call_later(YIELD_SECONDS, self._accept_and_watch)

    def _accept_and_watch(self) -> None:
        self._accept()
        self._watch()

    def _accept(self) -> None:
        with suppress(OSError):  # another process took it, or the client is gone
            connection, _ = self._listener.accept()
            self._connected(connection)


class SharingServer(DrainingServer):
    """A server that can retire: it accepts no new connection and serves those that it has.

    SIGUSR1 retires it, once others accept: each response then says `Connection: close`, and the
    process ends when its connections have, after `grace` seconds at the latest. On SIGTERM it
    drains as every server does. Ctrl-C is left to the parent process, which gets it as well.

    counts: connections by process, shared by all of them; NOT_SERVING for none. place: its own.
    """

    def __init__(
        self,
        app: FastAPI,
        counts: MutableSequence[int],
        place: int,
        *,
        grace: float,
        delay: float,
    ) -> None:
        super().__init__(app, grace=grace, delay=delay)
        self._app = app
        self._counts = counts
        self._place = place
        self._shared: list[SharedSocket] = []
        self._leaving: asyncio.Task[None] | None = None
        self._accepting: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup([])
        if not self.started:
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self.retire)
        self._shared = [SharedSocket(each, self._serve_one, self._has_more) for each in sockets]
        self._count()

    async def on_tick(self, counter: int) -> bool:
        self._count()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if sig != signal.SIGINT:
            super().handle_exit(sig, frame)

    def retire(self) -> None:
        """Leave new connections to the other processes, and end after the last one of its own."""
        if self._leaving is not None:
            return
        _log.info("retiring", connections=len(self.server_state.connections))
        self._app.state.is_retiring = True
        self._close_shared()
        self._leaving = asyncio.ensure_future(self._leave())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._close_shared()
        await super().shutdown(sockets)

    async def _leave(self) -> None:
        until = time.monotonic() + self._grace
        while self.server_state.connections and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        self.should_exit = True

    def _close_shared(self) -> None:
        for each in self._shared:
            each.close()
        self._shared = []
        self._counts[self._place] = NOT_SERVING

    def _has_more(self) -> bool:
        others = [count for count in self._counts if count != NOT_SERVING]
        return len(self.server_state.connections) > min(others, default=0)

    def _count(self) -> None:
        if self._shared:
            self._counts[self._place] = len(self.server_state.connections)

    def _serve_one(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._counts[self._place] = len(self.server_state.connections) + 1
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
