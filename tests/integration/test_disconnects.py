"""A client that disconnects costs nothing more, whatever it asked: its work is dropped unrun."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pictures
import pytest
from gates import Hold, calls_waiting, wait_until
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.types import Message
from webhosts import Web, web

from service.routes import lifecycle
from service.security.overlay_tokens import Grant, sign

SECRET = "a secret of more than thirty-two characters"  # noqa: S105
OVERLAY = "/integrations/label-studio/overlay.png"
KERNELS = "/models/small/kernels/features.0"
SETUP = "/integrations/label-studio/setup"
CONFIG = (
    '<View><Image name="image" value="$image"/><Choices name="c" toName="image">'
    '<Choice value="class 0"/></Choices></View>'
)

SETTING_UP = {"project": "1.1", "schema": CONFIG, "hostname": "", "access_token": ""}


@pytest.fixture
def studio() -> Iterator[Web]:
    with web() as host:
        host.pages["/data/upload/1/cat.png"] = (200, {"content-type": "image/png"}, pictures.png())
        yield host


def settings(studio: Web, **more: Any) -> dict[str, Any]:
    return {
        "label_studio_url": f"http://127.0.0.1:{studio.port}",
        "label_studio_token": "0123456789" * 4,
        "overlay_secret": SECRET,
        **more,
    }


def target(path: str) -> tuple[str, str, bytes]:
    """Method, request target and body of a good request to a route."""
    if path == OVERLAY:
        grant = Grant(("/data/upload/1/cat.png",), "http://studio.test")
        return "GET", f"{path}?key={sign(grant, SECRET)}&src=/data/upload/1/cat.png", b""
    if path == SETUP:
        return "POST", path, json.dumps(SETTING_UP).encode()
    return "GET", path, b""


def send(address: tuple[str, int], path: str, *headers: str) -> socket.socket:
    method, where, body = target(path)
    lines = [f"{method} {where} HTTP/1.1", "host: here", *headers]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    connection = socket.create_connection(address, timeout=10)
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def until(is_so: Callable[[], bool]) -> None:
    end, pause = time.monotonic() + 10, threading.Event()
    while not is_so():
        assert time.monotonic() < end, "it never came so"
        pause.wait(0.005)


@pytest.mark.parametrize("path", [KERNELS, SETUP, OVERLAY])
def test_what_waits_for_a_worker_is_dropped_when_its_client_disconnects(
    run_server, studio: Web, path: str
) -> None:
    with run_server(**settings(studio)) as server:
        scheduler, admission = server.service.scheduler, server.service.admission
        hold = Hold(scheduler)
        hold.wait_until_it_holds()
        try:
            connection = send(server.address, path)
            wait_until(scheduler, calls_waiting(1))
            ((call,),) = scheduler._calls._waiting.values()
            assert admission.images == (0 if path == SETUP else 1)
            connection.close()
            until(call.future.cancelled)
            until(lambda: admission.images == 0)
        finally:
            hold.release()
        with send(server.address, path) as again:
            assert again.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", [KERNELS, SETUP, OVERLAY])
def test_a_client_may_set_a_deadline_for_every_route_that_computes(
    run_server, studio: Web, path: str
) -> None:
    with run_server(**settings(studio)) as server:
        hold = Hold(server.service.scheduler)
        hold.wait_until_it_holds()
        try:
            with send(server.address, path, "x-request-timeout: 0.2") as connection:
                assert connection.recv(100).startswith(b"HTTP/1.1 504")
        finally:
            hold.release()
        with send(server.address, path, "x-request-timeout: soon") as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("path", [KERNELS, OVERLAY])
def test_what_is_drawn_needs_a_place(serve, studio: Web, path: str) -> None:
    with serve(**settings(studio, max_queue=1)) as client:
        admission = client.app.state.service.admission
        with admission.admit():
            assert get(client, path) == 429
        assert get(client, path) == 200
        assert admission.images == 0


def get(client: TestClient, path: str) -> int:
    return client.get(target(path)[1]).status_code


class _Gone(Request):
    """A request whose client has disconnected."""

    def __init__(self) -> None:
        super().__init__({"type": "http"})

    @property
    def receive(self) -> Any:
        return self._receive_once

    @staticmethod
    async def _receive_once() -> Message:
        return {"type": "http.disconnect"}


def test_a_client_that_disconnects_after_the_deadline_changes_nothing() -> None:
    async def overdue() -> None:
        async with asyncio.timeout(0) as limit:
            try:
                await asyncio.sleep(60)
            finally:
                await lifecycle._end_on_disconnect(_Gone(), limit)

    with pytest.raises(TimeoutError):
        asyncio.run(overdue())


def test_a_client_that_disconnects_ends_the_time_of_its_request() -> None:
    async def disconnected() -> None:
        async with asyncio.timeout(60) as limit:
            await lifecycle._end_on_disconnect(_Gone(), limit)
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        asyncio.run(disconnected())
