"""The server process: it drains before it closes its sockets."""

from __future__ import annotations

import asyncio
import signal
import time
from types import FrameType
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI

from service.routes.server.bounded_connection import BoundedConnection

_log = structlog.get_logger(__name__)

SWITCH_SECONDS = 0.0005
"""For `sys.setswitchinterval`: how long a worker computes before the event loop can run.

With Python's default, each of the many reads and writes of a refusal may wait 5 ms.
"""

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open.

Load balancers keep idle connections for a minute; if the service closed them sooner, it could lose
a request that is being sent.
"""


def config_of(app: FastAPI, **options: Any) -> uvicorn.Config:
    """How uvicorn serves the app; `options` are more of uvicorn's."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=BoundedConnection,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        **options,
    )


class DrainingServer(uvicorn.Server):
    """On SIGTERM or Ctrl-C: refuses new requests, finishes accepted ones, then exits with 0.

    uvicorn alone closes its sockets first, so clients cannot see that the service is no longer
    ready. This server keeps listening while it drains: `/health/ready` and new requests get 503
    with `Retry-After`, and a load balancer sends them elsewhere. A second signal stops it at once.

    grace: seconds that accepted requests may take.
    delay: seconds to keep listening at least, for load balancers that probe rarely.
    """

    def __init__(self, app: FastAPI, *, grace: float, delay: float, **options: Any) -> None:
        super().__init__(config_of(app, timeout_graceful_shutdown=int(grace), **options))
        self._admission = app.state.service.admission
        self._grace = grace
        self._delay = delay
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or not self._admission.is_open:
            super().handle_exit(sig, frame)
            return
        if sig == signal.SIGINT:
            # Raised again at the end, for the shell. After SIGTERM the exit status is 0.
            self._captured_signals.append(sig)
        self._admission.close()
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        _log.info("draining", images=self._admission.images)
        begun = time.monotonic()
        while (seconds := time.monotonic() - begun) < self._grace:
            if self._admission.is_idle and seconds >= self._delay:
                break
            await asyncio.sleep(0.02)
        self.should_exit = True
