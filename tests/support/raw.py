"""Requests as bytes over a socket, for what no HTTP client would send."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable

import pictures

PATIENCE = 10.0
"""Seconds after which a test that waits for something has failed."""


def connected(address: tuple[str, int], receive_buffer: int | None = None) -> socket.socket:
    """A connection that sends at once what it is given; its `with` closes it.

    receive_buffer: bytes that the system keeps for it where it does not read.
    """
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(PATIENCE)
    connection.connect(address)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def head(target: str = "POST /predict", *headers: str, version: str = "1.1") -> bytes:
    """A request's head; `headers` are lines."""
    return "\r\n".join([f"{target} HTTP/{version}", *headers, "", ""]).encode()


def post(body: bytes | None = None, *headers: str, path: str = "/predict") -> bytes:
    """A whole request with Content-Length; the body is a PNG file of noise."""
    body = pictures.png() if body is None else body
    lines = ["host: x", "content-type: image/png", f"content-length: {len(body)}", *headers]
    return head(f"POST {path}", *lines) + body


def chunked(body: bytes, size: int, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    """A body in chunks of `size` bytes."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = [b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts]
    return b"".join([*chunks, b"0\r\n", trailers, b"\r\n"])


def read_to_the_end(connection: socket.socket) -> bytes:
    """Everything until the other side closes or resets the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def read_one(connection: socket.socket) -> bytes:
    """One answer that has a Content-Length, and not a byte more."""
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        assert byte, answer
        answer += byte
    found = re.search(rb"\r\ncontent-length: (\d+)", answer.lower())
    assert found, answer
    left = int(found[1])
    while left:
        part = connection.recv(min(left, 65536))
        assert part, answer
        answer, left = answer + part, left - len(part)
    return answer


def ask(address: tuple[str, int], request: bytes) -> bytes:
    """What is answered to some bytes until the connection closes."""
    with connected(address) as connection:
        connection.sendall(request)
        return read_to_the_end(connection)


def statuses(answers: bytes) -> list[int]:
    """The statuses of several answers, in order."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def last_of(answers: bytes) -> bytes:
    """The last of several answers."""
    return answers[[found.start() for found in re.finditer(rb"HTTP/1\.1 \d{3} ", answers)][-1] :]


def wait_until(is_so: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Return when `is_so`."""
    until = time.monotonic() + patience
    while not is_so():
        assert time.monotonic() < until, "it never came so"
        threading.Event().wait(0.005)
