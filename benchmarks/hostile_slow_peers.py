"""Silent readers and silent uploaders at once, and what they leave of the rate of good clients.

    python benchmarks/hostile_slow_peers.py '{"port": 8000, "peers": 200, "addresses": 16}'

That is the process of the peers, which `slow_peers` starts: it holds all their connections, opens
another where the server ends one, and says on a line of its output when all of them are connected.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

SHARE = 0.8
"""Of their rate alone, that good clients keep."""
WINDOW, SETTLE = 10.0, 5.0
"""Seconds that a rate is counted, and before; never longer before than counted."""
RETURNS = 10.0
"""Seconds after which a peer whose connection was ended comes again."""
LATER = 1.0
"""Seconds after which a good client that was refused tries again."""
UPLOAD = 32 << 20
FILES = 4096


@dataclass(frozen=True, slots=True)
class Peers:
    """How many of each kind, over how many addresses of loopback. The good clients have another."""

    port: int
    peers: int
    addresses: int


# ---- the peers' process


@dataclass
class _Peer:
    """One of them: what it sends first, and whether it goes on with a byte a second."""

    head: bytes
    drips: bool
    address: str
    socket: socket.socket | None = None
    left: bytes = b""
    returns: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)


class _Crowd:
    """All peers in one loop. A reader asks and reads nothing; an uploader sends no whole body."""

    def __init__(self, plan: Peers, large: bytes) -> None:
        self._plan = plan
        self._selector = selectors.DefaultSelector()
        self.counts: Counter[str] = Counter()
        start = "POST /explain HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: image/jpeg\r\n"
        upload = f"{start}content-length: {UPLOAD}\r\n\r\n".encode()
        kinds = ((large, False), (upload, True))
        self._peers = [
            _Peer(head, drips, f"127.0.1.{1 + (2 * number + place) % plan.addresses}")
            for number in range(plan.peers)
            for place, (head, drips) in enumerate(kinds)
        ]

    def run(self) -> None:
        """Until the standard input ends."""
        stop = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
        said, next_drip = False, time.monotonic() + 1
        while not stop.is_set():
            now = time.monotonic()
            for peer in self._peers:
                if peer.socket is None and now >= peer.returns:
                    self._connect(peer)
            self._serve(0.1)
            if now >= next_drip:
                next_drip = now + 1
                self._drip()
            if not said and not any(peer.left for peer in self._peers):
                print("connected", flush=True)
                said = True
        held = sum(peer.socket is not None for peer in self._peers)
        print(json.dumps({"held at the end": held, **self.counts}), flush=True)

    def _connect(self, peer: _Peer) -> None:
        peer.socket = connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, FILES)
        connection.bind((peer.address, 0))
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", self._plan.port))
        peer.left = peer.head
        self._selector.register(connection, selectors.EVENT_WRITE, peer)
        self.counts["connections"] += 1

    def _serve(self, seconds: float) -> None:
        for key, events in self._selector.select(seconds):
            peer: _Peer = key.data
            if events & selectors.EVENT_WRITE:
                self._write(peer)
            elif peer.drips:
                self._answered(peer)

    def _write(self, peer: _Peer) -> None:
        assert peer.socket is not None
        try:
            peer.left = peer.left[peer.socket.send(peer.left) :]
        except BlockingIOError:
            return
        except OSError:
            self._end(peer, "not connected, or reset")
            return
        if not peer.left:
            self._selector.unregister(peer.socket)
            if peer.drips:  # it reads what it is answered; a reader does not
                self._selector.register(peer.socket, selectors.EVENT_READ, peer)

    def _answered(self, peer: _Peer) -> None:
        assert peer.socket is not None
        data = b""
        with suppress(OSError):
            data = peer.socket.recv(1 << 16)
        answer = data.split(b" ", 2)[1].decode() if data.startswith(b"HTTP/") else "closed"
        self._end(peer, f"uploader: {answer}")

    def _drip(self) -> None:
        """A byte of each uploader; and readers whose connection is no more come again."""
        for peer in self._peers:
            if peer.socket is None or peer.left:
                continue
            if peer.drips:
                try:
                    peer.socket.send(b"\xff")
                except BlockingIOError:
                    pass
                except OSError:
                    self._end(peer, "uploader: reset")
            elif _is_over(peer.socket):
                self._end(peer, "reader: ended by the server")

    def _end(self, peer: _Peer, why: str) -> None:
        assert peer.socket is not None
        self.counts[why] += 1
        with suppress(KeyError, ValueError):
            self._selector.unregister(peer.socket)
        peer.socket.close()
        peer.socket, peer.left = None, b""
        peer.returns = time.monotonic() + RETURNS


_STATE_ESTABLISHED = 1


def _is_over(connection: socket.socket) -> bool:
    """Whether the server has closed or reset it, though nothing is read."""
    state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state != _STATE_ESTABLISHED


def _raise_files(wanted: int) -> None:
    """Let this process, and what it starts, open that many files, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# ---- what starts them


@contextmanager
def _peers(plan: Peers) -> Iterator[Counter[str]]:
    """All of them while inside; at the end what became of them."""
    found: Counter[str] = Counter()
    script = Path(__file__).resolve()
    command = [sys.executable, str(script), json.dumps(asdict(plan))]
    search = os.pathsep.join(filter(None, (str(script.parent), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(  # noqa: S603 - this very file
        command,
        env={**os.environ, "PYTHONPATH": search},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != b"connected\n":
            raise RuntimeError("the slow peers were not all connected")
        try:
            yield found
        finally:
            process.stdin.close()
            found.update(json.loads(process.stdout.read() or b"{}"))


def _rate(
    port: int, photos: Sequence[bytes], clients: int, seconds: float
) -> tuple[float, Counter[str]]:
    """Good answers a second of a closed loop, and how all were answered."""
    statuses: Counter[str] = Counter()
    lock, stop = threading.Lock(), threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                while not stop.is_set():
                    fields = {"content-type": "image/jpeg"}
                    photo = photos[number % len(photos)]
                    connection.request("POST", "/explain?include=overlay", photo, fields)
                    response = connection.getresponse()
                    response.read()
                    with lock:
                        statuses[str(response.status)] += 1
                    if response.status != 200:
                        stop.wait(LATER)
            except (OSError, http.client.HTTPException) as error:
                with lock:
                    statuses[type(error).__name__] += 1
                stop.wait(LATER)
            finally:
                connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    with lock:
        before = statuses["200"]
    began = time.monotonic()
    time.sleep(seconds)
    with lock:
        count, window = statuses["200"] - before, time.monotonic() - began
    stop.set()
    for thread in threads:
        thread.join()
    return count / window, statuses


def slow_peers(start: object, options: argparse.Namespace) -> bool:
    """Measure alone and beside them in turn; print it; whether good clients keep their share.

    What else the machine does changes both, so each rate beside them is compared with those before
    and after, and the median of the pairs counts.
    """
    # The peers' process imports the standard library only.
    from measuring import machine, markdown, photograph  # noqa: PLC0415
    from watched import Watched  # noqa: PLC0415

    window = options.seconds or WINDOW
    photos = [photograph(seed, 320, 240) for seed in range(4)]
    _raise_files(4 * options.peers + 1024)
    became: Counter[str] = Counter()
    late, peak = 0.0, 0
    with Watched(start) as server:  # type: ignore[arg-type]
        _rate(server.port, photos, options.clients, 2)
        rest = server.at_rest()
        rows = [("alone", *_rate(server.port, photos, options.clients, window))]
        for _ in range(options.pairs):
            with _peers(Peers(server.port, options.peers, options.addresses)) as found:
                time.sleep(min(SETTLE, window))
                rows.append(("beside them", *_rate(server.port, photos, options.clients, window)))
                late, peak = max(late, server.lateness()), max(peak, server.peak())
            became.update(found)
            server.settles(30)
            rows.append(("alone again", *_rate(server.port, photos, options.clients, window)))
    shown = [[name, f"{rate:.1f}", _said(statuses)] for name, rate, statuses in rows]
    print(markdown(("good clients", "answers a second", "answered"), shown))
    rates = [rate for _, rate, _ in rows]
    shares = [
        2 * beside / max(before + after, 1e-9)
        for before, beside, after in zip(rates[::2], rates[1::2], rates[2::2], strict=False)
    ]
    share = statistics.median(shares)
    print(
        f"\n{options.peers} silent readers and {options.peers} silent uploaders from "
        f"{options.addresses} addresses: {_said(became)}\nThe event loop was late by "
        f"{1000 * late:.0f} ms at most; {max(0, peak - rest) >> 20} MiB above rest.\n"
        f"Good clients kept {share:.2f} of their rate in the median, "
        f"{', '.join(f'{each:.2f}' for each in shares)}; {SHARE} are wanted. {machine()}"
    )
    return share >= SHARE


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in counts.most_common())


def _main() -> None:
    from hostile_connections import LARGE_ANSWER  # noqa: PLC0415 - of the benchmark, as it is
    from measuring import photograph  # noqa: PLC0415

    plan = Peers(**json.loads(sys.argv[1]))
    _raise_files(4 * plan.peers + 1024)
    photo = photograph(0, 320, 240)
    start = f"POST {LARGE_ANSWER} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: image/jpeg\r\n"
    _Crowd(plan, f"{start}content-length: {len(photo)}\r\n\r\n".encode() + photo).run()


if __name__ == "__main__":
    _main()
