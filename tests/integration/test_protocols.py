"""The routes of other servers' protocols: KServe V1, Open Inference V2, TorchServe."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import own_models
import pictures
import pytest
import torch
from gates import Gate
from starlette.testclient import TestClient
from tiny import SmallNet

from service.images.decode import Preprocessing

SIDE = 224
PIXELS = pictures.noise(SIDE, SIDE)
PNG = pictures.png()
B64 = base64.b64encode(PNG).decode()
LENGTH = "Inference-Header-Content-Length"


def normalized(pixels: Any = PIXELS) -> Any:
    """What torchvision's transform makes of pixels that need no resizing: (1, 3, h, w)."""
    normal = Preprocessing()
    unit = pixels.astype(np.float32) / 255
    made = (unit - np.float32(normal.mean)) / np.float32(normal.std)
    return made.transpose(2, 0, 1)[None].astype(np.float32)


def own_logits(tensor: Any) -> Any:
    """The model's, without the service."""
    with torch.no_grad():
        return SmallNet().eval()(torch.from_numpy(tensor)).numpy()


def explained(client: TestClient, **query: object) -> Any:
    answer = client.post(
        "/explain", params=query, content=PNG, headers={"content-type": "image/png"}
    )
    return answer.raise_for_status().json()["results"][0]


def grid_of(explanation: Any) -> Any:
    grid = explanation["grid"]
    return np.frombuffer(base64.b64decode(grid["data"]), "<f4").reshape(grid["shape"])


def infer(client: TestClient, tensor: Any, *, verb: str = "infer", **more: Any) -> Any:
    return client.post(f"/v2/models/small/{verb}", json={"inputs": [tensor], **more})


def numbers(array: Any, datatype: str = "UINT8", **more: Any) -> dict[str, Any]:
    data = array.tolist()
    return {"name": "x", "datatype": datatype, "shape": list(array.shape), "data": data, **more}


def file(data: str = B64) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": [data]}


def values(answer: Any) -> dict[str, Any]:
    """The outputs of a JSON answer by name, in their shapes."""
    assert answer.status_code == 200, answer.text
    return {
        each["name"]: np.array(each["data"]).reshape(each["shape"])
        for each in answer.json()["outputs"]
    }


# ---- KServe V1


@pytest.mark.parametrize(
    "instance",
    [
        B64,
        {"b64": B64},
        {"data": B64, "target": 3},
        {"image": {"b64": B64}},
        {"image_bytes": {"b64": B64}},
        {"content": f"data:image/png;base64,{B64}"},
    ],
)
def test_v1_takes_a_file_however_clients_wrap_it(client, instance: Any) -> None:
    answer = client.post("/v1/models/small:predict", json={"instances": [instance]})
    assert answer.json() == {"predictions": [explained(client)["predictions"]]}
    assert "inference;dur=" in answer.headers["server-timing"]


def test_v1_explains_each_instance_for_its_own_target(client) -> None:
    instances = [{"data": B64, "target": 3}, {"data": B64, "target": "class 1"}, {"b64": B64}]
    body = {"instances": instances, "parameters": {"include": ["grid"], "layer": "features.0"}}
    answer = client.post("/v1/models/small:explain", json=body).json()
    found = [explanation for (explanation,) in answer["explanations"]]
    best = answer["predictions"][2][0]["class_id"]
    assert [each["class_id"] for each in found] == [3, 1, best]
    for each in found:
        (expected,) = explained(
            client, include="grid", layer="features.0", targets=each["class_id"]
        )["explanations"]
        np.testing.assert_allclose(grid_of(each), grid_of(expected), atol=1e-5)


@pytest.mark.parametrize("verify", [True, "search"])
def test_v1_explanations_have_the_verdict(client, verify: Any) -> None:
    expected = explained(client, include="none", verify=str(verify).lower())["explanations"]
    body = {"instances": [B64], "parameters": {"include": "none", "verify": verify}}
    answer = client.post("/v1/models/small:explain", json=body).json()
    assert answer["explanations"] == [expected]
    assert expected[0]["verify"]["forwards"] == 40


def test_v2_explanations_have_the_verdict(client) -> None:
    outputs = [{"name": "explain"}]
    found = values(infer(client, file(), outputs=outputs, parameters={"verify": True}))
    (expected,) = explained(client, include="none", verify="true")["explanations"]
    assert json.loads(found["explain"][0, 0])["verify"] == expected["verify"]
    refused = infer(client, file(), outputs=[{"name": "grid"}], parameters={"verify": True})
    assert refused.status_code == 400
    assert "the output `explain`" in refused.json()["error"]


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("kind", ["byte", "unit", "normalized"])
def test_v1_takes_nested_numbers_and_the_model_sees_just_those(
    client, layout: str, kind: str
) -> None:
    """8 bits survive the way to fractions and back exactly."""
    array = {
        "byte": PIXELS,
        "unit": PIXELS.astype(np.float32) / 255,
        "normalized": normalized()[0].transpose(1, 2, 0),
    }[kind]
    instance = array.transpose(2, 0, 1) if layout == "CHW" else array
    body = {"instances": [instance.tolist()]}
    if kind == "normalized":
        body["parameters"] = {"values": "normalized"}
    answer = client.post("/v1/models/small:predict", json=body).json()
    logits = {each["class_id"]: each["logit"] for each in answer["predictions"][0]}
    expected = own_logits(normalized())[0]
    np.testing.assert_allclose(list(logits.values()), expected[list(logits)], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"instances": {"b64": B64}}, 400, "instances"),
        ({}, 400, "instances"),
        ({"instances": []}, 400, "no image"),
        ({"instances": [{"b64": "no base64!"}]}, 400, "base64"),
        ({"instances": [{"b64": B64[:40]}]}, 400, "corrupt"),
        ({"instances": [{"url": "https://example.com/a.jpg"}]}, 400, "'url'"),
        ({"instances": [[[1, 2], [3]]]}, 400, "different lengths"),
        ({"instances": [[["red"]]]}, 400, "numbers"),
        ({"instances": [[[[-2.0, 0.0, 2.6]]]]}, 400, "normalized"),
        ({"instances": [[[[256, 0, 300]]]]}, 400, "not `byte`"),
        ({"instances": [{"b64": B64}], "parameters": {"top_k": 0}}, 400, "top_k"),
        ({"instances": [{"b64": B64}], "parameters": {"method": "occlusion"}}, 400, "/explain"),
        ({"instances": [{"b64": B64}], "parameters": {"mask": "{}"}}, 400, "/explain"),
        ({"instances": [{"b64": B64}], "other": 1}, 400, "other"),
    ],
)
def test_v1_refuses_in_its_own_words_and_body(client, body: Any, status: int, words: str) -> None:
    answer = client.post("/v1/models/small:predict", json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert words in answer.json()["error"]


def test_v1_lists_models_and_says_which_is_ready(client) -> None:
    assert client.get("/v1/models").json() == {"models": ["small", "other"]}
    assert client.get("/v1/models/other").json() == {"name": "other", "ready": True}
    missing = client.get("/v1/models/smal")
    assert missing.status_code == 404
    assert "Did you mean 'small'" in missing.json()["error"]


def test_more_instances_than_allowed_are_413(serve) -> None:
    with serve(max_images=2) as client:
        answer = client.post("/v1/models/small:predict", json={"instances": [B64] * 3})
        assert (answer.status_code, set(answer.json())) == (413, {"error"})


# ---- Open Inference Protocol V2


def test_v2_says_what_the_server_and_a_model_are(client) -> None:
    assert client.get("/v2").json()["name"] == "camserve"
    for probe in ("live", "ready"):
        assert client.get(f"/v2/health/{probe}").json() == {"live": True, "ready": True}
    assert client.get("/v2/models").json() == {"models": ["small", "other"]}
    version = client.get("/models/other").json()["version"]
    for path in ("/v2/models/other", f"/v2/models/other/versions/{version}"):
        found = client.get(path).json()
        assert (found["name"], found["versions"]) == ("other", [version])
        assert {"name": "scores", "datatype": "FP32", "shape": [-1, 5]} in found["outputs"]
        assert client.get(f"{path}/ready").json() == {"name": "other", "ready": True}


def test_v2_infer_gives_every_class_by_id_and_the_best_ones_in_order(client) -> None:
    found = values(infer(client, file(), parameters={"top_k": 3}))
    expected = explained(client, top_k=7)["predictions"]
    assert found["class_ids"].tolist() == [[each["class_id"] for each in expected[:3]]]
    assert found["labels"].tolist() == [[each["label"] for each in expected[:3]]]
    for each in expected:
        assert found["scores"][0, each["class_id"]] == pytest.approx(each["score"], rel=1e-5)
        assert found["logits"][0, each["class_id"]] == pytest.approx(each["logit"], abs=1e-6)


@pytest.mark.parametrize(
    ("array", "datatype", "parameters"),
    [
        (PIXELS[None], "UINT8", {}),
        (PIXELS[None].transpose(0, 3, 1, 2), "UINT8", {}),
        (PIXELS[None].astype(np.float32) / 255, "FP32", {}),
        (PIXELS[None].astype(np.float64), "FP64", {"values": "byte"}),
        (PIXELS[None].astype(np.int64), "INT64", {}),
        (normalized(), "FP32", {"values": "normalized"}),
        (normalized(), "FP16", {"values": "normalized"}),
    ],
)
def test_v2_tensors_give_the_models_own_logits(
    client, array: Any, datatype: str, parameters: Any
) -> None:
    """In JSON, where the datatype has a form there, and in binary; NHWC and NCHW."""
    expected = own_logits(normalized())
    if datatype == "FP16":
        array = array.astype(np.float16)
    else:
        answer = infer(client, numbers(array, datatype), parameters=parameters)
        np.testing.assert_allclose(values(answer)["logits"], expected, rtol=1e-4, atol=1e-6)
    answer = binary(client, array, datatype, parameters)
    raw = outputs_of(answer)["logits"]
    # Half a number has eleven bits: some pixels come out one level off.
    tolerance = 1e-3 if datatype == "FP16" else 1e-6
    np.testing.assert_allclose(np.frombuffer(raw, "<f4")[None], expected, rtol=1e-4, atol=tolerance)


def binary(
    client: TestClient, array: Any, datatype: str, parameters: Any, path: str = "small"
) -> Any:
    """Ask in the binary form, for an answer in it."""
    tensor = {"name": "x", "datatype": datatype, "shape": list(array.shape)}
    tensor["parameters"] = {"binary_data_size": array.nbytes}
    head = json.dumps(
        {"inputs": [tensor], "parameters": {**parameters, "binary_data_output": True}}
    ).encode()
    return client.post(
        f"/v2/models/{path}/infer",
        content=head + np.ascontiguousarray(array).tobytes(),
        headers={LENGTH: str(len(head)), "content-type": "application/octet-stream"},
    )


def outputs_of(answer: Any) -> dict[str, bytes]:
    """The raw outputs of a binary answer by name."""
    assert answer.status_code == 200, answer.text
    at = int(answer.headers[LENGTH])
    found = {}
    for each in json.loads(answer.content[:at])["outputs"]:
        size = each["parameters"]["binary_data_size"]
        found[each["name"]] = answer.content[at : at + size]
        at += size
    assert at == len(answer.content)
    return found


def test_v2_takes_files_in_the_binary_form_and_a_file_as_the_whole_body(client) -> None:
    jpeg = pictures.jpeg(seed=3)
    raw = b"".join(struct.pack("<I", len(each)) + each for each in (PNG, jpeg))
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2, 1]}
    tensor["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps({"inputs": [tensor]}).encode()
    both = client.post(
        "/v2/models/small/infer", content=head + raw, headers={LENGTH: str(len(head))}
    )
    whole = client.post("/v2/models/small/infer", content=PNG, headers={LENGTH: "0"})
    assert values(both)["scores"].shape == (2, 7)
    np.testing.assert_allclose(values(both)["scores"][:1], values(whole)["scores"], rtol=1e-5)
    np.testing.assert_allclose(
        values(whole)["scores"], values(infer(client, file()))["scores"], rtol=1e-5
    )


def test_v2_explain_gives_the_map_and_what_to_know_about_it(client) -> None:
    answer = infer(
        client, file(), verb="explain", id="q1", parameters={"target": "class 2", "top_k": 1}
    )
    assert answer.json()["id"] == "q1"
    found = values(answer)
    (expected,) = explained(client, include="grid", targets=2)["explanations"]
    assert found["targets"].tolist() == [[2]]
    np.testing.assert_allclose(found["grid"][0, 0], grid_of(expected), atol=1e-5)
    told = json.loads(found["explain"][0, 0])
    assert told["range"] == pytest.approx(expected["range"], rel=1e-3)
    for name in ("class_id", "label", "method", "layer", "flags", "cost"):
        assert told[name] == expected[name]


def test_v2_draws_heatmap_and_overlay_where_they_are_named(client) -> None:
    outputs = [{"name": name} for name in ("heatmap", "overlay", "explain", "targets")]
    parameters = {"explain_top": 2, "method": "layercam", "format": "png", "include": "regions"}
    found = values(infer(client, file(), outputs=outputs, parameters=parameters))
    assert list(found) == ["heatmap", "overlay", "explain", "targets"]
    for name in ("heatmap", "overlay"):
        assert found[name].shape == (1, 2)
        picture = pictures.opened(base64.b64decode(found[name][0, 1]))
        assert picture.size == (80, 60)
    told = json.loads(found["explain"][0, 1])
    assert (told["method"], "regions" in told) == ("layercam", True)


def test_v2_gives_tritons_classification(client) -> None:
    outputs = [{"name": "scores", "parameters": {"classification": 2}}]
    found = values(infer(client, file(), outputs=outputs))["scores"].tolist()
    expected = explained(client, top_k=2)["predictions"]
    assert found == [[f"{e['score']:f}:{e['class_id']}:{e['label']}" for e in expected]]


SMALL_PIXELS = np.zeros((1, 2, 2, 3), np.uint8)
BAD_V2 = {
    "no JSON": (b"{", {}, 400, "not JSON"),
    "no inputs": ({"inputs": []}, {}, 400, "inputs"),
    "two inputs": ({"inputs": [file(), file()]}, {}, 400, "one input"),
    "an unknown output": ({"inputs": [file()], "outputs": [{"name": "x"}]}, {}, 400, "heatmap"),
    "an unknown option": ({"inputs": [file()], "parameters": {"topk": 1}}, {}, 400, "top_k"),
    "no such class": (
        {"inputs": [file()], "outputs": [{"name": "grid"}], "parameters": {"target": 70}},
        {}, 404, "no class 70",
    ),
    "a wrong shape": ({"inputs": [file() | {"shape": [2]}]}, {}, 400, "1 elements"),
    "a negative shape": ({"inputs": [file() | {"shape": [-1, -1]}]}, {}, 400, "elements"),
    "numbers as BYTES": ({"inputs": [file() | {"data": [3]}]}, {}, 400, "strings"),
    "FP16 in JSON": (
        {"inputs": [numbers(SMALL_PIXELS, "FP16")]}, {}, 400, "binary data",
    ),
    "no picture's datatype": ({"inputs": [numbers(SMALL_PIXELS, "BOOL")]}, {}, 400, "BOOL"),
    "too large for its datatype": (
        {"inputs": [numbers(SMALL_PIXELS.astype(int) + 300)]}, {}, 400, "not UINT8",
    ),
    "two channels": ({"inputs": [numbers(SMALL_PIXELS[..., :2])]}, {}, 400, "height, width, 3)"),
    "no pixels": ({"inputs": [numbers(SMALL_PIXELS[:, :0])]}, {}, 400, "no pixels"),
    "an ambiguous layout": (
        {"inputs": [numbers(np.zeros((1, 3, 2, 3), np.uint8))]}, {}, 400, "layout",
    ),
    "an unknown layout": (
        {"inputs": [numbers(SMALL_PIXELS)], "parameters": {"layout": "CHWN"}}, {}, 400, "NHWC",
    ),
    "infinity": (
        {"inputs": [numbers(SMALL_PIXELS.astype(float), "FP32")], "parameters": {"values": "log"}},
        {}, 400, "unit",
    ),
    "no values": ({"inputs": [{k: v for k, v in file().items() if k != "data"}]}, {}, 400, "data"),
    "a size without bytes": (
        {"inputs": [{"name": "x", "datatype": "UINT8", "shape": [1, 2, 2, 3],
                     "parameters": {"binary_data_size": 12}}]},
        {}, 400, "ends within",
    ),
    "a wrong header": ({"inputs": [file()]}, {LENGTH: "100000"}, 400, LENGTH),
    "no number as header": ({"inputs": [file()]}, {LENGTH: "many"}, 400, LENGTH),
    "a compressed body": ({"inputs": [file()]}, {"content-encoding": "gzip"}, 400, "not gzip"),
    "a header of digits": ({"inputs": [file()]}, {LENGTH: "9" * 5000}, 400, LENGTH),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_V2)
def test_v2_refuses_in_its_own_body(client, name: str) -> None:
    body, headers, status, words = BAD_V2[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/v2/models/small/infer", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\xff\0\0\0rest", "ends within an element"),
        (b"\1\0", "ends within an element"),
        (b"\4\0\0\0junk", "not a supported image format"),
        (b"\5\0\0\0data:", "data: URI"),
        (struct.pack("<I", 5) + b"\xff\xd8\xff\0\0", "corrupt"),
    ],
)
def test_v2_refuses_broken_binary_files(client, raw: bytes, words: str) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    tensor["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps({"inputs": [tensor]}).encode()
    answer = client.post(
        "/v2/models/small/infer", content=head + raw, headers={LENGTH: str(len(head))}
    )
    assert answer.status_code == 400
    assert words in answer.json()["error"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_v2_refuses_tensors_that_are_not_finite(client, bad: float) -> None:
    array = np.full((1, 4, 4, 3), bad, np.float32)
    answer = binary(client, array, "FP32", {})
    assert answer.status_code == 400
    assert "not `unit`" in answer.json()["error"]


def test_v2_gives_a_model_of_ten_channels_its_pixels(serve, tmp_path: Path) -> None:
    """NHWC and NCHW, and any other size is fitted as a picture is."""
    config = tmp_path / "models.toml"
    config.write_text(
        '[[model]]\nname = "ten"\nbuilder = "own_models:many_channels"\n'
        "input = { size = 32, mean = 0.5, std = 0.25, channels = 10 }\n"
    )
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 10), dtype=np.uint8)
    model_input = (pixels.astype(np.float32) / 255 - 0.5) / 0.25
    with torch.no_grad():
        net = own_models.many_channels().eval()
        expected = net(torch.from_numpy(model_input.transpose(0, 3, 1, 2).copy())).numpy()
    with serve(models=(), config=config) as client:
        for array in (pixels, pixels.transpose(0, 3, 1, 2)):
            raw = outputs_of(binary(client, array, "UINT8", {}, path="ten"))["logits"]
            np.testing.assert_allclose(
                np.frombuffer(raw, "<f4").reshape(2, 3), expected, rtol=1e-4, atol=1e-5
            )
        wide = binary(client, np.zeros((1, 50, 70, 10), np.uint8), "UINT8", {}, path="ten")
        assert len(outputs_of(wide)["scores"]) == 12


# ---- TorchServe


@pytest.fixture(scope="module")
def versions(serve) -> Iterator[TestClient]:
    """A model in two versions, as TorchServe's paths name them."""
    with serve(models=("resnet-18=tiny:small", "resnet-18-2.0=tiny:other")) as client:
        yield client


@pytest.mark.parametrize(
    "sent",
    [
        {"content": PNG},
        {"content": PNG, "headers": {"content-type": "application/x-www-form-urlencoded"}},
        {"content": PNG, "headers": {"content-type": "image/png"}},
        {"files": {"data": PNG}},
        {"files": {"body": PNG}},
        {"json": {"data": B64}},
        {"json": B64},
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_torchserves_prediction_is_labels_with_scores(client, method: str, sent: Any) -> None:
    answer = client.request(method, "/predictions/small", **sent)
    expected = explained(client)["predictions"]
    assert list(answer.json()) == [each["label"] for each in expected]
    assert list(answer.json().values()) == pytest.approx([e["score"] for e in expected], rel=1e-5)


def test_torchserves_explanation_is_a_nested_array(client) -> None:
    """Of the best class, or of `target` as a field or in the query; other options too."""
    best = client.post("/explanations/small", files={"data": PNG})
    (expected,) = explained(client, include="grid")["explanations"]
    np.testing.assert_allclose(np.array(best.json()), grid_of(expected)[None], atol=1e-5)
    path = "/explanations/small?layer=features.0"
    (expected,) = explained(client, include="grid", targets=2, layer="features.0")["explanations"]
    for answer in (
        client.post(path, files={"data": PNG}, data={"target": "2"}),
        client.put(f"{path}&target=2", content=PNG),
    ):
        np.testing.assert_allclose(np.array(answer.json()), grid_of(expected)[None], atol=1e-5)


def test_torchserve_has_no_place_for_a_verdict_and_says_where_there_is_one(client) -> None:
    refused = client.post("/explanations/small?verify=true", content=PNG)
    assert (refused.status_code, refused.json()["type"]) == (400, "BadRequestException")
    assert "/explain?verify=true" in refused.json()["message"]


def test_several_pictures_of_a_torchserve_form_are_a_list(client) -> None:
    answer = client.post("/predictions/small", files=[("data", PNG), ("data", PNG)])
    assert len(answer.json()) == 2
    assert list(answer.json()[0]) == list(answer.json()[1])


def test_a_version_in_the_path_is_a_model_of_that_name_or_the_served_version(versions) -> None:
    small = versions.get("/models/resnet-18").json()["version"]
    found = {
        version: len(versions.put(f"/predictions/resnet-18{version}?top_k=9", content=PNG).json())
        for version in ("", "/2.0", f"/{small}")
    }
    assert found == {"": 7, "/2.0": 5, f"/{small}": 7}
    assert versions.get("/v2/models/resnet-18/versions/2.0").json()["versions"] == ["2.0"]
    missing = versions.put("/predictions/resnet-18/3.0", content=PNG)
    assert missing.status_code == 404
    assert missing.json()["type"] == "ModelVersionNotFoundException"
    assert small in missing.json()["message"]


@pytest.mark.parametrize(
    ("path", "sent", "status", "kind"),
    [
        ("/predictions/absent", {"content": PNG}, 404, "ModelNotFoundException"),
        ("/predictions/small", {"content": b"no picture"}, 400, "BadRequestException"),
        ("/predictions/small", {"content": b""}, 400, "BadRequestException"),
        ("/predictions/small", {"data": {"target": "1"}, "files": {"x": b""}}, 400,
         "BadRequestException"),
        ("/predictions/small?top_k=no", {"content": PNG}, 400, "BadRequestException"),
        ("/explanations/small?target=70", {"content": PNG}, 404, "ResourceNotFoundException"),
        ("/predictions/small/1/2", {"content": PNG}, 404, "ResourceNotFoundException"),
    ],
)  # fmt: skip
def test_torchserve_refuses_in_its_own_body(
    client, path: str, sent: Any, status: int, kind: str
) -> None:
    answer = client.post(path, **sent)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"code", "type", "message"}
    assert (answer.json()["code"], answer.json()["type"]) == (status, kind)


def test_labels_that_several_classes_share_keep_apart(serve, tmp_path: Path) -> None:
    config = tmp_path / "models.toml"
    labels = '["crane", "crane", "a", "b", "c", "d", "e"]'
    config.write_text(f'[[model]]\nname = "birds"\nbuilder = "tiny:small"\nlabels = {labels}\n')
    with serve(models=(), config=config) as client:
        answer = client.put("/predictions/birds?top_k=7", content=PNG).json()
    assert {"crane (0)", "crane (1)", "a"} < set(answer)
    assert sum(answer.values()) == pytest.approx(1)


# ---- what they share


def test_a_full_queue_is_refused_at_once_with_each_protocols_status(serve) -> None:
    """And every place is given back."""
    with serve(max_queue=1) as client, ThreadPoolExecutor(1) as threads:
        with Gate(client.app.state.service.scheduler) as gate:
            first = threads.submit(client.put, "/predictions/small", content=PNG)
            gate.wait_for_a_batch()
            refused = {
                "/v1/models/small:predict": client.post(
                    "/v1/models/small:predict", json={"instances": [B64]}
                ),
                "/v2/models/small/infer": infer(client, file()),
                "/predictions/small": client.put("/predictions/small", content=PNG),
            }
        assert first.result(10).status_code == 200
        assert {path: answer.status_code for path, answer in refused.items()} == {
            "/v1/models/small:predict": 429,
            "/v2/models/small/infer": 429,
            "/predictions/small": 503,
        }
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused.values())
        assert client.app.state.service.admission.images == 0


def test_the_deadline_and_the_size_of_a_body_hold_here_too(serve) -> None:
    with serve(max_body_bytes=20_000, request_timeout=0.2) as client:
        large = client.put("/predictions/small", content=b"x" * 30_000)
        assert (large.status_code, set(large.json())) == (413, {"code", "type", "message"})
        with Gate(client.app.state.service.scheduler):
            late = infer(client, file())
        assert (late.status_code, set(late.json())) == (504, {"error"})
        assert client.app.state.service.admission.images == 0


def test_a_broken_picture_among_good_ones_fails_the_request_and_leaves_nothing(client) -> None:
    instances = [B64, base64.b64encode(PNG[:60]).decode(), B64]
    answer = client.post("/v1/models/small:explain", json={"instances": instances})
    assert answer.status_code == 400
    assert "truncated or corrupt" in answer.json()["error"]
    assert client.app.state.service.admission.images == 0


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/v1/models/small:predict", {"error"}),
        ("/v2/models/small/infer", {"error"}),
        ("/predictions/small", {"code", "type", "message"}),
        ("/integrations/x-anylabeling/v1/predict", {"success", "error"}),
    ],
)
def test_without_a_key_each_protocol_is_refused_in_its_own_body(
    serve, tmp_path: Path, path: str, keys: set[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"labeling:{hashlib.sha256(b'a key').hexdigest()}\n")
    with serve(api_keys_file=file) as client:
        refused = client.post(path, content=PNG)
        assert (refused.status_code, set(refused.json())) == (401, keys)
        for header in ({"authorization": "Bearer a key"}, {"token": "a key"}):
            assert client.post(path, content=PNG, headers=header).status_code != 401


def held(server: Any, images: int) -> None:
    """Wait until the service holds just so many images."""
    until = time.monotonic() + 10
    while server.service.admission.images != images:
        assert time.monotonic() < until, f"{server.service.admission.images} are held"
        threading.Event().wait(0.005)


@pytest.mark.timeout(30)
def test_a_request_whose_client_has_gone_is_dropped_unrun(run_server, http) -> None:
    """And its place is free again."""
    sent = f"PUT /predictions/small HTTP/1.1\r\nhost: x\r\ncontent-length: {len(PNG)}\r\n\r\n"
    with run_server() as server, ThreadPoolExecutor(1) as threads:
        path = f"{server.url}/predictions/small"
        with Gate(server.service.scheduler) as gate:
            first = threads.submit(http.put, path, content=PNG)
            gate.wait_for_a_batch()
            with socket.create_connection(server.address, timeout=5) as connection:
                connection.sendall(sent.encode() + PNG)
                held(server, 2)
            held(server, 1)
            gate.open()
            assert first.result(10).status_code == 200
            assert http.put(path, content=PNG).status_code == 200
            assert gate.batches == [1, 1]


def test_what_is_no_route_answers_as_the_protocol_does(client) -> None:
    assert set(client.get("/v2/nothing").json()) == {"error"}
    assert set(client.get("/v1/models/small:predict").json()) == {"error"}
    assert client.get("/predictions/small").json()["type"] == "MethodNotAllowedException"
    assert "request_id" in client.get("/nothing").json()
