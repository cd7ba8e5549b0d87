"""What a detector finds, in each protocol and in bulk: the boxes of `/predict`, in other words."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pictures
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.cli.main import app
from service.images.run_lengths import rle_decode
from service.integrations.label_studio.brush import encode_rle

pytestmark = pytest.mark.timeout(120)

PNG = pictures.png(90, 70)
IMAGE = {"content-type": "image/png"}
ANYLABELING = "/integrations/x-anylabeling/v1"


@pytest.fixture(scope="module")
def client(serve) -> Any:
    """A client of a detector and a segmenter."""
    models = ("boxes=detectors:faster_rcnn", "regions=detectors:segmenter")
    with serve(models=models) as client:
        yield client


def listed(client: TestClient, model: str, **options: Any) -> list[dict[str, Any]]:
    """The predictions of `/predict`."""
    answer = client.post("/predict", params={"model": model, **options}, content=PNG, headers=IMAGE)
    return answer.raise_for_status().json()["results"][0]["predictions"]


def labelled(client: TestClient, model: str, **params: Any) -> Any:
    """What X-AnyLabeling gets."""
    uri = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    body = {"model": model, "image": uri, "params": params}
    answer = client.post(f"{ANYLABELING}/predict", json=body)
    return answer.raise_for_status().json()["data"]


def test_torchserve_returns_corners_and_scores_by_label(client: TestClient) -> None:
    found = client.post("/predictions/boxes", content=PNG, headers=IMAGE).raise_for_status().json()
    expected = listed(client, "boxes")
    assert len(found) == len(expected) > 1
    for each, prediction in zip(found, expected, strict=True):
        x, y, w, h = prediction["box"]
        assert each == {
            prediction["label"]: pytest.approx([x, y, x + w, y + h]),
            "score": pytest.approx(prediction["score"]),
        }


def test_kserve_returns_the_predictions_of_the_service(client: TestClient) -> None:
    body = {"instances": [{"b64": base64.b64encode(PNG).decode()}]}
    answer = client.post("/v1/models/boxes:predict", json=body).raise_for_status().json()
    assert [each["box"] for each in answer["predictions"][0]] == [
        each["box"] for each in listed(client, "boxes")
    ]


def test_x_anylabeling_draws_each_box_as_a_rectangle_of_its_class(client: TestClient) -> None:
    expected = listed(client, "boxes", min_score=0.6)
    data = labelled(client, "boxes", current_task="boxes", conf_threshold=0.6)
    assert data["description"] == f"{len(expected)} found"
    assert [(each["label"], each["shape_type"]) for each in data["shapes"]] == [
        (each["label"], "rectangle") for each in expected
    ]
    for shape, each in zip(data["shapes"], expected, strict=True):
        x, y, w, h = each["box"]
        assert shape["points"][0] == pytest.approx([x, y])
        assert shape["points"][2] == pytest.approx([x + w, y + h])
        assert shape["score"] == pytest.approx(each["score"])


def test_x_anylabeling_draws_regions_as_polygons_without_the_background(
    client: TestClient,
) -> None:
    """Filled again, the polygons are the masks, but for outlines a pixel off and small parts."""
    data = labelled(client, "regions", current_task="regions", conf_threshold=0.0)
    expected = {
        each["label"]: rle_decode(tuple(each["mask"]["size"]), each["mask"]["counts"])
        for each in listed(client, "regions")
        if each["class_id"]
    }
    drawn = {label: np.zeros((70, 90), np.uint8) for label in expected}
    for shape in data["shapes"]:
        assert shape["shape_type"] == "polygon"
        cv2.fillPoly(drawn[shape["label"]], [np.rint(shape["points"]).astype(np.int32)], 1)
    assert data["shapes"]
    assert max(mask.sum() for mask in expected.values()) > 500
    for label, mask in expected.items():
        inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        around = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert drawn[label][inside].all(), label
        corners = [point for s in data["shapes"] if s["label"] == label for point in s["points"]]
        columns, rows = np.rint(np.reshape(corners, (-1, 2))).astype(int).T
        assert around[rows.clip(0, 69), columns.clip(0, 89)].all(), label


def test_x_anylabeling_lists_the_tasks_of_each_kind_of_model(client: TestClient) -> None:
    described = client.get(f"{ANYLABELING}/models").json()["data"]
    first = {name: model["available_tasks"][0]["id"] for name, model in described.items()}
    assert first == {"boxes": "boxes", "regions": "regions"}
    refused = client.post(
        f"{ANYLABELING}/predict",
        json={
            "model": "boxes",
            "image": f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
            "params": {"current_task": "regions"},
        },
    )
    assert refused.status_code == 400
    assert "'boxes' has no task 'regions'" in refused.json()["error"]["message"]


def test_bulk_writes_a_row_for_each_detection(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    command = ["bulk", str(tmp_path), str(tmp_path / "out"), "--model", "detectors:faster_rcnn"]
    ran = CliRunner().invoke(app, [*command, "--explain-top", "2", "--device", "cpu"])
    assert ran.exit_code == 1, ran.output
    rows = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    found, failed = rows[:-1], rows[-1]
    assert failed["error_code"] == "unsupported_image"
    answer = json.loads(found[0]["answer"])
    assert [row["answer"] is None for row in found] == [False] + [True] * (len(found) - 1)
    assert [(row["detection"], row["label"]) for row in found] == [
        (each["detection"], each["label"]) for each in answer["predictions"]
    ]
    np.testing.assert_allclose(
        [row["box"] for row in found], [each["box"] for each in answer["predictions"]], rtol=1e-6
    )
    assert [len(row["overlays"]) for row in found] == [1, 1] + [0] * (len(found) - 2)
    for row in found[:2]:
        for file in row["overlays"] + row["heatmaps"]:
            assert (tmp_path / "out" / file).stat().st_size


def test_the_open_inference_protocol_pads_boxes_to_the_most_of_an_image(
    client: TestClient,
) -> None:
    """Two images; the detector's own metadata names what is returned."""
    files = [base64.b64encode(pictures.png(90, 70, seed=seed)).decode() for seed in (0, 1)]
    tensor = {"name": "image", "shape": [2], "datatype": "BYTES", "data": files}
    body = {"inputs": [tensor]}
    answer = client.post("/v2/models/boxes/infer", json=body).raise_for_status().json()
    found = {output["name"]: output for output in answer["outputs"]}
    described = client.get("/v2/models/boxes").json()["outputs"]
    assert [*found, "explain"] == [output["name"] for output in described]
    counts = found["num_detections"]["data"]
    most = max(counts)
    assert found["boxes"]["shape"] == [2, most, 4]
    boxes = np.reshape(found["boxes"]["data"], (2, most, 4))
    labels = np.reshape(found["labels"]["data"], (2, most))
    expected = listed(client, "boxes")
    assert counts[0] == len(expected)
    for index, each in enumerate(expected):
        x, y, w, h = each["box"]
        np.testing.assert_allclose(boxes[0, index], [x, y, x + w, y + h], atol=0.01)
        assert labels[0, index] == each["label"]
    assert not boxes[0, counts[0] :].any()
    explained = client.post("/v2/models/boxes/explain", json=body).raise_for_status().json()
    texts = {output["name"]: output for output in explained["outputs"]}["explain"]
    assert texts["shape"] == [2, 1]
    assert json.loads(texts["data"][0])["detection"] == 0
    refused = client.post("/v2/models/regions/infer", json=body)
    assert refused.status_code == 400
    assert "no output for regions" in refused.json()["error"]


CONFIG = """<View><Image name="image" value="$image"/>
  <RectangleLabels name="box" toName="image"><Label value="class 1"/><Label value="class 2"/>
    <Label value="class 3"/></RectangleLabels>
  <BrushLabels name="brush" toName="image"><Label value="class 1"/><Label value="class 2"/>
    <Label value="class 3"/></BrushLabels>
  <Choices name="kind" toName="image" choice="multiple"><Choice value="class 1"/>
    <Choice value="class 2"/><Choice value="class 3"/></Choices></View>"""


def prelabels(client: TestClient, model: str, **extra: Any) -> Any:
    """Label Studio's prediction of one task, in a project with these extra parameters."""
    base, project = "/integrations/label-studio", f"{model}.{len(extra)}"
    setup = {"project": project, "schema": CONFIG, "extra_params": {"model": model, **extra}}
    client.post(f"{base}/setup", json=setup).raise_for_status()
    uri = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    body = {"tasks": [{"id": 1, "data": {"image": uri}}], "project": project}
    body |= {"label_config": CONFIG, "params": {}}
    answer = client.post(f"{base}/predict", json=body).raise_for_status()
    return answer.json()["results"][0]


def test_label_studio_gets_a_rectangle_in_percent_for_each_box(client: TestClient) -> None:
    found = prelabels(client, "boxes", min_score=0.55)
    expected = listed(client, "boxes", min_score=0.55)
    rectangles = [each for each in found["result"] if each["type"] == "rectanglelabels"]
    assert found["score"] == min(each["score"] for each in expected)
    for entry, each in zip(rectangles, expected, strict=True):
        x, y, w, h = each["box"]
        value = entry["value"]
        assert (value["rectanglelabels"], entry["score"]) == ([each["label"]], each["score"])
        assert value["x"] * 0.9 == pytest.approx(x)
        assert value["y"] * 0.7 == pytest.approx(y)
        assert value["width"] * 0.9 == pytest.approx(w)
        assert value["height"] * 0.7 == pytest.approx(h)
    (chosen,) = (each for each in found["result"] if each["type"] == "choices")
    assert chosen["value"]["choices"] == list(dict.fromkeys(each["label"] for each in expected))


def test_label_studio_gets_the_mask_of_each_region_as_a_brush(client: TestClient) -> None:
    """In an interface with labels for three classes: the first has none, and no brush."""
    brushes = {
        entry["value"]["brushlabels"][0]: entry
        for entry in prelabels(client, "regions")["result"]
        if entry["type"] == "brushlabels"
    }
    expected = {each["label"]: each for each in listed(client, "regions") if each["class_id"]}
    assert brushes.keys() == expected.keys()
    for label, entry in brushes.items():
        mask = rle_decode(tuple(expected[label]["mask"]["size"]), expected[label]["mask"]["counts"])
        assert entry["value"]["rle"] == encode_rle(255 * mask.astype(np.uint8))
        assert entry["score"] == pytest.approx(expected[label]["score"])
        assert (entry["original_width"], entry["original_height"]) == (90, 70)
