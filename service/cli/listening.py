"""Open the sockets of `camserve serve`, before anything slow is imported or loaded."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from service.errors import ConfigurationError

BACKLOG = 2048
"""Connections that wait to be accepted, as uvicorn has it."""


@contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Yield listening sockets, one for each address of the host. Port 0 is a free port.

    Raises ConfigurationError with the reason and what to do, such as a port that is in use.
    """
    with ExitStack() as opened:
        try:
            sockets = [opened.enter_context(each) for each in _sockets(host, port)]
        except OSError as error:
            raise ConfigurationError(_sentence(host, port, error)) from error
        yield sockets


def _sockets(host: str, port: int) -> Iterator[socket.socket]:
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    opened, absent = 0, None
    for family, _, _, _, address in dict.fromkeys(addresses):
        try:
            yield socket.create_server(address[:2], family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            absent = error  # localhost has an IPv6 address also where a machine has no IPv6
        else:
            opened += 1
    if absent is not None and not opened:
        raise absent


def _sentence(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else port - 1
        return (
            f"port {port} of {host} is in use, perhaps by another camserve: end that, or choose "
            f"another port, such as --port {other} (make run PORT={other}), or 0 for a free one."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} may not be opened by this user; choose one above 1023: --port 8000."
    return (
        f"cannot listen on --host {host}: {error.strerror or error}; use an address of this "
        "machine: 127.0.0.1 for itself only, 0.0.0.0 for the network."
    )
