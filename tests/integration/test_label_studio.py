"""Label Studio's requests as the real one sends them (`tests/labeling/record.py`), and others."""

from __future__ import annotations

import base64
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pictures
import pytest
import tiny
from starlette.testclient import TestClient
from structlog.testing import capture_logs
from webhosts import web

from service.errors import QueueFull

RECORDED = json.loads((Path(__file__).parent / "recorded_label_studio.json").read_text())
BASE = "/integrations/label-studio"
CONFIG = """<View>
  <Image name="image" value="$image"/>
  <Choices name="kind" toName="image">
    <Choice value="class 0"/><Choice value="class 1"/><Choice value="class 2"/>
    <Choice value="class 3"/><Choice value="class 4"/><Choice value="class 5"/>
    <Choice value="class 6"/>
  </Choices>
  <BrushLabels name="cam" toName="image"><Label value="cam"/></BrushLabels>
  <RectangleLabels name="box" toName="image"><Label value="evidence"/></RectangleLabels>
  <PolygonLabels name="outline" toName="image"><Label value="evidence"/></PolygonLabels>
  <KeyPointLabels name="peak" toName="image"><Label value="peak" smart="true"/>
    <Label value="class 5" smart="true"/></KeyPointLabels>
</View>"""


PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "label-studio.md").read_text()


@pytest.mark.timeout(120)
def test_the_example_of_the_page_is_filled_by_the_model_that_the_page_starts(serve) -> None:
    (command,) = re.findall(r"^camserve serve.*$", PAGE, re.MULTILINE)
    (config,) = re.findall(r"```xml\n(.*?)```", PAGE, re.DOTALL)
    (extra,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert command == "camserve serve", "so it is the built-in model"
    file = Path(__file__).parents[2] / "examples" / "sunflower.jpg"
    with serve(models=()) as client:
        known = client.get("/models/builtin").json()["labels"]
        assert re.findall(r'<Choice value="(\w+)"', config) == known
        assert setup(client, json.loads(extra), config).status_code == 200
        photo = [{"image": data_uri(file.read_bytes())}]
        (found,) = results(predict(client, photo, config))
    kinds = {each["type"]: each["value"] for each in found["result"]}
    assert kinds["choices"]["choices"] == ["sunflower"]
    assert set(kinds) == {
        *("choices", "brushlabels", "rectanglelabels", "polygonlabels", "keypointlabels")
    }


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


PICTURE = pictures.png()
TASK = {"image": data_uri(PICTURE)}


def predict(
    client: TestClient,
    tasks: Sequence[Mapping[str, Any]] = (TASK,),
    config: str = CONFIG,
    clicked: Mapping[str, Any] | None = None,
    project: str = "1.1",
) -> Any:
    body = {
        "tasks": [{"id": number, "data": data} for number, data in enumerate(tasks, start=1)],
        "project": project,
        "label_config": config,
        "params": {
            "login": None,
            "password": None,
            "context": None if clicked is None else {"result": [clicked]},
        },
    }
    return client.post(f"{BASE}/predict", json=body)


def results(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    return response.json()["results"]


def setup(client: TestClient, extra: Any = None, config: str = CONFIG, project: str = "1.1") -> Any:
    body = {
        "project": project,
        "schema": config,
        "hostname": "http://127.0.0.1:9",
        "access_token": "0" * 40,
        "extra_params": extra,
    }
    return client.post(f"{BASE}/setup", json=body)


def explained(client: TestClient, query: str = "include=regions") -> Any:
    answer = client.post(f"/explain?{query}", files={"image": PICTURE})
    return answer.raise_for_status().json()["results"][0]["explanations"][0]


def of_type(result: Sequence[Mapping[str, Any]], kind: str) -> list[Any]:
    return [each for each in result if each["type"] == kind]


# ---- as recorded


@pytest.fixture(scope="module")
def with_uploads(serve) -> Iterator[TestClient]:
    """A service whose Label Studio has the pictures of the recorded tasks."""
    bodies = [request["body"] or {} for request in RECORDED]
    uploads = {task["data"]["image"] for body in bodies for task in body.get("tasks", [])}
    with web() as studio:
        for path in uploads:
            studio.pages[path] = (200, {"content-type": "image/png"}, PICTURE)
        with serve(label_studio_url=f"http://127.0.0.1:{studio.port}") as client:
            yield client


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_a_recorded_request_is_answered_as_label_studio_expects(with_uploads, number: int) -> None:
    request = RECORDED[number]
    content = json.dumps(request["body"]) if request["body"] else b""
    answer = with_uploads.request(
        request["method"], request["path"], content=content, headers=request["headers"]
    )
    assert answer.status_code == 200, answer.text
    said = answer.json()
    if request["path"].endswith("/predict"):
        assert len(said["results"]) == len(request["body"]["tasks"])
        for task in said["results"]:
            kinds = {each["type"] for each in task["result"]}
            assert kinds >= {"brushlabels", "rectanglelabels", "keypointlabels"}
    if request["path"].endswith("/setup"):
        assert said["model_version"].startswith("small-")


# ---- setup, versions, health


def test_setup_and_predictions_agree_on_the_version(client) -> None:
    """Label Studio asks again for the tasks whose predictions have another one."""
    version = setup(client).json()["model_version"]
    (task,) = results(predict(client))
    assert task["model_version"] == version
    assert version in client.get(f"{BASE}/versions").json()["versions"]
    assert client.get(f"{BASE}/health").json() == {"status": "UP"}


def test_extra_parameters_hold_for_their_project(client) -> None:
    extra = {"model": "other", "method": "layercam", "layer": "features.3", "threshold": 0.9}
    version = setup(client, extra, project="2.1").json()["model_version"]
    assert version.startswith("other-")
    assert version.endswith("-layercam-features.3-threshold0.9")
    (task,) = results(predict(client, project="2.1"))
    assert task["model_version"] == version
    expected = explained(
        client, "model=other&method=layercam&layer=features.3&threshold=0.9&include=regions"
    )
    assert len(of_type(task["result"], "rectanglelabels")) == min(
        10, len(expected["regions"]["boxes"])
    )
    (default,) = results(predict(client, project="3.1"))
    assert default["model_version"].startswith("small-")
    assert setup(client, None, project="2.1").json()["model_version"].startswith("small-")


@pytest.mark.parametrize(
    ("extra", "config", "status"),
    [
        ({"methods": "gradcam"}, CONFIG, 422),
        ({"model": "unknown"}, CONFIG, 404),
        ({"layer": "nowhere"}, CONFIG, 404),
        (None, "<View>", 422),
    ],
)
def test_setup_refuses_what_predictions_would_fail_on(client, extra, config, status) -> None:
    """Label Studio shows this to who connects it; of predictions that fail it shows nothing."""
    assert setup(client, extra, config).status_code == status


@pytest.mark.parametrize("verify", [True, "search"])
def test_with_verify_each_region_has_the_verdict_and_nothing_else_changes(client, verify) -> None:
    """Choice and scores are those of the class: a verdict never changes what is chosen."""
    plain_version = setup(client).json()["model_version"]
    (plain,) = results(predict(client))
    version = setup(client, {"verify": verify}, project="4.1").json()["model_version"]
    assert version != plain_version, "Label Studio asks again only for another version"
    (found,) = results(predict(client, project="4.1"))
    verdict = explained(client, f"include=regions&verify={verify}".lower())["verify"]
    assert found["score"] == plain["score"]
    assert [each["value"] for each in of_type(found["result"], "choices")] == [
        each["value"] for each in of_type(plain["result"], "choices")
    ]
    assert all("meta" not in each for each in plain["result"])
    regions = [each for each in found["result"] if each["type"] != "choices"]
    assert {each["type"] for each in regions} == {
        "brushlabels", "rectanglelabels", "polygonlabels", "keypointlabels"
    }  # fmt: skip
    for each in regions:
        assert each["score"] == found["score"]
        meta = each["meta"]
        (text,) = meta["text"]
        assert text == f"{verdict['verdict']} (agreement {verdict['agreement']:z.2f})"
        for name in ("verdict", "reason", "agreement", "p_place", "p_centred"):
            assert meta[name] == pytest.approx(verdict[name], abs=1e-3)
    assert all("meta" not in each for each in of_type(found["result"], "choices"))


def test_a_click_gets_the_verdict_on_the_map_of_its_class(client) -> None:
    setup(client, {"verify": True}, project="5.1")
    (found,) = results(predict(client, clicked=clicked("class 5"), project="5.1"))
    expected = explained(client, "include=regions&targets=5&verify=true")["verify"]
    (peak,) = of_type(found["result"], "keypointlabels")
    assert peak["meta"]["verdict"] == expected["verdict"]


def test_a_project_of_choices_alone_has_no_map_to_test(client) -> None:
    config = CONFIG.split("<BrushLabels", maxsplit=1)[0] + "</View>"
    setup(client, {"verify": True}, config, project="6.1")
    (found,) = results(predict(client, config=config, project="6.1"))
    (choice,) = found["result"]
    assert "meta" not in choice


def test_setup_does_not_wait_for_a_full_queue(serve) -> None:
    with serve(max_queue=1) as client, client.app.state.service.admission.admit():
        assert setup(client).status_code == 200
        assert client.post("/predict", files={"image": PICTURE}).status_code == 429


# ---- what is emitted


def test_each_control_gets_its_part_of_the_evidence(client) -> None:
    (task,) = results(predict(client))
    evidence = explained(client)
    by_type = {each["type"]: each for each in reversed(task["result"])}
    assert by_type["choices"]["value"] == {"choices": [evidence["label"]]}
    assert task["score"] == by_type["choices"]["score"] == pytest.approx(evidence["score"])
    boxes = [each["value"] for each in of_type(task["result"], "rectanglelabels")]
    shown = [
        [box["x"] * 0.8, box["y"] * 0.6, box["width"] * 0.8, box["height"] * 0.6] for box in boxes
    ]
    assert shown == [pytest.approx(box) for box in evidence["regions"]["boxes"][:10]]
    outlines = [each["value"] for each in of_type(task["result"], "polygonlabels")]
    points = [[x * 0.8, y * 0.6] for x, y in outlines[0]["points"]]
    assert points == [pytest.approx(point) for point in evidence["regions"]["polygons"][0]]
    peak = by_type["keypointlabels"]["value"]
    assert [peak["x"] * 0.8, peak["y"] * 0.6] == pytest.approx(evidence["regions"]["peak"])
    for kind, label in (
        ("brushlabels", "cam"),
        ("rectanglelabels", "evidence"),
        ("polygonlabels", "evidence"),
        ("keypointlabels", "peak"),
    ):
        assert by_type[kind]["value"][kind] in ([label], [evidence["label"]])
        assert (by_type[kind]["original_width"], by_type[kind]["original_height"]) == (80, 60)
    ids = [each["id"] for each in task["result"]]
    assert len(set(ids)) == len(ids)


def test_an_upright_picture_is_measured_upright(client) -> None:
    turned = "data:image/jpeg;base64," + base64.b64encode(pictures.jpeg(orientation=6)).decode()
    (task,) = results(predict(client, [{"image": turned}]))
    (brush,) = of_type(task["result"], "brushlabels")
    assert (brush["original_width"], brush["original_height"]) == (60, 80)


def test_only_what_the_config_has_is_emitted(client) -> None:
    config = """<View><Image name="i" value="$image"/>
      <Choices name="k" toName="i"><Choice value="unheard of"/></Choices>
      <RectangleLabels name="b" toName="i"><Label value="a"/><Label value="b"/></RectangleLabels>
      <KeyPointLabels name="p" toName="i"><Label value="Peak"/></KeyPointLabels></View>"""
    (task,) = results(predict(client, config=config))
    assert [(each["from_name"], each["to_name"]) for each in task["result"]] == [("p", "i")]


def test_a_project_with_choices_alone_gets_the_class(client) -> None:
    config = (
        '<View><Image name="i" value="$image"/><Choices name="k" toName="i">%s</Choices></View>'
    )
    best = explained(client)["label"]
    mapped = config % f'<Choice value="thing" predicted_values="{best}"/><Choice value="other"/>'
    (task,) = results(predict(client, config=mapped))
    (only,) = task["result"]
    assert only["value"] == {"choices": ["thing"]}
    unsure = mapped.replace('name="k"', 'name="k" model_score_threshold="0.9999"')
    assert results(predict(client, config=unsure)) == [[]]


def test_labels_map_classes_to_the_projects_names(client) -> None:
    config = """<View><Image name="i" value="$image"/><BrushLabels name="c" toName="i">
      <Label value="kitten"/><Label value="puppy"/></BrushLabels></View>"""
    best = explained(client)["label"]
    assert setup(client, {"labels": {best: "puppy"}}, config, "4.1").status_code == 200
    (task,) = results(predict(client, config=config, project="4.1"))
    assert task["result"][0]["value"]["brushlabels"] == ["puppy"]


def test_several_images_of_a_task_are_each_explained(client) -> None:
    config = """<View><Image name="l" value="$a"/><Image name="r" value="$b"/>
      <BrushLabels name="lc" toName="l"><Label value="cam"/></BrushLabels>
      <BrushLabels name="rc" toName="r"><Label value="cam"/></BrushLabels></View>"""
    task = {"a": data_uri(PICTURE), "b": data_uri(pictures.png(40, 30, seed=1))}
    (found,) = results(predict(client, [task], config))
    sizes = {each["to_name"]: each["original_width"] for each in found["result"]}
    assert sizes == {"l": 80, "r": 40}


# ---- many, and some that fail


def test_a_task_that_fails_is_empty_and_the_others_are_kept(client) -> None:
    broken = [
        {"image": data_uri(b"no picture")},
        {"image": "data:image/png;base64,%%%"},
        {"text": "no picture at all"},
        {"image": "/data/upload/1/x.png"},  # no Label Studio is named
        {"image": "http://169.254.169.254/"},
        {"image": ["a", "list"]},
    ]
    found = results(predict(client, [TASK, *broken, TASK]))
    assert [bool(each) for each in found] == [True, *[False] * len(broken), True]
    assert found[1:-1] == [[]] * len(broken)


@pytest.mark.parametrize(
    "config",
    ["<View/>", '<View><Image name="i" value="$image"/><TextArea name="t" toName="i"/></View>'],
)
def test_a_project_without_room_for_evidence_stores_nothing(client, config: str) -> None:
    """An empty prediction would be stored, and this version not be asked for again."""
    assert results(predict(client, [TASK, TASK], config)) == [[], []]


@pytest.mark.timeout(60)
def test_two_hundred_tasks_go_through_a_window_of_half_the_queue(serve) -> None:
    with serve(max_queue=8, workers=2) as client:
        admission = client.app.state.service.admission
        held: list[int] = []
        take = admission.take

        def note(*args: Any, **kwargs: Any) -> None:
            take(*args, **kwargs)
            held.append(admission.images)

        admission.take = note
        found = results(predict(client, [TASK] * 200))
        assert all(found)
        assert len(found) == 200
        assert max(held) == 4
        assert admission.images == 0


@pytest.mark.parametrize("queue", [1, 2, 3])
def test_the_smallest_queue_is_enough(serve, queue: int) -> None:
    with serve(max_queue=queue) as client:
        assert all(results(predict(client, [TASK] * 5)))


def test_where_others_fill_the_queue_it_waits_and_is_not_refused(serve) -> None:
    with serve(max_queue=2) as client, ThreadPoolExecutor(1) as asking:
        admission = client.app.state.service.admission
        refused, take = threading.Event(), admission.take

        def note(*args: Any, **kwargs: Any) -> None:
            try:
                take(*args, **kwargs)
            except QueueFull:
                refused.set()
                raise

        with admission.admit(), admission.admit():
            admission.take = note
            answer = asking.submit(predict, client, [TASK] * 3)
            assert refused.wait(10)
        assert all(results(answer.result(10)))


@pytest.mark.timeout(60)
def test_what_time_does_not_reach_is_empty(serve) -> None:
    """One task at a time; the second one hangs, and the first one is kept."""
    tiny.RELEASED.clear()
    with serve(models=("tiny:hangs",), max_queue=2, request_timeout=4) as client:
        try:
            stuck = {"image": data_uri(pictures.RED_PNG)}
            found = results(predict(client, [TASK, stuck, TASK]))
            assert tiny.HANGING.is_set()
        finally:
            tiny.RELEASED.set()
    assert found[0]
    assert found[1:] == [[], []]


# ---- clicks


def clicked(label: str, kind: str = "keypointlabels", name: str = "peak") -> dict[str, Any]:
    return {
        "id": "HkO-",
        "from_name": name,
        "to_name": "image",
        "type": kind,
        "is_positive": True,
        "value": {"x": 30.1, "y": 69.9, "width": 0.49, "labels": [label], kind: [label]},
    }


@pytest.mark.parametrize(
    ("click", "target"),
    [
        (clicked("class 5"), "5"),
        (clicked("peak"), None),
        (clicked("class 5", "choices", "kind"), "5"),
        (clicked("class 5", name="unknown"), None),
        ({"from_name": "peak", "type": "keypointlabels"}, None),
        ({"from_name": "peak", "type": "keypointlabels", "value": 3}, None),
    ],
)
def test_a_click_asks_for_the_evidence_of_its_class(client, click, target) -> None:
    (found,) = results(predict(client, clicked=click))
    query = "include=regions" if target is None else f"include=regions&targets={target}"
    evidence = explained(client, query)
    assert found["score"] == pytest.approx(evidence["score"])
    (peak,) = of_type(found["result"], "keypointlabels")
    x, y = peak["value"]["x"] * 0.8, peak["value"]["y"] * 0.6
    assert [x, y] == pytest.approx(evidence["regions"]["peak"])


@pytest.mark.parametrize("click", [clicked("class 5"), clicked("class 5", "choices", "kind")])
def test_a_click_leaves_the_annotators_choice_alone(client, click) -> None:
    (found,) = results(predict(client, clicked=click))
    assert of_type(found["result"], "choices") == []


def test_two_clicks_give_marks_of_their_own(client) -> None:
    """The page keeps the first ones beside the second ones."""
    ids = [
        {each["id"] for each in results(predict(client, clicked=clicked("class 5")))[0]["result"]}
        for _ in range(2)
    ]
    assert ids[0].isdisjoint(ids[1])


def test_a_click_that_fails_is_an_error_for_the_page(client) -> None:
    answer = predict(client, [{"image": data_uri(b"no picture")}], clicked=clicked("class 5"))
    assert answer.status_code == 415
    assert answer.json()["code"] == "unsupported_image"


def test_a_click_where_nothing_fits_gives_no_marks(client) -> None:
    (found,) = results(predict(client, config="<View/>", clicked=clicked("class 5")))
    assert found["result"] == []


# ---- keys


@pytest.fixture
def guarded(serve, tmp_path: Path) -> Iterator[TestClient]:
    keys = tmp_path / "keys"
    keys.write_text(
        "labeling:" + "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
    )
    with serve(api_keys_file=keys) as client:  # the hash of "secret"
        yield client


def test_the_key_is_the_password_of_basic(guarded) -> None:
    wrong, right = ("label-studio", "wrong"), ("label-studio", "secret")
    for auth, status in ((None, 401), (wrong, 401), (right, 200)):
        assert guarded.get(f"{BASE}/health", auth=auth).status_code == status
        asked = guarded.post(f"{BASE}/setup", json={"schema": CONFIG}, auth=auth)
        assert asked.status_code == status


def test_the_webhook_needs_no_key_and_does_nothing(guarded) -> None:
    answer = guarded.post(f"{BASE}/webhook", json={"action": "START_TRAINING"})
    assert answer.status_code == 200


# ---- bodies that are none


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 422),
        (b'{"tasks": []}', 422),
        (b'{"tasks": [{"data": 3}], "label_config": "<View/>"}', 422),
        (b'{"tasks": [], "label_config": "<View"}', 422),
    ],
)
def test_what_is_no_request_for_predictions_is_refused(client, body: bytes, status: int) -> None:
    assert client.post(f"{BASE}/predict", content=body).status_code == status


def test_no_tasks_have_no_results(client) -> None:
    assert results(predict(client, [])) == []


# ---- bounds


def test_extra_parameters_have_a_bound_and_are_kept_as_json(client) -> None:
    extra = {"labels": {f"class {n}": "x" * 100 for n in range(1000)}}
    answer = setup(client, extra, project="9.1")
    assert answer.status_code == 422
    assert "65536" in answer.json()["detail"]
    assert client.app.state.label_studio.extra_of("9.1") is None
    assert setup(client, {"method": "layercam"}, project="9.1").status_code == 200
    assert client.app.state.label_studio.extra_of("9.1") == b'{"method":"layercam"}'
    deep: Any = {}
    for _ in range(300):
        deep = {"labels": deep}
    assert setup(client, deep, project="9.1").status_code == 422


def test_a_name_of_a_project_and_a_config_have_a_longest(client) -> None:
    assert setup(client, project="9" * 201).status_code == 422
    body = {"tasks": [], "label_config": "<a>" * 500_000, "project": "1.1"}
    answer = client.post("/integrations/label-studio/predict", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_option")


def test_of_thousands_of_tasks_that_fail_a_hundred_are_logged(client) -> None:
    """And between two of them others have their turn on the event loop."""
    with capture_logs() as logs:
        answers = results(predict(client, [{}] * 3000))
    assert answers == [[]] * 3000
    failed = [each for each in logs if each["event"] == "label_studio_task_failed"]
    assert len(failed) == 100
    assert failed[-1]["more"] == "not logged"


@pytest.mark.parametrize("choice", ["probability", "margin", "entropy"])
def test_the_score_of_a_prediction_is_the_chosen_one_and_that_of_regions_the_class(
    serve, choice: str
) -> None:
    with serve(label_studio_score=choice) as client:
        (found,) = results(predict(client))
        answer = client.post("/predict?top_k=7", files={"image": PICTURE}).json()["results"][0]
        scores = [each["score"] for each in answer["predictions"]]
        entropy = -sum(score * math.log(score) for score in scores) / math.log(len(scores))
        assert sum(scores) == pytest.approx(1, abs=1e-5), "of all classes"
        expected = {
            "probability": scores[0],
            "margin": scores[0] - scores[1],
            "entropy": 1 - entropy,
        }
        assert found["score"] == pytest.approx(expected[choice], abs=1e-5)
        assert all(each["score"] == pytest.approx(scores[0]) for each in found["result"])
