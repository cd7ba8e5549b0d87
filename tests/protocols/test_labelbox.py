"""Labelbox's own SDK reads the rows that `camserve export labelbox` writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from typer.testing import CliRunner

from api_schemas.client import Client
from api_schemas.client.results import Explanation, Result
from service.cli.main import app

pytestmark = [pytest.mark.protocols, pytest.mark.timeout(240)]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMES = {"classification": "class", "bbox": "box", "polygon": "line", "mask": "map", "point": "top"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(2):
        (folder / f"{seed}.png").write_bytes(pictures.png(120, 90, seed=seed))
    return folder


@pytest.fixture(scope="module")
def seen(url: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the SDK's own types hold, row by row."""
    found = Path(os.environ.get("CAMSERVE_TEST_LABELBOX", ROOT / ".venv-labelbox"))
    if not (found / "bin/python").exists():
        pytest.skip("Labelbox's SDK is not installed: `make protocols` does it")
    out = tmp_path_factory.mktemp("out") / "rows.ndjson"
    flags = [part for kind, name in NAMES.items() for part in ("--feature", f"{kind}={name}")]
    command = ["export", "labelbox", str(photos), "--out", str(out), "--url", url, *flags]
    ran = CliRunner().invoke(app, command, env={"NO_PROXY": "127.0.0.1"})
    assert ran.exit_code == 0, ran.output
    command = [str(found / "bin/python"), str(HERE / "labelbox_client.py"), str(out)]
    read = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert read.returncode == 0, read.stderr
    return json.loads(read.stdout)


@pytest.fixture(scope="module")
def ours(url: str, photos: Path) -> dict[str, Result]:
    with Client(url, trust_env=False) as client:
        paths = sorted(photos.iterdir())
        answer = client.explain(paths, include="regions")
        return {path.name: result for path, result in zip(paths, answer, strict=True)}


def named(seen: list[Any], kind: str, key: str) -> list[Any]:
    return [each for each in seen if (each["name"], each["key"]) == (NAMES[kind], key)]


def evidence(ours: dict[str, Result], key: str) -> Explanation:
    return ours[key].explanations[0]


@pytest.mark.parametrize("key", ["0.png", "1.png"])
def test_the_sdk_reads_every_row_as_what_it_is(seen, ours, key: str) -> None:
    best, regions = ours[key].predictions[0], evidence(ours, key).regions
    (chosen,) = named(seen, "classification", key)
    assert (chosen["read_as"], chosen["value"]) == ("NDRadio", [best.label, best.score])
    boxes = named(seen, "bbox", key)
    assert {each["is"] for each in boxes} == {"Rectangle"}
    assert [each["value"] for each in boxes] == [
        [x, y, x + w, y + h] for x, y, w, h in regions.boxes
    ]
    polygons = named(seen, "polygon", key)
    assert {each["is"] for each in polygons} == {"Polygon"}
    closed = [[*polygon, polygon[0]] for polygon in regions.polygons]
    assert [list(map(tuple, each["value"])) for each in polygons] == closed
    (peak,) = named(seen, "point", key)
    assert (peak["is"], peak["value"]) == ("Point", list(regions.peak))
    (drawn,) = named(seen, "mask", key)
    assert drawn["is"] == "Mask"
    np.testing.assert_array_equal(drawn["value"], regions.mask)


def test_every_tool_has_the_score_as_its_confidence(seen, ours) -> None:
    tools = [each for each in seen if each["name"] != NAMES["classification"]]
    assert tools
    for each in tools:
        assert each["confidence"] == evidence(ours, each["key"]).score


def test_uuids_are_unlike_each_other(seen) -> None:
    assert len({each["uuid"] for each in seen}) == len(seen)
