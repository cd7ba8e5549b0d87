"""README, the tutorials and the command line's how-to: every block is run as a reader would."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import httpx
import pytest
import torch
import torchvision
from PIL import Image
from reading import ROOT, Block, blocks, differences, reader
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DOCS = ROOT / "docs"
README = ROOT / "README.md"
EGYPTIAN_CAT = 285
SAMPLE = ROOT / "examples" / "sunflower.jpg"
DATA = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.timeout(600)


def compare(said: str, block: Block) -> None:
    if block.output is not None:
        assert differences(said, block.output) == []


def is_of_the_airport(block: Block) -> bool:
    return block.kind == "sh" and "airport.jpg" in block.text


def test_right_for_the_right_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it that needs no download, in one Python, against the services that it starts."""
    page = blocks(DOCS / "tutorials" / "right-for-the-right-reason.md")
    assert len([each for each in page if each.kind == "python"]) > 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    with reader(tmp_path) as reading:
        try:
            for block in page:
                if not is_of_the_airport(block):
                    compare(reading.do(block), block)
        finally:
            if "client" in reading.names:
                reading.names["client"].close()
            sys.modules.pop("planes", None)
    for name in ("sunflower", "dandelion", "plane"):
        with Image.open(f"{name}.jpg") as picture:
            picture.load()


def test_right_for_the_right_reason_with_a_real_aeroplane(tmp_path: Path) -> None:
    """With torchvision's architecture and weights of the ONNX zoo, on a photograph of COCO."""
    weights = DATA / "weights" / "mobilenet_v2.fp16.safetensors"
    photograph = DATA / "coco_free" / "images" / "000000000540.jpg"
    if not weights.exists():
        pytest.skip(f"no photograph and no weights in {DATA}")
    (block,) = filter(
        is_of_the_airport, blocks(DOCS / "tutorials" / "right-for-the-right-reason.md")
    )
    shutil.copy(photograph, tmp_path / "airport.jpg")
    names = torchvision.models.MobileNet_V2_Weights.DEFAULT.meta["categories"]
    labelled = tmp_path / "labelled.safetensors"  # no file that torchvision published
    with safe_open(weights, "pt") as file:
        about = (file.metadata() or {}) | {"labels": json.dumps(names), "resize": "256"}
    save_file(load_file(weights), labelled, about)
    with reader(tmp_path, CAMSERVE_WEIGHTS=str(labelled)) as reading:
        compare(reading.shell(block.text), block)
    hidden = json.loads((tmp_path / "hidden" / "airport.json").read_text())
    assert hidden["explanations"][0]["score"] == pytest.approx(0.29, abs=0.02)


def test_the_examples_of_the_command_line(tmp_path: Path) -> None:
    page = blocks(DOCS / "how-to" / "use-the-command-line.md")
    (tmp_path / "photos").mkdir()
    for name in ("sunflower.jpg", "photos/a.jpg"):
        shutil.copy(SAMPLE, tmp_path / name)
    said = ""
    with reader(tmp_path) as reading:
        for block in page:
            if block.about == "":
                program = "python -c" in block.text
                said += reading.shell(block.text) if program else reading.do(block)
    assert '"file":"-"' in said
    assert "photos/a.jpg sunflower" in said
    written = {each.name for each in tmp_path.iterdir()}
    assert {"why", "explained", "sheet.jpg", "report.html"} <= written
    not_run = [block.commands[0] for block in page if block.about != ""]
    assert not_run == [
        "camserve explain photos",  # with a broken file among them: test_cli_explain has one
        "camserve explain photos --verify true",  # of a meadow: test_cli_explain has another
        "camserve --install-completion      # bash, zsh, fish or PowerShell; then open a new shell",
    ]


# ---- README


def test_readme_from_clone_to_the_first_heatmap(tmp_path: Path) -> None:
    """Each step of a newcomer; what `make run` installs is here already."""
    page = blocks(README)
    (clone,) = [each for each in page if "git clone" in each.text]
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone, so there is nothing to clone from")
    with reader(tmp_path, REPOSITORY=str(ROOT)) as reading:
        get, make = clone.commands
        reading.shell(get)
        assert (tmp_path / "camserve" / "Makefile").exists()
        reading.serve(make)
        (look,) = [each for each in page if each.text.startswith("curl") and "why.jpg" in each.text]
        reading.shell(look.text)
        first = next(each for each in page if each.kind == "console")
        assert first.commands[0].split("#")[0].strip() == make
        said = json.loads(reading.shell("\n".join(first.commands[1:])))
    with Image.open(tmp_path / "why.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (640, 480))
    shown = next(each.text for each in page if each.kind == "json")
    (result,) = said["results"]
    best = result["predictions"][0]
    assert f'"version": "{said["model"]["version"]}"' in shown
    assert f'"label": "{best["label"]}", "score": {best["score"]:.2f}' in shown
    assert f'"seen": {[round(each, 1) for each in result["seen"]]}' in shown
    start = {line for each in page for line in each.commands}
    for block in blocks(DOCS / "index.md"):
        assert {line.split("#")[0].strip() for line in block.commands} <= start | {make}


def test_readme_serves_models_of_ones_own(tmp_path: Path) -> None:
    """Each line; without the network torchvision's weights are random ones."""
    (block,) = [each for each in blocks(README) if "camserve serve --model" in each.text]
    torch.manual_seed(0)
    save_file(
        torchvision.models.mobilenet_v2(weights=None).state_dict(), tmp_path / "my.safetensors"
    )
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "cats.pt")
    (tmp_path / "mypackage").mkdir()
    shutil.copy(ROOT / "tests" / "support" / "tiny.py", tmp_path / "mypackage" / "models.py")
    with (tmp_path / "mypackage" / "models.py").open("a") as file:
        file.write("\n\nbuild = SmallNet\n")
    served = []
    quick = {"CAMSERVE_ALLOW_RANDOM_WEIGHTS": "true", "CAMSERVE_COMPILE": "false"}
    with reader(tmp_path, **quick) as reading:
        for line in block.commands:
            reading.serve(line)
            models = httpx.get(f"{reading.url}/models", trust_env=False).json()["models"]
            served.append([model["name"] for model in models if model["state"] == "ready"])
    assert served == [["resnet50"], ["mobilenet_v2"], ["cats", "builtin"], ["build"]]


def test_readme_explains_without_a_server(tmp_path: Path) -> None:
    (block,) = [each for each in blocks(README) if "camserve explain photos/" in each.text]
    (tmp_path / "photos").mkdir()
    shutil.copy(SAMPLE, tmp_path / "photos")
    with reader(tmp_path) as reading:
        said = "".join(map(reading.camserve, block.commands))
    assert "sunflower" in said
    assert "layer4.2.conv3" in said
    assert {each.name for each in tmp_path.iterdir()} >= {"explained", "why.html", "runs"}


def test_readme_asks_what_can_be_asked(tmp_path: Path) -> None:
    """With ImageNet's thousand classes, whose weights are random here."""
    (block,) = [each for each in blocks(README) if "targets=tabby" in each.text]
    for name in ("cat.jpg", "plane.jpg", "a.jpg", "b.jpg"):
        shutil.copy(SAMPLE, tmp_path / name)
    quick = {"CAMSERVE_ALLOW_RANDOM_WEIGHTS": "true", "CAMSERVE_COMPILE": "false"}
    with reader(tmp_path, **quick) as reading:
        reading.serve("camserve serve --model torchvision/resnet18")
        answers = [json.loads(reading.shell(line)) for line in block.commands]
    contrast, several, masked, activations, predicted = (each["results"] for each in answers)
    assert contrast[0]["explanations"][0]["contrast"] == EGYPTIAN_CAT
    assert len(several[0]["explanations"]) == 3
    assert several[0]["explanations"][0]["layer"] == ["layer4", "layer3"]
    assert len(masked[0]["masked"]["changes"]) == 1
    assert len(activations[0]["activations"]) == 20
    assert len(predicted) == 2


def test_every_command_of_readme_is_run_by_one_of_these_tests() -> None:
    marks = ("make run", "git clone", "why.jpg", "camserve serve", "camserve explain", "targets=")
    shells = [
        each for each in blocks(README) if each.kind in ("sh", "console", "bash", "shell", "")
    ]
    assert len(shells) == 6
    assert all(any(mark in each.text for mark in marks) for each in shells)
