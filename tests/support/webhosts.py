"""Hosts on this machine for tests of fetching: one that answers, one that must never be asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Page = tuple[int, Mapping[str, str], bytes]
"""Status, headers, body."""


class Web:
    """An HTTP server; `pages` are by path, `asked` are the request lines and Host headers it saw.

    A page may be a function that is given the request and writes what it likes.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.pages: dict[str, Page | Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[tuple[str, str]] = []


@contextmanager
def web(address: str = "127.0.0.1", context: Any = None) -> Iterator[Web]:
    """A server on a free port, over TLS where `context` is given."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append((self.path, self.headers["host"]))
            page = served.pages[self.path]
            if callable(page):
                page(self)
                return
            status, headers, body = page
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name that the base class calls

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((address, 0), Answer)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    served = Web(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Forbidden:
    """A port of this machine that must not be connected to."""

    def __init__(self, listening: Sequence[socket.socket]) -> None:
        self._listening = listening
        self.port: int = listening[0].getsockname()[1]

    def was_asked(self) -> bool:
        """Whether a connection has waited; then none does any more.

        A connection of its own, the last in line, shows that all before it were seen.
        """
        found = False
        for listener in self._listening:
            with socket.create_connection(listener.getsockname()[:2], timeout=5) as own:
                while True:
                    accepted, peer = listener.accept()
                    accepted.close()
                    if peer == own.getsockname():
                        break
                    found = True
        return found


@contextmanager
def forbidden() -> Iterator[Forbidden]:
    """One port that listens on 127.0.0.1, 127.0.0.2 and ::1."""
    first = socket.create_server(("127.0.0.1", 0))
    port = first.getsockname()[1]
    others = [socket.create_server(("127.0.0.2", port))]
    if socket.has_ipv6:
        others.append(socket.create_server(("::1", port), family=socket.AF_INET6))
    try:
        yield Forbidden([first, *others])
    finally:
        for listener in (first, *others):
            listener.close()


class Names:
    """A resolver of this process: names and what they resolve to, one answer after the other."""

    def __init__(self) -> None:
        self.answers: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []
        self._system = socket.getaddrinfo

    def add(self, name: str, *answers: Sequence[str]) -> None:
        """The last answer is given from then on."""
        self.answers[name] = [list(answer) for answer in answers]

    def getaddrinfo(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of `socket.getaddrinfo`; names that were not added go to the system."""
        name = host.decode() if isinstance(host, bytes) else host
        if name not in self.answers:
            return self._system(host, port, *args, **kwargs)
        self.asked.append(name)
        left = self.answers[name]
        answer = left.pop(0) if len(left) > 1 else left[0]
        if not answer:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [found for each in answer for found in self._system(each, port, *args, **kwargs)]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Names that tests add; nothing outside of this machine is asked for them."""
    found = Names()
    monkeypatch.setattr(socket, "getaddrinfo", found.getaddrinfo)
    return found
