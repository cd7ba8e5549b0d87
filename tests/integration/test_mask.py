"""`mask`: the answer for the picture with a part hidden, beside the one without."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco
from starlette.testclient import TestClient

from service.images.masks import Fill, hide

PNG = {"content-type": "image/png"}
BOX = [10, 5, 30, 20]

pytestmark = pytest.mark.timeout(30)


def ask(client: TestClient, data: bytes, **options: Any) -> Any:
    response = client.post("/explain", content=data, headers=PNG, params=options)
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return result


def refused(client: TestClient, mask: Any, status: int = 422, **options: Any) -> str:
    """The sentence with which a mask of an 80×60 picture is refused."""
    params = {"mask": mask if isinstance(mask, str) else json.dumps(mask), **options}
    response = client.post("/explain", content=pictures.png(), headers=PNG, params=params)
    assert response.status_code == status, response.text
    answer = response.json()
    assert answer["code"] == "invalid_option"
    return str(answer["detail"])


def in_box(width: int, height: int, box: list[int] = BOX) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), dtype=bool)
    x, y, w, h = box
    mask[y : y + h, x : x + w] = True
    return mask


def compressed(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's own run lengths."""
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def plain(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Run lengths as a list of numbers: by columns, zeros first."""
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def numbers_of(result: Any) -> list[Any]:
    """Predictions and maps, as they are compared; without pictures."""
    return [result["predictions"], [each["grid"] for each in result["explanations"]]]


FORMS = {
    "boxes": lambda _: {"boxes": [BOX]},
    "compressed": lambda mask: {"rle": compressed(mask)},
    "plain counts": lambda mask: {"rle": plain(mask)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fill", ["mean", "blur", "grey"])
@pytest.mark.parametrize("part", ["region", "rest"])
def test_the_masked_answer_is_that_of_the_picture_edited_by_hand(
    client: TestClient, form: str, fill: Fill, part: str
) -> None:
    pixels = pictures.noise()
    mask = in_box(80, 60)
    edited = hide(pixels, ~mask if part == "rest" else mask, fill)
    option = json.dumps(FORMS[form](mask) | {"fill": fill, "hide": part})
    result = ask(client, pictures.file(pixels), mask=option, include="grid", targets="3")
    by_hand = ask(client, pictures.file(edited), include="grid", targets="3")
    assert numbers_of(result["masked"]) == numbers_of(by_hand)
    unmasked = ask(client, pictures.file(pixels), include="grid", targets="3")
    assert numbers_of(result) == numbers_of(unmasked)
    assert numbers_of(result) != numbers_of(result["masked"])


def test_region_and_mean_are_taken_unless_told(client: TestClient) -> None:
    short, long = (
        ask(client, pictures.png(), mask=json.dumps({"boxes": [BOX]} | more), include="grid")
        for more in ({}, {"fill": "mean", "hide": "region"})
    )
    assert short["masked"] == long["masked"]


def test_the_pictures_of_the_masked_answer_show_the_masked_photo(client: TestClient) -> None:
    option = json.dumps({"boxes": [[0, 0, 80, 60]], "fill": "grey"})
    asked = {"mask": option, "include": "overlay", "format": "png", "opacity": 0}
    result = ask(client, pictures.png(), **asked)
    shown, masked = (
        np.asarray(pictures.opened(base64.b64decode(each["explanations"][0]["overlay"]["data"])))
        for each in (result, result["masked"])
    )
    assert np.array_equal(shown, pictures.noise())
    assert (masked == 128).all()


def test_changes_are_the_masked_values_minus_the_unmasked_ones(client: TestClient) -> None:
    """For the classes that were explained without the mask, in their order."""
    option = json.dumps({"boxes": [BOX], "fill": "grey"})
    for asked in ({"targets": ["4", "0"]}, {"explain_top": 3}, {}):
        result = ask(client, pictures.png(), mask=option, include="none", top_k=7, **asked)
        explained = [each["class_id"] for each in result["explanations"]]
        changes = result["masked"]["changes"]
        assert [each["class_id"] for each in changes] == explained
        assert [each["class_id"] for each in result["masked"]["explanations"]] == explained
        before, after = (
            {each["class_id"]: each for each in predictions}
            for predictions in (result["predictions"], result["masked"]["predictions"])
        )
        for change in changes:
            first, second = before[change["class_id"]], after[change["class_id"]]
            assert change["label"] == first["label"]
            for name in ("score", "logit"):
                assert change[name] == pytest.approx(second[name])
                assert change[f"{name}_change"] == pytest.approx(second[name] - first[name])


def test_a_mask_outside_of_what_the_model_sees_changes_nothing(client: TestClient) -> None:
    """Of 80×60 pixels it sees the middle; the fill must not depend on the rest either."""
    option = json.dumps({"boxes": [[0, 0, 4, 60]], "fill": "grey"})
    (change,) = ask(client, pictures.png(), mask=option)["masked"]["changes"]
    assert change["score_change"] == 0.0
    assert change["logit_change"] == 0.0


def test_boxes_are_in_upright_source_pixels(client: TestClient) -> None:
    """The file is lying on its side; EXIF says so, and the mask counts from the upright corner."""
    upright = np.rot90(pictures.noise(80, 60), 3).copy()
    assert upright.shape == (80, 60, 3)
    box = [3, 12, 40, 30]
    rotated = pictures.jpeg(80, 60, orientation=6)
    decoded = np.asarray(pictures.opened(pictures.jpeg(80, 60)))
    edited = hide(np.rot90(decoded, 3).copy(), in_box(60, 80, box), "grey")
    mask = {"boxes": [box], "fill": "grey"}
    result = ask(client, rotated, mask=json.dumps(mask), include="grid")
    assert (result["image"]["width"], result["image"]["height"]) == (60, 80)
    (explanation,) = result["explanations"]
    target = str(explanation["class_id"])
    by_hand = ask(client, pictures.file(edited), include="grid", targets=target)
    assert numbers_of(result["masked"]) == numbers_of(by_hand)
    rle = {"rle": compressed(in_box(60, 80, box)), "fill": "grey"}
    assert ask(client, rotated, mask=json.dumps(rle), include="grid")["masked"] == result["masked"]


def test_boxes_hold_for_every_image_and_each_is_changed_for_itself(client: TestClient) -> None:
    option = json.dumps({"boxes": [BOX]})
    data = [pictures.png(seed=seed) for seed in range(3)]
    files = [("image", each) for each in data]
    response = client.post("/explain", files=files, params={"mask": option, "include": "grid"})
    for each, result in zip(data, response.json()["results"], strict=True):
        alone = ask(client, each, mask=option, include="grid")
        assert (
            result["masked"]["predictions"][0]["class_id"]
            == (alone["masked"]["predictions"][0]["class_id"])
        )
        for change, single in zip(
            result["masked"]["changes"], alone["masked"]["changes"], strict=True
        ):
            assert change["logit_change"] == pytest.approx(single["logit_change"], abs=1e-5)


def test_run_lengths_of_one_size_fail_the_pictures_of_another(client: TestClient) -> None:
    """Each in its own place; the others are answered."""
    option = json.dumps({"rle": compressed(in_box(80, 60))})
    files = [("image", pictures.png(80, 60)), ("image", pictures.png(60, 80))]
    response = client.post("/explain", files=files, params={"mask": option})
    fits, fails = response.json()["results"]
    assert fits["masked"]["changes"]
    assert fails["error"]["code"] == "invalid_option"
    assert fails["error"]["status"] == 422
    assert "[60, 80]" in fails["error"]["detail"]
    assert "[80, 60]" in fails["error"]["detail"]


def test_a_json_request_gives_the_mask_as_an_object_or_as_text(client: TestClient) -> None:
    mask = {"boxes": [BOX], "fill": "blur", "hide": "rest"}
    expected = ask(client, pictures.png(), mask=json.dumps(mask), include="grid")["masked"]
    images = [{"data": base64.b64encode(pictures.png()).decode("ascii")}]
    for given in (mask, json.dumps(mask)):
        response = client.post(
            "/explain", json={"images": images, "mask": given, "include": ["grid"]}
        )
        assert response.json()["results"][0]["masked"] == expected


def test_a_mask_works_with_every_kind_of_method(client: TestClient) -> None:
    """A map of many passes is made twice; captures are of the unmasked picture alone."""
    option = json.dumps({"boxes": [BOX]})
    for asked in (
        {"method": "rise", "samples": 4},
        {"method": "eigencam"},
        {"activations": "head", "contrast": "1"},
    ):
        result = ask(client, pictures.png(), mask=option, include="grid", targets="0", **asked)
        first, second = result["explanations"][0], result["masked"]["explanations"][0]
        assert first["method"] == second["method"]
        assert first["grid"] != second["grid"]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("{boxes: 3}", ["not JSON"]),
        ("[1, 2]", ["`mask`"]),
        ("7", ["`mask`"]),
        ({}, ["either `rle` or `boxes`"]),
        ({"boxes": [BOX], "rle": {"size": [60, 80], "counts": [4800]}}, ["either"]),
        ({"boxes": []}, ["covers no pixel"]),
        ({"boxes": [[500, 500, 10, 10]]}, ["covers no pixel", "upper left"]),
        ({"boxes": [[10, 10, 0, 10]], "hide": "rest"}, ["covers no pixel"]),
        ({"boxes": [[1, 2, 3]]}, ["boxes"]),
        ({"boxes": [[1, 2, "a", 4]]}, ["boxes"]),
        ('{"boxes": [[0, 0, NaN, 5]]}', ["mask"]),
        ({"boxes": [BOX], "fill": "black"}, ["fill", "'grey'"]),
        ({"boxes": [BOX], "hide": "all"}, ["hide", "'rest'"]),
        ({"boxes": [BOX], "colour": "red"}, ["colour"]),
        ({"rle": {"size": [60, 80]}}, ["counts"]),
        ({"rle": {"size": [80, 60], "counts": [4800]}}, ["[80, 60]", "[60, 80]", "upright"]),
        ({"rle": {"size": [60, 80], "counts": [4800]}}, ["covers no pixel"]),
        ({"rle": {"size": [60, 80], "counts": [10, 20]}}, ["`mask` cannot be read"]),
        ({"rle": {"size": [60, 80], "counts": [-4, 4804]}}, ["`mask` cannot be read"]),
        ({"rle": {"size": [60, 80], "counts": "é"}}, ["`mask` cannot be read"]),
        ({"rle": {"size": [-60, -80], "counts": [4800]}}, ["[-60, -80]"]),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_in_words(
    client: TestClient, mask: Any, words: list[str]
) -> None:
    said = refused(client, mask)
    for word in words:
        assert word in said
    assert "pydantic" not in said
    assert "\n" not in said


def test_predict_takes_no_mask(client: TestClient) -> None:
    response = client.post(
        "/predict",
        content=pictures.png(),
        headers=PNG,
        params={"mask": '{"boxes": [[0, 0, 5, 5]]}'},
    )
    assert response.status_code == 422
    assert "'mask'" in response.json()["detail"]
