"""A real server in a thread of this process, so that what it holds can be counted."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.pipeline.service import Service
from service.routes.server.draining import config_of
from service.settings import Settings

DEVICE = os.environ.get("CAMSERVE_TEST_DEVICE", "cpu")
"""Where the models of tests are served: `make gpu` says cuda."""


class Server:
    """A real server on a free port of this machine.

    app, service: what it runs. url: where. address: host and port, for plain sockets.
    """

    def __init__(self, app: FastAPI, port: int, stop: Callable[[], None]) -> None:
        self.stop = stop
        self.app = app
        self.service: Service = app.state.service
        self.address = ("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{port}"


@contextmanager
def running(*, send_buffer: int | None = None, **settings: Any) -> Iterator[Server]:
    """The service in uvicorn, started and stopped as `camserve serve` does it.

    send_buffer: bytes that the system keeps for a client that does not read; some megabytes else.
    """
    values = {"models": ("tiny:small",), "device": DEVICE, "workers": 1, **settings}
    app = create_app(Settings(**values))
    server = uvicorn.Server(config_of(app))
    began, start = threading.Event(), server.startup
    ends, shutdown = threading.Event(), server.shutdown

    async def startup(sockets: Any = None) -> None:
        await start(sockets)
        began.set()

    async def end(sockets: Any = None) -> None:
        ends.set()
        await shutdown(sockets)

    def stop() -> None:
        server.should_exit = True
        assert ends.wait(10), "the server does not begin to stop"

    server.startup, server.shutdown = startup, end  # type: ignore[method-assign]
    listening = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:  # its connections inherit it
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=server.run, args=([listening],), name="camserve-uvicorn")
    thread.start()
    try:
        assert began.wait(10), "the server did not start"
        yield Server(app, listening.getsockname()[1], stop)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"
