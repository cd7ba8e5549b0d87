"""Memory: allocator and garbage collector settings, limits, and out-of-memory errors."""

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
"""Variables of glibc, each with its number for mallopt and the value of the service."""


def tune_allocator() -> None:
    """Configure the allocator of glibc, unless the environment does.

    It keeps up to 256 MiB of freed memory for the next activations; otherwise each large tensor is
    mapped again, with a page fault per page. More is returned to the kernel in pieces of that size:
    a GiB at once, freed under the GIL, stopped the event loop for 120 ms. All threads share two
    arenas: with the default of eight per core, fragmentation made memory grow without limit.

    Other C libraries have no such settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for variable, (number, value) in _MALLOPT.items():
        if variable not in os.environ:
            mallopt(number, value)


def return_freed_memory() -> None:
    """Return the freed memory that the allocator keeps to the system; with glibc alone.

    Loading a model frees hundreds of MiB of images and activations of its probes. What is between
    blocks in use is never returned by `free`.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # without Python's lock


def spare_collector() -> None:
    """Exclude all current objects from garbage collection.

    A full collection visits all objects while nothing else runs: with the 400,000 objects of torch
    it stopped the event loop for 200 ms. Call it when everything is imported and no model is
    loaded: the objects of a model must remain collectable.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # otherwise libraries report leaks at exit


@contextmanager
def collector_paused() -> Iterator[None]:
    """Disable garbage collection in all threads inside the `with`; several may overlap.

    For a single call that creates millions of permanent objects: repeated collections took three
    quarters of its time.
    """
    _PAUSES.enter()
    try:
        yield
    finally:
        _PAUSES.leave()


class _Pauses:
    """Counts the current pauses; the end of the last one enables collection again."""

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
    """Whether an exception means that the device or the machine is out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's allocator for the CPU raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_memory() -> None:
    """Release the device memory that torch caches."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_memory() -> dict[str, int]:
    """Bytes that torch has reserved on each GPU; empty without a GPU."""
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
