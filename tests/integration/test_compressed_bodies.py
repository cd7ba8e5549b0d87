"""Compressed request bodies on every route that takes a body, and JSON in other encodings."""

from __future__ import annotations

import base64
import codecs
import gzip
import json
import zlib
from typing import Any

import pictures
import pytest
from starlette.testclient import TestClient

PNG = pictures.png()
B64 = base64.b64encode(PNG).decode()
VIEW = """<View><Image name="i" value="$image"/>
<BrushLabels name="b" toName="i"><Label value="cam"/></BrushLabels></View>"""
TENSOR = {"name": "x", "shape": [1], "datatype": "BYTES", "data": [B64]}
FORM = b'--cut\r\ncontent-disposition: form-data; name="image"\r\n\r\n' + PNG + b"\r\n--cut--\r\n"

JSONS: dict[str, tuple[str, Any]] = {
    "explain": ("/explain", {"images": [{"data": B64}]}),
    "predict": ("/predict", {"images": [{"data": B64}]}),
    "V1": ("/v1/models/small:explain", {"instances": [B64]}),
    "V2": ("/v2/models/small/infer", {"inputs": [TENSOR]}),
    "TorchServe": ("/predictions/small", {"data": B64}),
    "X-AnyLabeling": (
        "/integrations/x-anylabeling/v1/predict",
        {"model": "small", "image": f"data:image/png;base64,{B64}"},
    ),
    "a setup": ("/integrations/label-studio/setup", {"project": "1.1", "schema": VIEW}),
    "tasks": (
        "/integrations/label-studio/predict",
        {
            "tasks": [{"id": 1, "data": {"image": f"data:image/png;base64,{B64}"}}],
            "label_config": VIEW,
        },
    ),
}

BODIES: dict[str, tuple[str, bytes, str]] = {
    name: (route, json.dumps(body).encode(), "application/json")
    for name, (route, body) in JSONS.items()
} | {
    "a raw image": ("/explain", PNG, "image/png"),
    "a form": ("/predict", FORM, "multipart/form-data; boundary=cut"),
    "a raw image of TorchServe": ("/explanations/small", PNG, "application/octet-stream"),
}


def sent(client: TestClient, route: str, body: bytes, kind: str, coding: str = "") -> Any:
    headers = {"content-type": kind} | ({"content-encoding": coding} if coding else {})
    return client.post(route, content=body, headers=headers)


def without_times(response: Any) -> str:
    """Ids and times differ between two answers to the same request."""
    assert response.status_code == 200, response.text
    answer = response.json()
    for name in ("id", "timing_ms"):
        answer.pop(name, None) if isinstance(answer, dict) else None
    for task in answer.get("results", []) if isinstance(answer, dict) else []:
        for region in task.get("result", []):
            del region["id"]
    return json.dumps(answer)


@pytest.mark.parametrize(("route", "body", "kind"), BODIES.values(), ids=BODIES)
def test_a_compressed_body_is_answered_as_the_plain_one(
    client: TestClient, route: str, body: bytes, kind: str
) -> None:
    plain = without_times(sent(client, route, body, kind))
    assert without_times(sent(client, route, body, kind, "identity")) == plain
    assert without_times(sent(client, route, gzip.compress(body), kind, "gzip")) == plain
    assert without_times(sent(client, route, zlib.compress(body), kind, "deflate")) == plain
    twice = gzip.compress(zlib.compress(body))
    assert without_times(sent(client, route, twice, kind, "deflate, gzip")) == plain
    assert client.app.state.service.admission.images == 0


@pytest.mark.parametrize(("route", "body", "kind"), BODIES.values(), ids=BODIES)
def test_another_coding_is_refused_by_its_name(
    client: TestClient, route: str, body: bytes, kind: str
) -> None:
    response = sent(client, route, body, kind, "br")
    ours = not route.startswith(
        ("/v1/", "/v2/", "/predictions", "/explanations", "/integrations/x")
    )
    assert response.status_code == (415 if ours else 400)
    assert "'br'" in response.text
    assert "gzip, deflate" in response.text


@pytest.mark.parametrize(("route", "kind"), [(each[0], each[2]) for each in BODIES.values()])
def test_a_bomb_is_too_large_and_its_bytes_are_counted(
    client: TestClient, serve: Any, route: str, kind: str
) -> None:
    with serve(max_body_bytes=200_000) as strict:
        response = sent(strict, route, gzip.compress(bytes(50_000_000)), kind, "gzip")
        assert response.status_code == 413, response.text
        assert "decoded" in response.text
        assert strict.app.state.service.admission.images == 0


def test_a_body_that_is_not_what_it_says_is_a_client_s_mistake(client: TestClient) -> None:
    response = sent(client, "/predict", PNG, "image/png", "gzip")
    assert (response.status_code, response.json()["code"]) == (400, "malformed_request")
    assert "not gzip" in response.json()["detail"]


# ---- JSON


@pytest.mark.parametrize(("route", "body"), JSONS.values(), ids=JSONS)
def test_json_with_a_byte_order_mark_is_read(client: TestClient, route: str, body: Any) -> None:
    plain = json.dumps(body).encode()
    marked = codecs.BOM_UTF8 + plain
    kind = "application/json"
    expected = without_times(sent(client, route, plain, kind))
    assert without_times(sent(client, route, marked, kind)) == expected


@pytest.mark.parametrize(("route", "body"), JSONS.values(), ids=JSONS)
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_json_in_utf_16_is_refused_by_its_name(
    client: TestClient, route: str, body: Any, encoding: str
) -> None:
    response = sent(client, route, json.dumps(body).encode(encoding), "application/json")
    assert response.status_code == 400
    assert encoding[:6].upper() in response.text
    assert "UTF-8" in response.text


@pytest.mark.parametrize(("route", "body"), JSONS.values(), ids=JSONS)
def test_json_that_is_not_utf_8_is_refused_by_its_name(
    client: TestClient, route: str, body: Any
) -> None:
    latin = json.dumps(body).removesuffix("}") + ', "note": "Käfer"}'
    kind = "application/json; charset=iso-8859-1"
    response = sent(client, route, latin.encode("latin-1"), kind)
    assert response.status_code == 400
    assert "not UTF-8" in response.text


@pytest.mark.parametrize(("route", "body"), JSONS.values(), ids=JSONS)
@pytest.mark.parametrize("format_", ["TIFF", "PNG", "JPEG"])
def test_an_image_that_says_it_is_json_is_told_its_content_type(
    client: TestClient, route: str, body: Any, format_: str
) -> None:
    """A TIFF was taken for JSON in UTF-16."""
    file = pictures.file(pictures.noise(8, 8), format_)
    response = sent(client, route, file, "application/json")
    assert response.status_code == 400
    assert f"{format_} file" in response.text
    assert f"image/{format_.lower()}" in response.text
