"""Memory: telling its lack from other failures, and keeping it where it is needed again."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_MALLOPT = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 256 << 20),
    "MALLOC_MMAP_THRESHOLD_": (-3, 1 << 30),
    "MALLOC_ARENA_MAX": (-8, 2),
}
"""The variables that glibc reads, each with mallopt's number for it and our value."""


def tune_allocator() -> None:
    """Tell glibc how memory is used here, but for what the environment tells it.

    It keeps up to 256 MiB of freed memory, because the next activation needs it again; otherwise
    every page of each large tensor faults. More is returned to the kernel in pieces of that size:
    a GiB at once, freed under the interpreter's lock, stopped the event loop for 120 ms. And all
    threads share two arenas: with glibc's eight per core, each with its own gaps, memory grew for
    as long as it was watched.

    Other C libraries have no such settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for variable, (number, value) in _MALLOPT.items():
        if variable not in os.environ:
            mallopt(number, value)


def spare_collector() -> None:
    """Leave everything that exists now out of Python's garbage collections.

    A full one goes through all objects while nothing else runs: with the 400,000 that importing
    torch leaves behind it stopped the event loop for 200 ms. To be called when everything is
    imported and no model is loaded: a model's objects must stay collectable.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries would report at the end what they had not cleared


@contextmanager
def collector_paused() -> Iterator[None]:
    """Run no garbage collection in any thread within the `with`; several may overlap.

    For what makes millions of objects that all stay, in one call that no other thread can
    interrupt: collections went through them again and again, and took three fourths of its time.
    """
    _PAUSES.enter()
    try:
        yield
    finally:
        _PAUSES.leave()


class _Pauses:
    """Counts who wants no collection; the last one to leave allows them again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._enabled = False

    def enter(self) -> None:
        with self._lock:
            if not self._count:
                self._enabled = gc.isenabled()
                gc.disable()
            self._count += 1

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count and self._enabled:
                gc.enable()


_PAUSES = _Pauses()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device, or this machine, has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's allocator for the CPU raises a RuntimeError of no class of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_memory() -> None:
    """Give back what torch keeps of a device's memory for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_memory() -> dict[str, int]:
    """Bytes that torch holds on each GPU; none where there is no GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {f"cuda:{index}": torch.cuda.memory_reserved(index) for index in range(count)}


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may use: the container's limit, or the machine's memory.

    cgroup: where the control groups are mounted, version 2 or 1.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(machine, int((cgroup / file).read_text()))
        except (OSError, ValueError):  # another version, or "max"
            continue
    return machine
