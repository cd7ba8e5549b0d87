"""The head of a response and the first bytes of its body are one write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

from service.routes.server.outbox import OnePacket, Outbox
from service.scheduling.admission import RequestPermits
from service.scheduling.transfers import Transfers

START = {"type": "http.response.start", "status": 200}


class Wire(asyncio.Transport):
    """A transport that notes what it is given, write by write."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed_after: int | None = None

    def writelines(self, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        self.sent.append(b"".join(parts))

    def close(self) -> None:
        self.closed_after = len(self.sent)

    def is_closing(self) -> bool:
        return self.closed_after is not None

    def get_write_buffer_size(self) -> int:
        return 0


def sent(*messages: tuple[dict[str, Any], bytes]) -> list[bytes]:
    """What leaves, write by write, where a server writes these bytes for these messages."""

    async def put() -> list[bytes]:
        wire = Wire()
        transfers = Transfers(rate=1, grace=1)
        outbox = Outbox(wire, FlowControl(wire), transfers, "192.0.2.7")
        for message, written in messages:

            async def send(_: Any, written: bytes = written) -> None:
                if written:
                    outbox.packet.write(written)

            await outbox.put(send, message, RequestPermits())
        return wire.sent

    return asyncio.run(put())


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_head_and_body_leave_together() -> None:
    assert sent((START, b"head"), (body(b"body"), b"body")) == [b"headbody"]


def test_only_the_first_part_of_a_long_body_waits_for_nothing() -> None:
    parts = (body(b"1", more=True), b"1"), (body(b"2", more=True), b"2"), (body(b"3"), b"3")
    assert sent((START, b"head"), *parts) == [b"head1", b"2", b"3"]


def test_a_head_without_a_body_leaves_at_once() -> None:
    """As of HEAD and 304: the server writes nothing for the message of the body."""
    assert sent((START, b"head"), (body(b""), b"")) == [b"head"]


def test_a_connection_that_is_closed_has_sent_the_head() -> None:
    wire = Wire()
    packet = OnePacket(wire)
    packet.holds = True
    packet.write(b"head")
    assert not packet.is_closing()
    packet.close()
    assert (wire.sent, wire.closed_after, packet.is_closing()) == ([b"head"], 1, True)
