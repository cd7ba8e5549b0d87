"""Telling a lack of memory from other failures."""

from __future__ import annotations

import torch


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
