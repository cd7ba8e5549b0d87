"""`camserve check` and `camserve layers --measure`: what a CI and a curious person call."""

from __future__ import annotations

from pathlib import Path

import pictures
import pytest
from typer.testing import CliRunner

from service.cli.flags import OUT
from service.cli.main import app

pytestmark = pytest.mark.timeout(60)

run = CliRunner(env={"COLUMNS": "250"})

GOOD = '[[model]]\nname = "good"\nbuilder = "own_models:net"\ninput.size = 32\n'
BAD = '[[model]]\nname = "bad"\nbuilder = "own_models:raises"\n'


def test_check_runs_every_model_and_prints_what_it_costs(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(GOOD)
    result = run.invoke(app, ["check", "--config", str(tmp_path / "models.toml")])
    assert result.exit_code == 0, result.output
    heading, row = result.output.splitlines()[:2]
    for column in ("classes", "parameters", "target layer", "lanes", "ms per image", "MiB"):
        assert column in heading
    assert row.split()[:5] == ["good", "7", "1,527", "features", "hooked"]
    assert "1 of 1 models can be served" in result.output


def test_check_fails_in_words_and_checks_the_others_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(BAD + GOOD)
    result = run.invoke(app, ["check", "--config", str(tmp_path / "models.toml")])
    assert result.exit_code == 1
    assert "models.toml: model[0].builder: model 'bad'" in result.output
    assert "planted: no such data set" in result.output
    assert "1 of 2 models can be served" in result.output
    assert "1,527" in result.output


def test_check_says_what_a_model_cannot_show(tmp_path: Path) -> None:
    text = GOOD.replace("own_models:net", "own_models:scripted")
    (tmp_path / "models.toml").write_text(text)
    result = run.invoke(app, ["check", "--config", str(tmp_path / "models.toml")])
    assert result.exit_code == 0
    assert "predict only" in result.output
    assert "accepts no hooks" in result.output


def test_check_measures_the_sensitivity_of_every_method(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(GOOD)
    options = ["--config", str(tmp_path / "models.toml"), "--sensitivity"]
    result = run.invoke(app, ["check", *options])
    assert result.exit_code == 0, result.output
    rows = {row.split()[0]: row.split()[1:] for row in result.output.splitlines() if row.strip()}
    for method in ("gradcam", "cam", "rise", "scorecam", "integrated_gradients"):
        values = [float(value) for value in rows[method][:3]]
        assert all(-1 <= value <= 1 for value in values)
    assert rows["eigencam"][0] == "+1.00"


def test_check_serves_a_model_whose_sensitivity_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(GOOD.replace("own_models:net", "own_models:scripted"))
    options = ["--config", str(tmp_path / "models.toml"), "--sensitivity"]
    result = run.invoke(app, ["check", *options])
    assert result.exit_code == 0, result.output
    assert "not measured" in result.output


def test_check_names_the_methods_whose_maps_hardly_depend_on_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CAMSERVE_SENSITIVITY", "true")
    result = run.invoke(app, ["check", "--model", "builtin"])
    assert result.exit_code == 0, result.output
    assert "the maps of guided_backprop hardly change" in result.output


def test_check_refuses_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text("[[model]\n")
    result = run.invoke(app, ["check", "--config", str(tmp_path / "models.toml")])
    assert result.exit_code == 2
    assert "models.toml, line 1" in result.output


def test_layers_are_ranked_on_the_users_images(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(OUT, "width", 160)  # a narrow terminal breaks the table's lines
    (tmp_path / "models.toml").write_text(GOOD)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(pictures.png())
    config = ["--config", str(tmp_path / "models.toml")]
    result = run.invoke(app, ["layers", "good", *config, "--measure", str(tmp_path / "photos")])
    assert result.exit_code == 0, result.output
    rows = result.output.splitlines()
    assert "faithfulness" in result.output
    assert "per ms" in result.output
    assert any(row.startswith(" * ") and "features" in row for row in rows)
    scores = [float(row[2:].split()[2]) for row in rows if "×" in row]
    assert len(scores) > 2
    assert scores == sorted(scores, reverse=True)


def test_layers_takes_the_name_of_a_model_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(GOOD)
    result = run.invoke(app, ["layers", "good", "--config", str(tmp_path / "models.toml")])
    assert result.exit_code == 0, result.output
    assert "8×16×16" in result.output
