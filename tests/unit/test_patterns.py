"""Layer patterns: what they match, and that matching never backtracks."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from counting import lines_run
from tiny import SmallNet, loaded

from service.errors import UnknownLayer
from service.models.patterns import PathMatcher


def matches(pattern: str, path: str) -> bool:
    return PathMatcher([pattern]).matches(path) == (True,)


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("features.*", ["features.0", "features."], ["features", "features.0.1", "xfeatures.0"]),
        ("features.?", ["features.0"], ["features.", "features.10", "features.."]),
        ("**.conv?", ["a.conv1", "a.b.conv2"], ["conv1", "a.conv", "a.conv12"]),
        ("**", ["a", "a.b.c"], []),
        ("***", ["a", "a.b.c"], []),
        ("*", ["a", ""], ["a.b"]),
        ("**a*c", ["a.ac", "abc"], ["a.c"]),
        ("a**b*c**", ["a.b.bxc.y"], ["a.b.x.c"]),
        ("layer[0]", ["layer[0]"], ["layer0"]),
        ("a\n?", ["a\nb"], ["a\n."]),
    ],
)
def test_a_pattern_matches_whole_paths(pattern: str, matching: list[str], other: list[str]) -> None:
    assert [path for path in [*matching, *other] if matches(pattern, path)] == matching


def test_every_short_pattern_means_what_a_regex_says() -> None:
    """All patterns of up to four tokens against all paths of up to four characters."""
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    paths = ["".join(each) for n in range(5) for each in itertools.product("ab.", repeat=n)]
    units = ["a", ".", "?", "*", "**"]
    for units_of in (each for n in range(1, 5) for each in itertools.product(units, repeat=n)):
        pattern = "".join(units_of)
        parts = re.split(r"(\*\*|\*|\?)", pattern)
        expected = re.compile("".join(wild.get(part, re.escape(part)) for part in parts), re.DOTALL)
        matcher = PathMatcher([pattern])
        for path in paths:
            assert matcher.matches(path) == (expected.fullmatch(path) is not None,), (pattern, path)


def test_many_patterns_are_told_apart() -> None:
    rng = random.Random(0)
    patterns = ["".join(rng.choices(["a", "b", ".", "?", "*", "**"], k=5)) for _ in range(40)]
    together = PathMatcher(patterns)
    for path in ("a", "ab", "a.b", "b.a.b", "abab", "..", ""):
        assert together.matches(path) == tuple(matches(each, path) for each in patterns)


HOSTILE = ["**" * 14 + "Z", "*a" * 200 + "Z", "**a" * 160, "?" * 500, "*" * 500, ("*a**b?" * 80)]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("unit", ["a", "ab", "a.", "."])
def test_matching_takes_one_step_a_character_whatever_the_wildcards(
    pattern: str, unit: str
) -> None:
    """`**` fourteen times and a `Z` held the event loop for 22.9 seconds."""
    matcher = PathMatcher([pattern] * 4)
    few, many = (lines_run(matcher.matches, unit * n) for n in (250, 1000))
    assert many <= 12 * 1000 * len(unit) + 100
    assert many <= 5 * few


def test_resolving_patterns_takes_time_in_proportion_to_the_layers(monkeypatch) -> None:
    """Not to their square: `**` of a thousand layers is a thousand look-ups."""
    model = loaded(SmallNet())
    paths = model.captured_layers(["**"])
    taken = lines_run(lambda: model.activation_bytes(paths, inputs=False))
    assert taken <= 10 * len(model.layers) + 20
    with pytest.raises(UnknownLayer, match="matches 'x"):
        model.captured_layers(["features.*", "x**"])
