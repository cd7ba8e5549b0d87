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
"""For `sys.setswitchinterval`: how long a worker computes before the event loop gets its turn.

Python's own 5 ms may be waited at each of the many reads and writes of a refusal.
"""

KEEP_ALIVE_SECONDS = 75
"""Of a connection that nothing is asked on.

Balancers keep theirs for a minute; were ours closed sooner, a request could be on its way then.
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
    """On SIGTERM or Ctrl-C: takes nothing new, finishes what it accepted, then ends with 0.

    uvicorn alone closes its sockets first, so that nobody could see that the service is not ready
    any more. Here it goes on listening while it drains: `/health/ready` and new requests get 503
    with `Retry-After`, and a balancer sends them elsewhere. A second signal ends it at once.

    grace: seconds that what was accepted may take.
    delay: seconds to go on listening at least, for balancers that look only now and then.
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
            # Raised again at the end, for the shell to see. After SIGTERM the service ended well.
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
