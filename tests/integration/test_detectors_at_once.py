"""A detector, a segmenter and a classifier, asked by many clients at once."""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import detectors
import httpx
import numpy as np
import PIL.Image
import pytest
import tiny
from crowd import nothing_is_left, served, together
from fastapi import FastAPI
from safetensors.torch import save_file
from structlog.testing import capture_logs

from api_schemas.client.calls import CONNECTION_LIMITS
from service.app import create_app
from service.pipeline.service import Service
from service.settings import Settings

SIZES = ((70, 90), (90, 70), (64, 96))
BOXES = (
    {"explain_top": 5},
    {"explain_top": 2, "method": "layercam"},
    {"explain_top": 1, "of": "x1"},
    {"explain_top": 2, "method": "rise", "samples": 10},
    {"layer": "backbone[0]", "explain_top": 3},
)
REGIONS = ({"explain_top": 3}, {"method": "layercam"}, {"method": "rise", "samples": 10})
LOGITS = ({"explain_top": 2}, {"method": "hirescam"}, {"layer": "features.0"})
KINDS = {"faster_rcnn": BOXES, "segmenter": REGIONS, "small": LOGITS}


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    save_file(tiny.small().state_dict(), tmp_path / "small.safetensors")
    labels = json.dumps(detectors.LABELS)
    tables = [
        f'[[model]]\nname = "{kind}"\nbuilder = "detectors:{kind}"\nlabels = {labels}\n'
        for kind in ("faster_rcnn", "segmenter")
    ]
    tables.append(
        '[[model]]\nname = "small"\nbuilder = "tiny:small"\n'
        f'weights = "{tmp_path}/small.safetensors"\n'
    )
    (tmp_path / "models.toml").write_text("\n".join(tables))
    return create_app(Settings(models=(), config=tmp_path / "models.toml", workers=2))


def wishes(count: int) -> list[tuple[bytes, dict[str, Any]]]:
    """Distinct images, each with a question of a model; equal questions come in crowds."""
    found = []
    kinds = [(model, options) for model, several in KINDS.items() for options in several]
    for seed, (model, options) in zip(range(count), itertools.cycle(kinds), strict=False):
        pixels = detectors.image(seed, SIZES[seed // len(kinds) % len(SIZES)])
        file = io.BytesIO()
        PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
        more = {"model": model, "include": "grid", "top_k": 5}
        more |= {"min_score": 0.05} if model == "faster_rcnn" else {}
        found.append((file.getvalue(), options | more))
    return found


def ask(client: httpx.Client, wish: tuple[bytes, dict[str, Any]]) -> dict[str, Any]:
    image, options = wish
    response = client.post(
        "/explain", params=options, content=image, headers={"content-type": "image/png"}
    )
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return dict(result)


def numbers(result: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Scores, boxes and maps of an answer, in one row."""
    rows = [[each["score"], *each.get("box", ())] for each in result["predictions"]]
    for each in result["explanations"]:
        grid = np.frombuffer(base64.b64decode(each["grid"]["data"]), "<f4")
        rows.append([each["class_id"], *(grid * each["range"][1]).tolist()])
    return np.concatenate([np.asarray(row) for row in rows])


def names(result: dict[str, Any]) -> list[Any]:
    found = [(each["class_id"], each.get("detection")) for each in result["predictions"]]
    return found + [(each["class_id"], each["layer"]) for each in result["explanations"]]


@pytest.mark.timeout(180)
def test_boxes_regions_and_classes_are_answered_as_if_alone(app: FastAPI) -> None:
    asked = wishes(144)
    with (
        capture_logs(),
        served(app) as url,
        httpx.Client(base_url=url, timeout=120, limits=CONNECTION_LIMITS) as client,
    ):
        alone = [ask(client, wish) for wish in asked]
        found = together(lambda wish: ask(client, wish), asked)
    crowd = 0
    for place, (one, twin) in enumerate(zip(found, alone, strict=True)):
        assert names(one) == names(twin), place
        mine = numbers(one)
        np.testing.assert_allclose(mine, numbers(twin), rtol=1e-3, atol=1e-3, err_msg=str(place))
        others = [each for each in alone if each is not twin and names(each) == names(one)]
        rivals = [numbers(each) for each in others]
        distances = [np.abs(mine - row).mean() for row in rivals if row.shape == mine.shape]
        assert all(np.abs(mine - numbers(twin)).mean() < each for each in distances), place
        crowd += bool(distances)
    assert crowd > len(asked) // 3, "most answers need others that they could be mistaken for"
    parts: Service = app.state.service
    nothing_is_left(parts)
