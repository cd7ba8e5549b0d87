"""Memory: telling its lack from other failures, and keeping it where it is needed again."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, up to a GiB: the next activation needs it again.

    Otherwise each large tensor is mapped anew and every page of it faults. `MALLOC_MMAP_THRESHOLD_`
    and `MALLOC_TRIM_THRESHOLD_` in the environment do the same and go before. Returns whether it
    was done; other C libraries have no such setting.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(name, _KEPT_BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


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
