"""Proportions with intervals: Wilson's for one, Newcombe's for the difference of two."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959964
"""The normal quantile of a two-sided 95 % interval."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Proportion:
    """`part` of `n`; n may be 0, and the interval is then 0..1."""

    part: int
    n: int

    @property
    def value(self) -> float:
        """The share, 0..1; 0 of nothing."""
        return self.part / self.n if self.n else 0.0

    @property
    def interval(self) -> Interval:
        """The 95 % interval of Wilson, "Probable inference", JASA 22 (1927), 209-212."""
        if not self.n:
            return 0.0, 1.0
        p, share = self.value, Z * Z / self.n
        middle = (p + share / 2) / (1 + share)
        half = Z / (1 + share) * math.sqrt(p * (1 - p) / self.n + share / (4 * self.n))
        return max(0.0, middle - half), min(1.0, middle + half)


def difference_interval(one: Proportion, other: Proportion) -> Interval:
    """The 95 % interval of one proportion minus another that is independent of it, −1..1.

    Newcombe, "Interval estimation for the difference between independent proportions", Statistics
    in Medicine 17 (1998), 873-890, method 10.
    """
    difference = one.value - other.value
    (low, high), (other_low, other_high) = one.interval, other.interval
    return (
        difference - math.hypot(one.value - low, other_high - other.value),
        difference + math.hypot(high - one.value, other.value - other_low),
    )
