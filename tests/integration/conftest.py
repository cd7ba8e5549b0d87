"""The whole service for tests: in this thread's reach, or behind a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from service.app import create_app
from service.connections import BoundedHead
from service.routes.state import Service
from service.settings import Settings

Serve = Callable[..., AbstractContextManager[TestClient]]
RunServer = Callable[..., AbstractContextManager["Server"]]


@contextmanager
def served(**settings: Any) -> Iterator[TestClient]:
    """A client of a new app with these settings; its threads end with the `with`."""
    values = {"models": ("tiny:small",), "device": "cpu", "workers": 1, **settings}
    with TestClient(create_app(Settings(**values))) as client:
        yield client


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
def running(**settings: Any) -> Iterator[Server]:
    """The service in uvicorn, started and stopped as `camserve serve` does it."""
    values = {"models": ("tiny:small",), "device": "cpu", "workers": 1, **settings}
    app = create_app(Settings(**values))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http=BoundedHead,
            ws="none",
        )
    )
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
    thread = threading.Thread(target=server.run, args=([listening],), name="camserve-uvicorn")
    thread.start()
    try:
        assert began.wait(10), "the server did not start"
        yield Server(app, listening.getsockname()[1], stop)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def serve() -> Serve:
    """A client of a service with settings of its own; see `served`."""
    return served


@pytest.fixture(scope="session")
def run_server() -> RunServer:
    """A server with settings of its own, for hang-ups, drains and chunks; see `running`."""
    return running


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    """A client of the models `small` (the default) and `other`."""
    with served(models=("tiny:small", "other=tiny:other"), workers=2) as client:
        yield client


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """A client for real servers."""
    with httpx.Client(timeout=10, trust_env=False) as client:
        yield client
