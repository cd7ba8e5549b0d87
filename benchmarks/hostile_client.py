"""A hostile client in a process of its own, which can be ended: it imports the standard library.

    python benchmarks/hostile_client.py PLAN.json

Prints what came back as JSON. `Plan` says what is sent.
"""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

CLOSED, CUT, SILENT = "closed without an answer", "cut off", "no answer"
UNREAD = 4096
"""Bytes of the receive buffer of a client that does not read."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What `connections` clients do at once: see `hostile_http.Hostile`.

    file, sizes: the bytes that each sends, and how long its pieces are.
    """

    port: int
    file: str
    sizes: list[int]
    connections: int = 1
    pause: float = 0.0
    answers: int = 1
    reads: bool = True
    hold: float = 0.0
    patience: float = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came back.

    answers: how often each came: "200", "422 invalid_option", or that there was none.
    sent: bytes, by all connections. seconds: until the last answer.
    """

    answers: dict[str, int]
    sent: int
    seconds: float

    def __str__(self) -> str:
        parts = [
            answer if count == 1 else f"{count} × {answer}"
            for answer, count in sorted(self.answers.items(), key=lambda each: -each[1])
        ]
        return ", ".join(parts)


def run(plan: Plan) -> Outcome:
    """Let all connections do it at once."""
    data = Path(plan.file).read_bytes()
    clients = [_Connection(plan, data) for _ in range(plan.connections)]
    threads = [threading.Thread(target=client.run) for client in clients]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = sum((client.answers for client in clients), Counter[str]())
    return Outcome(
        dict(answers), sum(client.sent for client in clients), time.monotonic() - started
    )


class _Stream(io.BufferedReader):
    """What is read of a connection; it outlives the answers that are read from it."""

    def close(self) -> None:
        pass


class _Answers:
    """A socket as `http.client` wants it: one stream for all answers."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = _Stream(socket.SocketIO(connection, "r"))  # type: ignore[arg-type]

    def makefile(self, _mode: str) -> io.BufferedReader:
        return self._stream


class _Connection:
    def __init__(self, plan: Plan, data: bytes) -> None:
        self.plan = plan
        self.data = memoryview(data)
        self.answers: Counter[str] = Counter()
        self.sent = 0
        self._until = time.monotonic() + plan.patience

    def run(self) -> None:
        try:
            with self._connected() as connection:
                sender = threading.Thread(target=self._send, args=(connection,), daemon=True)
                sender.start()
                if not self.plan.reads:
                    time.sleep(self.plan.hold)
                self._read(connection)
        except OSError as error:
            self.answers[f"not connected: {type(error).__name__}"] += 1

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.socket() as connection:
            if not self.plan.reads:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD)
            connection.settimeout(self.plan.patience)
            connection.connect(("127.0.0.1", self.plan.port))
            yield connection

    def _send(self, connection: socket.socket) -> None:
        at = 0
        with suppress(OSError):
            for number, size in enumerate(self.plan.sizes):
                if number:
                    time.sleep(self.plan.pause)
                end = at + size
                while at < end:
                    count = connection.send(self.data[at : min(end, at + (1 << 16))])
                    at += count
                    self.sent += count

    def _read(self, connection: socket.socket) -> None:
        stream = _Answers(connection)
        for number in range(self.plan.answers):
            connection.settimeout(max(0.1, self._until - time.monotonic()))
            answer = _answer(stream, "HEAD" if self.data[:5] == b"HEAD " else "GET")
            if answer in (CLOSED, SILENT) and number:
                if answer == SILENT:
                    self.answers["the connection stays open"] += 1
                return
            self.answers[answer] += 1
            if answer in (CLOSED, CUT, SILENT):
                return


def _answer(stream: _Answers, method: str) -> str:
    """Read one answer; its status and its code, or what there is instead."""
    response = http.client.HTTPResponse(stream, method=method)  # type: ignore[arg-type]
    begun = False
    try:
        response.begin()
        begun = True
        body = response.read(1 << 16)
        while response.read(1 << 20):
            pass
    except TimeoutError:
        return CUT if begun else SILENT
    except (OSError, http.client.HTTPException):
        return CUT if begun else CLOSED
    if response.length:  # the connection ended before its body
        return CUT
    return f"{response.status} {_code(body) if response.status >= 400 else ''}".strip()


def _code(body: bytes) -> str:
    """The code of an error, or the beginning of its sentence."""
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    if isinstance(found, dict) and isinstance(found.get("error"), dict):
        found = found["error"]
    if not isinstance(found, dict):
        return ""
    said = next((found[key] for key in ("code", "error", "message") if key in found), "")
    if isinstance(said, int):  # TorchServe's is the status again
        said = found.get("type", "")
    return re.sub(r"[^ -~]|[|`<>*$\\]", " ", str(said))[:48].strip()


def main() -> None:
    """Read a plan, run it, and print the outcome."""
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(asdict(run(plan))), flush=True)


if __name__ == "__main__":
    main()
