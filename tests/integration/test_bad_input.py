"""Whatever is sent: a problem body that says what to do, never a traceback, never a 500."""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import zlib
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import httpx
import pictures
import pytest
from starlette.testclient import TestClient

from service import errors
from service.routes.problems import STATUS, status_of

PNG = {"content-type": "image/png"}
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=cut"}
GOOD = base64.b64encode(pictures.png()).decode()


@pytest.fixture(scope="module")
def strict(serve) -> Iterator[TestClient]:
    """A service with small limits."""
    with serve(
        models=("tiny:small", "other=tiny:other"),
        max_body_bytes=60_000,
        max_images=3,
        max_pixels=100_000,
        max_activation_bytes=500_000,
    ) as client:
        yield client


def check_problem(response: Any, status: int, code: str, *words: str) -> None:
    """The response is a whole problem body of that status and code, and its detail has `words`."""
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "code", "detail", "request_id"}
    assert body["status"] == status
    assert body["title"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    assert "site-packages" not in response.text
    assert body["detail"][-1] in ".?"
    for word in words:
        assert word in body["detail"], body["detail"]


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    image = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + image + chunk(b"IEND", b"")


def form(*parts: tuple[str, bytes], end: bytes = b"--cut--\r\n") -> bytes:
    """A multipart body with the boundary `cut`."""
    lines = [
        f'--cut\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in parts
    ]
    return b"".join(lines) + end


# ---- images

IMAGES = {
    "empty body": (b"", 400, "empty_body", "--data-binary @cat.jpg"),
    "text": (b"I am not a picture", 415, "unsupported_image", "JPEG, PNG"),
    "HTML": (b"<!doctype html><html></html>", 415, "unsupported_image", "JPEG, PNG"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_image", "JPEG"),
    "truncated JPEG": (pictures.jpeg()[:-700], 400, "corrupt_image", "complete file"),
    "truncated PNG": (pictures.png()[:-700], 400, "corrupt_image", "complete file"),
    "a JPEG's first bytes": (b"\xff\xd8\xff", 400, "corrupt_image", "complete file"),
    "bomb": (png_header(50_000, 50_000), 413, "image_too_large", "at most 100000 pixels"),
    "over the limit": (pictures.file(pictures.red(400, 300)), 413, "image_too_large", "400 x 300"),
    "zero width": (png_header(0, 10), 400, "corrupt_image", "again"),
    "zero height": (png_header(10, 0), 400, "corrupt_image", "again"),
}


@pytest.mark.parametrize(("data", "status", "code", "words"), IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("route", ["/explain", "/predict"])
def test_a_bad_image_is_told_apart(
    strict: TestClient, *, route: str, data: bytes, status: int, code: str, words: str
) -> None:
    response = strict.post(route, content=data, headers=PNG)
    check_problem(response, status, code, words)


@pytest.mark.parametrize(("data", "status", "code", "words"), IMAGES.values(), ids=IMAGES)
def test_a_bad_image_says_the_same_in_json_and_in_a_form(
    strict: TestClient, data: bytes, status: int, code: str, words: str
) -> None:
    if not data:  # here there is a body, and the image in it is empty
        code, words = "empty_image", "content of the image file"
    text = base64.b64encode(data).decode()
    check_problem(strict.post("/explain", json={"images": [{"data": text}]}), status, code, words)
    body = form(("image", data))
    check_problem(strict.post("/explain", content=body, headers=FORM), status, code, words)


# ---- options

OPTIONS = {
    "unknown": ("topk=3", 422, "invalid_option", ["'topk'", "Did you mean 'top_k'?"]),
    "unknown, like none": ("zzz=3", 422, "invalid_option", ["'zzz'"]),
    "two unknown": ("topk=3&layers=x", 422, "invalid_option", ["'top_k'", "'layer'"]),
    "unknown method": (
        "method=gradcamm",
        422,
        "invalid_option",
        ["method:", "Did you mean 'gradcam'"],
    ),
    "unknown fit": ("fit=stretch", 422, "invalid_option", ["fit:", "'squash'"]),
    "unknown include": ("include=heatmaps", 422, "invalid_option", ["include", "'heatmap'"]),
    "several with a comma": (
        "include=heatmap,overlay",
        422,
        "invalid_option",
        ["include: repeat the parameter: include=heatmap&include=overlay"],
    ),
    "unknown, with a comma": ("include=heatmap,x", 422, "invalid_option", ["include", "'heatmap'"]),
    "unknown colormap": ("colormap=grey", 422, "invalid_option", ["colormap:", "'gray'"]),
    "unknown format": ("format=gif", 422, "invalid_option", ["format:", "'webp'"]),
    "unknown size": ("size=full", 422, "invalid_option", ["size:", "'native'"]),
    "top_k 0": ("top_k=0", 422, "invalid_option", ["top_k:", "1"]),
    "top_k -1": ("top_k=-1", 422, "invalid_option", ["top_k:"]),
    "top_k too large": ("top_k=1001", 422, "invalid_option", ["top_k:", "1000"]),
    "top_k no number": ("top_k=five", 422, "invalid_option", ["top_k:", "integer"]),
    "top_k a fraction": ("top_k=1.5", 422, "invalid_option", ["top_k:", "integer"]),
    "opacity over 1": ("opacity=1.1", 422, "invalid_option", ["opacity:", "1"]),
    "opacity NaN": ("opacity=nan", 422, "invalid_option", ["opacity:"]),
    "explain_top 0": ("explain_top=0", 422, "invalid_option", ["explain_top:"]),
    "101 targets": ("&".join(["targets=1"] * 101), 422, "invalid_option", ["targets:", "100"]),
    "empty target": ("targets=", 422, "invalid_option", ["targets"]),
    "targets and top": ("targets=1&explain_top=2", 422, "invalid_option", ["`explain_top`"]),
    "none and more": ("include=none&include=grid", 422, "invalid_option", ["`include=none`"]),
    "unknown model": ("model=smal", 404, "unknown_model", ["'smal'", "Did you mean 'small'?"]),
    "empty model": ("model=", 404, "unknown_model", ["Served: small, other"]),
    "unknown class id": ("targets=7", 404, "unknown_class", ["0 to 6"]),
    "huge class id": ("targets=" + "9" * 200, 404, "unknown_class", ["0 to 6"]),
    "negative class id": ("targets=-1", 404, "unknown_class", ["'-1'"]),
    "other digits": ("targets=%C2%B2", 404, "unknown_class", ["'²'"]),
    "unknown label": ("targets=class8", 404, "unknown_class", ["Did you mean 'class", "/models"]),
    "unknown layer": (
        "layer=feature.3",
        404,
        "unknown_layer",
        ["Did you mean 'features.3'", "/models/small/layers"],
    ),
    "no map": ("layer=head", 422, "invalid_option", ["'head'", "/models/small/layers"]),
    "one of two layers": ("layer=features&layer=x", 404, "unknown_layer", ["'x'"]),
    "no glob match": ("activations=layer*", 404, "unknown_layer", ["'layer*'"]),
    "no type match": ("activations=type:conv2d", 404, "unknown_layer", ["'type:conv2d'"]),
    "unknown activation": ("activations=heads", 404, "unknown_layer", ["'head'"]),
    "unknown form": ("activations=head&activation_as=png", 422, "invalid_option", ["'image'"]),
    "too many activations": ("activations=**", 422, "invalid_option", ["500000", "fewer"]),
}


@pytest.mark.parametrize(("query", "status", "code", "words"), OPTIONS.values(), ids=OPTIONS)
def test_a_bad_option_is_named_with_what_it_takes(
    strict: TestClient, query: str, status: int, code: str, words: list[str]
) -> None:
    response = strict.post(f"/explain?{query}", content=pictures.png(), headers=PNG)
    check_problem(response, status, code, *words)


# ---- bodies

BODIES = {
    "curl's default": (
        b"\x89PNG",
        {"content-type": "application/x-www-form-urlencoded"},
        (415, "unsupported_media_type", ["-H 'content-type: image/jpeg'", "--data-binary"]),
    ),
    "no type": (pictures.png(), {}, (415, "unsupported_media_type", ["-H 'content-type: image/"])),
    "text": (
        pictures.png(),
        {"content-type": "text/plain"},
        (415, "unsupported_media_type", ["'text/plain'"]),
    ),
    "other multipart": (
        form(("image", pictures.png())),
        {"content-type": "multipart/mixed; boundary=cut"},
        (415, "unsupported_media_type", ["'multipart/mixed'"]),
    ),
    "no boundary": (
        form(("image", pictures.png())),
        {"content-type": "multipart/form-data"},
        (400, "malformed_request", ["boundary", "by hand"]),
    ),
    "another boundary": (
        form(("image", pictures.png())),
        {"content-type": "multipart/form-data; boundary=other"},
        (400, "malformed_request", ["multipart"]),
    ),
    "cut in an image": (
        form(("image", pictures.png()))[:-500],
        FORM,
        (400, "malformed_request", ["ends too early"]),
    ),
    "no last boundary": (
        form(("image", pictures.png()), end=b""),
        FORM,
        (400, "malformed_request", ["ends too early"]),
    ),
    "cut in a header": (b"--cut\r\ncontent-dispo", FORM, (400, "malformed_request", ["too early"])),
    "no form": (b"just text", FORM, (400, "malformed_request", ["multipart"])),
    "a long part header": (
        b"--cut\r\ncontent-disposition: " + b"x" * 5000 + b"\r\n\r\n\r\n--cut--\r\n",
        FORM,
        (400, "malformed_request", ["header"]),
    ),
    "no parts": (form(), FORM, (400, None, ["image"])),
    "another field": (
        form(("top_k", b"3"), ("image", pictures.png())),
        FORM,
        (422, "invalid_option", ["'top_k'", "?top_k=3"]),
    ),
    "a part without a name": (
        b"--cut\r\ncontent-type: image/png\r\n\r\nx\r\n--cut--\r\n",
        FORM,
        (422, "invalid_option", ["'image'"]),
    ),
    "four images": (
        form(*[("image", b"x")] * 4),
        FORM,
        (413, "body_too_large", ["3 images", "several requests"]),
    ),
    "a thousand parts": (form(*[("image", b"")] * 1000), FORM, (413, "body_too_large", ["3"])),
    "four images in JSON": (
        json.dumps({"images": [{"data": GOOD[:8]}] * 4}),
        JSON,
        (413, "body_too_large", ["3 images"]),
    ),
    "not JSON": (b'{"images": [', JSON, (400, "malformed_request", ["not JSON"])),
    "a picture as JSON": (pictures.png(), JSON, (400, "malformed_request", ["not JSON"])),
    "a JSON list": (b"[]", JSON, (400, "malformed_request", ["not an object", '"images"'])),
    "a JSON word": (b"null", JSON, (400, "malformed_request", ["not an object"])),
    "deep JSON": (b"[" * 5000, JSON, (400, "malformed_request", ["JSON"])),
    "no images": (b"{}", JSON, (422, "invalid_option", ["images"])),
    "empty images": (b'{"images": []}', JSON, (422, "invalid_option", ["images"])),
    "images as text": (b'{"images": ["QUJD"]}', JSON, (422, "invalid_option", ["images.0"])),
    "an unknown field": (
        json.dumps({"images": [{"data": GOOD}], "topk": 3}),
        JSON,
        (422, "invalid_option", ["'topk'", "Did you mean 'top_k'?"]),
    ),
    "an unknown field of an image": (
        json.dumps({"images": [{"dat": GOOD}]}),
        JSON,
        (422, "invalid_option", ["images.0", "'dat'"]),
    ),
    "a wrong type": (
        json.dumps({"images": [{"data": GOOD}], "layer": "features"}),
        JSON,
        (422, "invalid_option", ["layer:", "array"]),
    ),
    "a class that is no number": (
        json.dumps({"images": [{"data": GOOD}], "targets": [1.5, True, None]}),
        JSON,
        (422, "invalid_option", ["targets.0:", "targets.1:", "targets.2:"]),
    ),
    "contradicting fields": (
        json.dumps({"images": [{"data": GOOD}], "targets": [1], "explain_top": 2}),
        JSON,
        (422, "invalid_option", ["`explain_top`"]),
    ),
    "wrong base64": (
        json.dumps({"images": [{"data": "%%%"}]}),
        JSON,
        (400, "invalid_image_data", ["base64"]),
    ),
    "base64 for URLs": (
        json.dumps({"images": [{"data": base64.urlsafe_b64encode(b"\xfb\xff" * 30).decode()}]}),
        JSON,
        (400, "invalid_image_data", ["standard base64"]),
    ),
    "base64 cut short": (
        json.dumps({"images": [{"data": GOOD[:-3]}]}),
        JSON,
        (400, "invalid_image_data", ["base64"]),
    ),
    "base64 of nothing": (json.dumps({"images": [{"data": ""}]}), JSON, (400, "empty_image", [])),
    "other letters": (
        json.dumps({"images": [{"data": "ÄÖÜ✓"}]}),
        JSON,
        (400, "invalid_image_data", ["base64"]),
    ),
    "a data: URI without base64": (
        json.dumps({"images": [{"data": "data:image/png,%89PNG"}]}),
        JSON,
        (400, "invalid_image_data", ["data:image/png;base64,"]),
    ),
    "a URL": (
        json.dumps({"images": [{"url": "https://example.org/cat.jpg"}]}),
        JSON,
        (400, "invalid_image_data", ["URL", "`data`"]),
    ),
    "neither data nor URL": (
        json.dumps({"images": [{}]}),
        JSON,
        (400, "invalid_image_data", ["`data`"]),
    ),
    "too many bytes": (b"x" * 60_001, PNG, (413, "body_too_large", ["60000 bytes"])),
}


@pytest.mark.parametrize(("body", "headers", "expected"), BODIES.values(), ids=BODIES)
def test_a_bad_body_says_what_to_send(strict: TestClient, body, headers, expected) -> None:
    status, code, words = expected
    response = strict.post("/explain", content=body, headers=headers)
    check_problem(response, status, code or response.json()["code"], *words)


@pytest.mark.parametrize("query", ["top_k=3", "x=1", "="])
def test_a_json_request_has_no_query(strict: TestClient, query: str) -> None:
    response = strict.post(f"/explain?{query}", json={"images": [{"data": GOOD}]})
    check_problem(response, 422, "invalid_option")


def test_options_in_the_query_of_a_json_request_are_sent_to_its_fields(strict: TestClient) -> None:
    response = strict.post("/explain?top_k=3", json={"images": [{"data": GOOD}]})
    check_problem(response, 422, "invalid_option", "fields", "`images`")


# ---- some images bad, some good


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_image_leaves_the_others_their_answers(strict: TestClient, place: int) -> None:
    files = [pictures.png(seed=seed) for seed in range(3)]
    files[place] = b"no picture"
    sent = [("image", data) for data in files]
    response = strict.post("/explain", files=sent)
    assert response.status_code == 200
    results = response.json()["results"]
    failed = results.pop(place)
    assert set(failed) == {"error"}
    assert set(failed["error"]) == {"code", "detail", "status"}
    assert (failed["error"]["code"], failed["error"]["status"]) == ("unsupported_image", 415)
    assert all(result["explanations"] for result in results)


def test_a_bad_image_in_json_is_an_error_in_its_place(strict: TestClient) -> None:
    images = [{"data": GOOD}, {"data": "%"}, {"url": "http://localhost/"}]
    results = strict.post("/predict", json={"images": images}).json()["results"]
    assert results[0]["predictions"]
    assert [each["error"]["code"] for each in results[1:]] == ["invalid_image_data"] * 2


def test_where_all_images_fail_the_first_error_answers(strict: TestClient) -> None:
    sent = [("image", data) for data in (png_header(50_000, 50_000), b"", b"no picture")]
    response = strict.post("/explain", files=sent)
    check_problem(response, 413, "image_too_large")


# ---- limits of a body on a real socket


@pytest.fixture(scope="module")
def strict_url(run_server) -> Iterator[str]:
    with run_server(max_body_bytes=100_000, max_images=3) as server:
        yield server.url


def test_a_declared_body_over_the_limit_is_refused(strict_url: str, http: httpx.Client) -> None:
    response = http.post(f"{strict_url}/explain", content=b"x" * 20_000_000, headers=PNG)
    check_problem(response, 413, "body_too_large", "100000 bytes")


def test_a_chunked_body_over_the_limit_is_refused(strict_url: str, http: httpx.Client) -> None:
    chunks = (b"x" * 10_000 for _ in range(2_000))
    response = http.post(f"{strict_url}/explain", content=chunks, headers=PNG)
    check_problem(response, 413, "body_too_large", "100000 bytes")


def test_a_chunked_body_within_the_limit_is_answered(strict_url: str, http: httpx.Client) -> None:
    data = pictures.png()
    chunks = (data[start : start + 1000] for start in range(0, len(data), 1000))
    response = http.post(f"{strict_url}/explain", content=chunks, headers=PNG)
    assert response.status_code == 200


def test_the_connection_is_good_for_another_request_after_a_refusal(
    strict_url: str,
) -> None:
    connection = HTTPConnection(strict_url.removeprefix("http://"), timeout=5)
    try:
        statuses = []
        for body in (b"x" * 200_000, b"no picture", pictures.png()):
            connection.request("POST", "/predict", body, PNG)
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
        assert statuses == [413, 415, 200]
    finally:
        connection.close()


def test_what_is_no_http_does_not_hurt(strict_url: str, http: httpx.Client) -> None:
    host, port = strict_url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    with connection:
        connection.sendall(b"\x16\x03\x01\x02\x00 not HTTP\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert http.get(f"{strict_url}/health/ready").status_code == 200


# ---- routes


def test_an_unknown_route_is_a_problem(strict: TestClient) -> None:
    check_problem(strict.get("/explode"), 404, "not_found", "/explode", "/docs")


@pytest.mark.parametrize(("method", "route"), [("GET", "/explain"), ("DELETE", "/models")])
def test_a_wrong_method_is_a_problem_and_says_what_is_allowed(
    strict: TestClient, method: str, route: str
) -> None:
    response = strict.request(method, route)
    check_problem(response, 405, "method_not_allowed", route, method)
    assert response.headers["allow"] in {"POST", "GET, HEAD"}


@pytest.mark.parametrize("route", ["/models/smal", "/models/smal/layers"])
def test_an_unknown_model_in_the_path_is_a_problem(strict: TestClient, route: str) -> None:
    check_problem(strict.get(route), 404, "unknown_model", "Did you mean 'small'?")


def test_the_service_is_well_after_all_that(strict: TestClient) -> None:
    assert strict.post("/explain", content=pictures.png(), headers=PNG).status_code == 200
    assert strict.app.state.service.admission.images == 0


# ---- the tree of errors and its table


def every_error() -> list[type[errors.CamserveError]]:
    found, left = [], [errors.CamserveError]
    while left:
        found.append(left.pop())
        left += found[-1].__subclasses__()
    return [each for each in found if each.__module__ == errors.__name__]


GROUPS = {errors.CamserveError, errors.RequestError, errors.ImageError, errors.Refused}
"""Bases that are never raised themselves; each shares the code of one of its classes, or has the
one of an unexpected exception."""


def test_every_error_that_a_request_may_meet_has_its_status() -> None:
    unlisted = {each for each in every_error() if each not in STATUS}
    assert unlisted <= GROUPS | {errors.ConfigurationError, errors.InferenceHangs}
    assert status_of(errors.InferenceHangs("why")) == 500, "that of its base"


def test_every_error_has_a_status_of_its_kind() -> None:
    for each in set(every_error()) - GROUPS:
        error = each("why")
        if isinstance(error, errors.RequestError | errors.ImageError):
            assert 400 <= status_of(error) < 500, each
        elif isinstance(error, errors.Unauthorized):
            assert status_of(error) == 401
        elif isinstance(error, errors.Refused):
            assert status_of(error) in {429, 503}, each
            assert error.retry_after >= 1
        else:
            assert status_of(error) in {500, 503, 504}, each


def test_every_code_is_snake_case_and_of_one_class() -> None:
    codes = [each.code for each in every_error() if each not in GROUPS]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", code) for code in codes)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Each class that has a code of its own stands there beside it."""
    drawn = dict(re.findall(r"── (\w+) +([a-z_]+)\n", errors.__doc__ or ""))
    codes = {each.__name__: each.code for each in set(every_error()) - GROUPS}
    del codes["ConfigurationError"]  # told on the command line, where no code is shown
    assert drawn == codes
