"""The memory budget for decoding, shared by all images of a process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import DeadlineExceeded, ImageTooLarge
from service.resources import memory_limit

SHARE = 4
"""Default: decoding may use 1/SHARE of the memory limit of the process."""


class DecodeBudget:
    """Bytes that are reserved before an image is decoded and released after preprocessing.

    A thread that waits for bytes holds none, and a thread that holds bytes never waits, so that
    there is no deadlock.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes or memory_limit() // SHARE
        self._taken = 0
        self._freed = threading.Condition()

    @property
    def taken(self) -> int:
        """Bytes that are reserved now."""
        return self._taken

    @contextmanager
    def take(self, amount: int, deadline: float | None = None) -> Iterator[None]:
        """Reserve bytes; wait for them until `deadline`, on `time.monotonic()`'s clock.

        Raises ImageTooLarge if they exceed the budget, and DeadlineExceeded.
        """
        if amount > self.max_bytes:
            raise ImageTooLarge(
                f"Decoding the image takes {amount:,} bytes of memory, and the limit is "
                f"{self.max_bytes:,}; scale it down, or save it in 8 bits and in "
                "strips or tiles, and send it again."
            )
        with self._freed:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._freed.wait_for(lambda: self._taken + amount <= self.max_bytes, wait):
                raise DeadlineExceeded(
                    "The deadline passed before there was enough memory to decode the image; try "
                    "again later."
                )
            self._taken += amount
        try:
            yield
        finally:
            with self._freed:
                self._taken -= amount
                self._freed.notify_all()
