"""`POST /experiments`: every edit against plain torch on a private copy, controls, and refusals."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from api_schemas.answers import ExperimentAnswer
from api_schemas.client import AsyncClient, Client
from api_schemas.options import EDITS
from service.cam.regions import find_regions
from service.images.decode import Source, decode, fit_to_model
from service.images.masks import filling
from service.images.run_lengths import rle_decode, rle_encode
from service.models.catalog import parse_model
from service.models.loaded import LoadedModel
from service.models.loading import load_model

pytestmark = pytest.mark.timeout(60)

IMAGE, OTHER = pictures.png(300, 180, seed=3), pictures.png(200, 220, seed=4)
BOX = (130, 50, 40, 30)
REGION = {"boxes": [BOX]}
PNG = {"content-type": "image/png"}

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def builtin(serve: Any) -> Iterator[TestClient]:
    with serve(models=("builtin",), workers=2) as client:
        yield client


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(parse_model("builtin"))


def sent(*images: bytes) -> list[dict[str, str]]:
    return [{"data": base64.b64encode(image).decode()} for image in images]


def ask(client: TestClient, edits: Any, *images: bytes, **options: Any) -> Any:
    """The results of the images, IMAGE alone by default."""
    body = {"images": sent(*(images or (IMAGE,))), "edits": edits, **options}
    response = client.post("/experiments", json=body)
    assert response.status_code == 200, response.text
    return response.json()["results"]


def source_of(data: bytes) -> Source:
    return decode(data, max_pixels=10**7)


def logits_of(model: LoadedModel, pixels: Pixels, fit: Any = None) -> torch.Tensor:
    """By a private copy, of a source's pixels."""
    shown = fit_to_model(Source(np.ascontiguousarray(pixels), "PNG", ""), model.preprocessing, fit)
    with torch.no_grad():
        return model.replicate()(model.normalised(shown.pixels[None]))[0]


def in_box(pixels: Pixels, inside: Pixels, box: tuple[int, ...] = BOX) -> Pixels:
    """`pixels` with the box from `inside`."""
    x, y, w, h = box
    made = pixels.copy()
    made[y : y + h, x : x + w] = inside[y : y + h, x : x + w]
    return made


def filled(pixels: Pixels) -> Pixels:
    return np.full_like(pixels, np.rint(pixels.mean(axis=(0, 1))))


def stretched(pixels: Pixels) -> Pixels:
    """The other image at IMAGE's size, which is neither smaller nor larger on both sides."""
    return cv2.resize(pixels, (300, 180), interpolation=cv2.INTER_LINEAR)


def pasted(own: Pixels, other: Pixels) -> Pixels:
    made = own.copy()
    made[60:90, 140:180] = other[20:50, 10:50]
    return made


def shifted(own: Pixels, _other: Pixels) -> Pixels:
    made = filling(own, "grey").copy()
    made[7:, :-20] = own[:-7, 20:]
    return made


def reduced(own: Pixels, _other: Pixels) -> Pixels:
    made = filled(own)
    made[45:135, 75:225] = cv2.resize(own, (150, 90), interpolation=cv2.INTER_AREA)
    return made


def enlarged(own: Pixels, _other: Pixels) -> Pixels:
    return cv2.resize(own[45:135, 75:225], (300, 180), interpolation=cv2.INTER_LINEAR)


def in_grey(own: Pixels) -> Pixels:
    return np.array(Image.fromarray(own).convert("L").convert("RGB"))


def turned(own: Pixels) -> Pixels:
    """Hues turned by 120 degrees: red becomes green, green blue, blue red."""
    return own[:, :, [2, 0, 1]]


Oracle = Callable[[Pixels, Pixels], Pixels]
ORACLES: dict[str, tuple[dict[str, Any], Oracle]] = {
    "hide": ({"region": REGION}, lambda own, _: in_box(own, filled(own))),
    "hide, blurred": (
        {"edit": "hide", "region": REGION, "fill": "blur"},
        lambda own, _: in_box(own, filling(own, "blur")),
    ),
    "hide, by another image": (
        {"edit": "hide", "region": REGION, "fill": {"image": 1}},
        lambda own, other: in_box(own, stretched(other)),
    ),
    "keep": (
        {"region": REGION, "fill": "grey"},
        lambda own, _: in_box(np.full_like(own, 128), own),
    ),
    "background": (
        {"region": REGION, "image": 1},
        lambda own, other: in_box(stretched(other), own),
    ),
    "paste": ({"image": 1, "region": {"boxes": [[10, 20, 40, 30]]}, "at": [140, 60]}, pasted),
    "recolour": ({"to": "grey"}, lambda own, _: in_grey(own)),
    "recolour, swapped in a region": (
        {"edit": "recolour", "to": "bgr", "region": REGION},
        lambda own, _: in_box(own, own[:, :, ::-1]),
    ),
    "recolour, hues turned": (
        {"edit": "recolour", "to": {"hue": 120}},
        lambda own, _: turned(own),
    ),
    "shift": ({"x": -20, "y": 7, "fill": "grey"}, shifted),
    "flip": ({}, lambda own, _: own[:, ::-1]),
    "flip, vertically": ({"edit": "flip", "axis": "vertical"}, lambda own, _: own[::-1]),
    "scale": ({"factor": 0.5}, reduced),
    "scale, up": ({"edit": "scale", "factor": 2}, enlarged),
}


def named(name: str) -> dict[str, Any]:
    return {"name": name, "edit": name, **ORACLES[name][0]}


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_every_edit_is_that_of_plain_torch_on_a_private_copy(
    builtin: TestClient, model: LoadedModel, fit: str
) -> None:
    edits = [named(name) for name in ORACLES]
    result, _ = ask(builtin, edits, IMAGE, OTHER, targets=[0, 3], fit=fit)
    own, other = source_of(IMAGE).pixels, source_of(OTHER).pixels
    before = logits_of(model, own, fit)
    assert [each["name"] for each in result["edits"]] == list(ORACLES)
    for (name, (_, oracle)), found in zip(ORACLES.items(), result["edits"], strict=True):
        after = logits_of(model, oracle(own, other), fit)
        for change in found["changes"]:
            one = change["class_id"]
            moved = float(after[one] - before[one])
            assert change["logit_change"] == pytest.approx(moved, abs=1e-5), name
            assert change["logit"] == pytest.approx(float(after[one]), abs=1e-5), name
            scores = after.softmax(0)[one] - before.softmax(0)[one]
            assert change["score_change"] == pytest.approx(float(scores), abs=1e-5), name
        best = [each["class_id"] for each in found["predictions"]]
        assert best == after.topk(len(best)).indices.tolist(), name


NULL = {
    "hide nothing": {"edit": "hide", "region": {"boxes": []}},
    "hide by itself": {"edit": "hide", "region": REGION, "fill": {"image": 0}},
    "keep all": {"edit": "keep", "region": {"boxes": [[0, 0, 300, 180]]}},
    "its own background": {"edit": "background", "region": REGION, "image": 0},
    "pasted onto itself": {"edit": "paste", "image": 0, "region": REGION, "at": [130, 50]},
    "the same order": {"edit": "recolour", "to": "rgb"},
    "turned by 360 degrees": {"edit": "recolour", "to": {"hue": 360}},
    "shifted by 0": {"edit": "shift"},
    "scaled by 1": {"edit": "scale", "factor": 1},
}


@pytest.mark.parametrize("compiled", [False, True])
def test_an_edit_that_changes_nothing_changes_exactly_nothing(serve: Any, compiled: bool) -> None:
    edits = [{"name": name, **edit} for name, edit in NULL.items()]
    with serve(models=("builtin",), compile=compiled) as client:
        (result,) = ask(client, edits, targets=[0, 1, 2])
    for edit in result["edits"]:
        assert edit["predictions"] == result["predictions"], edit["name"]
        for change in edit["changes"]:
            assert change["logit_change"] == change["score_change"] == 0.0, edit["name"]


def test_in_the_compiled_lane_the_changes_are_the_same_within_its_tolerance(
    serve: Any, builtin: TestClient
) -> None:
    edits = [named(name) for name in ORACLES]
    plain = ask(builtin, edits, IMAGE, OTHER)
    with serve(models=("builtin",), compile=True) as client:
        lanes = client.get("/models/builtin").json()["lanes"]
        assert "compiled" in str(lanes)
        compiled = ask(client, edits, IMAGE, OTHER)
    for one, other in zip(plain, compiled, strict=True):
        for left, right in zip(one["edits"], other["edits"], strict=True):
            change = left["changes"][0]["logit_change"]
            assert right["changes"][0]["logit_change"] == pytest.approx(change, abs=2e-3)


def test_controls_are_the_same_edit_at_other_places_that_the_model_sees(
    builtin: TestClient, model: LoadedModel
) -> None:
    own = source_of(IMAGE).pixels
    x, _, w, _ = fit_to_model(source_of(IMAGE), model.preprocessing, None).geometry.seen
    left, width = round(x), round(x + w) - round(x)
    edits = [{"name": "a", "edit": "hide", "region": {"boxes": [[left, 10, width, 70]]}}]
    (result,) = ask(builtin, edits, targets=[1], controls=64)
    (change,), control = (result["edits"][0][key] for key in ("changes", "control"))
    before = logits_of(model, own)[1]
    every = [  # as wide as what is seen, the region can only lie further down
        float(logits_of(model, in_box(own, filled(own), (left, top, width, 70)))[1] - before)
        for top in range(111)
        if top != 10
    ]
    assert control == change["control"]
    assert control["n"] == 64
    places = control["logit_changes"]
    for place in places:
        assert min(abs(place - each) for each in every) < 1e-5
    assert len(places) == 64
    assert (control["low"], control["high"]) == (min(places), max(places))
    assert control["mean"] == pytest.approx(np.mean(places), abs=1e-5)
    assert min(every) - 1e-5 <= control["low"] < control["mean"] < control["high"]
    smaller = sum(abs(each) < abs(change["logit_change"]) for each in every)
    assert smaller - (len(every) - 64) <= control["smaller"] <= smaller


def test_a_region_that_has_no_place_beside_itself_is_moved_around_the_edges(
    builtin: TestClient,
) -> None:
    edits = [{"name": "most", "edit": "hide", "region": {"boxes": [[70, 5, 150, 160]]}}]
    (result,) = ask(builtin, edits)
    control = result["edits"][0]["control"]
    assert control["n"] == 8
    assert control["low"] < control["high"]


def test_a_request_repeats_exactly_and_the_seed_chooses_the_places(builtin: TestClient) -> None:
    edits = [named("hide")]
    first, again, other = (ask(builtin, edits, seed=seed) for seed in (0, 0, 1))
    assert first == again
    changes = [each[0]["edits"][0]["changes"][0]["logit_change"] for each in (first, other)]
    assert changes[0] == changes[1]
    assert first[0]["edits"][0]["control"] != other[0]["edits"][0]["control"]


def test_edits_do_not_change_each_other(builtin: TestClient) -> None:
    names = ["hide", "flip", "recolour"]
    (together,) = ask(builtin, [named(name) for name in names])
    for name, found in zip(names, together["edits"], strict=True):
        (alone,) = ask(builtin, [named(name)])
        one, other = (each["changes"][0]["logit_change"] for each in (alone["edits"][0], found))
        assert one == pytest.approx(other, abs=1e-5)


def test_the_control_of_an_edit_without_effect_covers_zero(serve: Any) -> None:
    """Class 0 depends on one corner, which the edited part does not touch."""
    covered = 0
    with serve(models=("tiny:corner",), workers=2) as client:
        for seed in range(200):
            box = [20 + seed % 7 * 20, 30 + seed % 5 * 25, 40, 40]
            image = pictures.png(224, 224, seed=seed)
            edits = [{"name": "away", "edit": "hide", "region": {"boxes": [box]}, "fill": "grey"}]
            (result,) = ask(client, edits, image, targets=["0"], seed=seed, fit="squash")
            (edit,) = result["edits"]
            assert edit["changes"][0]["logit_change"] == pytest.approx(0, abs=1e-6)
            covered += edit["control"]["low"] <= 1e-6 and edit["control"]["high"] >= -1e-6
    assert covered >= 190


def test_hiding_what_the_class_depends_on_changes_more_than_its_controls(serve: Any) -> None:
    edits = [{"name": "cue", "edit": "hide", "region": {"boxes": [[0, 0, 12, 12]]}, "fill": "grey"}]
    white = np.full((224, 224, 3), 250, np.uint8)
    with serve(models=("tiny:corner",)) as client:
        (result,) = ask(
            client,
            edits,
            pictures.file(white),
            targets=["0"],
            fit="squash",
            controls=32,
        )
    (edit,) = result["edits"]
    assert edit["changes"][0]["logit_change"] < -1
    assert edit["control"]["smaller"] >= 31


def test_mask_of_explain_and_the_edits_hide_and_keep_are_one_thing(builtin: TestClient) -> None:
    edits = [named("hide"), {"name": "rest", "edit": "keep", "region": REGION, "fill": "blur"}]
    (result,) = ask(builtin, edits)
    for edit, mask in zip(
        result["edits"],
        [{"boxes": [BOX]}, {"boxes": [BOX], "hide": "rest", "fill": "blur"}],
        strict=True,
    ):
        options = {"mask": json.dumps(mask), "include": "none"}
        answer = builtin.post("/explain", content=IMAGE, headers=PNG, params=options).json()
        change = answer["results"][0]["masked"]["changes"][0]
        for key in ("class_id", "logit", "logit_change", "score_change"):
            assert edit["changes"][0][key] == pytest.approx(change[key], abs=1e-5)


def test_run_lengths_and_boxes_mean_the_same(builtin: TestClient) -> None:
    mask = np.zeros((180, 300), bool)
    x, y, w, h = BOX
    mask[y : y + h, x : x + w] = True
    rle = rle_encode(mask)
    form = {"rle": {"size": rle.size, "counts": rle.counts}}
    edits = [named("hide"), {"name": "rle", "edit": "hide", "region": form}]
    (result,) = ask(builtin, edits)
    boxes, runs = result["edits"]
    assert boxes["changes"] == runs["changes"]


def test_a_region_is_what_a_map_marks(builtin: TestClient, model: LoadedModel) -> None:
    options = {"targets": "1", "method": "occlusion", "include": ["grid", "regions"]}
    answer = builtin.post(
        "/explain", content=IMAGE, headers=PNG, params={**options, "threshold": 0.6}
    ).json()["results"][0]["explanations"][0]
    grid = np.frombuffer(base64.b64decode(answer["grid"]["data"]), "<f4")
    shown = fit_to_model(source_of(IMAGE), model.preprocessing, None)
    regions = find_regions(grid.reshape(answer["grid"]["shape"]), shown.geometry, 0.6)
    own = source_of(IMAGE).pixels
    marked = rle_decode(regions.rle.size, regions.rle.counts)
    assert marked.any()
    hidden = np.where(marked[:, :, None], filled(own), own)
    expected = logits_of(model, hidden)[1] - logits_of(model, own)[1]
    region = {"of": 1, "threshold": 0.6, "method": "occlusion"}
    edits = [
        {"name": "map", "edit": "hide", "region": region},
        {"name": "rle", "edit": "hide", "region": {"rle": answer["regions"]["rle"]}},
    ]
    (result,) = ask(builtin, edits, targets=[1])
    for edit in result["edits"]:
        change = edit["changes"][0]["logit_change"]
        assert change == pytest.approx(float(expected), abs=1e-5)
        assert edit["control"]["n"] == 8


def test_a_region_of_another_image_is_pasted_by_the_map_of_that_image(builtin: TestClient) -> None:
    region = {"of": 1, "method": "occlusion"}
    params = {"targets": "1", "method": "occlusion", "include": "regions"}
    answer = builtin.post("/explain", content=OTHER, headers=PNG, params=params).json()
    rle = answer["results"][0]["explanations"][0]["regions"]["rle"]
    edits = [
        {"name": "map", "edit": "paste", "image": 1, "region": region, "at": [120, 40]},
        {"name": "rle", "edit": "paste", "image": 1, "region": {"rle": rle}, "at": [120, 40]},
    ]
    result, _ = ask(builtin, edits, IMAGE, OTHER)
    by_map, by_rle = result["edits"]
    assert by_map["changes"] == by_rle["changes"]
    assert by_map["changes"][0]["logit_change"] != 0


def test_a_form_and_json_get_the_same_answer(builtin: TestClient) -> None:
    edits = [named("hide"), named("background")]
    files = [
        ("image", ("a.png", IMAGE, "image/png")),
        ("edits", (None, json.dumps(edits))),
        ("image", ("b.png", OTHER, "image/png")),
    ]
    response = builtin.post("/experiments", files=files, params={"top_k": 2, "seed": 5})
    assert response.status_code == 200, response.text
    by_json = ask(builtin, edits, IMAGE, OTHER, top_k=2, seed=5)
    for one, other in zip(response.json()["results"], by_json, strict=True):
        assert [each["name"] for each in one["edits"]] == ["hide", "background"]
        assert len(one["predictions"]) == 2
        for left, right in zip(one["edits"], other["edits"], strict=True):
            # Two images share a forward pass or not: the last bits differ.
            controls = [edit["control"].pop("logit_changes") for edit in (left, right)]
            assert controls[0] == pytest.approx(controls[1], abs=1e-5)
            assert left["control"] == pytest.approx(right["control"], abs=1e-5)
            change = right["changes"][0]["logit_change"]
            assert left["changes"][0]["logit_change"] == pytest.approx(change, abs=1e-5)


def test_an_image_that_fails_spoils_only_the_edits_that_take_from_it(builtin: TestClient) -> None:
    edits = [named("hide"), named("background")]
    good, bad = ask(builtin, edits, IMAGE, b"no image")
    assert bad["error"]["code"] == "unsupported_image"
    hide, background = good["edits"]
    assert hide["changes"][0]["logit_change"] != 0
    assert background["error"]["status"] == 422
    assert "image 1" in background["error"]["detail"]
    alone = builtin.post("/experiments", json={"images": sent(b"no image"), "edits": edits[:1]})
    assert alone.status_code == 415


def test_the_price_is_known_before_and_bounded(serve: Any, builtin: TestClient) -> None:
    edits = [named("hide"), named("flip")]
    (result,) = ask(builtin, edits, controls=5)
    assert result["forwards"] == 1 + (1 + 5) + 1
    with serve(max_cost=7) as client:
        response = client.post(
            "/experiments", json={"images": sent(IMAGE), "edits": edits, "controls": 5}
        )
        assert response.status_code == 422
        assert "8 forward passes" in response.json()["detail"]
        assert "controls" in response.json()["detail"]


def test_a_key_pays_for_an_experiment_before_it_runs(serve: Any, tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"somebody:{hashlib.sha256(b'sesame').hexdigest()} cost=5\n")
    body = {"images": sent(IMAGE), "edits": [named("hide")]}
    headers = {"authorization": "Bearer sesame"}
    with serve(api_keys_file=keys) as client:
        assert client.post("/experiments", json=body).status_code == 401
        refused = client.post("/experiments", json=body, headers=headers)
        assert refused.status_code in (422, 429), refused.text
        fine = client.post("/experiments", json={**body, "controls": 2}, headers=headers)
        assert fine.status_code == 200, fine.text


def test_the_answer_is_bounded_in_bytes(serve: Any) -> None:
    with serve(max_answer_bytes=1 << 20) as client:
        edits = [{"name": str(n), "edit": "flip"} for n in range(32)]
        body = {"images": sent(*[IMAGE] * 20), "edits": edits, "top_k": 7}
        response = client.post("/experiments", json=body)
        assert response.status_code == 422
        assert "answer" in response.json()["detail"]


HIDE = {"name": "a", "edit": "hide", "region": REGION}
BAD_EDITS: dict[str, tuple[Any, str]] = {
    "no list": ({"name": "a"}, "edits"),
    "none": ([], "edits"),
    "too many": ([{"name": str(n), "edit": "flip"} for n in range(33)], "edits"),
    "two of one name": ([HIDE, HIDE], "two edits have the name 'a'"),
    "no name": ([{"edit": "flip"}], "name"),
    "an empty name": ([{"name": "", "edit": "flip"}], "name"),
    "no kind": ([{"name": "a"}], "edit"),
    "an unknown kind": ([{"name": "a", "edit": "hyde"}], "'hide'"),
    "no region": ([{"name": "a", "edit": "hide"}], "edits.0.hide.region"),
    "two forms of a region": ([HIDE | {"region": {**REGION, "of": 1}}], "give one of `boxes`"),
    "an empty region": ([HIDE | {"region": {}}], "give one of `boxes`"),
    "a threshold of boxes": ([HIDE | {"region": {**REGION, "threshold": 0.3}}], "belong to `of`"),
    "a threshold above 1": ([HIDE | {"region": {"of": 1, "threshold": 2}}], "threshold"),
    "a box of three numbers": ([HIDE | {"region": {"boxes": [[1, 2, 3]]}}], "boxes"),
    "an unknown fill": ([HIDE | {"fill": "men"}], "Did you mean 'mean'?"),
    "a fill of another form": ([HIDE | {"fill": {"photo": 1}}], '{"image": 1}'),
    "a fill that is a number": ([HIDE | {"fill": 3}], "fill"),
    "an image that is not there": ([HIDE | {"fill": {"image": 1}}], "edits.0.hide.fill.image"),
    "a negative image": ([HIDE | {"fill": {"image": -1}}], "edits.0.hide.fill.image"),
    "paste without an image": ([HIDE | {"edit": "paste"}], "edits.0.paste.image"),
    "a foreign field": ([{"name": "a", "edit": "flip", "x": 1}], "no field 'x'"),
    "an unknown axis": ([{"name": "a", "edit": "flip", "axis": "diagonal"}], "axis"),
    "an order of other letters": ([{"name": "a", "edit": "recolour", "to": "xyz"}], "'bgr'"),
    "a hue beyond a turn": ([{"name": "a", "edit": "recolour", "to": {"hue": 400}}], "hue"),
    "a factor of 0": ([{"name": "a", "edit": "scale", "factor": 0}], "factor"),
    "a shift by half a pixel": ([{"name": "a", "edit": "shift", "x": 0.5}], "edits.0.shift.x"),
    "run lengths of another size": (
        [HIDE | {"region": {"rle": {"size": [9, 9], "counts": [81]}}}],
        "edits.0.hide.region",
    ),
    "a method without a layer": (
        [HIDE | {"region": {"of": 1, "method": "rise", "layer": "layer3"}}],
        "rise",
    ),
}


@pytest.mark.parametrize("case", BAD_EDITS)
def test_a_wrong_edit_is_refused_with_its_place_and_what_to_do(
    builtin: TestClient, case: str
) -> None:
    edits, words = BAD_EDITS[case]
    form = [("image", ("a.png", IMAGE)), ("edits", (None, json.dumps(edits)))]
    for sending in ({"json": {"images": sent(IMAGE), "edits": edits}}, {"files": form}):
        response = builtin.post("/experiments", **sending)
        assert response.status_code == 422, response.text
        assert response.json()["code"] == "invalid_option"
        assert words in response.json()["detail"], response.json()["detail"]


BAD_REQUESTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no edits": ({"edits": None}, 422, "edits"),
    "an unknown option": ({"contrls": 3}, 422, "'controls'"),
    "an option of explain": ({"colormap": "jet"}, 422, "colormap"),
    "too many controls": ({"controls": 65}, 422, "controls"),
    "a negative seed": ({"seed": -1}, 422, "seed"),
    "no predictions": ({"top_k": 0}, 422, "top_k"),
    "an unknown class": ({"targets": ["tulpe"]}, 404, "tulip"),
    "an unknown model": ({"model": "biultin"}, 404, "builtin"),
    "a region of an unknown class": (
        {"edits": [HIDE | {"region": {"of": "tulpe"}}]},
        404,
        "tulip",
    ),
    "a region at an unknown layer": (
        {"edits": [HIDE | {"region": {"of": 1, "layer": "layer33"}}]},
        404,
        "layer3",
    ),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_wrong_option_is_refused(builtin: TestClient, case: str) -> None:
    fields, status, words = BAD_REQUESTS[case]
    body = {"images": sent(IMAGE), "edits": [HIDE], **fields}
    response = builtin.post("/experiments", json=body)
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("experiments?control=3", "Did you mean 'controls'?"),
        ("experiments?explain_top=3", "'explain_top' is an option of /explain, which"),
        ("predict?seed=3", "'seed' is an option of /explain, which"),
        ("explain?controls=3", "'controls' is an option of /experiments, which"),
    ],
)
def test_a_mistyped_option_is_compared_with_those_of_its_own_route(
    builtin: TestClient, route: str, words: str
) -> None:
    response = builtin.post(f"/{route}", files={"image": IMAGE}, data={"edits": json.dumps([HIDE])})
    assert response.status_code == 422
    assert words in response.json()["detail"]


@pytest.mark.parametrize(
    ("sending", "status", "words"),
    [
        ({"content": IMAGE, "headers": PNG}, 415, "edits"),
        ({"files": [("image", ("a.png", IMAGE))]}, 422, "0 parts named 'edits'"),
        ({"files": [("edits", (None, json.dumps([HIDE])))]}, 400, "'image'"),
        (
            {"files": [("image", ("a.png", IMAGE)), *[("edits", (None, "[]"))] * 2]},
            422,
            "2 parts named 'edits'",
        ),
        ({"files": [("image", ("a.png", IMAGE)), ("edits", (None, "[{"))]}, 400, "`edits`"),
        ({"files": [("photo", ("a.png", IMAGE))]}, 422, "'photo'"),
        ({"content": b"[]", "headers": {"content-type": "application/json"}}, 400, "object"),
        ({"json": {"images": sent(IMAGE), "edits": [HIDE]}, "params": {"seed": 1}}, 422, "query"),
    ],
)
def test_a_wrong_body_is_refused(
    builtin: TestClient, sending: Any, status: int, words: str
) -> None:
    response = builtin.post("/experiments", **sending)
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]


def test_experiments_beside_other_requests_see_nothing_of_them(builtin: TestClient) -> None:
    edits = [named("hide"), named("flip")]
    images = [pictures.png(120, 100, seed=seed) for seed in range(6)]
    alone = [ask(builtin, edits, image) for image in images]

    def both(place: int) -> Any:
        builtin.post("/explain", content=images[place], headers=PNG, params={"verify": "true"})
        return ask(builtin, edits, images[place])

    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(both, range(6)))
    for one, other in zip(alone, together, strict=True):
        for left, right in zip(one[0]["edits"], other[0]["edits"], strict=True):
            assert left["predictions"][0]["class_id"] == right["predictions"][0]["class_id"]
            change = right["changes"][0]["logit_change"]
            assert left["changes"][0]["logit_change"] == pytest.approx(change, abs=1e-5)


def test_a_model_of_one_channel_is_edited_in_colour_and_sees_grey(
    serve: Any, tmp_path: Any
) -> None:
    config = tmp_path / "models.toml"
    config.write_text(
        """
        [[model]]
        name = "grey"
        builder = "own_models:many_channels"
        arguments = { channels = 1, classes = 3 }
        input = { size = 32, channels = 1 }
        """
    )
    with serve(models=(), config=config) as client:
        (result,) = ask(client, [named("hide"), {"name": "g", "edit": "recolour", "to": "grey"}])
    hide, grey = (edit["changes"][0]["logit_change"] for edit in result["edits"])
    assert hide != 0
    assert grey == 0


def test_the_client_asks_the_same_from_threads_and_from_tasks(
    run_server: Any, builtin: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    edits = [named("hide"), named("background")]
    expected = ask(builtin, edits, IMAGE, OTHER, targets=[1], controls=3)

    async def from_a_task(url: str) -> ExperimentAnswer:
        async with AsyncClient(url) as client:
            return await client.experiments([IMAGE, OTHER], edits=edits, targets=1, controls=3)

    with run_server(models=("builtin",)) as server, Client(server.url) as client:
        models = EDITS.validate_python(edits)
        answers = (
            client.experiments([IMAGE, OTHER], edits=models, targets=1, controls=3),
            asyncio.run(from_a_task(server.url)),
        )
        with pytest.raises(ValueError, match="hide"):
            client.experiments(IMAGE, edits=[{"name": "a", "edit": "hyde"}])
        with pytest.raises(TypeError, match="did you mean 'controls'"):
            client.experiments(IMAGE, edits=edits[:1], control=3)  # type: ignore[call-arg]
    for answer in answers:
        for result, wanted in zip(answer.results, expected, strict=True):
            assert result.edits is not None
            for edit, one in zip(result.edits, wanted["edits"], strict=True):
                assert edit.name == one["name"]
                assert edit.changes is not None
                change = one["changes"][0]["logit_change"]
                assert edit.changes[0].logit_change == pytest.approx(change, abs=1e-5)
                assert edit.control is not None
                assert edit.control.n == 3


# ---- edits of the model


def layer_edit(name: str, layer: str = "layer2", **fields: Any) -> dict[str, Any]:
    return {"name": name, "edit": "channels", "layer": layer, **fields}


def input_of(model: LoadedModel, data: bytes = IMAGE) -> torch.Tensor:
    pixels = fit_to_model(source_of(data), model.preprocessing, None).pixels
    return model.normalised(pixels[None])


def output_of(model: LoadedModel, layer: str, data: bytes) -> torch.Tensor:
    """What a layer returns for an image, by a plain hook on a private copy."""
    net, found = model.replicate(), []
    hook = net.get_submodule(layer).register_forward_hook(lambda *args: found.append(args[2]))
    with torch.no_grad():
        net(input_of(model, data))
    hook.remove()
    return found[0].clone()


def hooked_logits(
    model: LoadedModel, layer: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The logits with a layer's output changed, by a plain hook on a private copy."""
    net = model.replicate()
    net.get_submodule(layer).register_forward_hook(lambda _m, _a, output: change(output.clone()))
    with torch.no_grad():
        return net(input_of(model))[0]


def noisy(values: torch.Tensor, seed: int) -> torch.Tensor:
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    mean = values.mean(dim=(2, 3), keepdim=True)
    return mean + noise * values.std(dim=(2, 3), keepdim=True, correction=0)


CHANNELS = [3, 17, 18, 19]
SETTINGS: dict[str, Any] = {
    "zero": "zero",
    "mean": "mean",
    "noise": "noise",
    "scale": {"scale": -1.5},
    "another image's": {"image": 1},
}


@pytest.mark.parametrize("layer", ["stem", "layer2", "layer3", "layer2.1.conv1.0"])
def test_set_channels_are_those_of_a_plain_hook(
    builtin: TestClient, model: LoadedModel, layer: str
) -> None:
    other = output_of(model, layer, OTHER)
    own = output_of(model, layer, IMAGE)
    changed = {
        "zero": torch.zeros_like(own),
        "mean": own.mean(dim=(2, 3), keepdim=True).expand_as(own),
        "noise": noisy(own, 7),
        "scale": -1.5 * own,
        "another image's": other,
    }
    edits = [
        layer_edit(name, layer, channels=[3, "17-19"], set=setting)
        for name, setting in SETTINGS.items()
    ]
    result, _ = ask(builtin, edits, IMAGE, OTHER, targets=[0, 2], seed=7, controls=2)
    before = logits_of(model, source_of(IMAGE).pixels)
    for edit in result["edits"]:

        def change(output: torch.Tensor, name: str = edit["name"]) -> torch.Tensor:
            output[:, CHANNELS] = changed[name][:, CHANNELS]
            return output

        after = hooked_logits(model, layer, change)
        assert edit["channels"] == CHANNELS
        assert edit["control"]["n"] == 2
        for one in edit["changes"]:
            moved = float((after - before)[one["class_id"]])
            assert one["logit_change"] == pytest.approx(moved, abs=1e-5), edit["name"]
            assert one["logit_change"] != 0
        assert [p["class_id"] for p in edit["predictions"]][:1] == [int(after.argmax())]


def test_patching_all_channels_gives_the_other_image_s_answer(
    builtin: TestClient, model: LoadedModel
) -> None:
    edits = [layer_edit("all", channels=["*"], set={"image": 1})]
    result, other = ask(builtin, edits, IMAGE, OTHER)
    for patched, plain in zip(result["edits"][0]["predictions"], other["predictions"], strict=True):
        assert patched["class_id"] == plain["class_id"]
        assert patched["logit"] == pytest.approx(plain["logit"], abs=1e-4)
    assert other["edits"][0]["changes"][0]["logit_change"] == 0


def test_the_top_channels_are_those_with_the_largest_gradient_times_activation(
    builtin: TestClient, model: LoadedModel
) -> None:
    net, kept = model.replicate(), []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()

    net.get_submodule("layer2").register_forward_hook(keep)
    (gradient,) = torch.autograd.grad(net(input_of(model))[0, 3], kept)
    contribution = (gradient * kept[0].detach()).sum(dim=(0, 2, 3))
    expected = sorted(contribution.topk(6).indices.tolist())
    edits = [
        layer_edit("by class", channels={"top": 6, "of": 3}),
        layer_edit("by target", channels={"top": 6}),
        layer_edit("by number", channels=expected),
    ]
    (result,) = ask(builtin, edits, targets=[3])
    by_class, by_target, by_number = result["edits"]
    assert by_class["channels"] == by_target["channels"] == expected
    assert by_class["changes"] == by_target["changes"] == by_number["changes"]
    assert by_class["changes"][0]["logit_change"] < 0
    assert by_class["control"]["smaller"] >= 6


NULL_INSIDE = {
    "scaled by 1": {"set": {"scale": 1}},
    "from the image itself": {"set": {"image": 0}},
}


@pytest.mark.parametrize("compiled", [False, True])
def test_an_edit_of_channels_that_changes_nothing_changes_exactly_nothing(
    serve: Any, compiled: bool
) -> None:
    edits = [layer_edit(name, channels=["*"], **more) for name, more in NULL_INSIDE.items()]
    edits += [layer_edit("a few", "layer3", channels=[1, 2], set={"scale": 1})]
    with serve(models=("builtin",), compile=compiled) as client:
        (result,) = ask(client, edits)
    for edit in result["edits"]:
        assert edit["changes"][0]["logit_change"] == 0
        assert edit["changes"][0]["score_change"] == 0


def test_other_channels_are_a_control_of_the_same_number(builtin: TestClient) -> None:
    edits = [
        layer_edit("one", channels=[0]),
        layer_edit("nearly all", channels=["1-63"]),
        layer_edit("all", channels=["*"]),
    ]
    (result,) = ask(builtin, edits, controls=64)
    one, nearly, every = (edit["control"] for edit in result["edits"])
    assert one["n"] == 63
    assert len(one["logit_changes"]) == 63
    assert nearly == {"n": 0, "mean": None, "low": None, "high": None, "smaller": 0}
    assert every["n"] == 0


def grid_of(explanation: Any) -> Any:
    grid = np.frombuffer(base64.b64decode(explanation["grid"]["data"]), "<f4")
    return grid.reshape(explanation["grid"]["shape"])


GRADIENTS: dict[str, tuple[Any, Callable[[torch.Tensor], torch.Tensor]]] = {
    "zero": ("zero", torch.zeros_like),
    "scale": ({"scale": -2}, lambda gradient: -2 * gradient),
    "clip": ({"clip": 0.0005}, lambda gradient: gradient.clamp(-0.0005, 0.0005)),
}


def by_hooks(
    model: LoadedModel, edited: str, target: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Grad-CAM of class 2 at `target` with the gradient at `edited` changed, by plain hooks."""
    net, kept = model.replicate(), []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()

    def alter(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output.register_hook(change)
        return output

    net.get_submodule(target).register_forward_hook(keep)
    net.get_submodule(edited).register_forward_hook(alter)
    (gradient,) = torch.autograd.grad(net(input_of(model))[0, 2], kept)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * kept[0].detach()).sum(dim=1)[0].relu()


@pytest.mark.parametrize("edited", ["layer3", "layer2"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_changed_gradient_changes_the_map_as_plain_hooks_do_and_no_score(
    builtin: TestClient, model: LoadedModel, name: str, edited: str
) -> None:
    setting, change = GRADIENTS[name]
    expected = by_hooks(model, edited, "layer2", change)
    explain = {"target": 2, "layer": "layer2", "include": ["grid"]}
    edits = [
        {"name": name, "edit": "gradient", "layer": edited, "set": setting, "explain": explain}
    ]
    (result,) = ask(builtin, edits, targets=[0, 2])
    (edit,) = result["edits"]
    explanation = edit["explanation"]
    low, high = explanation["range"]
    assert explanation["class_id"] == 2
    assert high == pytest.approx(float(expected.max()), rel=1e-4, abs=1e-7)
    made = torch.tensor(grid_of(explanation)) * high
    assert torch.allclose(made, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.max())))
    assert edit["predictions"] == result["predictions"]
    assert edit["control"] is None
    assert all(one["logit_change"] == one["score_change"] == 0 for one in edit["changes"])
    assert low == 0


def test_a_gradient_that_is_not_changed_gives_the_map_of_explain(builtin: TestClient) -> None:
    methods = ["gradcam", "layercam", "input_gradient", "integrated_gradients", "guided_gradcam"]
    explain = {"include": ["grid"], "target": 1, "steps": 5}
    edits = [
        {
            "name": method,
            "edit": "gradient",
            "layer": "layer3",
            "set": {"scale": 1},
            "explain": {**explain, "method": method},
        }
        for method in methods
    ]
    (result,) = ask(builtin, edits)
    for edit in result["edits"]:
        params = {"method": edit["name"], "include": "grid", "targets": "1", "steps": 5}
        answer = builtin.post("/explain", content=IMAGE, headers=PNG, params=params).json()
        plain = answer["results"][0]["explanations"][0]
        assert np.allclose(grid_of(edit["explanation"]), grid_of(plain), atol=1e-4), edit["name"]
        assert edit["explanation"]["flags"] == plain["flags"]


def test_a_zeroed_gradient_leaves_nothing_of_any_map(builtin: TestClient) -> None:
    methods = ["gradcampp", "hirescam", "xgradcam", "input_gradient", "guided_backprop"]
    edits = [
        {
            "name": method,
            "edit": "gradient",
            "layer": "layer3",
            "set": "zero",
            "explain": {"method": method, "include": ["none"]},
        }
        for method in methods
    ]
    (result,) = ask(builtin, edits)
    for edit in result["edits"]:
        assert edit["explanation"]["range"] == [0, 0], edit["name"]
        assert "all_zero" in edit["explanation"]["flags"]


BAD_INSIDE: dict[str, tuple[Any, int, str]] = {
    "a channel that is not there": (layer_edit("a", channels=[64]), 422, "64 channels, 0 to 63"),
    "a range that ends too late": (layer_edit("a", channels=["60-70"]), 422, "0 to 63"),
    "a range that runs back": (layer_edit("a", channels=["9-3"]), 422, "channels"),
    "more top channels than there are": (layer_edit("a", channels={"top": 65}), 422, "0 to 63"),
    "no channels": (layer_edit("a", channels=[]), 422, "channels"),
    "no number": (layer_edit("a", channels=["three"]), 422, "channels"),
    "half a channel": (layer_edit("a", channels=[1.5]), 422, "channels"),
    "another form of channels": (layer_edit("a", channels={"best": 3}), 422, '{"top": 10}'),
    "another setting": (layer_edit("a", channels=[1], set="blur"), 422, "'zero', 'mean'"),
    "another form of setting": (layer_edit("a", channels=[1], set={"by": 2}), 422, '{"scale"'),
    "a scale beyond all bounds": (layer_edit("a", channels=[1], set={"scale": 1e9}), 422, "scale"),
    "another image that is not there": (
        layer_edit("a", channels=[1], set={"image": 1}),
        422,
        "edits.0.channels.set.image",
    ),
    "no layer": ({"name": "a", "edit": "channels", "channels": [1]}, 422, "layer"),
    "an unknown layer": (layer_edit("a", "layer22", channels=[1]), 404, "layer2"),
    "a layer without channels": (layer_edit("a", "fc", channels=[1]), 422, "fc"),
    "top channels of an unknown class": (
        layer_edit("a", channels={"top": 3, "of": "tulpe"}),
        404,
        "tulip",
    ),
    "a gradient without a change": (
        {"name": "a", "edit": "gradient", "layer": "layer3"},
        422,
        "edits.0.gradient.set",
    ),
    "a gradient set to noise": (
        {"name": "a", "edit": "gradient", "layer": "layer3", "set": "noise"},
        422,
        "'zero'",
    ),
    "a negative clip": (
        {"name": "a", "edit": "gradient", "layer": "layer3", "set": {"clip": -1}},
        422,
        "clip",
    ),
    "a gradient before the map's layer": (
        {"name": "a", "edit": "gradient", "layer": "layer1", "set": "zero"},
        422,
        "comes later",
    ),
    "a method without gradients": (
        {
            "name": "a",
            "edit": "gradient",
            "layer": "layer3",
            "set": "zero",
            "explain": {"method": "rise"},
        },
        422,
        "uses no gradient",
    ),
    "an overlay": (
        {
            "name": "a",
            "edit": "gradient",
            "layer": "layer3",
            "set": "zero",
            "explain": {"include": ["overlay"]},
        },
        422,
        "include",
    ),
}


@pytest.mark.parametrize("case", BAD_INSIDE)
def test_a_wrong_edit_of_the_model_is_refused(builtin: TestClient, case: str) -> None:
    edit, status, words = BAD_INSIDE[case]
    response = builtin.post("/experiments", json={"images": sent(IMAGE), "edits": [edit]})
    assert response.status_code == status, response.text
    assert words in response.json()["detail"], response.json()["detail"]


def test_a_transformer_s_channels_are_set_for_all_tokens(serve: Any) -> None:
    edits = [
        layer_edit("a", "blocks.1", channels=[0, 1], set={"scale": 0.5}),
        layer_edit("top", "blocks.1", channels={"top": 3}),
    ]
    with serve(models=("timm/test_vit",), allow_random_weights=True) as client:
        (result,) = ask(client, edits, controls=2)
    for edit in result["edits"]:
        assert edit["changes"][0]["logit_change"] != 0


def test_an_edit_that_the_model_answers_with_infinity_fails_alone(
    serve: Any, tmp_path: Any
) -> None:
    config = tmp_path / "models.toml"
    config.write_text(
        """
        [[model]]
        name = "half"
        builder = "tiny:small"
        dtype = "float16"
        """
    )
    edits = [
        layer_edit("too much", "features.0", channels=["*"], set={"scale": 1000}),
        layer_edit("more", "features.2", channels=["*"], set={"scale": -1000}),
        layer_edit("half", "features.2", channels=["*"], set={"scale": 0.5}),
        layer_edit("noise", "features.2", channels={"top": 2}, set="noise"),
    ]
    with serve(models=(), config=config) as client:
        (result,) = ask(client, edits, controls=2)
    failed = [edit["error"] for edit in result["edits"] if "error" in edit]
    for error in failed:
        assert error["status"] == 422
        assert "weaker" in error["detail"]
    half, noise = result["edits"][2:]
    assert half["changes"][0]["logit_change"] != 0
    assert noise["changes"][0]["logit_change"] != 0


def test_a_model_without_layers_takes_edits_of_images_alone(serve: Any, tmp_path: Any) -> None:
    config = tmp_path / "models.toml"
    config.write_text(
        """
        [[model]]
        name = "scripted"
        builder = "own_models:scripted"
        input.size = 32
        """
    )
    with serve(models=(), config=config) as client:
        response = client.post(
            "/experiments",
            json={"images": sent(IMAGE), "edits": [layer_edit("a", channels=[1])]},
        )
        assert response.status_code == 422
        assert "Edit the image instead" in response.json()["detail"]
        (result,) = ask(client, [named("hide")])
        assert result["edits"][0]["changes"][0]["logit_change"] != 0


def test_an_experiment_ends_at_its_deadline_and_others_go_on(builtin: TestClient) -> None:
    edits = [{**HIDE, "name": str(number)} for number in range(16)]
    response = builtin.post(
        "/experiments",
        json={"images": sent(IMAGE), "edits": edits, "controls": 64},
        headers={"x-request-timeout": "0.4"},
    )
    assert response.status_code == 504, response.text
    assert ask(builtin, [HIDE])[0]["edits"][0]["changes"]
