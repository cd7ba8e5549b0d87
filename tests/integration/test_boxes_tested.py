"""Verdicts and experiments on boxes and regions, by the trained detector and segmenter of flowers.

Figures against plain torchvision on a private copy, what edits of known objects do, and refusals.
"""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detectors
import numpy as np
import PIL.Image
import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor
from torchvision.ops import box_iou

from service.cam.verdict import RUNS, Evidence, contrasts, design, hidden, judge
from service.models.catalog import ModelSpec
from service.models.loading import load_model

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent.parent / "tools" / "flower_scenes")
    import flower_networks
    import scenes

pytestmark = pytest.mark.timeout(240)

PNG = {"content-type": "image/png"}
LABELS = json.dumps(flower_networks.LABELS)
TABLES = f"""
[[model]]
name = "boxes"
builder = "flower_networks:faster_rcnn"
labels = {LABELS}

[[model]]
name = "regions"
builder = "flower_networks:lraspp"
labels = {LABELS}

[model.input]
size = [320, 320]
resize = 320
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
"""


@pytest.fixture(scope="module")
def flowers(serve: Any, shared_data: Path, tmp_path_factory: Any) -> Iterator[TestClient]:
    config = tmp_path_factory.mktemp("flowers") / "models.toml"
    config.write_text(TABLES)
    with serve(models=(), config=str(config)) as client:
        yield client


@pytest.fixture(scope="module")
def scene(shared_data: Path) -> scenes.Scene:
    return scenes.validation(shared_data / "flowers128.tar", 1)[0]


def png(pixels: Tensor) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


def explained(client: TestClient, data: bytes, **options: Any) -> Any:
    response = client.post("/explain", content=data, headers=PNG, params=options)
    assert response.status_code == 200, response.text
    return response.json()["results"][0]


def tried(client: TestClient, data: bytes, edits: Any, **options: Any) -> Any:
    body = {"images": [{"data": base64.b64encode(data).decode()}], "edits": edits, **options}
    response = client.post("/experiments", json=body)
    assert response.status_code == 200, response.text
    return response.json()["results"][0]


def box_of(explanation: Any) -> Tensor:
    x, y, w, h = explanation["box"]
    return torch.tensor([[x, y, x + w, y + h]])


def best_match(raw: dict[str, Tensor], box: Tensor, label: int) -> tuple[float, float]:
    """Score and IoU of the best detection of the class over the box, in plain torchvision."""
    overlaps = box_iou(box, raw["boxes"])[0]
    scores = torch.where((overlaps >= 0.5) & (raw["labels"] == label), raw["scores"], 0)
    if not len(scores) or not scores.any():
        return 0.0, 0.0
    return float(scores.max()), float(overlaps[scores.argmax()])


def outputs(module: Any, images: Tensor) -> Any:
    with torch.no_grad():
        return copy.deepcopy(module)(images.float() / 255)


def whole(box: Any) -> list[float]:
    """A box in whole pixels, a little larger."""
    x, y, w, h = box
    left, top = int(x) - 4, int(y) - 4
    return [max(left, 0), max(top, 0), int(w) + 9, int(h) + 9]


def test_hiding_the_object_removes_its_box_and_keeping_it_keeps_it(
    flowers: TestClient, scene: scenes.Scene
) -> None:
    data = png(scene.pixels)
    (explanation,) = explained(flowers, data, include="none")["explanations"]
    inside, others = whole(explanation["box"]), scene.boxes
    far = next(
        [x, y, 24, 24]
        for y in range(0, 296, 8)
        for x in range(0, 296, 8)
        if not box_iou(torch.tensor([[x - 12.0, y - 12, x + 36, y + 36]]), others).any()
    )
    edits = [
        {"name": "gone", "edit": "hide", "region": {"boxes": [inside]}},
        {"name": "kept", "edit": "keep", "region": {"boxes": [inside]}},
        {"name": "far", "edit": "hide", "region": {"boxes": [far]}},
    ]
    result = tried(flowers, data, edits, controls=2)
    gone, kept, away = (edit["changes"][0] for edit in result["edits"])
    assert gone["score"] < 0.5
    assert gone["stays"] is False
    assert (kept["stays"], away["stays"]) == (True, True)
    assert kept["overlap"] > 0.5
    assert abs(away["score_change"]) < 0.1
    assert gone["box"] == explanation["box"]
    assert gone["control"]["n"] == 2
    assert gone["control"]["smaller"] == 2
    assert result["forwards"] == 2 + 3 * 3


def test_the_figures_of_an_edit_are_those_of_torchvision_on_a_private_copy(
    flowers: TestClient, scene: scenes.Scene
) -> None:
    data = png(scene.pixels)
    (explanation,) = explained(flowers, data, include="none")["explanations"]
    x, y, w, h = (int(side) for side in explanation["box"])
    part = [x + w // 4, y + h // 4, w // 2, h // 2]
    edits = [{"name": "part", "edit": "hide", "fill": "grey", "region": {"boxes": [part]}}]
    at = ",".join(map(str, explanation["box"]))
    (edit,) = tried(flowers, data, edits, at=at, controls=3)["edits"]
    changed = scene.pixels.clone()
    changed[:, part[1] : part[1] + part[3], part[0] : part[0] + part[2]] = 128
    (raw,) = outputs(flower_networks.faster_rcnn(), changed[None])
    score, overlap = best_match(raw, box_of(explanation), explanation["class_id"])
    (change,) = edit["changes"]
    assert change["score"] == pytest.approx(score, abs=1e-5)
    assert change["overlap"] == pytest.approx(overlap, abs=1e-5)
    assert change["score_change"] == pytest.approx(score - explanation["score"], abs=1e-5)
    assert len(change["control"]["score_changes"]) == 3
    shown = [each["score"] for each in edit["predictions"]]
    assert shown == pytest.approx([s for s in raw["scores"].tolist() if s >= 0.5], abs=1e-5)


def test_the_verdict_on_a_box_is_that_of_its_score_in_a_private_copy(
    flowers: TestClient, scene: scenes.Scene
) -> None:
    result = explained(flowers, png(scene.pixels), verify="true", include="grid", explain_top=2)
    plan = design((320, 320))
    copies = torch.cat([hidden(scene.pixels, plan, slice(n, n + 8)) for n in range(0, RUNS, 8)])
    raw = outputs(flower_networks.faster_rcnn(), copies)
    assert len(result["explanations"]) == 2
    for explanation in result["explanations"]:
        found, box = explanation["verify"], box_of(explanation)
        scores = [best_match(each, box, explanation["class_id"])[0] for each in raw]
        falls = explanation["score"] - torch.tensor(scores)[:, None]
        evidence = Evidence(plan, falls, contrasts(scene.pixels, plan))
        grid = np.frombuffer(base64.b64decode(explanation["grid"]["data"]), "<f4")
        expected = judge(evidence, torch.tensor(grid.reshape(explanation["grid"]["shape"])), 0)
        assert found["verdict"] == expected.verdict
        assert found["agreement"] == pytest.approx(expected.agreement, abs=2e-3)
        assert found["p_place"] == pytest.approx(expected.p_place, abs=5e-3)
        assert found["forwards"] == 40


def test_the_figures_of_a_region_are_those_of_plain_torch(
    flowers: TestClient, scene: scenes.Scene
) -> None:
    data = png(scene.pixels)
    (explanation,) = explained(flowers, data, model="regions", include="none", verify="true")[
        "explanations"
    ]
    assert explanation["verify"]["verdict"] in {"supported", "inconclusive"}
    region = {"rle": explanation["region"]}
    edits = [
        {"name": "gone", "edit": "hide", "region": region},
        {"name": "kept", "edit": "keep", "region": region},
    ]
    result = tried(flowers, data, edits, model="regions", controls=2)
    gone, kept = (edit["changes"][0] for edit in result["edits"])
    assert (gone["stays"], kept["stays"]) == (False, True)
    assert "detection" not in gone
    model = load_model(ModelSpec("regions", "flower_networks:lraspp"))
    normal = (torch.tensor(n)[:, None, None] for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    mean, std = normal
    mask = torch.from_numpy(decoded(explanation["region"]))
    fill = scene.pixels.double().mean(dim=(1, 2)).round().to(torch.uint8)
    changed = torch.where(mask, fill[:, None, None], scene.pixels)
    with torch.no_grad():
        out = copy.deepcopy(model.module)((changed[None].float() / 255 - mean) / std)["out"][0]
    class_id = gone["class_id"]
    expected = float(out.softmax(dim=0)[class_id][mask].mean())
    assert gone["score"] == pytest.approx(expected, abs=1e-4)
    share = float((out.argmax(dim=0)[mask] == class_id).float().mean())
    assert gone["overlap"] == pytest.approx(share, abs=2e-3)


def decoded(rle: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    from service.images.run_lengths import rle_decode

    return rle_decode(rle["size"], rle["counts"])
