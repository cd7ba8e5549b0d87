"""When what failed may be tried again."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """A delay that doubles with each failure, from `first` to `longest` seconds.

    Times are on whatever clock the caller reads.
    """

    first: float = 1.0
    longest: float = 60.0
    failures: int = 0
    until: float = -math.inf

    def failed(self, now: float) -> None:
        """Note a failure."""
        self.until = now + min(self.longest, self.first * 2.0 ** min(self.failures, 30))
        self.failures += 1

    def succeeded(self) -> None:
        """Forget all failures."""
        self.failures, self.until = 0, -math.inf

    def is_over(self, now: float) -> bool:
        """Whether it may be tried again."""
        return now >= self.until

    def seconds_left(self, now: float) -> int:
        """For `Retry-After`: whole seconds, at least 1."""
        return 1 if self.is_over(now) else max(1, math.ceil(self.until - now))
