"""`camserve compare`: exit codes, JSON, JUnit and the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from service.cli.main import app

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, a broken one and a text, below another folder."""
    images = tmp_path / "images" / "deep"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(5):
        pixels = generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    (images / "broken.jpg").write_bytes(b"not an image")
    (images / "notes.txt").write_text("no image")
    return tmp_path / "images"


def compare(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_the_same_weights_pass_every_gate_at_zero(folder: Path):
    gates = ("flips=0", "scores=0", "maps=1", "overlap=1", "class_flips=0")
    fail_on = [text for gate in gates for text in ("--fail-on", gate)]
    result = compare("tiny:small", "tiny:small", folder, *fail_on, "--json")
    found = json.loads(result.stdout)
    overall = found["overall"]
    assert (overall["images"], overall["flips"], overall["score_distance"]) == (5, 0, 0)
    assert (overall["correlation"], overall["overlap"], overall["centre_shift"]) == (1, 1, 0)
    assert all(gate["kept"] for gate in found["gates"])
    assert [each["image"] for each in found["failed"]] == ["deep/broken.jpg"]
    assert [model["name"] for model in found["models"]] == ["small (A)", "small (B)"]
    assert "notes.txt" in result.stderr, "what is no image is named"


def test_a_model_that_differs_is_refused_with_code_1_in_words_and_in_junit(
    folder: Path, tmp_path: Path
):
    junit = tmp_path / "gates.xml"
    fail_on = ("--fail-on", "flips=2%", "--fail-on", "scores=1")
    result = compare("tiny:other", "tiny:small", folder, *fail_on, "--junit", junit, code=1)
    assert re.search(r"refused: flips \d\.\d+, at most 0\.02", result.stderr)
    suite = ET.parse(junit).getroot().find("testsuite")  # noqa: S314 - written here
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    failed = {case.get("name"): case.find("failure") is not None for case in suite}
    assert failed == {"flips": True, "scores": False, "answers": False}


def test_labels_that_only_one_model_has_are_said(folder: Path):
    result = compare("tiny:small", "tiny:other", folder)
    assert "Only small has the labels class 5, class 6" in " ".join(result.stderr.split())


def test_an_image_that_only_a_answers_refuses_b(folder: Path):
    Image.new("RGB", (48, 48), (255, 0, 0)).save(folder / "red.png")
    result = compare("tiny:small", "tiny:fails_in_forward", folder, code=1)
    assert "red.png (fails_in_forward): RuntimeError: planted: forward" in result.stderr
    assert "images that only small answers" in result.stderr


def test_the_report_loads_nothing_and_shows_the_worst_images_side_by_side(
    folder: Path, tmp_path: Path
):
    report = tmp_path / "report.html"
    compare("tiny:small", "tiny:other", folder, "--report", report, "--worst", "2")
    page = report.read_text(encoding="utf-8")
    assert page.count("<article>") == 2
    assert page.count('src="data:image/jpeg;base64,') == 4
    assert "default-src &#x27;none&#x27;" in page
    assert not re.search(r"https?://|<script", page)
    assert "deep/broken.jpg (small and other)" in page


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--fail-on", "flips=lots"), ("flips=lots", "percentage")),
        (("--fail-on", "map"), ("'map'", "maps")),
        (("--method", "gradcm"), ("gradcm", "gradcam")),
        (("--masks", "nowhere.json"), ("nowhere.json", "No such file")),
        (("--report", "nowhere/x.html"), ("nowhere/x.html", "no folder")),
        (("--junit", "."), ("--junit .", "name a file")),
    ],
)
def test_wrong_usage_is_code_2_and_says_what_is_accepted(
    folder: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
):
    result = compare("tiny:small", "tiny:small", folder, *arguments, code=2)
    assert all(part in " ".join(result.stderr.split()) for part in parts), result.stderr


def test_a_folder_of_broken_images_is_wrong_usage(folder: Path):
    for image in (folder / "deep").glob("*.png"):
        image.unlink()
    result = compare("tiny:small", "tiny:small", folder, code=2)
    assert "none of 1 images could be compared; deep/broken.jpg" in result.stderr
