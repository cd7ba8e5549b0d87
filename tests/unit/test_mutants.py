"""The tool of `make mutants`: what it changes, and that it knows the tests of every module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def changed(
    tool: ModuleType, folder: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> set[str]:
    """Every mutant of one line."""
    (folder / "module.py").write_text(source)
    monkeypatch.setattr(tool, "ROOT", folder)
    return {each.shown(source)[1] for each in tool.mutants_of("module.py")}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < 1", {"x = a <= 1", "x = a >= 1", "x = a < 2"}),
        ("x = (a) == (b)", {"x = (a) != (b)"}),
        ("x = a is not b", {"x = a is b"}),
        ("x = a not in b", {"x = a in b"}),
        ("x = not a", {"x =  a"}),
        ("x = -a", {"x = a"}),
        ("x = a - b", {"x = a + b"}),
        ("x = a and b", {"x = a or b"}),
        ("x = 'ü' + f(dim=True)", {"x = 'ü' - f(dim=True)", "x = 'ü' + f(dim=False)"}),
        ("x = min(a)", {"x = max(a)"}),
        ("x += a", {"x -= a"}),
        ("x: int | None = 0.5", {"x: int | None = 1.5"}),
        ("def f(a: A | B = 0) -> A | B: ...", {"def f(a: A | B = 1) -> A | B: ..."}),
        ("Union = A | B", set()),
        ("assert a == 1", set()),
        ("x = f'{a + 1}'", set()),
    ],
)
def test_one_token_is_changed_where_it_says_something_about_behaviour(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    expected: set[str],
) -> None:
    assert changed(tool, tmp_path, source, monkeypatch) == expected


def test_every_module_that_is_changed_has_tests_and_they_exist(tool: ModuleType) -> None:
    for module in tool.modules(tool.TARGETS):
        if tool.mutants_of(module):
            missing = [test for test in tool.tests_of(module) if not (ROOT / test).is_file()]
            assert missing == [], module
    for path in tool._known()["tests"]:
        assert (ROOT / path).exists(), path


def test_every_equivalent_mutant_is_one_and_says_why(tool: ModuleType) -> None:
    for each in tool._known().get("equivalent", ()):
        source = (ROOT / each["module"]).read_text(encoding="utf-8")
        shown = {mutant.shown(source) for mutant in tool.mutants_of(each["module"])}
        assert (each["line"], each["mutant"]) in shown
        assert len(each["why"].split()) > 3
