"""`camserve serve` with a task on its event loop that records how late it is woken.

    python benchmarks/ticking_server.py STATE_FILE serve --port 8000

STATE_FILE is shared with the process that measures: see `Ticks`. Everything else is `camserve`.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import mmap
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

EVERY = 0.005
"""Seconds between two ticks."""

_SLOTS = struct.Struct("6d")
_WANTED, _CURRENT, _WORST, _LAST, _COUNT, _GROSS = range(6)


class Ticks:
    """Six doubles of shared memory.

    The run that is wanted and the one that is counted, the largest lateness in it without what the
    thread waited for a core, the time of the last tick (seconds of CLOCK_MONOTONIC), the ticks so
    far, and the largest lateness with that.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b")
        self._memory = mmap.mmap(self._file.fileno(), _SLOTS.size)

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the file first. Any user may write to it: in a container the service is another."""
        path.write_bytes(bytes(_SLOTS.size))
        path.chmod(0o666)
        return cls(path)

    def close(self) -> None:
        self._memory.close()
        self._file.close()

    def _read(self, slot: int) -> float:
        return float(struct.unpack_from("d", self._memory, 8 * slot)[0])

    def _write(self, slot: int, value: float) -> None:
        struct.pack_into("d", self._memory, 8 * slot, value)

    # ---- for the process that measures

    def restart(self, patience: float = 30.0) -> bool:
        """Begin a new count, once the server has returned freed memory; False: it does not tick."""
        wanted = self._read(_WANTED) + 1
        self._write(_WANTED, wanted)
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if self._read(_CURRENT) == wanted:
                return True
            time.sleep(EVERY)
        return False

    def worst(self) -> float:
        """The largest lateness in seconds since `restart`, that of a tick still due included.

        What the thread of the event loop waited for a core is left out, where the kernel counts it.
        """
        return max(self._read(_WORST), self.overdue())

    def gross(self) -> float:
        """The same with what the thread waited for a core, which others may have had."""
        return max(self._read(_GROSS), self.overdue())

    def overdue(self) -> float:
        """Seconds that the next tick is late by now."""
        return max(0.0, time.monotonic() - self._read(_LAST) - EVERY)

    # ---- for the server

    async def tick(self) -> None:
        """Forever."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        worst, gross, counted = 0.0, 0.0, -1.0
        waits = _core_waits()
        while True:
            wanted = self._read(_WANTED)
            if wanted != counted:
                gc.collect()
                if trim is not None:
                    trim(0)
                worst, gross, counted = 0.0, 0.0, wanted
                self._write(_WORST, worst)
                self._write(_GROSS, gross)
                self._write(_LAST, time.monotonic())
                self._write(_CURRENT, wanted)
            started, waited = time.monotonic(), next(waits)
            await asyncio.sleep(EVERY)
            now = time.monotonic()
            late = now - started - EVERY
            gross = max(gross, late)
            worst = max(worst, late - (next(waits) - waited))
            self._write(_WORST, worst)
            self._write(_GROSS, gross)
            self._write(_LAST, now)
            self._write(_COUNT, self._read(_COUNT) + 1)


def _core_waits() -> Iterator[float]:
    """Seconds that this thread was ready to run and had no core, so far; 0 where none are known."""
    try:
        path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        with path.open("rb", 0) as file:
            while True:
                file.seek(0)
                yield int(file.read(100).split()[1]) / 1e9
    except (OSError, IndexError):
        yield from itertools.repeat(0.0)


def main() -> None:
    """Serve, and tick."""
    path, *arguments = sys.argv[1:]
    from service.cli import main, serve_http  # noqa: PLC0415 - a client imports `Ticks` alone

    class Ticking(serve_http.DrainingServer):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.ticking = asyncio.ensure_future(Ticks(Path(path)).tick())

    serve_http.DrainingServer = Ticking  # type: ignore[misc]
    sys.argv = ["camserve", *arguments]
    main.main()


if __name__ == "__main__":
    main()
