"""README, the tutorials and the command line's how-to: every block is run as a reader would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torchvision
from PIL import Image
from reading import ROOT, Block, Reader, blocks, differences, reader
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DOCS = ROOT / "docs"
README = ROOT / "README.md"
DANDELION = 1
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


@pytest.mark.large
def test_a_shortcut_is_found_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit refuses the first model because of its cue, and lets the mended one pass."""
    monkeypatch.chdir(tmp_path)
    with reader(tmp_path) as reading:
        for block in blocks(DOCS / "tutorials" / "find-and-mend.md"):
            if "||" in block.text:
                said = reading.shell(f"{{ {block.text} }} 2>&1")
                said = said.replace(str(tmp_path), "/home/you/camserve")
                assert block.output is not None
                assert set(block.output.splitlines()) <= set(said.splitlines()), said
            elif not block.about:
                compare(reading.do(block), block)
    verdicts = {}
    for name in ("first", "mended"):
        found = json.loads((tmp_path / name / "audit.json").read_text())
        verdicts[name] = {one["label"]: one["verdict"] for one in found["classes"]}
    assert verdicts["first"].pop("plane") == "suspected_cue"
    assert "suspected_cue" not in {*verdicts["first"].values(), *verdicts["mended"].values()}


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

SHELLS = ("sh", "console", "bash", "shell", "")


def test_a_newcomer_runs_readme_from_top_to_bottom_in_a_fresh_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command and its output. What `make run` and pip install is here already.

    Without the network torchvision's weights are random ones.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone, so there is nothing to clone from")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shells = [block for block in blocks(README) if block.kind in SHELLS]
    first, clone, cpu, look, own, alone, options = shells
    get, make = clone.commands
    bash = ["/bin/bash", "-euc", get]
    subprocess.run(bash, cwd=tmp_path, env=os.environ | {"REPOSITORY": str(ROOT)}, check=True)
    home = tmp_path / "camserve"
    quick = {"CAMSERVE_ALLOW_RANDOM_WEIGHTS": "true", "CAMSERVE_COMPILE": "false"}
    with reader(home, INDEX="https://index.example/cpu", **quick) as reading:
        reading.serve(make)
        assert first.commands[0].split("#")[0].strip() == make
        check_first_answer(json.loads(reading.shell(first.commands[1])))
        installing = cpu.commands[0].replace("make run", "make --dry-run --always-make install")
        assert "--extra-index-url https://index.example/cpu -c constr" in reading.shell(installing)
        reading.shell(look.text)
        with Image.open(home / "why.jpg") as picture:
            assert (picture.format, picture.size) == ("JPEG", (640, 480))
        check_own_models(reading, own)
        check_alone(reading, alone)
        reading.serve(make)
        check_options([json.loads(reading.shell(line)) for line in options.commands])
        (program,) = [block for block in blocks(README) if block.kind == "python"]
        with contextlib.chdir(home):
            assert reading.python(program.text) == "sunflower\n"
        with Image.open(home / "why-from-python.jpg") as picture:
            assert picture.size == (640, 480)


def check_first_answer(said: dict[str, Any]) -> None:
    """What the page prints below the first command, and what it says of the built-in model."""
    page = blocks(README)
    shown = next(each.text for each in page if each.kind == "json")
    (result,) = said["results"]
    best = result["predictions"][0]
    assert f'"version": "{said["model"]["version"]}"' in shown
    assert f'"label": "{best["label"]}", "score": {best["score"]:.2f}' in shown
    assert f'"seen": {[round(each, 1) for each in result["seen"]]}' in shown
    labels = ", ".join(sorted(each["label"] for each in result["predictions"]))
    assert f"five flowers ({labels})" in README.read_text()
    start = {line.split("#")[0].strip() for each in page for line in each.commands}
    for block in blocks(DOCS / "index.md"):
        assert {line.split("#")[0].strip() for line in block.commands} <= start


def check_own_models(reading: Reader, block: Block) -> None:
    """Each line serves its models, from files that a user would have."""
    home = reading.folder
    torch.manual_seed(0)
    save_file(torchvision.models.mobilenet_v2(weights=None).state_dict(), home / "my.safetensors")
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), home / "cats.pt")
    (home / "mypackage").mkdir()
    shutil.copy(ROOT / "tests" / "support" / "tiny.py", home / "mypackage" / "models.py")
    with (home / "mypackage" / "models.py").open("a") as file:
        file.write("\n\nbuild = SmallNet\n")
    served = []
    for line in block.commands:
        reading.serve(line)
        models = httpx.get(f"{reading.url}/models", trust_env=False).json()["models"]
        served.append([model["name"] for model in models if model["state"] == "ready"])
    assert served == [["resnet50"], ["mobilenet_v2"], ["cats", "builtin"], ["build"]]


def check_alone(reading: Reader, block: Block) -> None:
    """Each line without a server, in order; an extra is installed before the line that needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = []
    for line in block.commands:
        if found := re.match(r"\.venv/bin/pip install -e '\.\[(\w+)\]'", line):
            assert found[1] in project["optional-dependencies"]
            said.append(found[1])
        else:
            said.append(reading.camserve(line))
    assert said[2] == "tensorboard"
    assert "--tensorboard" in block.commands[3]
    assert all("sunflower" in said[place] for place in (0, 1, 3))
    assert "layer4.2.conv3" in said[4]
    assert (reading.folder / "explained" / "sunflower.overlay.jpeg").exists()
    assert {each.name for each in reading.folder.iterdir()} >= {"explained", "why.html", "runs"}


def check_options(answers: list[dict[str, Any]]) -> None:
    results = [each["results"] for each in answers]
    contrast, several, verified, masked, activations, predicted = results
    (explained,) = contrast[0]["explanations"]
    assert (explained["label"], explained["contrast"]) == ("sunflower", DANDELION)
    assert len(several[0]["explanations"]) == 3
    assert several[0]["explanations"][0]["layer"] == ["layer3", "layer2"]
    assert several[0]["explanations"][0]["overlay"]["media_type"] == "image/png"
    assert verified[0]["explanations"][0]["verify"]["forwards"] == 40
    (change,) = masked[0]["masked"]["changes"]
    assert change["label"] == "sunflower"
    assert change["score_change"] < 0
    assert len(activations[0]["activations"]) > 10
    assert all("image" in each for each in activations[0]["activations"])
    assert [len(each["predictions"]) for each in predicted] == [3, 3]
