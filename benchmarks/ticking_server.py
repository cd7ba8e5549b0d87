"""`camserve serve` with a task on its event loop that records how late it is woken.

    python benchmarks/ticking_server.py STATE_FILE serve --port 8000

STATE_FILE is shared with the process that measures: see `Ticks`. Everything else is `camserve`.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import mmap
import struct
import sys
import time
from pathlib import Path
from typing import Any, Self

EVERY = 0.005
"""Seconds between two ticks."""

_SLOTS = struct.Struct("5d")
_WANTED, _CURRENT, _WORST, _LAST, _COUNT = range(5)


class Ticks:
    """Five doubles of shared memory.

    The run that is wanted and the one that is counted, the largest lateness in it, the time of the
    last tick (seconds of CLOCK_MONOTONIC), and the ticks so far.
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
        """The largest lateness in seconds since `restart`, that of a tick still due included."""
        return max(self._read(_WORST), self.overdue())

    def overdue(self) -> float:
        """Seconds that the next tick is late by now."""
        return max(0.0, time.monotonic() - self._read(_LAST) - EVERY)

    # ---- for the server

    async def tick(self) -> None:
        """Forever."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        worst, counted = 0.0, -1.0
        while True:
            wanted = self._read(_WANTED)
            if wanted != counted:
                gc.collect()
                if trim is not None:
                    trim(0)
                worst, counted = 0.0, wanted
                self._write(_WORST, worst)
                self._write(_LAST, time.monotonic())
                self._write(_CURRENT, wanted)
            started = time.monotonic()
            await asyncio.sleep(EVERY)
            now = time.monotonic()
            worst = max(worst, now - started - EVERY)
            self._write(_WORST, worst)
            self._write(_LAST, now)
            self._write(_COUNT, self._read(_COUNT) + 1)


def main() -> None:
    """Serve, and tick."""
    path, *arguments = sys.argv[1:]
    from service import cli, serve_command  # noqa: PLC0415 - a client imports `Ticks` alone

    class Ticking(serve_command.DrainingServer):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.ticking = asyncio.ensure_future(Ticks(Path(path)).tick())

    serve_command.DrainingServer = Ticking  # type: ignore[misc]
    sys.argv = ["camserve", *arguments]
    cli.main()


if __name__ == "__main__":
    main()
