"""The faulty requests of a soak: each kind is sent, and its answer must be the right refusal."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pictures
import pytest
import tiny
from running import Server
from soak_requests import PATIENCE, SOILED, Ask, form, raw, send
from tiny import SmallNet
from torch import Tensor, nn

from service.cam.heatmap import render_heatmap

PNG = "image/png"
RED, GOOD = (PNG, pictures.RED_PNG), (PNG, pictures.png())


class Dawdling(SmallNet):
    """Takes a twentieth of a second for every batch."""

    def forward(self, x: Tensor) -> Tensor:
        threading.Event().wait(0.05)
        return super().forward(x)


def dawdles() -> nn.Module:
    """For `--model soak_faults:dawdles`."""
    return Dawdling()


@dataclass(frozen=True, slots=True)
class _DiesWithItsThread:
    """A task that no worker survives."""

    told: Future[None] = field(default_factory=Future)
    request: None = None

    def run(self) -> None:
        raise SystemExit

    def give_up(self) -> None:
        self.told.set_result(None)


class UnforeseenAnswer(AssertionError):
    """A faulty request was not answered as it must be."""


class Faults:
    """Sends faulty requests to one server. `kinds` are all that there are.

        fault = Faults(server)
        fault.send("gives_nan")    # raises UnforeseenAnswer

    Each call opens connections of its own and closes them.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._one_hangs = threading.Lock()
        self.kinds: dict[str, Callable[[], None]] = {
            "the client disconnects during the upload": self._goes_in_mid_upload,
            "the client disconnects before the response": self._goes_before_its_answer,
            "the client disconnects during the response": self._goes_in_mid_answer,
            "no image": lambda: self._is_refused(b"no image at all", 415),
            "an empty image": lambda: self._is_refused(b"", 400),
            "a truncated image": lambda: self._is_refused(pictures.png(200, 200)[:4000], 400),
            "an image of too many pixels": lambda: self._is_refused(_huge(), 413),
            "unknown options": self._asks_for_what_is_not_there,
            "one bad image of three": self._one_bad_of_three,
            "the deadline passes": self._deadline,
            "exception in a hook": lambda: self._fails("fails_in_hook", "inference_failed"),
            "exception in forward": lambda: self._fails("fails_in_forward", "inference_failed"),
            "exception in backward": lambda: self._fails("fails_in_backward", "inference_failed"),
            "exception in render": self._fails_to_render,
            "not a number": lambda: self._fails("gives_nan", "non_finite_output"),
            "a replica returned dirty": self._soils,
            "a worker dies": self._kills_a_worker,
            "a worker hangs": self._hangs,
        }

    def send(self, kind: str) -> None:
        """One of that kind. Raises UnforeseenAnswer where it is not answered as it must be."""
        self.kinds[kind]()

    def _answer(self, ask: Ask) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(*self._server.address, timeout=PATIENCE)
        try:
            status, body = send(connection, ask)
            return status, json.loads(body)
        finally:
            connection.close()

    def _expect(self, ask: Ask, status: int, code: str | None = None) -> Any:
        found, body = self._answer(ask)
        if found != status or (code is not None and body.get("code") != code):
            said = f"{found} {str(body)[:200]}"
            raise UnforeseenAnswer(f"{ask.path}: {said} instead of {status} {code or ''}")
        return body

    # ---- the client

    def _goes_in_mid_upload(self) -> None:
        ask = form("/explain", {"model": "other"}, [GOOD] * 3)
        with self._connected() as connection:
            connection.sendall(ask.raw()[: -len(ask.body) // 2])

    def _goes_before_its_answer(self) -> None:
        with self._connected() as connection:
            connection.sendall(raw("/explain", {"model": "small"}, [GOOD]).raw())

    def _goes_in_mid_answer(self) -> None:
        asked = {"include": ["overlay", "heatmap"], "format": "png"}
        ask = raw("/explain", asked, [(PNG, pictures.png(700, 500))])
        with self._connected() as connection:
            connection.sendall(ask.raw())
            connection.recv(2000)

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        """A connection that ends with a reset."""
        with socket.create_connection(self._server.address, timeout=PATIENCE) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            yield connection
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    # ---- the request

    def _is_refused(self, data: bytes, status: int) -> None:
        self._expect(raw("/explain", {}, [(PNG, data)]), status)

    def _asks_for_what_is_not_there(self) -> None:
        for options, status in (
            ({"model": "smal"}, 404),
            ({"layer": "features.77"}, 404),
            ({"method": "magic"}, 422),
            ({"colour": "red"}, 422),
        ):
            self._expect(raw("/explain", options, [GOOD]), status)

    def _one_bad_of_three(self) -> None:
        files = [GOOD, (PNG, b"no image"), GOOD]
        results = self._expect(form("/predict", {"model": "other"}, files), 200)["results"]
        if ["error" in result for result in results] != [False, True, False]:
            raise UnforeseenAnswer(f"one bad image of three: {str(results)[:200]}")

    def _deadline(self) -> None:
        ask = raw("/explain", {"model": "dawdles", "method": "rise", "samples": 400}, [GOOD])
        late = replace(ask, headers={**ask.headers, "x-request-timeout": "0.4"})
        self._expect(late, 504, "deadline_exceeded")

    # ---- the model, and what is ours

    def _fails(self, model: str, code: str) -> None:
        self._expect(raw("/explain", {"model": model}, [RED]), 500, code)

    def _fails_to_render(self) -> None:
        self._expect(raw("/explain", {"colormap": UNDRAWABLE}, [GOOD]), 500, "render_failed")

    def _soils(self) -> None:
        for model in SOILED:
            self._expect(raw("/predict", {"model": model}, [RED]), 200)

    def _kills_a_worker(self) -> None:
        scheduler, task = self._server.service.scheduler, _DiesWithItsThread()
        with scheduler._wake:
            scheduler._calls.add(task)  # type: ignore[arg-type]
            scheduler._wake.notify()
        task.told.result(PATIENCE)

    def _hangs(self) -> None:
        """Alone at its model: whoever shares a batch with it would be given up with it."""
        workers = self._server.service.scheduler.workers
        with self._one_hangs:
            tiny.RELEASED.clear()
            try:
                self._expect(raw("/explain", {"model": "hangs"}, [RED]), 500, "inference_hangs")
            finally:
                tiny.RELEASED.set()
            for _ in range(int(PATIENCE / 0.01)):
                if not workers.abandoned:
                    return
                threading.Event().wait(0.01)
            raise UnforeseenAnswer("a thread that hung was released and did not end")


def _huge() -> bytes:
    """The head of a PNG that says it has 81 million pixels."""
    data = bytearray(pictures.png())
    data[16:24] = struct.pack(">II", 9_000, 9_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


UNDRAWABLE = "bone"


@contextmanager
def drawing_fails() -> Iterator[None]:
    """Inside, no heatmap can be drawn in the colours `UNDRAWABLE`."""

    def render(grid: Any, geometry: Any, style: Any, *more: Any) -> Any:
        if style.colormap == UNDRAWABLE:
            raise RuntimeError("planted: render")
        return render_heatmap(grid, geometry, style, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.pipeline.response.render_heatmap", render)
        yield


RARE = ("the deadline passes", "a worker hangs")
CYCLE = 80


def faulty_kinds(kinds: list[str]) -> Iterator[str]:
    """Without end: the slow kinds once in `CYCLE`, the others in turn."""
    common = itertools.cycle(kind for kind in kinds if kind not in RARE)
    for number in itertools.count():
        place = number % CYCLE
        yield RARE[place // 20 - 1] if place in (20, 40) else next(common)
