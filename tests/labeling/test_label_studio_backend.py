"""The service as the backend of a real Label Studio: what it stores, and what its SDK says of it.

Label Studio tells success whatever happens, so what counts is what its API has afterwards.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pictures
import pytest
from label_studio import LEGACY_TOKEN, LabelStudio
from numpy.typing import NDArray
from running import running

pytestmark = [pytest.mark.labeling, pytest.mark.timeout(600)]

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <Choices name="flower" toName="image"><Choice value="Sunflower"/><Choice value="Rose"/>
    <Choice value="Tulip"/></Choices>
  <BrushLabels name="cam" toName="image"><Label value="cam"/></BrushLabels>
  <RectangleLabels name="box" toName="image"><Label value="evidence"/></RectangleLabels>
  <PolygonLabels name="outline" toName="image"><Label value="evidence"/></PolygonLabels>
  <KeyPointLabels name="peak" toName="image"><Label value="peak" smart="true"/>
    <Label value="Rose" smart="true"/></KeyPointLabels>
</View>"""
STEP = 255 / 11
"""Of the brush's twelve levels."""


def heatmap(explanation: Any) -> NDArray[np.float64]:
    """255 times the map, in pixels of the source."""
    picture = pictures.opened(base64.b64decode(explanation["heatmap"]["data"]))
    return np.asarray(picture, dtype=np.float64)


def alpha(said: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    (data,) = said["alphas"]
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(shape).astype(np.float64)


def of_type(prediction: Any, kind: str) -> list[Any]:
    return [each for each in prediction["result"] if each["type"] == kind]


@pytest.fixture(scope="module")
def project(studio: LabelStudio, backend, photos) -> int:
    """A project with a photograph and two pictures, the backend attached, predictions retrieved."""
    project = studio.project(CONFIG)
    studio.upload(project, {**photos, "a.png": pictures.png(), "b.png": pictures.png(seed=1)})
    attached = studio.attach(project, backend.url, backend.key)
    assert attached["state"] == "CO", attached
    studio.retrieve(project)
    return project


def test_the_interface_that_the_page_prints_is_filled(studio: LabelStudio, backend, photos) -> None:
    """With the built-in model, which the page starts."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "label-studio.md"
    (config,) = re.findall(r"```xml\n(.*?)```", page.read_text(), re.DOTALL)
    project = studio.project(config)
    studio.upload(project, photos)
    studio.attach(project, backend.url, backend.key)
    studio.retrieve(project)
    (prediction,) = studio.predictions(project)
    (choice,) = of_type(prediction, "choices")
    assert choice["value"]["choices"] == ["sunflower"]
    for kind in ("brushlabels", "rectanglelabels", "polygonlabels", "keypointlabels"):
        assert of_type(prediction, kind), kind
    assert [said["errors"] for said in studio.judge(config, [prediction])] == [[]]


def test_it_connects_and_shows_the_version(studio: LabelStudio, project: int) -> None:
    (found,) = studio.ask("GET", "ml", params={"project": project})
    assert found["readable_state"] == "Connected"
    assert found["model_version"].startswith("builtin-")
    assert found["model_version"].endswith("-gradcam-layer3")


def test_every_task_has_one_prediction_of_that_version(studio: LabelStudio, project: int) -> None:
    stored = studio.predictions(project)
    assert [each["task"] for each in stored] == [task["id"] for task in studio.tasks(project)]
    (backend,) = studio.ask("GET", "ml", params={"project": project})
    assert {each["model_version"] for each in stored} == {backend["model_version"]}


def test_a_second_retrieval_asks_for_nothing(studio: LabelStudio, backend, project: int) -> None:
    before = studio.predictions(project)
    studio.retrieve(project)
    assert [each["id"] for each in studio.predictions(project)] == [each["id"] for each in before]


def test_its_interface_finds_no_fault(studio: LabelStudio, project: int) -> None:
    stored = studio.predictions(project)
    assert all(len(each["result"]) >= 4 for each in stored)
    assert [said["errors"] for said in studio.judge(CONFIG, stored)] == [[], [], []]


def test_the_brush_is_the_map_to_half_a_step(
    studio: LabelStudio, backend, project: int, photos
) -> None:
    """Decoded by Label Studio's own converter."""
    prediction = studio.predictions(project)[0]
    (said,) = studio.judge(CONFIG, [prediction])
    expected = heatmap(backend.explained(photos["sunflower.jpg"]))
    found = alpha(said, expected.shape)
    assert np.abs(found - expected).max() <= STEP / 2 + 1
    assert found.max() == 255
    assert len(np.unique(found)) == 12


def test_class_box_outline_and_peak_are_those_of_explain(
    studio: LabelStudio, backend, project: int, photos
) -> None:
    prediction = studio.predictions(project)[0]
    expected = backend.explained(photos["sunflower.jpg"])
    (choice,) = of_type(prediction, "choices")
    assert choice["value"]["choices"] == ["Sunflower"]
    assert prediction["score"] == pytest.approx(expected["score"])
    box = of_type(prediction, "rectanglelabels")[0]["value"]
    shown = [box["x"] * 6.4, box["y"] * 4.8, box["width"] * 6.4, box["height"] * 4.8]
    assert shown == pytest.approx(expected["regions"]["boxes"][0])
    outline = of_type(prediction, "polygonlabels")[0]["value"]["points"]
    assert len(outline) == len(expected["regions"]["polygons"][0])
    (peak,) = of_type(prediction, "keypointlabels")
    assert [peak["value"]["x"] * 6.4, peak["value"]["y"] * 4.8] == pytest.approx(
        expected["regions"]["peak"]
    )


def test_a_click_brings_the_evidence_of_its_class(
    studio: LabelStudio, backend, project: int, photos
) -> None:
    (attached,) = studio.ask("GET", "ml", params={"project": project})
    task = studio.tasks(project)[0]["id"]
    mark = {
        "id": "HkO-",
        "from_name": "peak",
        "to_name": "image",
        "type": "keypointlabels",
        "original_width": 640,
        "original_height": 480,
        "is_positive": True,
        "value": {"x": 30.1, "y": 69.9, "width": 0.49, "keypointlabels": ["Rose"]},
    }
    answer = studio.click(attached["id"], task, mark)
    assert not answer.get("errors")
    expected = backend.explained(photos["sunflower.jpg"], "&targets=rose")
    result = answer["data"]["result"]
    (peak,) = [each for each in result if each["type"] == "keypointlabels"]
    assert peak["value"]["keypointlabels"] == ["Rose"]
    assert [peak["value"]["x"] * 6.4, peak["value"]["y"] * 4.8] == pytest.approx(
        expected["regions"]["peak"]
    )
    generic = studio.click(
        attached["id"], task, mark | {"value": mark["value"] | {"keypointlabels": ["peak"]}}
    )
    assert generic["data"]["score"] == pytest.approx(0.89, abs=0.02)


# ---- what goes wrong


def test_a_wrong_key_is_said_when_it_is_connected(studio: LabelStudio, backend) -> None:
    project = studio.project(CONFIG)
    studio.add(project, [{"image": _data_uri(pictures.png())}])
    refused = studio.attach(project, backend.url, "a wrong key")
    assert refused["status"] == 400
    assert "authentication parameters" in json.dumps(refused)
    assert studio.predictions(project) == []


def test_a_dead_backend_stores_nothing_and_hurts_nobody(studio: LabelStudio, tmp_path) -> None:
    project = studio.project(CONFIG)
    picture = base64.b64encode(pictures.png()).decode()
    studio.add(project, [{"image": f"data:image/png;base64,{picture}"}])
    with running(models=("tiny:small",)) as server:
        attached = studio.attach(project, f"{server.url}/integrations/label-studio")
        assert attached["state"] == "CO"
    studio.retrieve(project)
    assert studio.predictions(project) == []
    assert studio.ask("GET", f"ml/{attached['id']}")["readable_state"] == "Disconnected"


def test_one_broken_picture_among_many_loses_itself_alone(studio: LabelStudio, backend) -> None:
    project = studio.project(CONFIG)
    good = [{"image": _data_uri(pictures.png(seed=seed))} for seed in range(4)]
    broken = [{"image": _data_uri(b"no picture")}, {"image": "/data/upload/1/missing.png"}]
    tasks = studio.add(project, [*good[:2], *broken, *good[2:]])
    studio.attach(project, backend.url, backend.key)
    studio.retrieve(project)
    kept = [each["task"] for each in studio.predictions(project)]
    assert kept == [tasks[place]["id"] for place in (0, 1, 4, 5)]


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ('<View><Image name="i" value="$image"/><TextArea name="t" toName="i"/></View>', 0),
        (
            (
                '<View><Image name="i" value="$image"/><Choices name="c" toName="i">'
                '<Choice value="car"/><Choice value="bus"/></Choices></View>'
            ),
            0,
        ),
        (
            (
                '<View><Image name="i" value="$image"/><Choices name="c" toName="i">'
                '<Choice value="car"/></Choices><BrushLabels name="b" toName="i">'
                '<Label value="heatmap"/><Label value="car"/></BrushLabels></View>'
            ),
            1,
        ),
    ],
    ids=["no control", "unknown choices", "unknown choices, a generic label"],
)
def test_only_labels_of_the_project_are_stored(
    studio: LabelStudio, backend, config: str, stored: int
) -> None:
    project = studio.project(config)
    studio.add(project, [{"image": _data_uri(pictures.png())}])
    studio.attach(project, backend.url, backend.key)
    studio.retrieve(project)
    found = studio.predictions(project)
    assert len(found) == stored
    assert [said["errors"] for said in studio.judge(config, found)] == [[]] * stored


def test_extra_parameters_choose_model_method_and_labels(studio: LabelStudio, backend) -> None:
    config = """<View><Image name="i" value="$image"/><BrushLabels name="b" toName="i">
      <Label value="thing"/><Label value="other"/></BrushLabels></View>"""
    project = studio.project(config)
    studio.add(project, [{"image": _data_uri(pictures.png())}])
    labels = {f"class {number}": "thing" for number in range(7)}
    extra = {"model": "small", "method": "layercam", "labels": labels}
    attached = studio.attach(project, backend.url, backend.key, extra_params=extra)
    assert attached["model_version"].endswith("-layercam-features")
    studio.retrieve(project)
    (found,) = studio.predictions(project)
    assert found["model_version"] == attached["model_version"]
    assert [each["value"]["brushlabels"] for each in found["result"]] == [["thing"]]


def test_two_hundred_tasks_come_in_one_request_and_are_all_stored(
    studio: LabelStudio, backend, project: int
) -> None:
    """Each picture is fetched from Label Studio, which answers this very request meanwhile."""
    source = studio.tasks(project)[1]["data"]["image"]
    many = studio.project(CONFIG)
    studio.add(many, [{"image": source}] * 200)
    studio.attach(many, backend.url, backend.key, extra_params={"model": "small"})
    asked = backend.server.service.metrics.requests.labels(
        "/integrations/label-studio/predict", "200"
    )
    before = asked._value.get()
    studio.retrieve(many)
    assert asked._value.get() - before == 1
    assert len(studio.predictions(many)) == 200


# ---- tokens and places of pictures


def test_a_legacy_token_is_as_good(studio: LabelStudio, project: int) -> None:
    source = studio.tasks(project)[1]["data"]["image"]
    with running(label_studio_url=studio.url, label_studio_token=LEGACY_TOKEN) as server:
        assert _predicted(server.url, CONFIG, source)


def test_without_a_token_an_upload_is_not_had(studio: LabelStudio, project: int) -> None:
    source = studio.tasks(project)[1]["data"]["image"]
    with running(label_studio_url=studio.url) as server:
        assert not _predicted(server.url, CONFIG, source)


def test_a_local_file_is_had_through_label_studio(studio: LabelStudio, backend) -> None:
    project = studio.project(CONFIG)
    folder = studio.files / "cats"
    folder.mkdir()
    (folder / "a cat.png").write_bytes(pictures.png())
    storage = {"path": str(folder), "project": project, "use_blob_urls": True}
    made = studio.ask("POST", "storages/localfiles", json=storage)
    studio.ask("POST", f"storages/localfiles/{made['id']}/sync")
    studio.attach(project, backend.url, backend.key)
    studio.retrieve(project)
    assert len(studio.predictions(project)) == len(studio.tasks(project)) == 1


def _data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _predicted(url: str, config: str, source: str) -> bool:
    body = {"tasks": [{"id": 1, "data": {"image": source}}], "label_config": config}

    answer = httpx.post(f"{url}/integrations/label-studio/predict", json=body, trust_env=False)
    return bool(answer.raise_for_status().json()["results"][0])
