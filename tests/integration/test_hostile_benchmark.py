"""The benchmark of hostile requests runs: each part in its smallest form, on a tiny model."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FEW = r"^E (HEAD|no Host)$|^A6 V2 binary: a shape of"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    import hostile
    from hostile_http import Names

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def run(monkeypatch):
    """The benchmark's `main`, whose verdict is left to a machine that is quiet."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests' / 'support'}:{ROOT}")

    def run(*arguments: str) -> None:
        with contextlib.suppress(SystemExit):
            hostile.main(["--model", "tiny:small", "--memory", "3g", *arguments])

    return run


def test_every_row_has_a_name_of_its_own():
    keys = [f"{row.item} {row.name}" for row in hostile.rows_of("")]
    assert len(keys) == len(set(keys))
    assert len(keys) > 300


def test_a_request_is_built_of_the_model_s_own_names():
    (row,) = hostile.rows_of("^A6 V2 binary: a shape of")
    (request,) = row.build(Names("mine", "layer1"))
    assert request.startswith(b"POST /v2/models/mine/infer HTTP/1.1\r\n")


@pytest.mark.large
def test_a_few_rows_are_measured_and_the_page_gets_their_table(run, tmp_path: Path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Before\n\n<!-- hostile:begin -->until now<!-- hostile:end -->\n\nafter\n")
    rows = tmp_path / "rows.json"
    run("--rows", FEW, "--again", "0", "--write", "--page", str(page), "--save", str(rows))
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\n\nafter\n")
    assert "until now" not in text
    assert "| E | HEAD |" in text
    kept = hostile.hostile_table.load(rows)
    assert len(kept) == 3
    shape = next(row for key, row in kept.items() if "shape" in key)
    assert shape.answer.startswith(("400", "413"))
    assert not any(row.killed for row in kept.values())
    assert "served under" in capsys.readouterr().out


def test_good_requests_are_compared_beside_hostile_ones(run, capsys):
    run("--storm", "--rows", FEW, "--requests", "3", "--seconds", "1", "--clients", "1")
    said = capsys.readouterr().out
    assert "3 hostile requests of 3 kinds" in said
    assert "| the server lives | 0 restarts | yes |" in said
    assert " 0 not; " in said


@pytest.mark.large
def test_a_few_slow_peers_are_held_while_good_requests_are_counted(run, capsys):
    few = ("--peers", "2", "--addresses", "2", "--pairs", "1", "--seconds", "1")
    run("--slow-peers", *few, "--clients", "1")
    said = capsys.readouterr().out
    assert "2 silent readers and 2 silent uploaders from 2 addresses" in said
    assert "Good clients kept" in said
