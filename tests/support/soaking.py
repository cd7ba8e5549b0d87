"""A soak: thousands of requests, a fifth of them faulty, and what is held before and after.

    with served_for_a_soak() as server:
        soak = Soak(server, clients=16)
        soak.run(20_000)
    print(soak.table())
    assert not soak.verdicts()

The server runs in this process, so that its hooks, threads and tensors can be counted.
"""

from __future__ import annotations

import ctypes
import gc
import http.client
import itertools
import json
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import dirty
import numpy as np
import psutil
import pytest
import soak_faults
import tiny
import torch
from running import Server, running
from safetensors.torch import save_file
from soak_faults import Faults, faulty_kinds
from soak_requests import MODELS, PATIENCE, SOILED, Ask, differences, good_asks, send
from torch import nn

from service import logs

MEBIBYTE = 1 << 20
SAMPLED_EVERY, SETTLED_AFTER = 100, 1000
"""Requests between two readings of the memory, and those before the first that counts."""
SLOPE_BOUND = 1.0
"""MiB a thousand requests."""
SEEN = 20
"""Sentences about what went wrong that are kept of each kind."""

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "soak_faults:dawdles": soak_faults.dawdles,
    **{f"tiny:{name}": getattr(tiny, name) for name in (*MODELS, "hangs")},
    **{f"dirty:{name}": getattr(dirty, name) for name in SOILED},
}
SIDE = "64"
"""Pixels of the models' inputs."""


@contextmanager
def served_for_a_soak(**settings: Any) -> Iterator[Server]:
    """A server of good and faulty models, whose temporary files lie in a folder of their own."""
    with (
        tempfile.TemporaryDirectory() as weights,
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        soak_faults.drawing_fails(),
        _logs_thrown_away(),
        running(models=_weighed(Path(weights)), workers=4, compile=False, **settings) as server,
    ):
        patch.setattr(tempfile, "tempdir", folder)
        yield server


@contextmanager
def _logs_thrown_away() -> Iterator[None]:
    """Thousands of planted tracebacks; whoever keeps them, as pytest does, keeps their tensors."""
    root = logging.getLogger()
    handlers = root.handlers
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        with redirect_stderr(nowhere):
            logs.configure("json")
        try:
            yield
        finally:
            root.handlers = handlers


def _weighed(folder: Path) -> tuple[str, ...]:
    """Every model with a weights file, which says that it takes small images."""
    found = []
    for builder, build in BUILDERS.items():
        file = folder / f"{builder.partition(':')[2]}.safetensors"
        save_file(build().state_dict(), file, {"resize": SIDE, "crop": SIDE})
        found.append(f"{builder}@{file}")
    return tuple(found)


def _give_back() -> None:
    """Return freed memory to the system, where the C library knows how."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass(frozen=True, slots=True)
class Held:
    """What a server at rest holds."""

    hooks: int
    pool_faults: int
    images: int
    threads: int
    file_descriptors: int
    temporary_files: int
    live_tensors: int

    @classmethod
    def now(cls, server: Server) -> Held:
        """Counted in this process."""
        gc.collect()
        pool = server.service.pool
        return cls(
            hooks=pool.hooks_live(),
            pool_faults=len(pool.faults()),
            images=server.service.admission.images,
            threads=threading.active_count(),
            file_descriptors=len(list(Path("/proc/self/fd").iterdir())),
            temporary_files=sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
            live_tensors=sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
        )


@dataclass
class Soak:
    """Requests from several clients at once, to one server, and what came of them.

    different: good requests that there are; each is sent many times.
    warming:  requests before the first count.
    progress: called with the number of requests sent.
    answered: good requests. faulty: how many of each kind were sent.
    wrong:    good requests that were not answered as they were alone.
    unforeseen: faulty requests that were not answered as they must be.
    rss:      (requests, MiB, MiB with what was freed given back) as they went.
    """

    server: Server
    clients: int = 16
    different: int = 220
    warming: int = 300
    progress: Callable[[int], None] = lambda _: None
    answered: int = 0
    faulty: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    unforeseen: Counter[str] = field(default_factory=Counter)
    rss: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    before: Held | None = None
    after: Held | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._faults = Faults(self.server)
        self._asks = good_asks(self.different)
        self._twins = self._alone()
        self._process = psutil.Process()

    def _alone(self) -> list[Any]:
        """What each good request is answered alone."""
        connection = http.client.HTTPConnection(*self.server.address, timeout=PATIENCE)
        twins = []
        for ask in self._asks:
            status, body = send(connection, ask)
            assert status == 200, (ask.path, body[:500])
            twins.append(json.loads(body)["results"])
        connection.close()
        return twins

    def run(self, requests: int) -> None:
        """Send that many, a fifth of them faulty; Ctrl-C ends it early."""
        for kind in self._faults.kinds:  # what is made once is made here
            self._fault(kind)
        self._all(self.warming)
        self._forget()
        self.before = self._at_rest()
        began = time.monotonic()
        self._all(requests)
        self.seconds = time.monotonic() - began
        self.after = self._at_rest(self.before)

    def _all(self, requests: int) -> None:
        numbers = iter(range(requests))
        kinds = faulty_kinds(list(self._faults.kinds))
        threads = [
            threading.Thread(target=self._client, args=(numbers, kinds), name="client")
            for _ in range(self.clients)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _client(self, numbers: Iterator[int], kinds: Iterator[str]) -> None:
        connection = http.client.HTTPConnection(*self.server.address, timeout=PATIENCE)
        while not self._stop.is_set():
            with self._lock:
                number = next(numbers, None)
                kind = next(kinds) if number is not None and number % 5 == 4 else None
            if number is None:
                break
            if kind is None:
                self._good(connection, number)
            else:
                self._fault(kind)
                connection.close()  # the server closes what is idle for as long as some of these
            if number % SAMPLED_EVERY == 0:
                self.progress(number)
                self._read_memory(number)
        connection.close()

    def _read_memory(self, number: int) -> None:
        """As it is, and once the C library has given back what it keeps of freed memory."""
        kept = self._process.memory_info().rss / MEBIBYTE
        _give_back()
        self.rss.append((number, kept, self._process.memory_info().rss / MEBIBYTE))

    def _good(self, connection: http.client.HTTPConnection, number: int) -> None:
        place = number * 7 % len(self._asks)
        ask = self._asks[place]
        found = self._compared(connection, ask, self._twins[place])
        with self._lock:
            self.answered += 1
            if found is not None and len(self.wrong) < SEEN:
                self.wrong[f"{ask.path}: {found}"] += 1

    def _compared(self, connection: http.client.HTTPConnection, ask: Ask, twin: Any) -> str | None:
        try:
            status, body = send(connection, ask)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return repr(error)
        if status != 200:
            return f"{status} {body[:200]!r}"
        return next(differences(json.loads(body)["results"], twin), None)

    def _fault(self, kind: str) -> None:
        said = None
        try:
            self._faults.send(kind)
        except (AssertionError, OSError, http.client.HTTPException, TimeoutError) as error:
            said = f"{kind}: {error!r}"
        with self._lock:
            self.faulty[kind] += 1
            if said is not None and len(self.unforeseen) < SEEN:
                self.unforeseen[said] += 1

    def _forget(self) -> None:
        """What the warming up counted, but for what went wrong in it."""
        self.answered = 0
        self.faulty.clear()
        self.rss.clear()

    def _at_rest(self, expected: Held | None = None) -> Held:
        """What is held when the last connection has been closed: a few moments after the last."""
        workers = self.server.service.scheduler.workers
        held, before = Held.now(self.server), None
        until = time.monotonic() + 10
        while time.monotonic() < until:
            threading.Event().wait(0.1)
            before, held = held, Held.now(self.server)
            idle = not workers.busy and not workers.abandoned and not held.images
            if idle and held == (expected or before):
                break
        return held

    # ---- what came of it

    def slope(self) -> float | None:
        """MiB a thousand requests, by least squares behind the first thousand; None: too few."""
        kept = [(number, used) for number, _, used in self.rss if number >= SETTLED_AFTER]
        if len(kept) < 10:
            return None
        numbers, used = np.array(kept).T
        return float(np.polyfit(numbers / 1000, used, 1)[0])

    def verdicts(self) -> list[str]:
        """Everything that is not as it must be, in sentences."""
        found = [f"wrong, {n} times: {what}" for what, n in self.wrong.items()]
        found += [f"unforeseen, {n} times: {what}" for what, n in self.unforeseen.items()]
        found += [
            f"{name}: {was} at the start, {now} at the end"
            for name, was, now in self._counts()
            if was != now
        ]
        slope = self.slope()
        if slope is not None and slope >= SLOPE_BOUND:
            found.append(f"memory grows by {slope:.2f} MiB a thousand requests")
        return found

    def _counts(self) -> list[tuple[str, int, int]]:
        if self.before is None or self.after is None:
            return []
        was, now = asdict(self.before), asdict(self.after)
        names = [each.name for each in fields(Held)]
        return [(name.replace("_", " "), was[name], now[name]) for name in names]

    def table(self) -> str:
        """In Markdown: what was sent, what is held, how memory went."""
        total = self.answered + self.faulty.total()
        rows = [f"| valid requests | {self.answered} | {sum(self.wrong.values())} |"]
        rows += [
            f"| {kind} | {n} | {sum(c for s, c in self.unforeseen.items() if s.startswith(kind))} |"
            for kind, n in sorted(self.faulty.items(), key=lambda each: -each[1])
        ]
        held = [f"| {name} | {was} | {now} |" for name, was, now in self._counts()]
        slope = self.slope()
        shown = ", ".join(
            f"{u:.0f} ({k:.0f})" for _, k, u in itertools.islice(self.rss, 0, None, 20)
        )
        replaced = sum(self.server.service.pool.replaced.values())
        sent = (
            f"{total} requests of {self.clients} clients in {self.seconds:.0f} s; {replaced} "
            f"replicas and {self.server.service.scheduler.workers.replaced} threads were replaced."
        )
        memory = (
            f"Resident MiB, every {20 * SAMPLED_EVERY} requests; in parentheses including "
            f"the freed memory that the C library keeps: {shown}. Slope after the first "
            f"{SETTLED_AFTER}: {'-' if slope is None else f'{slope:.2f}'} MiB per thousand."
        )
        sent_head = "| sent | times | unexpected result |\n|---|---|---|"
        held_head = "| held by the process | at the start | at the end |\n|---|---|---|"
        parts = [sent, "", sent_head, *rows, "", held_head, *held, "", memory]
        return "\n".join(parts)
