"""Exponential backoff: when a failed operation may be retried."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """A delay that doubles with each failure, from `first` to `longest` seconds.

    Times are on the clock of the caller.
    """

    first: float = 1.0
    longest: float = 60.0
    failures: int = 0
    until: float = -math.inf

    def failed(self, now: float) -> None:
        """Record a failure."""
        self.until = now + min(self.longest, self.first * 2.0 ** min(self.failures, 30))
        self.failures += 1

    def succeeded(self) -> None:
        """Reset after a success."""
        self.failures, self.until = 0, -math.inf

    def is_over(self, now: float) -> bool:
        """Whether the delay has passed."""
        return now >= self.until

    def seconds_left(self, now: float) -> int:
        """For `Retry-After`: whole seconds, at least 1."""
        return 1 if self.is_over(now) else max(1, math.ceil(self.until - now))
