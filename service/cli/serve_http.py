"""`camserve serve` in one process: run the service in uvicorn, and say when it is ready."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
import uvicorn
from fastapi import FastAPI

from service import logs
from service.app import create_app
from service.cli.announcing import announce
from service.errors import ConfigurationError
from service.resources import memory_limit, spare_collector, tune_allocator
from service.routes.server.draining import SWITCH_SECONDS, DrainingServer
from service.settings import Settings


def run(settings: Settings, sockets: Sequence[socket.socket]) -> None:
    """Serve on open sockets until a signal. Raises ConfigurationError if no model was loaded."""

    def server_of(served: FastAPI) -> uvicorn.Server:
        return DrainingServer(served, grace=settings.drain_timeout, delay=settings.drain_delay)

    run_server(
        settings,
        sockets,
        server_of,
        lambda: announce(settings, sockets[0].getsockname()[1]),
    )


def run_server(
    settings: Settings,
    sockets: Sequence[socket.socket],
    server_of: Callable[[FastAPI], uvicorn.Server],
    ready: Callable[[], None],
) -> None:
    """Build the app and serve it; `ready` is called once models are loaded.

    Raises ConfigurationError if no model was loaded.
    """
    logs.configure(settings.log_format)
    tune_allocator()
    sys.setswitchinterval(SWITCH_SECONDS)
    served = create_app(settings, background=True)
    spare_collector()
    server = server_of(served)
    _when_ready(server, served, ready)
    server.run(list(sockets))
    service = served.state.service
    entries = service.library.entries.values()
    if not service.pool.models and all(entry.state == "failed" for entry in entries):
        raise ConfigurationError(" ".join(entry.reason or "" for entry in entries))
    if not server.started:
        raise typer.Exit(1)


def share_of(settings: Settings, processes: int) -> Settings:
    """The settings of each of several processes; also what is a part of the memory is divided."""
    memory = memory_limit() // processes
    share = settings.share_of(processes)
    return share.model_copy(
        update={
            "max_held_answer_bytes": share.max_held_answer_bytes or memory // 8,
            "max_decode_bytes": share.max_decode_bytes or memory // 4,
        }
    )


def _when_ready(server: uvicorn.Server, served: FastAPI, ready: Callable[[], None]) -> None:
    """Call `ready` once models are loaded; stop the server if none could be."""
    start = server.startup

    async def wait() -> None:
        loading = [asyncio.wrap_future(future) for future in served.state.loading]
        await asyncio.gather(*loading, return_exceptions=True)
        if served.state.service.pool.models:
            ready()
        else:
            server.should_exit = True

    async def startup(sockets: Any = None) -> None:
        await start(sockets)
        if server.started:
            served.state.announcing = asyncio.create_task(wait())

    server.startup = startup  # type: ignore[method-assign]
