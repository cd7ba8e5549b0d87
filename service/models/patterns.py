"""Match layer paths against glob patterns, all patterns at once and without backtracking.

    matcher = PathMatcher(["features.*", "**.conv?"])
    matcher.matches("features.0")           # (True, False)

`*` and `?` stop at a dot, `**` crosses it; all other characters match themselves. One pass over a
path updates the set of reachable states of every pattern, one bit per state: the work is at most
the length of the path times the length of all patterns, for any wildcards (Baeza-Yates and
Gonnet, "A New Approach to Text Searching", CACM 35(10), 1992).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PARTS = re.compile(r"\*+|\?|[^*?]", re.DOTALL)


def is_pattern(text: str) -> bool:
    """Whether a name has a wildcard."""
    return "*" in text or "?" in text


class PathMatcher:
    """Glob patterns, compiled once for many paths."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._literals: dict[str, int] = {}
        self._any_but_dot = self._any = self._stars = self._first = 0
        self._ends: list[int] = []
        state = 1
        for pattern in patterns:
            self._first |= state
            for part in _PARTS.findall(pattern):
                self._add(part, state)
                state <<= 1
            self._ends.append(state)
            state <<= 1  # the final state has no exit

    def _add(self, part: str, state: int) -> None:
        if part[0] != "*":
            if part == "?":
                self._any_but_dot |= state
            else:
                self._literals[part] = self._literals.get(part, 0) | state
            return
        self._stars |= state
        if len(part) > 1:
            self._any |= state

    def matches(self, path: str) -> tuple[bool, ...]:
        """Whether each pattern matches the whole path."""
        stars, once = self._stars, self._any_but_dot
        states = self._first | (self._first & stars) << 1
        for character in path:
            steps = self._literals.get(character, 0)
            stays = self._any
            if character != ".":
                steps |= once
                stays = stars
            states = (states & steps) << 1 | states & stays
            states |= (states & stars) << 1
            if not states:
                break
        return tuple(bool(states & end) for end in self._ends)
