"""The page of models: what one benchmark writes on it stays when another one writes the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent.parent / "benchmarks")
    from models_page import kept, with_probes

PAGE = """# Models

| model | cut at | compile |
|---|---|---|
| alexnet | `features.11` | 51 |
| vgg11 | `features.19` | 33 |

## Not compiled

| model | why |
|---|---|
| vit_b_16 | it crosses the cut. |
"""
MEASURED = {
    "layer": "norm",
    "grid": [7, 7],
    "probes": [],
    "transform": "resize 256",
    "forwards": 25,
}
DONE = {
    "torchvision/alexnet": MEASURED,
    "torchvision/vit_b_16": MEASURED | {"probes": ["places", "batch"]},
    "timm/pit": MEASURED | {"forwards": 19.5},
    "timm/large": {"skipped": "it needs more than 4 GB"},
}


def test_rows_get_their_columns_and_timm_a_table() -> None:
    text = with_probes(PAGE, DONE, "1.0", ["sam"])
    assert "| model | cut at | compile | probes | transform |\n|---|---|---|---|---|\n" in text
    assert "| alexnet | `features.11` | 51 | passed | resize 256 |" in text
    assert "| vgg11 | `features.19` | 33 | not measured |  |" in text
    assert "| vit_b_16 | it crosses the cut. | places, batch | resize 256 |" in text
    assert "| timm/pit | `norm` | 7×7 | passed | resize 256 | 19.5 |" in text
    assert "| timm/large |  |  | skipped: it needs more than 4 GB |  |  |" in text
    assert "from\n19.5 to 25, with a median of 25." in text
    assert "and not tried: sam." in text


def test_writing_twice_is_writing_once() -> None:
    text = with_probes(PAGE, DONE, "1.0", ["sam"])
    assert with_probes(text, DONE, "1.0", ["sam"]) == text


def test_a_new_page_keeps_the_columns_and_the_table() -> None:
    text = with_probes(PAGE, DONE, "1.0", ["sam"])
    assert kept(PAGE, text) == text
    assert kept(PAGE.replace("51", "52"), text) == text.replace("| 51 |", "| 52 |")
