"""Detectors and segmenters of Hugging Face through `/models`, `/predict` and `/explain`."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from small_detectors import image, save
from starlette.testclient import TestClient

from service.evaluation.compare import compare_files, summarise
from service.images.run_lengths import rle_decode
from service.models.catalog import ModelSpec
from service.models.loading import load_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.timeout(240)

NAMES = ("Detr", "RTDetr", "Segformer", "MobileNetV2")


def png(size: tuple[int, int] = (70, 90)) -> bytes:
    pixels = image(1, size).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def builders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hf")
    return {name: f"hf/{save(transformers, name, folder / name)}" for name in NAMES}


@pytest.fixture(scope="module")
def client(serve: Any, builders: dict[str, str]) -> Iterator[TestClient]:
    with serve(models=tuple(builders.values())) as client:
        yield client


def asked(
    client: TestClient, path: str = "/explain", *, data: bytes | None = None, **more: Any
) -> Any:
    content = data or png()
    headers = {"content-type": "image/png"}
    return client.post(path, params={"min_score": 0.0} | more, content=content, headers=headers)


def test_the_models_say_what_they_are(client: TestClient) -> None:
    listed = {each["name"]: each for each in client.get("/models").json()["models"]}
    assert [listed[name]["task"] for name in NAMES] == ["detection"] * 2 + ["segmentation"] * 2
    assert "DetrImageProcessor" in listed["Detr"]["transform"]


@pytest.mark.parametrize("name", ["Detr", "RTDetr"])
def test_a_box_is_named_by_the_place_that_was_predicted(client: TestClient, name: str) -> None:
    predicted = asked(client, "/predict", model=name)
    assert predicted.status_code == 200, predicted.text
    boxes = predicted.json()["results"][0]["predictions"]
    assert len(boxes) == 12
    at = ",".join(map(str, boxes[0]["box"]))
    for more in ({}, {"of": "x2"}, {"contrast": "owl" if boxes[0]["label"] != "owl" else "cat"}):
        response = asked(client, model=name, at=at, include="grid", **more)
        assert response.status_code == 200, response.text
        (explanation,) = response.json()["results"][0]["explanations"]
        assert explanation["box"] == boxes[0]["box"]
        assert "all_zero" not in explanation["flags"]


@pytest.mark.parametrize("name", ["Detr", "RTDetr"])
def test_a_box_is_followed_through_an_edit(client: TestClient, name: str) -> None:
    """Boxes of queries are fractions of the source; an edit that hides nothing leaves them."""
    predicted = asked(client, "/predict", model=name).json()["results"][0]["predictions"]
    body = {
        "model": name,
        "min_score": 0.0,
        "top_k": 12,
        "images": [{"data": base64.b64encode(png()).decode()}],
        "edits": [{"edit": "hide", "name": "corner", "region": {"boxes": [[0, 0, 1, 1]]}}],
    }
    response = client.post("/experiments", json=body)
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    assert [each["box"] for each in result["predictions"]] == [each["box"] for each in predicted]
    (change,) = result["edits"][0]["changes"]
    assert change["box"] == predicted[0]["box"]
    assert change["overlap"] > 0.9
    assert abs(change["score_change"]) < 0.05


@pytest.mark.parametrize("name", ["Detr", "RTDetr"])
def test_a_detector_does_not_differ_from_itself(
    client: TestClient, builders: dict[str, str], name: str, tmp_path: Path
) -> None:
    predicted = asked(client, "/predict", model=name).json()["results"][0]["predictions"]
    (tmp_path / "a.png").write_bytes(png())
    one, other = (load_model(ModelSpec(name, builders[name])) for _ in range(2))
    files = [(tmp_path / "a.png", Path("a.png"))]
    comparison = summarise(one, other, compare_files(one, other, files))
    likely = sum(each["score"] >= 0.5 for each in predicted)
    assert comparison.overall.images == likely
    assert (comparison.overall.flips, comparison.overall.score_distance) == (0, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "Detr", "method": "eigencam"}, "not for models of the task detection"),
        ({"model": "Detr", "fit": "pad"}, "`fit`"),
        ({"model": "Detr", "layer": "model.decoder.layers.0"}, "not a feature map"),
        ({"model": "Detr", "at": "5000,5000"}, "No detection is at the point"),
        ({"model": "RTDetr", "verify": "search"}, "`verify=search`"),
    ],
)
def test_what_they_do_not_have_is_refused_by_name(client, options, words: str) -> None:
    response = asked(client, **options)
    assert response.status_code == 422
    assert words in response.json()["detail"]


@pytest.mark.parametrize("size", [(1, 1), (4, 80), (80, 4)])
@pytest.mark.parametrize("name", ["Detr", "Segformer"])
def test_extreme_images_have_answers(client: TestClient, name: str, size: tuple[int, int]) -> None:
    headers = {"content-type": "image/png"}
    response = client.post(
        "/explain", params={"model": name, "include": "overlay"}, content=png(size), headers=headers
    )
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("name", "y"), [("Segformer", 20), ("MobileNetV2", 35)])
def test_a_place_in_a_region_names_it(client: TestClient, name: str, y: int) -> None:
    """The crop of MobileNetV2's processor begins 14 pixels from the left of the image."""
    headers = {"content-type": "image/png"}
    options = {"model": name, "at": f"20,{y}", "include": "grid"}
    response = client.post("/explain", params=options, content=png(), headers=headers)
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    (explanation,) = result["explanations"]
    region = rle_decode((70, 90), explanation["region"]["counts"])
    assert region[y, 20]
    classes = [rle_decode((70, 90), each["mask"]["counts"]) for each in result["predictions"]]
    assert not (sum(mask.astype(int) for mask in classes) > 1).any()
