"""X-AnyLabeling's remote server: the requests of version 4.2.1, replayed."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pictures
import pytest
from starlette.testclient import TestClient

BASE = "/integrations/x-anylabeling/v1"
PNG = pictures.png(120, 90)
URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def predict(client: TestClient, model: str = "small", image: str = URI, **params: Any) -> Any:
    """What the program sends with its widgets at their start."""
    widgets = {"conf_threshold": 0.5, "iou_threshold": 0.0, "epsilon_factor": 0.001}
    body = {"model": model, "image": image, "params": widgets | params}
    return client.post(f"{BASE}/predict", json=body, headers={"Token": ""})


def shapes(client: TestClient, **params: Any) -> list[Any]:
    answer = predict(client, **params)
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"] is True
    return answer.json()["data"]["shapes"]


def explained(client: TestClient, **query: object) -> Any:
    query = {"include": "regions"} | query
    answer = client.post(
        "/explain", params=query, content=PNG, headers={"content-type": "image/png"}
    )
    return answer.raise_for_status().json()["results"][0]["explanations"][0]


def test_every_model_is_listed_with_its_classes_tasks_and_widgets(client) -> None:
    answer = client.get(f"{BASE}/models").json()
    assert answer["success"] is True
    assert list(answer["data"]) == ["small", "other"]
    model = answer["data"]["other"]
    assert model["classes"] == [f"class {index}" for index in range(5)]
    assert [task["id"] for task in model["available_tasks"]] == [
        "cam_polygon", "cam_rectangle", "cam_point", "cam_verified"
    ]  # fmt: skip
    widgets = {widget["name"] for widget in model["widgets"]}
    for task in model["available_tasks"]:
        assert {"button_run"} < set(task["active_widgets"]) <= widgets


def test_polygons_rectangles_and_the_peak_are_those_of_the_regions(client) -> None:
    expected = explained(client)
    regions = expected["regions"]
    polygons = shapes(client, current_task="cam_polygon")
    assert [each["points"] for each in polygons] == regions["polygons"]
    rectangles = shapes(client, current_task="cam_rectangle")
    corners = [(each["points"][0], each["points"][2]) for each in rectangles]
    assert corners == [([x, y], [x + w, y + h]) for x, y, w, h in regions["boxes"]]
    (peak,) = shapes(client, current_task="cam_point")
    assert peak["points"] == [regions["peak"]]
    for kind, found in (("polygon", polygons), ("rectangle", rectangles), ("point", [peak])):
        for each in found:
            assert (each["shape_type"], each["label"]) == (kind, expected["label"])
            assert each["score"] == pytest.approx(expected["score"], rel=1e-5)
            assert each["group_id"] > 0


def test_a_task_of_its_own_has_the_verdict_beside_the_same_polygons(client) -> None:
    verify = explained(client, verify="true")["verify"]
    told = f"{verify['verdict']} (agreement {verify['agreement']:z.2f})"
    plain = predict(client, current_task="cam_polygon").json()["data"]
    found = predict(client, current_task="cam_verified").json()["data"]
    assert found["description"] == f"{plain['description']}, {told}"
    assert len(found["shapes"]) == len(plain["shapes"]) > 0
    for each, other in zip(found["shapes"], plain["shapes"], strict=True):
        assert each["points"] == other["points"]
        assert (other["description"], other["attributes"]) == ("gradcam", {})
        assert each["description"] == f"gradcam, {told}"
        assert each["attributes"] == {"verdict": verify["verdict"]}


def test_the_confidence_is_where_the_map_is_cut(client) -> None:
    for cut in (0.2, 0.8):
        found = shapes(client, conf_threshold=cut, current_task="cam_rectangle")
        assert len(found) == len(explained(client, threshold=cut)["regions"]["boxes"])


def test_the_mask_fineness_leaves_points_out(client) -> None:
    fine = shapes(client, conf_threshold=0.1)
    coarse = shapes(client, conf_threshold=0.1, epsilon_factor=0.01)
    count = [sum(len(each["points"]) for each in found) for found in (fine, coarse)]
    assert count[1] < count[0]
    assert all(len(each["points"]) >= 3 for each in coarse)
    corners = np.concatenate([each["points"] for each in coarse])
    assert corners.min() >= 0
    assert (corners.max(axis=0) <= (120, 90)).all()


def test_the_class_filter_decides_which_classes_get_shapes(client) -> None:
    label = explained(client)["label"]
    assert shapes(client, filter_classes=[label])
    assert shapes(client, filter_classes=[])
    assert shapes(client, filter_classes=["another"]) == []


def test_the_programs_own_switch_says_whether_older_shapes_stay(client) -> None:
    """It uses the switch where the answer has no `replace`; the class is in the description."""
    data = predict(client).json()["data"]
    assert "replace" not in data
    assert data["description"].startswith(explained(client)["label"])


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "absent"}, 404, "unknown_model"),
        ({"image": "data:image/png;base64,!!"}, 400, "invalid_image_data"),
        ({"image": URI[:82]}, 400, "corrupt_image"),
        ({"current_task": "cam_circle"}, 400, "invalid_option"),
        ({"conf_threshold": 2}, 400, "invalid_option"),
    ],
)
def test_errors_are_never_200(client, body: Any, status: int, code: str) -> None:
    """With 200 and `success: false` the program shows no shapes and says nothing."""
    answer = predict(client, **body)
    assert answer.status_code == status
    assert answer.json()["success"] is False
    assert answer.json()["error"]["code"] == code
