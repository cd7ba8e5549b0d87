"""Many clients at once of a real server, and what they must not leave behind."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import uvicorn
from fastapi import FastAPI

from service.pipeline.service import Service

CLIENTS = 64

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app behind a real socket; its address. Who connects early waits in the backlog."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="camserve-uvicorn"
        )
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def together(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of each item, by `CLIENTS` threads that start at the same moment."""
    start = threading.Barrier(CLIENTS)
    with ThreadPoolExecutor(CLIENTS, initializer=start.wait, initargs=(20,)) as threads:
        return list(threads.map(function, items))


def nothing_is_left(parts: Service) -> None:
    assert parts.pool.hooks_live() == 0
    assert parts.pool.faults() == []  # every replica idle, and in the condition it was built in
    assert set(parts.pool.replaced.values()) == {0}
    assert parts.admission.images == 0
    assert parts.scheduler.waiting == 0
    for model in parts.pool.models.values():
        assert all(parameter.grad is None for parameter in model.module.parameters())
