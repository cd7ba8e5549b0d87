"""Memory that decoding may take at once, shared by all images of a process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import DeadlineExceeded, ImageTooLarge
from service.resources import memory_limit

SHARE = 4
"""Without a setting, decoding may take this fraction of the memory that the process may use."""


class DecodeBudget:
    """Bytes that are taken before an image is decoded and given back when it is fitted.

    Whoever does not get its bytes at once waits in its own thread, and holds none meanwhile: those
    who hold some never wait, so that there is always one who goes on.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes or memory_limit() // SHARE
        self._taken = 0
        self._freed = threading.Condition()

    @property
    def taken(self) -> int:
        """Bytes that are taken now."""
        return self._taken

    @contextmanager
    def take(self, amount: int, deadline: float | None = None) -> Iterator[None]:
        """Hold so many bytes; wait for them until `deadline`, on `time.monotonic()`'s clock.

        Raises ImageTooLarge where they are more than all there are, and DeadlineExceeded.
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
