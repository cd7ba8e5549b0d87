"""`POST /explain` and `/predict`: the wire shape, and that what it carries is true."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import numpy as np
import pictures
import pytest
import tiny
import torch
from numpy.typing import NDArray
from PIL import ImageOps
from starlette.testclient import TestClient
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

from service.cam.heatmap import COLORMAPS
from service.routes import classify

PNG = {"content-type": "image/png"}
CAPTURABLE = ["features", *(f"features.{index}" for index in range(5)), "head"]

PREDICTION = {"class_id", "label", "score", "logit"}
EXPLANATION = {
    *("class_id", "label", "score", "contrast", "method", "layer", "range", "flags", "cost")
}


def ask(client: TestClient, data: bytes, route: str = "/explain", **options: Any) -> Any:
    """The one result of a raw image body."""
    response = client.post(route, content=data, headers=PNG, params=options)
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return result


def picture(encoded: dict[str, Any]) -> Any:
    """The picture of a wire field; its stated size and type are its real ones."""
    opened = pictures.opened(base64.b64decode(encoded["data"], validate=True))
    assert opened.size == (encoded["width"], encoded["height"])
    assert opened.get_format_mimetype() == encoded["media_type"]
    return opened


def grid_of(explanation: dict[str, Any]) -> NDArray[np.float32]:
    grid = explanation["grid"]
    assert grid["dtype"] == "float32"
    values = np.frombuffer(base64.b64decode(grid["data"], validate=True), dtype="<f4")
    return values.reshape(grid["shape"])


def upsampled(grid: NDArray[np.float32], width: int, height: int) -> NDArray[np.uint8]:
    """What a heatmap of that size must hold where the model saw the whole picture."""
    maps = torch.from_numpy(grid.copy())[None, None]
    full = functional.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
    return (255 * full[0, 0].abs()).round().to(torch.uint8).numpy()


def model_input(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """The evaluation transform of torchvision, written out: resize 256, crop 224, normalise."""
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    image = transforms.center_crop(transforms.resize(image, [256], antialias=True), [224, 224])
    scaled = transforms.to_dtype(image, torch.float32, scale=True)
    return transforms.normalize(scaled, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]


# ---- the shape of the answer


def test_an_answer_has_every_field_of_the_contract(client: TestClient) -> None:
    data = pictures.png()
    options = {"include": ["heatmap", "overlay", "grid"], "activations": "head"}
    response = client.post("/explain", content=data, headers=PNG, params=options)
    answer = response.json()
    assert response.headers["content-type"] == "application/json"
    assert set(answer) == {"id", "model", "results", "timing_ms"}
    assert answer["model"]["name"] == "small"
    assert re.fullmatch("[0-9a-f]{12}", answer["model"]["version"])
    (result,) = answer["results"]
    assert set(result) == {"image", "seen", "predictions", "explanations", "activations"}
    sha256 = hashlib.sha256(data).hexdigest()
    assert result["image"] == {"width": 80, "height": 60, "format": "PNG", "sha256": sha256}
    assert all(set(each) == PREDICTION for each in result["predictions"])
    (explanation,) = result["explanations"]
    assert set(explanation) == EXPLANATION | {"heatmap", "overlay", "grid"}
    assert set(explanation["heatmap"]) == {"media_type", "width", "height", "data"}
    assert set(explanation["overlay"]) == {"media_type", "width", "height", "data"}
    assert set(explanation["grid"]) == {"shape", "dtype", "data"}
    assert explanation["contrast"] is None
    assert explanation["method"] == "gradcam"
    assert explanation["layer"] == "features"
    assert explanation["cost"] == {"forwards": 1.0}
    assert explanation["flags"] == []
    (activation,) = result["activations"]
    assert {"layer", "kind", "shape", "dtype", "stats"} <= set(activation)
    assert set(activation["stats"]) == {"min", "max", "mean", "std", "zero_fraction"}


def test_a_contrast_with_several_classes_is_named_with_its_weights(client: TestClient) -> None:
    def contrast(**options: Any) -> tuple[Any, Any]:
        params = {"targets": "0", "include": "none"} | options
        response = client.post("/explain", content=pictures.png(), headers=PNG, params=params)
        (explanation,) = response.json()["results"][0]["explanations"]
        return explanation["contrast"], explanation.get("contrasts")

    assert contrast(contrast="2") == (2, None)
    named = [{"class_id": 2, "label": "class 2", "weight": 0.6}]
    assert contrast(contrast="2", contrast_weight="0.6") == (None, named)
    (_, several), (_, nearest) = contrast(contrast=["2", "4"]), contrast(contrast="nearest:3")
    assert [each["class_id"] for each in several] == [2, 4]
    assert sum(each["weight"] for each in several) == pytest.approx(1)
    assert len({each["class_id"] for each in nearest} - {0}) == 3


def test_predictions_are_those_of_a_plain_forward_pass(client: TestClient) -> None:
    with torch.no_grad():
        logits = tiny.small().eval()(model_input(pictures.noise()))[0]
    predictions = ask(client, pictures.png(), top_k=7)["predictions"]
    best = logits.argsort(descending=True)
    assert [each["class_id"] for each in predictions] == best.tolist()
    assert [each["label"] for each in predictions] == [f"class {index}" for index in best]
    assert [each["logit"] for each in predictions] == pytest.approx(logits[best].tolist(), rel=1e-4)
    scores = [each["score"] for each in predictions]
    assert scores == pytest.approx(logits.softmax(0)[best].tolist(), rel=1e-4)


def test_top_k_lists_five_unless_told_and_never_more_than_there_are(client: TestClient) -> None:
    counts = {
        asked: len(ask(client, pictures.png(), **asked_as)["predictions"])
        for asked, asked_as in {0: {}, 2: {"top_k": 2}, 1000: {"top_k": 1000}}.items()
    }
    assert counts == {0: 5, 2: 2, 1000: 7}


def test_a_map_on_paper_arrives_over_http(serve) -> None:
    """Class 0 likes red and dislikes green: the red half is evidence, the green half is none."""
    halves = np.zeros((224, 224, 3), dtype=np.uint8)
    halves[:, :112, 0] = halves[:, 112:, 1] = 255
    options = {"layer": "maps", "fit": "squash", "include": "grid"}
    with serve(models=("tiny:paper",)) as client:
        result = ask(client, pictures.file(halves), targets=0, **options)
    (explanation,) = result["explanations"]
    red, green = (1 - 0.485) / 0.229, 2 * (0 - 0.456) / 0.224  # of a red pixel, behind `maps`
    highest = (red - green) / 224**2
    assert explanation["range"] == pytest.approx([0.0, highest], rel=1e-5)
    grid = grid_of(explanation)
    assert grid.shape == (224, 224)
    assert (grid[:, :112] == 1).all()
    assert (grid[:, 112:] == 0).all()


def test_the_map_is_grad_cam_by_plain_autograd(client: TestClient) -> None:
    (explanation,) = ask(client, pictures.png(), targets=3, include="grid")["explanations"]
    model = tiny.small().eval()
    maps = model.features(model_input(pictures.noise())).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.head(maps.mean(dim=(2, 3)))[0, 3], maps)
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1)[0].relu().detach()
    assert explanation["range"] == pytest.approx([float(cam.min()), float(cam.max())], rel=1e-4)
    expected = (cam / cam.max()).numpy() if cam.any() else cam.numpy()
    np.testing.assert_allclose(grid_of(explanation), expected, atol=1e-5)


# ---- the ways to send an image


def test_three_kinds_of_body_give_the_same_answer(client: TestClient) -> None:
    data = pictures.png()
    text = base64.b64encode(data).decode()
    answers = [
        client.post("/explain?top_k=3", files={"image": data}),
        client.post("/explain?top_k=3", content=data, headers=PNG),
        client.post("/explain?top_k=3", content=data, headers={"content-type": "image/x-unheard"}),
        client.post(
            "/explain?top_k=3", content=data, headers={"content-type": "application/octet-stream"}
        ),
        client.post("/explain", json={"images": [{"data": text}], "top_k": 3}),
        client.post(
            "/explain", json={"images": [{"data": f"data:image/png;base64,{text}"}], "top_k": 3}
        ),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    results = [answer.json()["results"] for answer in answers]
    assert all(result == results[0] for result in results)


def test_json_may_be_declared_as_a_kind_of_json_and_hold_line_breaks(client: TestClient) -> None:
    """`base64` and Python's `encodebytes` wrap their lines; `+json` types are JSON."""
    body = json.dumps({"images": [{"data": base64.encodebytes(pictures.png()).decode()}]})
    kinds = ["application/json; charset=utf-8", "application/vnd.mine+json", "Application/JSON"]
    statuses = [
        client.post("/predict", content=body, headers={"content-type": kind}).status_code
        for kind in kinds
    ]
    assert statuses == [200, 200, 200]


def test_several_images_are_answered_in_the_order_they_came(client: TestClient) -> None:
    files = [pictures.png(seed=seed) for seed in range(6)]
    sent = [("image", (f"{index}.png", data, "image/png")) for index, data in enumerate(files)]
    answer = client.post("/explain", files=sent).json()
    expected = [hashlib.sha256(data).hexdigest() for data in files]
    assert [result["image"]["sha256"] for result in answer["results"]] == expected
    alone = [ask(client, data)["predictions"][0]["class_id"] for data in files]
    assert [result["predictions"][0]["class_id"] for result in answer["results"]] == alone


def test_options_of_a_json_request_are_its_fields(client: TestClient) -> None:
    """Numbers, numeric strings and labels are all class names."""
    images = [{"data": base64.b64encode(pictures.png()).decode()}]
    fields = {"targets": [0, "1", "class 2"], "include": ["grid"], "top_k": 1, "fit": "pad"}
    (result,) = client.post("/explain", json={"images": images, **fields}).json()["results"]
    assert [each["class_id"] for each in result["explanations"]] == [0, 1, 2]
    assert len(result["predictions"]) == 1
    options = {"targets": ["0", "1", "class 2"], "include": "grid", "top_k": 1, "fit": "pad"}
    assert ask(client, pictures.png(), **options) == result


def test_the_bytes_decide_the_format_not_the_declared_type(client: TestClient) -> None:
    assert ask(client, pictures.jpeg())["image"]["format"] == "JPEG"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_jpeg_is_answered_as_its_upright_pixels_are(
    client: TestClient, orientation: int
) -> None:
    data = pictures.jpeg(90, 50, orientation=orientation)
    upright = ImageOps.exif_transpose(pictures.opened(data))
    turned = ask(client, data, include=["heatmap", "grid"])
    straight = ask(client, pictures.file(np.asarray(upright)), include=["heatmap", "grid"])
    size = (turned["image"]["width"], turned["image"]["height"])
    assert size == ((50, 90) if orientation > 4 else (90, 50))
    for result in (turned, straight):
        del result["image"]["sha256"], result["image"]["format"]
    assert turned == straight


# ---- an image as the answer


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/jpeg", "image/jpeg"),
        ("image/png", "image/png"),
        ("image/webp", "image/webp"),
        ("image/*", "image/jpeg"),
        ("IMAGE/PNG", "image/png"),
        ("image/png;q=0.5, image/webp;q=0.9", "image/webp"),
        ("application/json;q=0.4, image/*;q=0.6", "image/jpeg"),
        ("application/json;q=0.6, image/*;q=0.4", "application/json"),
        ("application/json, image/png", "application/json"),
        ("image/png;q=0", "application/json"),
        ("image/gif", "application/json"),
        ("*/*", "application/json"),
        ("", "application/json"),
        # What browsers send: <img>, fetch, axios.
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "image/webp"),
        ("application/json, text/plain, */*", "application/json"),
    ],
)
def test_accept_decides_between_json_and_the_overlay(
    client: TestClient, accept: str, kind: str
) -> None:
    headers = {**PNG, "accept": accept}
    response = client.post("/explain", content=pictures.png(), headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == kind
    if kind.startswith("image/"):
        opened = pictures.opened(response.content)
        assert (opened.get_format_mimetype(), opened.size) == (kind, (80, 60))
        assert "total;dur=" in response.headers["server-timing"]


def test_any_image_takes_the_format_option(client: TestClient) -> None:
    headers = {**PNG, "accept": "image/*"}
    response = client.post("/explain?format=webp", content=pictures.png(), headers=headers)
    assert response.headers["content-type"] == "image/webp"


def test_the_image_that_answers_is_the_overlay_of_the_json_answer(client: TestClient) -> None:
    options = {"targets": [4], "opacity": 0.7, "colormap": "viridis", "fit": "pad"}
    asked = {"content": pictures.png(), "params": options}
    direct = client.post("/explain", headers={**PNG, "accept": "image/png"}, **asked)
    told = ask(client, pictures.png(), include="overlay", format="png", **options)
    assert direct.content == base64.b64decode(told["explanations"][0]["overlay"]["data"])


@pytest.mark.parametrize("size", ["source", "model", "native"])
def test_the_heatmap_alone_answers_if_it_is_included(client: TestClient, size: str) -> None:
    options = {"targets": [4], "include": "heatmap", "size": size}
    for accept in ("image/png", "image/*", "image/jpeg, image/png;q=0.1"):
        headers = {**PNG, "accept": accept}
        direct = client.post("/explain", content=pictures.png(), params=options, headers=headers)
        assert direct.headers["content-type"] == "image/png"
        told = ask(client, pictures.png(), **options)["explanations"][0]["heatmap"]
        assert direct.content == base64.b64decode(told["data"])


@pytest.mark.parametrize(
    ("accept", "query", "named"),
    [
        ("image/jpeg", "include=heatmap", ["'image/jpeg'", "include=heatmap", "image/png"]),
        ("image/png", "format=jpeg", ["'image/png'", "format=jpeg", "image/jpeg"]),
        ("image/png", "include=heatmap&include=overlay", ["include=heatmap,overlay", "alone"]),
        ("image/png", "include=grid", ["include=grid", "include=overlay"]),
        ("image/png", "include=none", ["include=none", "include=heatmap"]),
        ("image/png", "targets=1&targets=2", ["2 explanations", "one target"]),
        ("image/png", "explain_top=3", ["3 explanations", "one target"]),
        ("image/png", "top_k=3&activations=head", ["`top_k` and `activations`", "leave out"]),
        ("image/png", 'mask={"boxes":[[1,1,9,9]]}', ["`mask`", "leave out"]),
        ("image/png", "threshold=0.2", ["`threshold`", "leave out"]),
        ("image/png", "verify=true", ["`verify`", "leave out"]),
    ],
)
def test_options_that_one_image_cannot_honour_are_refused(
    client: TestClient, accept: str, query: str, named: list[str]
) -> None:
    headers = {**PNG, "accept": accept}
    response = client.post(f"/explain?{query}", content=pictures.png(), headers=headers)
    assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")
    detail = response.json()["detail"]
    assert all(word in detail for word in (*named, "application/json")), detail


def test_a_format_that_is_also_accepted_is_honoured(client: TestClient) -> None:
    headers = {**PNG, "accept": "image/png, image/*;q=0.5"}
    response = client.post("/explain?format=webp", content=pictures.png(), headers=headers)
    assert response.headers["content-type"] == "image/webp"


def test_several_images_cannot_be_one_picture(client: TestClient) -> None:
    files = [("image", pictures.png()), ("image", pictures.png(seed=1))]
    response = client.post("/explain", files=files, headers={"accept": "image/png"})
    assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")
    assert "application/json" in response.json()["detail"]


def test_a_bad_image_is_a_problem_also_where_a_picture_was_wanted(client: TestClient) -> None:
    headers = {**PNG, "accept": "image/png"}
    response = client.post("/explain", content=b"no picture", headers=headers)
    assert response.status_code == 415
    assert response.headers["content-type"] == "application/problem+json"


def test_predict_answers_json_whatever_is_accepted(client: TestClient) -> None:
    headers = {**PNG, "accept": "image/png"}
    response = client.post("/predict", content=pictures.png(), headers=headers)
    assert response.headers["content-type"] == "application/json"


# ---- what is sent


@pytest.mark.parametrize(
    ("include", "sent"),
    [
        (None, {"heatmap"}),
        (["heatmap"], {"heatmap"}),
        (["overlay"], {"overlay"}),
        (["grid"], {"grid"}),
        (["heatmap", "overlay", "grid"], {"heatmap", "overlay", "grid"}),
        (["none"], set()),
    ],
)
def test_include_says_what_is_sent(client: TestClient, include, sent: set[str]) -> None:
    options = {} if include is None else {"include": include}
    (explanation,) = ask(client, pictures.png(), **options)["explanations"]
    assert set(explanation) - EXPLANATION == sent


@pytest.mark.parametrize("colormap", ["turbo", "viridis", "gray"])
def test_heatmap_pixels_are_the_upsampled_grid_and_its_palette_the_colormap(
    client: TestClient, colormap: str
) -> None:
    options = {"include": ["heatmap", "grid"], "fit": "squash", "colormap": colormap}
    (explanation,) = ask(client, pictures.png(120, 90), **options)["explanations"]
    heatmap = picture(explanation["heatmap"])
    assert heatmap.mode == "P"
    table = np.array(heatmap.getpalette(), dtype=np.uint8).reshape(256, 3)
    assert (table == COLORMAPS[colormap]).all()
    difference = np.asarray(heatmap).astype(int) - upsampled(grid_of(explanation), 120, 90)
    assert np.abs(difference).max() <= 1  # a rounding apart
    assert (difference == 0).mean() > 0.99


def test_a_native_heatmap_has_one_pixel_a_cell(client: TestClient) -> None:
    options = {"include": ["heatmap", "grid"], "size": "native", "fit": "squash"}
    (explanation,) = ask(client, pictures.png(), **options)["explanations"]
    grid = grid_of(explanation)
    assert grid.shape == (56, 56)
    assert (np.asarray(picture(explanation["heatmap"])) == np.rint(255 * grid)).all()


def test_a_heatmap_at_model_size_covers_what_the_model_saw(client: TestClient) -> None:
    options = {"include": ["heatmap", "grid"], "size": "model"}
    (explanation,) = ask(client, pictures.png(), **options)["explanations"]
    heatmap = picture(explanation["heatmap"])
    assert heatmap.size == (224, 224)
    expected = upsampled(grid_of(explanation), 224, 224).astype(int)
    assert np.abs(np.asarray(heatmap).astype(int) - expected).max() <= 1


def test_outside_what_the_model_saw_the_heatmap_is_0_and_the_overlay_plain(
    client: TestClient,
) -> None:
    """A 400 x 100 picture is seen from x = 156.25 to 243.75 and from y = 6.25 to 93.75."""
    pixels = pictures.noise(400, 100)
    options = {"include": ["heatmap", "overlay"], "format": "png", "opacity": 1}
    (explanation,) = ask(client, pictures.file(pixels), **options)["explanations"]
    inside = np.zeros((100, 400), dtype=bool)
    inside[6:94, 156:244] = True
    heatmap = np.asarray(picture(explanation["heatmap"]))
    overlay = np.asarray(picture(explanation["overlay"]))
    assert not heatmap[~inside].any()
    assert (overlay[~inside] == pixels[~inside]).all()
    assert heatmap[inside].any()


def test_opacity_goes_from_the_photo_to_the_colours(client: TestClient) -> None:
    options = {"include": ["heatmap", "overlay"], "format": "png", "fit": "squash"}
    (none,) = ask(client, pictures.png(), opacity=0, **options)["explanations"]
    assert (np.asarray(picture(none["overlay"])) == pictures.noise()).all()
    (full,) = ask(client, pictures.png(), opacity=1, **options)["explanations"]
    colours = COLORMAPS["turbo"][np.asarray(picture(full["heatmap"]))]
    assert (np.asarray(picture(full["overlay"])) == colours).all()


def test_pictures_are_bounded_by_the_render_side(serve) -> None:
    with serve(max_render_side=64) as client:
        options = {"include": ["heatmap", "overlay"]}
        (explanation,) = ask(client, pictures.png(200, 100), **options)["explanations"]
    assert picture(explanation["heatmap"]).size == (64, 32)
    assert picture(explanation["overlay"]).size == (64, 32)


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((400, 100), [156.25, 6.25, 87.5, 87.5]),  # 1024 x 256; (1024 - 224) / 2 = 400
        ((100, 400), [6.25, 156.25, 87.5, 87.5]),
        ((256, 256), [16, 16, 224, 224]),
        ((1, 1), [16 / 256, 16 / 256, 224 / 256, 224 / 256]),
        ((3, 2), [80 * 3 / 384, 16 / 128, 224 * 3 / 384, 224 / 128]),
        # 341 x 256, as torchvision rounds it; round((341 - 224) / 2) = 58
        ((640, 480), [58 * 640 / 341, 30, 224 * 640 / 341, 420]),
    ],
)
def test_seen_is_the_middle_for_crop_and_everything_for_squash_and_pad(
    client: TestClient, size: tuple[int, int], seen: list[float]
) -> None:
    data = pictures.png(*size)
    parts = {fit: ask(client, data, fit=fit)["seen"] for fit in ("crop", "squash", "pad")}
    assert parts["crop"] == pytest.approx(seen)
    assert parts["squash"] == [0, 0, *size]
    assert parts["pad"] == pytest.approx([0, 0, *size])


@pytest.mark.parametrize("size", [(1, 60), (60, 1), (2000, 2)])
def test_very_long_pictures_are_answered(client: TestClient, size: tuple[int, int]) -> None:
    result = ask(client, pictures.png(*size), include=["heatmap", "overlay", "grid"])
    assert picture(result["explanations"][0]["heatmap"]).size == size


# ---- targets


def test_the_best_prediction_is_explained_unless_told(client: TestClient) -> None:
    result = ask(client, pictures.png())
    (explanation,) = result["explanations"]
    best = result["predictions"][0]
    assert {key: explanation[key] for key in ("class_id", "label", "score")} == {
        key: best[key] for key in ("class_id", "label", "score")
    }


@pytest.mark.parametrize("target", ["0", "class 0", "00"])
def test_class_0_is_a_class(client: TestClient, target: str) -> None:
    (explanation,) = ask(client, pictures.png(), targets=target)["explanations"]
    assert (explanation["class_id"], explanation["label"]) == (0, "class 0")


def test_targets_keep_their_order_and_duplicates_are_one(client: TestClient) -> None:
    targets = ["5", "class 1", "class 5", "1", "0"]
    explanations = ask(client, pictures.png(), targets=targets)["explanations"]
    assert [each["class_id"] for each in explanations] == [5, 1, 0]


def test_a_target_that_is_not_the_prediction_is_flagged(client: TestClient) -> None:
    result = ask(client, pictures.png(), targets=list(range(7)))
    best = result["predictions"][0]["class_id"]
    flagged = {each["class_id"]: each["flags"] for each in result["explanations"]}
    assert "target_not_predicted" not in flagged.pop(best)
    assert all("target_not_predicted" in flags for flags in flagged.values())


def test_explain_top_explains_the_best_in_order(client: TestClient) -> None:
    result = ask(client, pictures.png(), explain_top=3)
    best = [each["class_id"] for each in result["predictions"][:3]]
    assert [each["class_id"] for each in result["explanations"]] == best
    everything = ask(client, pictures.png(), explain_top=100)["explanations"]
    assert len(everything) == 7


def test_maps_do_not_depend_on_which_other_maps_are_asked(client: TestClient) -> None:
    several = ask(client, pictures.png(), targets=[0, 3, 6], include="grid")["explanations"]
    for explanation in several:
        target = explanation["class_id"]
        (alone,) = ask(client, pictures.png(), targets=target, include="grid")["explanations"]
        np.testing.assert_allclose(grid_of(alone), grid_of(explanation), atol=1e-5)
        assert alone["range"] == pytest.approx(explanation["range"], rel=1e-4)


# ---- layers


def test_a_layer_can_be_named_and_its_map_has_its_shape(client: TestClient) -> None:
    options = {"layer": "features.0", "include": "grid"}
    (explanation,) = ask(client, pictures.png(), **options)["explanations"]
    assert explanation["layer"] == "features.0"
    assert explanation["grid"]["shape"] == [112, 112]


def test_several_layers_are_fused_at_the_finest_shape(client: TestClient) -> None:
    """Named twice, a layer is one; fused maps are the mean of maps scaled to 1."""
    layers = ["features.3", "features.0", "features.3"]
    ask_for = {"include": "grid", "targets": 0}
    (fused,) = ask(client, pictures.png(), layer=layers, **ask_for)["explanations"]
    assert fused["layer"] == ["features.3", "features.0"]
    grid = grid_of(fused)
    assert grid.shape == (112, 112)
    alone = [
        grid_of(ask(client, pictures.png(), layer=layer, **ask_for)["explanations"][0])
        for layer in ("features.3", "features.0")
    ]
    coarse = torch.from_numpy(alone[0].copy())[None, None]
    finer = functional.interpolate(coarse, (112, 112), mode="bilinear", align_corners=False)[0, 0]
    mean = (finer.numpy() + alone[1]) / 2
    np.testing.assert_allclose(grid, mean / mean.max(), atol=1e-4)


# ---- activations


def plain_outputs(pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """What a plain forward hook sees, before anything is changed in place."""
    seen = {}
    model = tiny.small().eval()
    for path in CAPTURABLE:
        model.get_submodule(path).register_forward_hook(
            lambda _module, _args, output, path=path: seen.update({path: output.clone()[0].numpy()})
        )
    with torch.no_grad():
        model(model_input(pixels))
    return seen


def array_of(activation: dict[str, Any]) -> NDArray[np.float16]:
    assert activation["array"]["dtype"] == "float16"
    values = np.frombuffer(base64.b64decode(activation["array"]["data"], validate=True), "<f2")
    return values.reshape(activation["shape"])


@pytest.mark.parametrize("route", ["/explain", "/predict"])
def test_activations_are_what_a_plain_forward_hook_sees(client: TestClient, route: str) -> None:
    options = {"activations": "**", "activation_as": ["stats", "array", "image"]}
    activations = ask(client, pictures.png(), route, **options)["activations"]
    assert [each["layer"] for each in activations] == CAPTURABLE
    plain = plain_outputs(pictures.noise())
    for activation in activations:
        expected = plain[activation["layer"]]
        np.testing.assert_allclose(array_of(activation), expected, rtol=2e-3, atol=1e-4)
        stats = activation["stats"]
        assert stats["min"] == pytest.approx(float(expected.min()), rel=1e-4, abs=1e-6)
        assert stats["max"] == pytest.approx(float(expected.max()), rel=1e-4, abs=1e-6)
        assert stats["mean"] == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-6)
        assert stats["std"] == pytest.approx(float(expected.std()), rel=1e-3, abs=1e-6)
        assert stats["zero_fraction"] == pytest.approx(float((expected == 0).mean()), abs=1e-3)
        assert picture(activation["image"]).mode == "L"
        assert activation["kind"] == "output"


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        (["head"], ["head"]),
        (["features.*"], [f"features.{index}" for index in range(5)]),
        (["features.?"], [f"features.{index}" for index in range(5)]),
        (["*"], ["features", "head"]),
        (["type:Conv2d"], ["features.0", "features.3"]),
        (["head", "features.0", "features.0", "type:Linear"], ["features.0", "head"]),
    ],
)
def test_activations_may_be_named_by_globs(
    client: TestClient, patterns: list[str], layers: list[str]
) -> None:
    activations = ask(client, pictures.png(), activations=patterns)["activations"]
    assert [each["layer"] for each in activations] == layers


def test_activations_take_the_forms_asked_for(client: TestClient) -> None:
    forms = {}
    for form in ("stats", "array", "image"):
        (sent,) = ask(client, pictures.png(), activations="head", activation_as=form)["activations"]
        forms[form] = set(sent) & {"stats", "array", "image"}
    assert forms == {"stats": {"stats"}, "array": {"array"}, "image": {"image"}}


def test_each_image_gets_its_own_activations(client: TestClient) -> None:
    data = [pictures.png(seed=seed) for seed in range(4)]
    options = {"activations": "features", "activation_as": "array"}
    answer = client.post("/predict", files=[("image", one) for one in data], params=options).json()
    for seed, result in enumerate(answer["results"]):
        expected = plain_outputs(pictures.noise(seed=seed))["features"]
        np.testing.assert_allclose(
            array_of(result["activations"][0]), expected, rtol=2e-3, atol=1e-4
        )


# ---- /predict


def test_predict_gives_the_predictions_of_explain_and_no_more(client: TestClient) -> None:
    data = pictures.png()
    predicted = ask(client, data, "/predict", top_k=7, fit="pad")
    explained = ask(client, data, top_k=7, fit="pad")
    assert set(predicted) == {"image", "seen", "predictions"}
    assert predicted["seen"] == explained["seen"]
    for one, two in zip(predicted["predictions"], explained["predictions"], strict=True):
        assert one["class_id"] == two["class_id"]
        assert one["logit"] == pytest.approx(two["logit"], rel=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        {"targets": "0"},
        {"explain_top": "2"},
        {"method": "gradcam"},
        {"layer": "features"},
        {"include": "none"},
        {"size": "model"},
        {"colormap": "jet"},
        {"format": "png"},
        {"opacity": "0.5"},
    ],
)
def test_predict_refuses_what_only_explain_takes(client: TestClient, option) -> None:
    (name,) = option
    responses = [
        client.post("/predict", content=pictures.png(), headers=PNG, params=option),
        client.post("/predict", json={"images": [{"data": "AAAA"}], **option}),
    ]
    for response in responses:
        assert (response.status_code, response.json()["code"]) == (422, "invalid_option")
        assert f"{name!r}" in response.json()["detail"]
        assert "/explain" in response.json()["detail"]


# ---- models


def test_the_first_model_answers_unless_another_is_named(client: TestClient) -> None:
    data = pictures.png()
    answers = [
        client.post("/explain", content=data, headers=PNG, params=params).json()
        for params in ({}, {"model": "small"}, {"model": "other"})
    ]
    assert [answer["model"]["name"] for answer in answers] == ["small", "small", "other"]
    assert answers[0]["results"] == answers[1]["results"]
    assert answers[0]["model"]["version"] != answers[2]["model"]["version"]
    assert len(answers[2]["results"][0]["predictions"]) == 5
    listed = client.get("/models").json()["models"]
    assert [(model["name"], model["default"]) for model in listed] == [
        ("small", True),
        ("other", False),
    ]


def test_targets_and_layers_are_those_of_the_named_model(client: TestClient) -> None:
    response = client.post(
        "/explain?model=other&targets=6", content=pictures.png(), headers=PNG
    ).json()
    assert response["code"] == "unknown_class"
    assert "0 to 4" in response["detail"]


# ---- headers


def test_server_timing_is_timing_ms(client: TestClient) -> None:
    response = client.post("/explain", content=pictures.png(), headers=PNG)
    timing = response.json()["timing_ms"]
    assert list(timing) == ["decode", "queue", "inference", "render", "total"]
    told = dict(
        re.fullmatch(r"(\w+);dur=([\d.]+)", entry).groups()
        for entry in response.headers["server-timing"].split(", ")
    )
    assert {stage: float(ms) for stage, ms in told.items()} == timing
    assert all(ms >= 0 for ms in timing.values())
    stages = ("decode", "queue", "inference", "render")
    assert 0 < sum(timing[stage] for stage in stages) <= timing["total"]


def test_a_request_id_is_echoed(client: TestClient) -> None:
    headers = {**PNG, "x-request-id": "case-42.a_B"}
    response = client.post("/explain", content=pictures.png(), headers=headers)
    assert response.headers["x-request-id"] == response.json()["id"] == "case-42.a_B"


@pytest.mark.parametrize("sent", ["", "with space", "a" * 101, 'quote"', "Ünïcode", "{evil}"])
def test_a_request_id_that_is_no_plain_word_is_replaced(client: TestClient, sent: str) -> None:
    """It goes into logs and headers as it is, so it may hold nothing that means something there."""
    headers = {"x-request-id": sent.encode()}
    ids = [client.get("/health/live", headers=headers).headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


def test_a_contrast_has_the_difference_of_the_two_logits(client: TestClient) -> None:
    result = ask(client, pictures.png(), contrast="2", top_k=7, include="none")
    logits = {each["class_id"]: each["logit"] for each in result["predictions"]}
    (explanation,) = result["explanations"]
    assert set(explanation) == EXPLANATION | {"logit_difference"}
    difference = logits[explanation["class_id"]] - logits[2]
    assert explanation["logit_difference"] == pytest.approx(difference, abs=1e-5)


def test_a_repeated_query_has_the_options_of_its_first_request(client: TestClient) -> None:
    """Options of a query are validated once; another query, and another route, has its own."""
    first, again = (ask(client, pictures.png(), top_k=1, include="grid") for _ in range(2))
    other = ask(client, pictures.png(), top_k=2)
    assert first == again
    assert len(first["predictions"]) == 1
    assert len(other["predictions"]) == 2
    for _ in range(2):
        assert "explanations" not in ask(client, pictures.png(), "/predict", top_k=1)
        wrong = client.post("/predict?top_k=0", content=pictures.png(), headers=PNG)
        assert wrong.status_code == 422


def test_options_of_few_short_queries_are_kept(client: TestClient) -> None:
    """More queries than are kept, and a longer one than is kept, are answered by their options."""
    for number in range(1, 4):
        query = f"top_k={number}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classify, "MAX_QUERIES", 1)
            patch.setattr(classify, "MAX_QUERY", 7)
            response = client.post(f"/predict?{query}", content=pictures.png(), headers=PNG)
        assert len(response.json()["results"][0]["predictions"]) == number
