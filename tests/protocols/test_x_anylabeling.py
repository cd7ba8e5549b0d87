"""X-AnyLabeling's own client class, from its package, against the service."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pictures
import pytest
from flowers import LABELS, SIDE, Flowers

from api_schemas.client import Client
from api_schemas.client.results import Result, decode_mask

pytestmark = [pytest.mark.protocols, pytest.mark.timeout(180)]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    path.write_bytes(pictures.png(120, 90))
    return path


@pytest.fixture(scope="module")
def seen(url: str, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the client class made of our answers."""
    return told(url, picture, tmp_path_factory.mktemp("work"))


def told(url: str, picture: Path, work: Path) -> Any:
    """What the client class made of the answers for one image."""
    folder = Path(os.environ.get("CAMSERVE_TEST_X_ANYLABELING", ROOT / ".venv-x-anylabeling"))
    python = folder / "bin/python"
    if not python.exists():
        pytest.skip("X-AnyLabeling is not installed: `make protocols` does it")
    qt = [str(python), "-c", "import PyQt6.QtMultimedia, PyQt6.QtWidgets"]
    tried = subprocess.run(qt, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"Qt lacks a library of the system: {tried.stderr.splitlines()[-1]}")
    base = f"{url}/integrations/x-anylabeling"
    command = [str(python), str(HERE / "x_anylabeling_client.py"), base, str(picture), str(work)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def regions(url: str, picture: Path) -> Any:
    answer = httpx.post(
        f"{url}/explain?include=regions",
        content=picture.read_bytes(),
        headers={"content-type": "image/png"},
        trust_env=False,
    )
    return answer.raise_for_status().json()["results"][0]["explanations"][0]["regions"]


def test_it_lists_the_models_with_their_tasks(seen) -> None:
    assert list(seen["models"]) == ["small"]
    assert len(seen["models"]["small"]["available_tasks"]) == 4


def test_it_would_draw_the_evidence_in_pixels_of_the_picture(seen, regions) -> None:
    tasks = seen["tasks"]["small"]
    polygons = [each["points"] for each in tasks["cam_polygon"]["shapes"]]
    assert polygons == regions["polygons"]
    boxes = [
        [*points[0], points[2][0] - points[0][0], points[2][1] - points[0][1]]
        for points in (each["points"] for each in tasks["cam_rectangle"]["shapes"])
    ]
    assert boxes == regions["boxes"]
    (peak,) = tasks["cam_point"]["shapes"]
    assert peak["points"] == [regions["peak"]]
    assert {each["type"] for each in tasks["cam_rectangle"]["shapes"]} == {"rectangle"}
    assert peak["score"] > 0
    assert tasks["cam_point"]["description"].startswith(peak["label"])


def test_its_widgets_reach_the_model(seen) -> None:
    """Mask fineness, the class filter and the switch that keeps older shapes."""
    points = [
        sum(len(shape["points"]) for shape in found["shapes"])
        for found in (seen["tasks"]["small"]["cam_polygon"], seen["coarse"])
    ]
    assert points[1] <= points[0]
    assert seen["coarse"]["replace"] is True
    assert (seen["filtered"]["shapes"], seen["filtered"]["replace"]) == ([], False)


def test_a_refusal_is_told_to_the_person(seen) -> None:
    assert seen["refused"]["shapes"] == []
    (complaint,) = seen["complaints"]
    assert "404" in complaint


# ---- a detector and a segmenter of flowers


@pytest.fixture(scope="module")
def flowers_seen(
    flowers_url: str,
    flowers_folder: Path,
    scenes: list[Flowers],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """What the client class made of the answers for one scene."""
    return told(flowers_url, flowers_folder / scenes[0].name, tmp_path_factory.mktemp("work"))


def predicted(url: str, scene: Flowers, model: str, **options: Any) -> Result:
    with Client(url, trust_env=False) as client:
        return client.predict(scene.file, model=model, **options)[0]


def test_it_would_draw_each_box_as_a_rectangle_of_its_class(
    flowers_seen, flowers_url: str, scenes: list[Flowers]
) -> None:
    tasks = flowers_seen["tasks"]["flower-boxes"]
    assert next(iter(tasks)) == "boxes"
    assert "regions" not in tasks
    expected = predicted(flowers_url, scenes[0], "flower-boxes").predictions
    found = tasks["boxes"]
    assert found["description"] == f"{len(expected)} found"
    assert len(found["shapes"]) == len(expected) > 1
    for shape, each in zip(found["shapes"], expected, strict=True):
        assert (shape["type"], shape["label"]) == ("rectangle", each.label)
        assert shape["score"] == pytest.approx(each.score)
        x, y, w, h = each.box
        assert shape["points"] == [
            pytest.approx(corner) for corner in ([x, y], [x + w, y], [x + w, y + h], [x, y + h])
        ]
    groups = [shape["group"] for shape in found["shapes"]]
    assert len(set(groups)) == len(groups)
    assert flowers_seen["complaints"] == []


def test_it_would_draw_the_outlines_of_regions(
    flowers_seen, flowers_url: str, scenes: list[Flowers]
) -> None:
    """Filled again, they are the regions but for their edges and small parts."""
    shapes = flowers_seen["tasks"]["flower-regions"]["regions"]["shapes"]
    result = predicted(flowers_url, scenes[0], "flower-regions", top_k=len(LABELS))
    masks = {
        each.label: decode_mask(each.mask)
        for each in result.predictions
        if each.class_id and each.score >= 0.5
    }
    assert {shape["label"] for shape in shapes} == masks.keys()
    assert {shape["type"] for shape in shapes} == {"polygon"}
    for label, mask in masks.items():
        drawn = np.zeros((SIDE, SIDE), dtype=np.uint8)
        for shape in shapes:
            if shape["label"] == label:
                cv2.fillPoly(drawn, [np.rint(shape["points"]).astype(np.int32)], 1)
        overlap = (mask & (drawn > 0)).sum() / (mask | (drawn > 0)).sum()
        assert overlap > 0.8, label


def test_it_would_draw_the_evidence_for_the_best_box(
    flowers_seen, flowers_url: str, scenes: list[Flowers]
) -> None:
    with Client(flowers_url, trust_env=False) as client:
        asked = {"model": "flower-boxes", "include": "regions"}
        (explanation,) = client.explain(scenes[0].file, **asked)[0].explanations
    (peak,) = flowers_seen["tasks"]["flower-boxes"]["cam_point"]["shapes"]
    assert peak["points"] == [pytest.approx(explanation.regions.peak)]
    assert peak["label"] == explanation.label
