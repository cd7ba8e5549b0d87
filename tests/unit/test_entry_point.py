"""`camserve` and `python -m camserve`: the command line of this service, or a sentence."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import service
from camserve import __main__ as entry


def test_the_command_line_of_this_service_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["camserve", "--version"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"camserve {service.__version__}\n"


@pytest.mark.parametrize("origin", ["service.py", "service/__init__.py"])
def test_another_module_of_the_name_service_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    origin: str,
) -> None:
    found = ModuleSpec("service", None, origin=str(tmp_path / origin))
    monkeypatch.setattr(entry, "find_spec", lambda _name: found)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert str((tmp_path / origin).parent) in said
    assert said.startswith("error: ")
