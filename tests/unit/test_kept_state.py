"""What outlives a request is bounded: every cache of the code is listed here with its bound."""

from __future__ import annotations

import ast
from pathlib import Path

import service

ROOT = Path(service.__file__).parent.parent

CACHES = {
    # One for each file system that the operator's `camserve bulk` names.
    "service.cli.bulk.inputs._file_system",
    # A constant, computed when the first keys file is read.
    "service.security.keys._blank_hashes",
    # 64 tuples of models' own labels; models are the operator's.
    "service.pipeline.answer_size.longest_label",
    # 8 axes of maps: the pixels drawn times the cells, 1.8 MB for 2,048 pixels and 224 cells.
    "service.cam.heatmap._weights",
    # 128 pairs of a model's own mean or std and a device; models are the operator's.
    "service.models.loaded._on_each_channel",
}
"""A new one says what fills it and what bounds it, in entries and in bytes."""

MEMOISERS = {"lru_cache", "cache"}


def names_of(node: ast.AST) -> set[str]:
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def test_every_memoised_function_is_listed() -> None:
    found = set()
    for path in sorted((ROOT / "service").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and any(
                MEMOISERS & names_of(each) for each in node.decorator_list
            ):
                found.add(f"{module}.{node.name}")
    assert found == CACHES


def test_no_client_s_text_becomes_a_regular_expression_or_a_split_address() -> None:
    """`re` and `urllib.parse` keep what they have compiled and split: the latter at any length.

    Every pattern is a literal (`test_regexes`); addresses are split where their length is known.
    """
    splitting = set()
    for path in sorted((ROOT / "service").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        if {"urlsplit", "urlparse", "urljoin"} & {
            name for call in calls for name in names_of(call.func)
        }:
            splitting.add(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "request.url":
                splitting.add(f"{module}: request.url")
    assert splitting == {
        "service.security.addresses",  # MAX_URL
        "service.security.fetcher",  # MAX_URL, and redirects of allowed hosts
        "service.integrations.label_studio.host",  # MAX_URL, and the operator's own
        "service.settings",  # the operator's own
    }
