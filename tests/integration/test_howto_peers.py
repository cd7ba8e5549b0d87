"""`docs/how-to/coming-from-torchserve-kserve-vertex.md`: every command of it, with real curl."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "how-to" / "coming-from-torchserve-kserve-vertex.md"

BLOCK = re.compile(r"^```sh([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.timeout(120)
def test_every_command_of_the_page_is_answered(run_server, tmp_path: Path) -> None:
    """The lines of TorchServe's documentation among them, unchanged but for the port."""
    blocks = BLOCK.findall(PAGE.read_text())
    (serve,) = (text for about, text in blocks if "serve" in about)
    models = tuple(re.findall(r"--model (\S+)", serve))
    wrapper = tmp_path / "bin" / "curl"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f"#!/bin/sh\nexec {shutil.which('curl')} --silent --show-error --fail-with-body "
        f'--noproxy "*" --max-time 30 --write-out "\\n" "$@"\n'
    )
    wrapper.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}",
        "CHECKOUT": str(ROOT),
    }
    said = ""
    with run_server(models=models) as server:
        port = str(server.address[1])
        for about, text in blocks:
            if "serve" in about:
                continue
            ran = subprocess.run(
                ["/bin/sh", "-euc", text.replace("8080", port)],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
            said += ran.stdout
    answers = [json.loads(line) for line in said.splitlines() if line]
    ping, first, *others, both, nested = answers[:7]
    assert ping == {"status": "Healthy"}
    assert max(first, key=first.get) == "sunflower"
    assert others[:3] == [first] * 3
    assert [max(each, key=each.get) for each in both] == ["sunflower"] * 2
    assert (len(nested), max(map(max, nested[0]))) == (1, 1.0)
    assert answers[8]["results"][0]["explanations"][0]["class_id"] == 2
    predicted, explained = answers[9:11]
    assert predicted["predictions"][0][0]["label"] == "sunflower"
    assert explained["explanations"][0][0]["class_id"] == 0
    metadata, inferred, pixels = answers[11:]
    assert metadata["name"] == "resnet-18"
    assert {each["name"] for each in inferred["outputs"]} == {
        "class_ids", "labels", "scores", "logits"
    }  # fmt: skip
    assert [each["name"] for each in pixels["outputs"]] == ["grid", "targets"]
