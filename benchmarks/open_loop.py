"""Clients that ask at a given rate, whether or not they are answered, in a process of their own.

    offered = offer(Offer(port, "/explain", rate=400, seconds=120), photos)

Unlike `clients.py`, where a slow server slows its clients down. Connections are kept alive and used
again; a request that finds none idle opens another. Each request has its number as `X-Request-ID`.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from clients import multipart

PATIENCE = 30.0
"""Seconds to wait for the last answers."""
LOST, UNCONNECTED = 0, -1
"""In place of a status: the connection ended before an answer; none was made."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What to send: `rate` requests a second, evenly, for `seconds`."""

    port: int
    path: str
    rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Sent:
    """One request. at: when it was written, by `time.monotonic()`. seconds: until its answer."""

    number: int
    at: float
    seconds: float
    status: int


@dataclass(frozen=True, slots=True)
class Offered:
    """What came of it. late: seconds by which each request was sent later than it should have been.

    connections: how many were opened.
    """

    sent: list[Sent]
    late: list[float]
    connections: int

    def seconds(self, status: int) -> list[float]:
        """Of all answers with that status."""
        return [each.seconds for each in self.sent if each.status == status]


def offer(load: Offer, photos: Sequence[bytes]) -> Offered:
    """Send it from another process, and return when the last answer is there."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_main, args=(theirs, load, list(photos)))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
        assert isinstance(found, Offered)
        return found
    finally:
        process.join()


def _main(answer_to: Connection, load: Offer, photos: Sequence[bytes]) -> None:
    gc.disable()
    answer_to.send(asyncio.run(_Clients(load, photos).run()))


class _Connection(asyncio.Protocol):
    """One connection; at most one request at a time is on it."""

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport | None = None
        self.answered: asyncio.Future[int] | None = None
        self.closed = False
        self._received = bytearray()

    def ask(self, request: bytes) -> asyncio.Future[int]:
        """The status of the answer, when all of it is there."""
        assert self.transport is not None
        self.answered = asyncio.get_running_loop().create_future()
        self._received.clear()
        self.transport.write(request)
        return self.answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or self.answered is None or self.answered.done():
            return
        head = bytes(self._received[:end]).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0] or 0)
        if len(self._received) >= end + 4 + length:
            self.closed = self.closed or b"connection: close" in head
            self.answered.set_result(int(head.split(b" ", 2)[1]))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self.closed = True
        if self.answered is not None and not self.answered.done():
            self.answered.set_result(LOST)


@dataclass
class _Clients:
    load: Offer
    photos: Sequence[bytes]
    idle: list[_Connection] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    opened: int = 0

    async def run(self) -> Offered:
        """Send at the rate, then wait for what is still on its way."""
        kind, _ = multipart(b"")
        bodies = [multipart(photo)[1] for photo in self.photos]
        head = f"POST {self.load.path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\n"
        heads = [f"{head}content-length: {len(body)}\r\nx-request-id: " for body in bodies]
        late, tasks = [], set()
        began = time.monotonic()
        for number in range(int(self.load.rate * self.load.seconds)):
            due = began + number / self.load.rate
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            elif not number % 16:
                await asyncio.sleep(0)  # behind its time: let the answers in all the same
            late.append(max(0.0, time.monotonic() - due))
            turn = number % len(bodies)
            task = asyncio.ensure_future(self._ask(number, heads[turn], bodies[turn]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE)
        return Offered(sorted(self.sent, key=lambda each: each.number), late, self.opened)

    async def _ask(self, number: int, head: str, body: bytes) -> None:
        connection = await self._connection()
        at, status = time.monotonic(), UNCONNECTED
        if connection is not None:
            status = await connection.ask(f"{head}{number}\r\n\r\n".encode() + body)
            if not connection.closed:
                self.idle.append(connection)
        self.sent.append(Sent(number, at, time.monotonic() - at, status))

    async def _connection(self) -> _Connection | None:
        while self.idle:
            connection = self.idle.pop()
            if not connection.closed:
                return connection
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(_Connection, "127.0.0.1", self.load.port)
        except OSError:
            return None
        self.opened += 1
        return made
