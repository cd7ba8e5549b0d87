"""`verify` over HTTP: the figures are a private copy's, for every method, and repeat exactly."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from starlette.testclient import TestClient

from api_schemas.methods import METHODS
from service.cam.verdict import RUNS, Evidence, contrasts, design, hidden, judge
from service.images.decode import decode, fit_to_model
from service.models.catalog import parse_model
from service.models.loading import load_model

PNG = {"content-type": "image/png"}
IMAGE = pictures.png(300, 180, seed=3)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def builtin(serve: Any) -> Iterator[TestClient]:
    with serve(models=("builtin",), workers=2, compile=True) as client:
        yield client


def ask(client: TestClient, data: bytes = IMAGE, **options: Any) -> Any:
    response = client.post("/explain", content=data, headers=PNG, params=options)
    assert response.status_code == 200, response.text
    return response.json()["results"][0]["explanations"]


def without_evidence(explanation: Any) -> Any:
    return {key: value for key, value in explanation.items() if key != "verify"}


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_the_figures_are_those_of_plain_torch_on_a_private_copy(
    builtin: TestClient, fit: Any
) -> None:
    (explanation,) = ask(builtin, verify="true", include="grid", fit=fit)
    model = load_model(parse_model("builtin"))
    source = decode(IMAGE, max_pixels=10**7)
    shown = fit_to_model(source, model.preprocessing, fit)
    plan = design((shown.pixels.shape[1], shown.pixels.shape[2]), shown.geometry.content)
    with torch.no_grad():
        net = model.replicate()
        own = net(model.normalised(shown.pixels[None]))
        others = net(model.normalised(hidden(shown.pixels, plan, slice(0, RUNS))))
    evidence = Evidence(plan, own - others, contrasts(shown.pixels, plan))
    grid = np.frombuffer(base64.b64decode(explanation["grid"]["data"]), "<f4")
    expected = judge(
        evidence,
        torch.tensor(grid.reshape(explanation["grid"]["shape"])),
        explanation["class_id"],
    )
    found = explanation["verify"]
    assert found["verdict"] == expected.verdict
    assert found["reason"] == expected.reason
    assert found["agreement"] == pytest.approx(expected.agreement, abs=2e-3)
    assert tuple(found["agreement_by_fill"].values()) == pytest.approx(
        expected.agreement_by_fill, abs=2e-3
    )
    assert found["p_place"] == pytest.approx(expected.p_place, abs=5e-3)
    assert found["baselines"]["contrast"] == pytest.approx(expected.contrast, abs=2e-3)
    assert (found["forwards"], found["design"]) == (40, "pb40/0")
    assert "p_class" not in found, "five classes are too few"


@pytest.mark.parametrize(
    "method", [name for name in METHODS if "attention" not in METHODS[name].needs]
)
def test_every_method_gets_a_verdict_and_the_same_map_and_pays_forty_passes(
    builtin: TestClient, method: str
) -> None:
    options = {"method": method, "include": "grid", "samples": 40, "steps": 8}
    (plain,) = ask(builtin, **options)
    (verified,) = ask(builtin, verify="true", **options)
    assert verified["grid"] == plain["grid"]
    assert verified["verify"]["verdict"] in {"supported", "inconclusive", "refuted"}
    assert verified["cost"]["forwards"] == pytest.approx(plain["cost"]["forwards"] + 40)
    assert "verify" not in plain


def test_a_request_repeats_exactly_and_targets_do_not_change_each_other(
    builtin: TestClient,
) -> None:
    alone = [ask(builtin, verify="true", targets=target)[0]["verify"] for target in (0, 3)]
    together = ask(builtin, verify="true", targets=[0, 3])
    again = ask(builtin, verify="true", targets=[0, 3])
    assert together == again
    for one, other in zip(alone, together, strict=True):
        assert one["agreement"] == pytest.approx(other["verify"]["agreement"], abs=1e-4)


def test_an_earlier_layer_is_suggested_and_tried_where_the_verdict_is_inconclusive(
    builtin: TestClient,
) -> None:
    tried = 0
    for seed in range(6):
        image = pictures.png(200, 200, seed=seed)
        (plain,) = ask(builtin, image, verify="true")
        (searched,) = ask(builtin, image, verify="search")
        if plain["verify"]["verdict"] != "inconclusive":
            assert searched == plain
            continue
        tried += 1
        assert "tried" not in plain["verify"]
        steps = searched["verify"]["tried"]
        assert steps[0]["layer"] == plain["verify"]["try_layer"]
        supported = [one["layer"] for one in steps if one["verdict"] == "supported"]
        assert searched["layer"] == (supported[0] if supported else plain["layer"])
        (direct,) = ask(builtin, image, verify="true", layer=steps[0]["layer"])
        if steps[0]["verdict"] != direct["verify"]["verdict"]:  # each look needs a smaller one
            p_values = (direct["verify"]["p_place"], direct["verify"]["p_centred"])
            assert 0.05 / 3 < max(p_values) <= 0.05
            assert steps[0]["verdict"] == "inconclusive"
        assert steps[0]["agreement"] == pytest.approx(direct["verify"]["agreement"], abs=1e-4)
        assert searched["cost"]["forwards"] > plain["cost"]["forwards"]
    assert tried, "noise has no evidence to point at"


def test_a_hidden_part_gets_a_verdict_of_its_own(builtin: TestClient) -> None:
    mask = '{"boxes": [[0, 0, 150, 180]]}'
    response = builtin.post(
        "/explain", content=IMAGE, headers=PNG, params={"verify": "true", "mask": mask}
    )
    (result,) = response.json()["results"]
    (masked,) = result["masked"]["explanations"]
    assert masked["verify"]["agreement"] != result["explanations"][0]["verify"]["agreement"]


def test_json_takes_true_and_a_wrong_word_is_named(builtin: TestClient) -> None:
    encoded = base64.b64encode(IMAGE).decode()
    body = {"images": [{"data": encoded}], "verify": True, "include": ["none"]}
    answer = builtin.post("/explain", json=body)
    assert answer.json()["results"][0]["explanations"][0]["verify"]["forwards"] == 40
    wrong = builtin.post("/explain", content=IMAGE, headers=PNG, params={"verify": "maybe"})
    assert wrong.status_code == 422
    assert all(word in wrong.json()["detail"] for word in ("verify", "true", "search"))


def test_the_price_of_a_verdict_counts_against_the_bound(serve: Any) -> None:
    with serve(max_cost=30) as client:
        refused = client.post("/explain", content=IMAGE, headers=PNG, params={"verify": "true"})
        assert refused.status_code == 422
        assert "forward passes" in refused.json()["detail"]


def test_a_model_without_a_compiled_lane_is_verified_in_the_hooked_one(serve: Any) -> None:
    with serve(compile=False) as client:
        (explanation,) = ask(client, verify="true")
        assert explanation["verify"]["forwards"] == 40


def counted(client: TestClient) -> dict[tuple[str, str, str], float]:
    """The samples of `camserve_verdicts_total`, by model, method and verdict."""
    registry = client.app.state.service.metrics.registry  # type: ignore[attr-defined]
    return {
        (each.labels["model"], each.labels["method"], each.labels["verdict"]): each.value
        for family in registry.collect()
        for each in family.samples
        if each.name == "camserve_verdicts_total"
    }


def test_each_explanation_that_was_tested_is_counted_once_wherever_it_is_answered(
    serve: Any,
) -> None:
    image = base64.b64encode(IMAGE).decode()
    labeling = {
        "tasks": [{"id": 1, "data": {"i": f"data:image/png;base64,{image}"}}],
        "project": "1.1",
        "label_config": '<View><Image name="i" value="$i"/><BrushLabels name="b" toName="i">'
        '<Label value="cam"/></BrushLabels></View>',
        "params": {},
    }
    studio = "/integrations/label-studio"
    setup = {"project": "1.1", "schema": "<View/>", "extra_params": {"verify": True}}
    remote = {"model": "small", "image": image, "params": {"current_task": "cam_verified"}}
    with serve(models=("tiny:small",)) as client:
        ask(client)
        assert counted(client) == {}
        found = ask(client, verify="true", explain_top=2)
        found += ask(client, verify="search", method="layercam")
        expected = Counter(("small", each["method"], each["verify"]["verdict"]) for each in found)
        assert counted(client) == expected
        verdict = ask(client, verify="true")[0]["verify"]["verdict"]
        client.post(
            "/v1/models/small:explain", json={"instances": [image], "parameters": {"verify": True}}
        )
        client.post(f"{studio}/setup", json=setup)
        client.post(f"{studio}/predict", json=labeling)
        client.post("/integrations/x-anylabeling/v1/predict", json=remote)
        expected["small", "gradcam", verdict] += 4
        assert counted(client) == expected
        assert "camserve_verdicts_total{" in client.get("/metrics").text


@pytest.mark.parametrize(("width", "height"), [(2000, 4), (4, 2000), (1, 1), (500, 20)])
def test_an_image_that_fills_little_of_the_padded_input_is_answered(
    builtin: TestClient, width: int, height: int
) -> None:
    (explanation,) = ask(builtin, pictures.png(width, height), verify="true", fit="pad")
    assert explanation["verify"]["verdict"] in {"supported", "inconclusive", "refuted"}


def test_an_answer_that_is_an_image_refuses_a_verdict_before_it_is_paid_for(
    builtin: TestClient,
) -> None:
    headers = {**PNG, "accept": "image/png"}
    refused = builtin.post("/explain", content=IMAGE, headers=headers, params={"verify": "true"})
    assert refused.status_code == 406
    assert "leave out `verify`" in refused.json()["detail"]
    plain = builtin.post("/explain", content=IMAGE, headers=headers)
    assert plain.headers["content-type"] == "image/png"
