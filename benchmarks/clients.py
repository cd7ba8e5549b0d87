"""Clients that ask without pause, in a process of their own that takes as little CPU as it can.

    measured = run(Load(port, "/explain", clients=16, seconds=5), bodies, begins=..., ends=...)

Each client has one connection and one thread that is blocked in the kernel nearly always; answers
are read into a buffer and only counted. `begins` and `ends` are called at the edges of the window
that is measured, so that the caller can look at the server's clock then.
"""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PATIENCE = 8.0
"""The window is at most this many times as long as was asked for, however few answers came."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: a closed loop of `clients`, counted for `seconds` after it has settled."""

    port: int
    path: str
    clients: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What the clients saw in the window.

    latencies:   seconds of each answer that was complete in it.
    window:      its length in seconds. size: bytes of an answer, headers included, on average.
    client_cpu:  CPU seconds of the clients' process in it.
    failures:    statuses other than 200, and what else went wrong.
    """

    latencies: list[float]
    window: float
    size: float
    client_cpu: float
    failures: list[str]

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.window


def multipart(data: bytes) -> tuple[str, bytes]:
    """The content type and the body of a form with one part `image`, as curl -F sends it."""
    head = (
        b'--edge\r\ncontent-disposition: form-data; name="image"; filename="photo.jpg"\r\n'
        b"content-type: image/jpeg\r\n\r\n"
    )
    return "multipart/form-data; boundary=edge", head + data + b"\r\n--edge--\r\n"


def run(
    load: Load,
    photos: Sequence[bytes],
    begins: Callable[[], object] = lambda: None,
    ends: Callable[[], object] = lambda: None,
) -> Measured:
    """Send the load from another process."""
    with subprocess.Popen(  # noqa: S603 - this very file
        [sys.executable, str(Path(__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump((asdict(load), list(photos)), process.stdin)
        process.stdin.close()
        for expected, called in (("begins", begins), ("ends", ends)):
            line = process.stdout.readline().decode().strip()
            if line != expected:
                raise RuntimeError(f"the clients said {line!r} instead of {expected!r}")
            called()
        return Measured(**json.loads(process.stdout.read()))


class _Clients:
    def __init__(self, load: Load, photos: Sequence[bytes]) -> None:
        self.load = load
        self.requests = [_request(load, photo) for photo in photos]
        self.answers: list[tuple[float, float, int]] = []  # when complete, latency, bytes
        self.failures: list[str] = []
        self.stop = threading.Event()

    def ask(self, number: int) -> None:
        """One client, until it is told to stop."""
        turn, buffer = number, bytearray(1 << 20)
        try:
            with socket.create_connection(("127.0.0.1", self.load.port), timeout=120) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while not self.stop.is_set():
                    started = time.perf_counter()
                    connection.sendall(self.requests[turn % len(self.requests)])
                    status, size = _receive(connection, buffer)
                    done = time.perf_counter()
                    if status == b"200":
                        self.answers.append((done, done - started, size))
                    else:
                        self.failures.append(status.decode())
                    turn += 1
        except OSError as error:
            self.failures.append(repr(error))

    def count(self) -> Measured:
        """Let them settle, watch the window, and stop them."""
        load = self.load
        threads = [threading.Thread(target=self.ask, args=(n,)) for n in range(load.clients)]
        for thread in threads:
            thread.start()
        began = time.perf_counter()
        self._wait(lambda: len(self.answers) >= load.clients, began + 0.5, PATIENCE * load.seconds)
        print("begins", flush=True)
        start, cpu, before = time.perf_counter(), time.process_time(), len(self.answers)
        enough = before + 2 * load.clients
        self._wait(
            lambda: len(self.answers) >= enough, start + load.seconds, PATIENCE * load.seconds
        )
        end, cpu = time.perf_counter(), time.process_time() - cpu
        print("ends", flush=True)
        self.stop.set()
        for thread in threads:
            thread.join()
        inside = [answer for answer in self.answers if start < answer[0] <= end]
        return Measured(
            [latency for _, latency, _ in inside],
            end - start,
            sum(size for *_, size in inside) / max(1, len(inside)),
            cpu,
            sorted(set(self.failures)),
        )

    def _wait(self, enough: Callable[[], bool], earliest: float, longest: float) -> None:
        """Until it is enough, not before `earliest` and `longest` seconds at most."""
        latest = time.perf_counter() + longest
        while (now := time.perf_counter()) < latest and not (now >= earliest and enough()):
            if self.failures:
                return
            time.sleep(min(0.02, max(0.001, earliest - now)))


def _request(load: Load, photo: bytes) -> bytes:
    kind, body = multipart(photo)
    head = (
        f"POST {load.path} HTTP/1.1\r\nhost: 127.0.0.1:{load.port}\r\n"
        f"content-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _receive(connection: socket.socket, buffer: bytearray) -> tuple[bytes, int]:
    """Read one answer; its status and its size in bytes, headers included."""
    view, got, end = memoryview(buffer), 0, -1
    while end < 0:
        count = connection.recv_into(view[got:])
        if not count:
            raise ConnectionError("the server closed the connection")
        got += count
        end = buffer.find(b"\r\n\r\n", 0, got)
    head = bytes(buffer[:end]).lower()
    place = head.find(b"content-length:")
    if place < 0:
        raise ConnectionError("an answer without content-length")
    total = end + 4 + int(head[place + 15 :].split(b"\r\n", 1)[0])
    while got < total:
        count = connection.recv_into(view[: min(len(buffer), total - got)])
        if not count:
            raise ConnectionError("the server closed the connection")
        got += count
    return head.split(b" ", 2)[1], total


def _main() -> None:
    load, photos = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this
    found: dict[str, Any] = asdict(_Clients(Load(**load), photos).count())
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _main()
