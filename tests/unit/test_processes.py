"""Settings divided among server processes, and which process accepts a connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from service import settings as module
from service.routes.server.shared_sockets import SharedSocket
from service.settings import Settings


def test_what_bounds_the_service_is_divided_and_rounded_up() -> None:
    whole = Settings(processes="4", workers=6, max_queue=10, key_rate=5, key_cost=8, device="cpu")
    share = whole.share_of(4)
    assert (share.workers, share.max_queue, share.key_rate, share.key_cost) == (2, 3, 2, 2.0)
    assert share.max_queue_bytes == whole.max_queue_bytes // 4
    assert share.key_concurrency == 0, "no limit stays none"


def test_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 12)
    share = Settings(device="cpu").share_of(3)
    assert (share.worker_count, share.torch_threads, share.single_request_thread_count) == (4, 1, 4)


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (8, 1), (9, 2), (64, 8)])
def test_auto_is_one_process_for_each_eight_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int
) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: cores)
    assert Settings(processes="auto", device="cpu").process_count == processes


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "1.5", "100"])
def test_a_wrong_number_of_processes_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError):
        Settings(processes=wrong)


def accepted(clients: int, has_more: Callable[[], bool]) -> int:
    """How many of so many waiting connections are accepted."""

    async def listen() -> int:
        found: list[socket.socket] = []
        everything = asyncio.Event()

        def connected(connection: socket.socket) -> None:
            found.append(connection)
            if len(found) == clients:
                everything.set()

        listener = socket.create_server(("127.0.0.1", 0))
        waiting = [socket.create_connection(listener.getsockname()) for _ in range(clients)]
        shared = SharedSocket(listener, connected, has_more)
        await everything.wait()
        shared.close()
        for each in (*found, *waiting):
            each.close()
        return len(found)

    return asyncio.run(asyncio.wait_for(listen(), 10))


@pytest.mark.parametrize("has_more", [False, True])
def test_a_process_with_more_connections_still_accepts_if_no_other_does(has_more: bool) -> None:
    assert accepted(3, lambda: has_more) == 3


def test_a_closed_socket_leaves_connections_to_other_processes() -> None:
    """The copy of the socket in another process accepts what waits."""

    async def leave() -> socket.socket:
        listener = socket.create_server(("127.0.0.1", 0))
        other = listener.dup()
        SharedSocket(listener, lambda connection: connection.close(), lambda: False).close()
        return other

    with asyncio.run(leave()) as other, socket.create_connection(other.getsockname()):
        other.setblocking(True)
        other.accept()[0].close()
