"""`camserve serve`: run the service in uvicorn, and print its URL once models are loaded."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog
import typer
import uvicorn
from fastapi import FastAPI

from service import logs
from service.app import create_app
from service.cli.flags import ERR
from service.errors import ConfigurationError
from service.resources import spare_collector, tune_allocator
from service.routes.server.draining import SWITCH_SECONDS, DrainingServer
from service.settings import Settings

_log = structlog.get_logger(__name__)


def run(settings: Settings, sockets: Sequence[socket.socket]) -> None:
    """Serve on open sockets until a signal. Raises ConfigurationError if no model was loaded."""
    logs.configure(settings.log_format)
    tune_allocator()
    sys.setswitchinterval(SWITCH_SECONDS)
    served = create_app(settings, background=True)
    spare_collector()
    server = DrainingServer(served, grace=settings.drain_timeout, delay=settings.drain_delay)
    url = _url(settings.host, sockets[0].getsockname()[1])
    announce = _log_url if settings.log_format == "json" else _print_url
    _when_ready(server, served, lambda: announce(url))
    server.run(list(sockets))
    service = served.state.service
    entries = service.library.entries.values()
    if not service.pool.models and all(entry.state == "failed" for entry in entries):
        raise ConfigurationError(" ".join(entry.reason or "" for entry in entries))
    if not server.started:
        raise typer.Exit(1)


def _when_ready(server: uvicorn.Server, served: FastAPI, announce: Callable[[], None]) -> None:
    """Announce the service once models are loaded; stop the server if none could be."""
    start = server.startup

    async def wait() -> None:
        loading = [asyncio.wrap_future(future) for future in served.state.loading]
        await asyncio.gather(*loading, return_exceptions=True)
        if served.state.service.pool.models:
            announce()
        else:
            server.should_exit = True

    async def startup(sockets: Any = None) -> None:
        await start(sockets)
        if server.started:
            served.state.announcing = asyncio.create_task(wait())

    server.startup = startup  # type: ignore[method-assign]


def _url(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - only compared
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _log_url(url: str) -> None:
    _log.info("serving", url=url, docs=f"{url}/docs")


def _print_url(url: str) -> None:
    sample = _sample()
    ERR.print(f"\n[bold]camserve[/] serves on [bold]{url}[/]\n", highlight=False)
    ERR.print("  explain an image:")
    ERR.print(
        f"    curl -F image=@{sample} '{url}/explain?include=overlay'",
        soft_wrap=True,
        highlight=False,
    )
    ERR.print(
        f"    curl -F image=@{sample} {url}/explain -H 'accept: image/jpeg' -o why.jpg",
        soft_wrap=True,
        highlight=False,
    )
    ERR.print(f"  try every route:          {url}/docs", highlight=False)
    ERR.print("  how-to and reference:     README.md and docs/\n", highlight=False)


def _sample() -> str:
    """Return the path of the sample image in a checkout, else a placeholder."""
    sample = Path(__file__).parents[2] / "examples" / "sunflower.jpg"
    return os.path.relpath(sample) if sample.exists() else "YOUR.jpg"
