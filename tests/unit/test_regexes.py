"""Every regular expression of the service takes time in proportion to its text.

A regular expression that is not listed here fails the first test: list it with how it is used and
with the texts that could make it backtrack.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backtracking import Mode, alphabet, matched, steps
from starlette.routing import Route

import service
from service.integrations.registry import INTEGRATIONS
from service.routes import classify, health, kernel_images, served_models
from service.routes.page.router import page_router

ROOT = Path(service.__file__).parent.parent

Hostile = tuple[str, str, str]
"""What a text begins with, what is repeated, and what it ends with."""

LISTED: dict[str, tuple[Mode, list[Hostile]]] = {
    "service.models.huggingface._REPOSITORY": ("fullmatch", [("a", "a", "!"), ("a", "a/", "")]),
    "service.models.huggingface._MADE_UP": ("fullmatch", [("LABEL_", "1", "!")]),
    "service.security.addresses._ENTRY": ("fullmatch", [("*.", "a", ":"), ("[", "a", "")]),
    "service.security.addresses._NAME": (
        "fullmatch",
        [("", "a-", "."), ("", "a.", "!"), ("", "a", "!")],
    ),
    "service.security.addresses._PRINTABLE": ("fullmatch", [("", "a", " ")]),
    "service.security.addresses._URL": ("match", [("http://", "a", "@"), ("http://", "a:", "\\")]),
    "service.security.addresses._is_host": ("fullmatch", [("0x", "f", "g")]),
    "service.routes.forms._BOUNDARY": (
        "fullmatch",
        [("multipart/form-data; boundary=", "a", "!")],
    ),
    "service.routes.forms._IMAGE_HEAD": (
        "fullmatch",
        [
            ('content-disposition: form-data; name="image"; filename="', "a", "\n"),
            ('content-disposition: form-data; name="image"\r\ncontent-type: image/', "a", " "),
        ],
    ),
    "service.images.formats._NAME": (
        "fullmatch",
        [("", "a.jpg", "!"), ("", ".jp", ""), ("", " ", ".jpx")],
    ),
    "service.images.formats._ADDRESS": ("fullmatch", [("http", "s", ""), ("https://", "a", " ")]),
    "service.images.headers.jpeg_header._MARKER": (
        "scan",
        [("", "\xff", ""), ("", "\xff\x00", "")],
    ),
    "service.images.image_files._OF_A_CLASS": (
        "scan",
        [("", ".1", "a"), (".", "1", "a"), ("", ".", "")],
    ),
    "service.images.image_files.text_of": (
        "scan",
        [("", "\\", ""), ("", "\\x", ""), ("", "\\x0", "")],
    ),
    "service.integrations.label_studio.label_config._VARIABLE": (
        "scan",
        [("", "$", ""), ("$a", ".a", "."), ("$a", "-", ""), ("", "$a.", ""), ("$", "a", "")],
    ),
    "service.integrations.label_studio.task_images._WEB": ("match", [("http", "s", "")]),
    "service.integrations.label_studio.overlay._ENCODED": ("match", [("https", "%3A", "")]),
    "service.integrations.label_studio.overlay._QUERY": (
        "fullmatch",
        [("key=", "a", ""), ("key=", "&src=", ""), ("key=", ".", "&src")],
    ),
    "service.security.keys._LIMIT": ("fullmatch", [("rate=", "1", "")]),
    "service.security.keys._LINE": (
        "fullmatch",
        [(f"a:{'0' * 64}", " a", "\n"), (f"a:{'0' * 64} ", " ", ""), (f"a:{'0' * 64} ", "a", " ")],
    ),
    "service.integrations.label_studio.host._LEGACY": ("fullmatch", [("", "a", "g")]),
    "service.integrations.label_studio.host._IMAGE_PATHS": (
        "match",
        [("/tasks/", "1", "/"), ("/", "data/upload", "")],
    ),
    "service.integrations.label_studio.host._STORAGE": (
        "fullmatch",
        [("", "a", ":/"), ("s3://", "a", "\n")],
    ),
    "service.integrations.label_studio.host._exchange": ("fullmatch", [("", "a", " ")]),
    "service.models.builder_names._of_library": ("scan", [("", "'", ""), ("'", "a", "")]),
    "service.models.builders._FUNCTION": (
        "fullmatch",
        [("", "a", ""), ("", ".py", ""), ("", "a:", ""), ("a:", "a", "-")],
    ),
    "service.models.builders._OF_AUX": ("match", [("", "aux1", ""), ("", "AuxLogits", "")]),
    "service.models.builders._is_of_url": (
        "scan",
        [("", "-", ""), ("-", "a", ".pt"), ("", "-a", "")],
    ),
    "service.models.catalog.ENTRY": ("fullmatch", [("", "A", "a")]),
    "service.models.catalog.NAME": ("fullmatch", [("", "a", "/")]),
    "service.models.catalog.parse_model": ("scan", [("", "/:", "")]),
    "service.models.weights.checkpoints._AVERAGED": (
        "scan",
        [("", "ema", ""), ("", "_", ""), ("", "a", "")],
    ),
    "service.models.weights.checkpoints._OF_TRAINING": (
        "fullmatch",
        [("", "loss", ""), ("", ".", "")],
    ),
    "service.models.models_toml._digest": ("fullmatch", [("", "a", "")]),
    "service.models.models_toml._syntax": (
        "scan",
        [("", " (at line ", ""), (" (at line ", "1", "")],
    ),
    "service.models.capabilities._FOLDERS": (
        "scan",
        [("", "/a", " "), ("/", "a", ""), ("", "/", "")],
    ),
    "service.models.patterns._PARTS": ("scan", [("", "*", "a"), ("", "*?", "")]),
    "service.models.weights.weights_file._unpickled": (
        "scan",
        [("", "GLOBAL ", ""), ("GLOBAL ", "a", "")],
    ),
    "service.security.overlay_tokens._BETWEEN": ("scan", [("", "/", "")]),
    "service.security.overlay_tokens._ORIGIN": ("fullmatch", [("http://", "a", "/")]),
    "service.security.overlay_tokens._PREFIX": (
        "fullmatch",
        [("http://", "a", " "), ("/", "a/", " ")],
    ),
    "service.routes.lifecycle.timeout_of": ("fullmatch", [("", "1", "."), ("1.", "1", "a")]),
    "service.routes.hosts._NAME": ("fullmatch", [("", "a", "/"), ("", "a.", ""), ("", "a.", "/")]),
    "service.routes.hosts._PORT": ("fullmatch", [(":", "1", ""), ("", ":", "")]),
    "service.routes.middleware._ID": ("fullmatch", [("", "a", "/")]),
    "service.settings._LINK_VALUE": ("match", [("", "tcp", ""), ("tcp:", "/", "")]),
    "service.settings._SERVICE_LINK": (
        "fullmatch",
        [("", "_", ""), ("", "A_PORT_1", ""), ("PORT_", "1", ""), ("SERVICE_HOST", "_", "")],
    ),
    "service.routes.problems._sentence": ("scan", [("", "'", ""), ("'", "a", "")]),
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in ("service", "api_schemas", "camserve"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def is_regex(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "re"
        and node.func.attr not in ("escape", "purge")
    )


@functools.cache
def found() -> dict[str, re.Pattern[Any]]:
    """Every pattern in the code: by module and the name it has, or the function it stands in."""
    patterns: dict[str, re.Pattern[Any]] = {}
    for module, tree in modules():
        calls = [node for node in ast.walk(tree) if is_regex(node)]
        for outer in tree.body:
            if isinstance(outer, ast.Assign) and outer.value in calls:
                assert isinstance(outer.targets[0], ast.Name)
                name = outer.targets[0].id
                patterns[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
                calls.remove(outer.value)
        for outer in ast.walk(tree):
            if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for call in [each for each in ast.walk(outer) if each in calls]:
                    assert isinstance(call, ast.Call)
                    name = f"{module}.{outer.name}"
                    assert name not in patterns, "one a function, so that each has a name"
                    patterns[name] = re.compile(ast.literal_eval(call.args[0]))
                    calls.remove(call)
        assert not calls, (module, "a regular expression that has no name")
    return patterns


def routes() -> Iterator[tuple[str, re.Pattern[str]]]:
    routers = [router for integration in INTEGRATIONS for router in integration.routers]
    routers += [classify.router, health.router, kernel_images.router, served_models.router]
    routers += [page_router()]
    for router in routers:
        for route in router.routes:
            assert isinstance(route, Route)
            yield route.path, route.path_regex


def texts(pattern: re.Pattern[Any], hostile: list[Hostile]) -> Iterator[Hostile]:
    """Those listed, and every one or two characters that the pattern tells apart, repeated."""
    letters = alphabet(pattern)
    rng = random.Random(0)
    letters = sorted(rng.sample(letters, min(len(letters), 10)))
    pumps = [*letters, *map("".join, itertools.product(letters, repeat=2))]
    yield from hostile
    for prefix in {"", *(each[0] for each in hostile)}:
        for pump in pumps:
            yield prefix, pump, "\0"


def assert_linear(pattern: re.Pattern[Any], mode: Mode, hostile: list[Hostile]) -> None:
    for prefix, pump, suffix in texts(pattern, hostile):
        few, many = (steps(pattern, mode, prefix + pump * n + suffix) for n in (32, 128))
        assert many <= 5 * few + 300, (pattern.pattern, mode, prefix, pump, suffix, few, many)


def test_every_regular_expression_is_listed() -> None:
    assert sorted(found()) == sorted(LISTED)


def test_no_other_module_of_regular_expressions_is_used() -> None:
    """`fnmatch`, `glob` and `regex` make regular expressions, and so does `from re import`."""
    for module, tree in modules():
        for node in ast.walk(tree):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                assert node.module != "re", module
            allowed = (
                {"glob"} if module == "service.images.image_files" else set()
            )  # the command line's
            assert not {"fnmatch", "regex", "glob"}.intersection(names) - allowed, module


@pytest.mark.parametrize("name", LISTED)
def test_each_takes_time_in_proportion_to_its_text(name: str) -> None:
    mode, hostile = LISTED[name]
    assert_linear(found()[name], mode, hostile)


def test_the_routes_are_found_in_time_in_proportion_to_the_path() -> None:
    for path, pattern in routes():
        begin = re.sub(r"\{[^}]*\}", "a", path)
        hostile = [
            ("", "/", ""),
            (f"{begin}/", "a", ""),
            (begin, ":predict", ""),
            ("/v1/", "a/", ""),
        ]
        assert_linear(pattern, "match", hostile)


@pytest.mark.parametrize(
    ("pattern", "mode", "pump", "power"),
    [
        (r"[A-Za-z0-9+/\s]+=*\s*\Z", "match", " ", 2),  # what kept the service busy for 3.4 s
        (r".*.*.*Z", "fullmatch", "a", 3),
        (r"a+b", "scan", "a", 2),
        (r"(?:a|a)*b", "match", "a", 8),
    ],
)
def test_what_is_not_linear_is_seen(pattern: str, mode: Mode, pump: str, power: int) -> None:
    few, many = (steps(re.compile(pattern), mode, pump * n + "\0") for n in (8, 16))
    assert many > 2 ** (power - 0.8) * few


def test_the_counting_matcher_finds_what_re_finds() -> None:
    rng = random.Random(1)
    for name, pattern in found().items():
        letters = alphabet(pattern)
        for _ in range(200):
            text = "".join(rng.choices(letters, k=rng.randrange(8)))
            given: Any = text.encode("latin-1") if isinstance(pattern.pattern, bytes) else text
            ours = [matched(pattern, mode, text) for mode in ("fullmatch", "match", "scan")]
            theirs = [pattern.fullmatch(given), pattern.match(given), pattern.search(given)]
            assert ours == [bool(each) for each in theirs], (name, text)
