"""`docs/how-to/serve-your-model.md`, run as a reader would: every block, top to bottom."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from reading import ROOT, blocks, reader

PAGE = ROOT / "docs" / "how-to" / "serve-your-model.md"


@pytest.mark.timeout(240)
def test_the_page_leads_from_a_state_dict_to_an_explained_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    ours = sys.modules.pop("nets", None)  # the tests' own module has the name of the page's
    printed = ""
    with reader(tmp_path) as reading:
        try:
            for block in blocks(PAGE):
                if "no-test" not in block.about:
                    printed += reading.do(block)
        finally:
            sys.modules.pop("nets", None)
            if ours is not None:
                sys.modules["nets"] = ours
    assert re.search(r"halves +2 +3,442 +features +hooked", printed)
    assert re.search(r"features\.1 +8×16×16 +\+0\.\d+", printed), "layers --measure"
    answer = json.loads((tmp_path / "why" / "photo.json").read_text())
    assert answer["predictions"][0]["label"] == "light below"
    with Image.open(tmp_path / "why" / "photo.overlay.jpeg") as overlay:
        assert overlay.size == (96, 96)
