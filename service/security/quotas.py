"""Quotas of each key: requests per minute, concurrent requests, and their total cost.

Everything runs on the event loop, so that no locks are needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from service.errors import InvalidOption, KeyLimit
from service.security.keys import Key


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of one key; 0: no limit. rate: requests per minute. cost: total forward passes."""

    rate: int = 0
    concurrency: int = 0
    cost: float = 0


@dataclass(slots=True)
class _Use:
    """The current use of a key. `tokens`: remaining requests of a token bucket."""

    tokens: float
    filled: float
    requests: int = 0
    cost: float = 0


@dataclass(slots=True)
class Visit:
    """One request of a key."""

    name: str
    bounds: Bounds
    use: _Use
    cost: float = 0

    def reserve(self, cost: float) -> None:
        """Add to the cost of the request, in forward passes.

        Raises KeyLimit, and InvalidOption for a cost above the limit of the key.
        """
        most, total = self.bounds.cost, self.cost + cost
        if most and total > most:
            raise InvalidOption(
                f"This request costs {total:g} forward passes, and the limit of the key "
                f"{self.name!r} is {most:g} at once. Send fewer images or request less."
            )
        if most and self.use.cost + cost > most:
            raise KeyLimit(
                f"The open requests of the key {self.name!r} cost {self.use.cost:g} forward "
                f"passes, and its limit is {most:g} at once; try again when they are finished."
            )
        self.use.cost += cost
        self.cost = total


@dataclass(frozen=True, slots=True)
class Quotas:
    """The current use of all keys.

    default:   the limits of keys without limits of their own, in this process.
    processes: how many server processes divide a key's own limits.
    """

    default: Bounds = Bounds()
    clock: Callable[[], float] = time.monotonic
    processes: int = 1
    _uses: dict[str, _Use] = field(default_factory=dict)

    @contextmanager
    def visit(self, key: Key) -> Iterator[Visit]:
        """Count a request for as long as it lasts. Raises KeyLimit."""
        bounds = self._bounds(key)
        use = self._uses.setdefault(key.name, _Use(bounds.rate, self.clock()))
        if bounds.concurrency and use.requests >= bounds.concurrency:
            raise KeyLimit(
                f"The key {key.name!r} has {use.requests} open requests, which is its limit; "
                "try again when one is finished."
            )
        if bounds.rate:
            self._take_token(key.name, use, bounds.rate)
        visit = Visit(key.name, bounds, use)
        use.requests += 1
        try:
            yield visit
        finally:
            use.requests -= 1
            use.cost -= visit.cost

    def _bounds(self, key: Key) -> Bounds:
        """The limits of a key in this process; its own are divided and rounded up."""
        rate, concurrency, cost = key.rate, key.concurrency, key.cost
        return Bounds(
            self.default.rate if rate is None else math.ceil(rate / self.processes),
            self.default.concurrency
            if concurrency is None
            else math.ceil(concurrency / self.processes),
            self.default.cost if cost is None else cost / self.processes,
        )

    def _take_token(self, name: str, use: _Use, rate: int) -> None:
        now = self.clock()
        use.tokens = min(rate, use.tokens + (now - use.filled) * rate / 60)
        use.filled = now
        if use.tokens < 1:
            raise KeyLimit(
                f"The key {name!r} may make {rate} requests per minute; try again after the "
                "seconds in Retry-After.",
                retry_after=math.ceil((1 - use.tokens) * 60 / rate),
            )
        use.tokens -= 1
