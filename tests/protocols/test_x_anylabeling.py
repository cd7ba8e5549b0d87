"""X-AnyLabeling's own client class, from its package, against the service."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pictures
import pytest

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
    folder = Path(os.environ.get("CAMSERVE_TEST_X_ANYLABELING", ROOT / ".venv-x-anylabeling"))
    python = folder / "bin/python"
    if not python.exists():
        pytest.skip("X-AnyLabeling is not installed: `make protocols` does it")
    qt = [str(python), "-c", "import PyQt6.QtMultimedia, PyQt6.QtWidgets"]
    tried = subprocess.run(qt, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"Qt lacks a library of the system: {tried.stderr.splitlines()[-1]}")
    base = f"{url}/integrations/x-anylabeling"
    work = tmp_path_factory.mktemp("work")
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
    polygons = [each["points"] for each in seen["cam_polygon"]["shapes"]]
    assert polygons == regions["polygons"]
    boxes = [
        [*points[0], points[2][0] - points[0][0], points[2][1] - points[0][1]]
        for points in (each["points"] for each in seen["cam_rectangle"]["shapes"])
    ]
    assert boxes == regions["boxes"]
    (peak,) = seen["cam_point"]["shapes"]
    assert peak["points"] == [regions["peak"]]
    assert {each["type"] for each in seen["cam_rectangle"]["shapes"]} == {"rectangle"}
    assert peak["score"] > 0
    assert seen["cam_point"]["description"].startswith(peak["label"])


def test_its_widgets_reach_the_model(seen) -> None:
    """Mask fineness, the class filter and the switch that keeps older shapes."""
    points = [
        sum(len(shape["points"]) for shape in seen[task]["shapes"])
        for task in ("cam_polygon", "coarse")
    ]
    assert points[1] <= points[0]
    assert seen["coarse"]["replace"] is True
    assert (seen["filtered"]["shapes"], seen["filtered"]["replace"]) == ([], False)


def test_a_refusal_is_told_to_the_person(seen) -> None:
    assert seen["refused"]["shapes"] == []
    (complaint,) = seen["complaints"]
    assert "404" in complaint
