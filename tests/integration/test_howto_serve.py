"""`docs/how-to/serve-your-model.md`, run as a reader would: every block, top to bottom."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "how-to" / "serve-your-model.md"

BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(240)
def test_the_page_leads_from_a_state_dict_to_an_explained_photo(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, module in (("python", ""), ("camserve", "-m service ")):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        (binaries / name).chmod(0o755)
    # `make test` sets PYTHONSAFEPATH, with which a script's own folder is not searched.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment = inherited | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    folder = tmp_path / "work"
    folder.mkdir()
    said = ""
    for kind, about, text in BLOCK.findall(PAGE.read_text()):
        if written := re.search(r"file=(\S+)", about):
            (folder / written[1]).write_text(text)
        elif kind == "sh" and "no-test" not in about:
            ran = subprocess.run(
                ["/bin/sh", "-euc", text],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
            said += ran.stdout
    assert re.search(r"halves +2 +3,442 +features +hooked", said)
    assert "faithfulness" in said
    answer = json.loads((folder / "why" / "photo.json").read_text())
    assert answer["predictions"][0]["label"] == "light below"
    with Image.open(folder / "why" / "photo.overlay.jpeg") as overlay:
        assert overlay.size == (96, 96)
