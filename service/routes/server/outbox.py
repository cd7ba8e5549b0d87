"""The unsent output of a connection, until the socket has taken it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import structlog
from uvicorn.protocols.http.flow_control import FlowControl

from service.scheduling.admission import RequestPermits
from service.scheduling.transfers import Transfer, Transfers

_log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
"""How often a client that does not read is checked."""

Message = MutableMapping[str, Any]


class OnePacket(asyncio.Transport):
    """Writes the head of a response together with the first bytes of its body.

    uvicorn writes them one after the other, and uvloop sends each at once: two system calls and two
    packets, both under the GIL.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: list[bytes] = []
        self.holds = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, or hold while `holds`."""
        self._head.append(bytes(data))
        if not self.holds:
            self.flush()

    def flush(self) -> None:
        """Send what is held."""
        self.holds, head, self._head = False, self._head, []
        if head:
            self._transport.writelines(head)

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether the connection is closed or about to be."""
        return self._transport.is_closing()


class Outbox:
    """Waits until responses are sent, and aborts the connection if the client does not read them.

    client: its address, for the log.
    packet: the transport for what uvicorn writes.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        flow: FlowControl,
        transfers: Transfers,
        client: str,
    ) -> None:
        self.packet = OnePacket(transport)
        self._transport = transport
        self._flow = flow
        self._transfers = transfers
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._held = RequestPermits()
        self._written = 0
        self._before = 0
        self._transfer: Transfer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_lost = False

    async def put(
        self, send: Callable[[Message], Awaitable[None]], message: Message, held: RequestPermits
    ) -> None:
        """Send one message of a response; after the last one, wait until all of it is sent.

        Up to 64 KiB, which the transport buffers, are not waited for.
        """
        self._held = held
        self.packet.holds = message["type"] == "http.response.start"
        await send(message)
        if not self.packet.holds:
            self.packet.flush()  # the head of a response without a body
        self._written += len(message.get("body", b""))
        self.watch()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            await self.emptied()

    async def emptied(self) -> None:
        """Return when everything is sent, or the connection is closed."""
        if not self._flow.write_paused or self._is_lost:
            return
        self._transport.set_write_buffer_limits(high=0)  # now `drain` waits for the last byte
        await self._flow.drain()
        if not self._is_lost:
            self._transport.set_write_buffer_limits()
        self.watch()

    def watch(self) -> None:
        """Check from now on that the client reads, if some output is unsent."""
        if not self._unsent:
            self._rest()
        elif self._transfer is None:
            self._before = self._written - self._unsent
            self._transfer = self._transfers.send(
                measure=self._moved, end=self._end, holds=self._holds
            )
            self._timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def lost(self) -> None:
        """The connection is closed."""
        self._is_lost = True
        self._rest()

    @property
    def _unsent(self) -> int:
        return 0 if self._is_lost else self._transport.get_write_buffer_size()

    def _moved(self) -> int:
        return max(0, self._written - self._unsent - self._before)

    def _holds(self, counter: str) -> bool:
        return self._held.holds(counter)

    def _rest(self) -> None:
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        if not self._unsent or self._transfer is None:
            self._rest()
        elif self._transfer.deadline < time.monotonic():
            self._end()
        else:
            self._timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def _end(self) -> None:
        _log.info("slow_reader", client=self._client, unsent=self._unsent)
        self._rest()
        self._held.release()
        self._transport.abort()
