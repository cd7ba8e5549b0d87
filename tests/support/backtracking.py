"""How many steps a backtracking matcher takes for a regular expression and a text.

Python's own matcher counts nothing, and clocks are no proof. This one walks the same tree, which
`re` itself parses, tries alternatives in the same order, and backtracks as `re` does; it leaves out
every shortcut of the C code, so `re` takes at most as many steps.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, Literal

Mode = Literal["fullmatch", "match", "scan"]
"""`scan` is what `search`, `split`, `sub`, `findall` and `finditer` do."""

_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    codes.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    codes.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_SINGLE = {codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN}


def steps(pattern: re.Pattern[Any], mode: Mode, text: str) -> int:
    """Steps to match, or to find that nothing matches; bytes are matched as Latin-1."""
    return _Matcher(pattern, text).run(mode)[1]


def matched(pattern: re.Pattern[Any], mode: Mode, text: str) -> bool:
    """Whether there is a match; to prove this matcher against the real one."""
    return _Matcher(pattern, text).run(mode)[0]


def alphabet(pattern: re.Pattern[Any]) -> list[str]:
    """Characters that the pattern tells apart: its own, ends of its ranges, and strange ones."""
    found: set[str] = set("a0 .\0")
    left = list(_parser.parse(_text(pattern), pattern.flags & ~re.UNICODE))
    while left:
        node = left.pop()
        if isinstance(node, tuple) and node and node[0] in (codes.LITERAL, codes.NOT_LITERAL):
            found.add(chr(node[1]))
        elif isinstance(node, tuple) and node and node[0] == codes.RANGE:
            found.update(map(chr, node[1]))
        elif isinstance(node, (tuple, list, _parser.SubPattern)):
            left.extend(node)
    return sorted(found)


def _text(pattern: re.Pattern[Any]) -> str:
    given = pattern.pattern
    return given.decode("latin-1") if isinstance(given, bytes) else given


class _Matcher:
    def __init__(self, pattern: re.Pattern[Any], text: str) -> None:
        flags = pattern.flags & ~re.UNICODE
        self._tree = list(_parser.parse(_text(pattern), flags))
        self._dotall = bool(flags & re.DOTALL)
        self._ignore = bool(flags & re.IGNORECASE)
        self._characters = text.lower() if self._ignore else text
        self._steps = 0

    def run(self, mode: Mode) -> tuple[bool, int]:
        length = len(self._characters)
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(50 * length + 5000)
        try:
            if mode == "fullmatch":
                found = self._match(self._tree, 0, 0, lambda end: end == length)
            elif mode == "match":
                found = self._match(self._tree, 0, 0, lambda _end: True)
            else:
                found = self._scan()
        finally:
            sys.setrecursionlimit(before)
        return found, self._steps

    def _scan(self) -> bool:
        start, found = 0, False
        while start <= len(self._characters):
            ends: list[int] = []
            self._match(self._tree, 0, start, lambda end, ends=ends: not ends.append(end))
            found = found or bool(ends)
            start = max(start + 1, ends[0] if ends else 0)
        return found

    def _match(
        self, nodes: Sequence[Any], index: int, at: int, then: Callable[[int], bool]
    ) -> bool:
        while index < len(nodes):
            self._steps += 1
            kind, value = nodes[index]
            index += 1
            if kind in _SINGLE:
                if not self._is(kind, value, at):
                    return False
                at += 1
            elif kind is codes.AT:
                if not self._stands(value, at):
                    return False
            elif kind in (codes.ASSERT, codes.ASSERT_NOT):
                assert value[0] == 1, "only looking ahead"
                ahead = self._match(list(value[1]), 0, at, lambda _end: True)
                if ahead is not (kind is codes.ASSERT):
                    return False
            else:
                rest = index
                go_on = lambda end, rest=rest: self._match(nodes, rest, end, then)  # noqa: E731
                return self._inner(kind, value, at, go_on)
        return then(at)

    def _inner(self, kind: Any, value: Any, at: int, then: Callable[[int], bool]) -> bool:
        if kind is codes.SUBPATTERN:
            return self._match(list(value[3]), 0, at, then)
        if kind is codes.BRANCH:
            return any(self._match(list(each), 0, at, then) for each in value[1])
        assert kind is codes.MAX_REPEAT, f"{kind} is not understood here"
        least, most, item = value[0], value[1], list(value[2])
        if len(item) == 1 and item[0][0] in _SINGLE:
            return self._repeat_one(item[0], least, most, at, then)
        return self._repeat(item, least, most, at, then)

    def _repeat_one(
        self, item: Any, least: int, most: int, at: int, then: Callable[[int], bool]
    ) -> bool:
        count = 0
        while count < most and self._is(*item, at + count):
            count += 1
        self._steps += count
        return any(then(at + taken) for taken in range(count, least - 1, -1))

    def _repeat(
        self, item: list[Any], least: int, most: int, at: int, then: Callable[[int], bool]
    ) -> bool:
        def again(count: int, start: int) -> bool:
            self._steps += 1
            longer = lambda end: end != start and again(count + 1, end)  # noqa: E731
            if count < most and self._match(item, 0, start, longer):
                return True
            return count >= least and then(start)

        return again(0, at)

    def _is(self, kind: Any, value: Any, at: int) -> bool:
        self._steps += 1
        if at >= len(self._characters):
            return False
        character = self._characters[at]
        if kind is codes.ANY:
            return self._dotall or character != "\n"
        if kind is codes.IN:
            return self._in(value, character)
        literal = chr(value).lower() if self._ignore else chr(value)
        return (character == literal) is (kind is codes.LITERAL)

    def _in(self, items: Sequence[Any], character: str) -> bool:
        wanted = True
        for kind, value in items:
            if kind is codes.NEGATE:
                wanted = False
            elif kind is codes.CATEGORY:
                if _CATEGORIES[value](character):
                    return wanted
            elif kind is codes.RANGE:
                if value[0] <= ord(character) <= value[1]:
                    return wanted
            elif character == (chr(value).lower() if self._ignore else chr(value)):
                return wanted
        return not wanted

    def _stands(self, where: Any, at: int) -> bool:
        length = len(self._characters)
        if where in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
            return at == 0
        if where is codes.AT_END:
            return at == length or (at == length - 1 and self._characters[at] == "\n")
        assert where is codes.AT_END_STRING, f"{where} is not understood here"
        return at == length
