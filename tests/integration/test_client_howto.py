"""`docs/how-to/use-the-python-client.md`: its Python, top to bottom, against the built-in model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "how-to" / "use-the-python-client.md"

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(60)
def test_the_examples_of_the_page_do_what_it_says(
    run_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sample = ROOT / "examples" / "sunflower.jpg"
    shutil.copy(sample, "sunflower.jpg")
    Path("photographs").mkdir()
    shutil.copy(sample, "photographs/a.jpg")
    Path("photographs/b.jpg").write_bytes(b"broken")
    names: dict[str, Any] = {}
    with run_server(models=()) as server:
        for block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
            code = block.replace("http://127.0.0.1:8000", server.url)
            exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102 - the page's own words
    said = capsys.readouterr().out
    assert re.match(r"sunflower \d+%\n", said)
    assert "float32" in said
    assert "of the photograph" in said
    assert "sunflower\nunsupported_image\n" in said
    assert "unknown_layer 404" in said
    assert "1 of 2\na.jpg sunflower [(" in said
    assert "2 of 2\nb.jpg " in said
    assert said.count("\nsunflower\n") >= 3
    assert names["why"].grid.max() == 1
    for name in ("why.jpg", "kernels.png"):
        with Image.open(name) as picture:
            picture.load()


EXPERIMENTS = ROOT / "docs" / "how-to" / "experiments.md"


@pytest.mark.timeout(60)
def test_the_examples_of_the_experiments_do_what_the_page_says(
    run_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shutil.copy(ROOT / "examples" / "sunflower.jpg", "sunflower.jpg")
    Image.new("RGB", (300, 200), "grey").save("other.jpg")
    page = EXPERIMENTS.read_text(encoding="utf-8")
    with run_server(models=()) as server:
        page = page.replace("http://127.0.0.1:8000", server.url)
        names: dict[str, Any] = {}
        code, inside = BLOCK.findall(page)
        for block in (code, inside):
            exec(compile(block, str(EXPERIMENTS), "exec"), names)  # noqa: S102 - the page's own words
        (command,) = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        by_curl = []
        if shutil.which("curl"):
            said = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True)
            by_curl = json.loads(said.stdout)["results"][0]["edits"]
    without, only, silent, patched, clipped = capsys.readouterr().out.splitlines()
    assert silent.startswith("silent [")
    assert patched.split("]")[0].removeprefix("of the other image") in silent
    assert clipped == "clipped None 0.0"
    assert without.startswith("without it -")
    assert without.endswith("8 of 8"), "the flower counts more than every other place"
    assert only.startswith("only it ")
    assert len(code.splitlines()) <= 12
    for edit, line in zip(by_curl, (without, only), strict=False):
        said_by_python = float(line.split()[2])
        assert edit["changes"][0]["logit_change"] == pytest.approx(said_by_python, abs=1e-4)
