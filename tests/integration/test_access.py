"""Keys, origins and headers, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pictures
import pytest
from gates import Gate
from pydantic import ValidationError
from starlette.testclient import TestClient

from api_schemas.options import PredictOptions
from service import logs
from service.app import create_app
from service.errors import ConfigurationError
from service.pipeline.resolve import resolve_options
from service.security import keys as keys_module
from service.settings import Settings

PNG = {"content-type": "image/png"}
KEY, TIGHT, ADMIN = "a long random text", "another one", "the admin's"
FRUGAL = "a third"


def line(name: str, key: str, limits: str = "") -> str:
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()} {limits}\n"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def basic(user: str, password: str) -> dict[str, str]:
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"authorization": f"Basic {pair}"}


def predict(client: TestClient, headers: dict[str, str], **query: Any) -> Any:
    route = "/explain" if "method" in query else "/predict"
    return client.post(route, params=query, content=pictures.png(), headers=PNG | headers)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    api, admin = folder / "api", folder / "admin"
    keys = [line("labeling", KEY), line("tight", TIGHT, "concurrency=1 cost=100")]
    api.write_text("".join([*keys, line("frugal", FRUGAL, "cost=2")]))
    admin.write_text(line("ops", ADMIN))
    return {"api_keys_file": api, "admin_keys_file": admin}


@pytest.fixture(scope="module")
def guarded(serve, files) -> Iterator[TestClient]:
    """A service with keys."""
    with serve(**files) as client:
        yield client


# ---- keys


@pytest.mark.parametrize(
    "headers",
    [
        bearer(KEY),
        {"authorization": f"bearer   {KEY} "},
        {"x-api-key": KEY},
        basic("", KEY),
        basic("anybody", KEY),
    ],
)
def test_a_key_is_taken_in_three_forms(guarded: TestClient, headers: dict[str, str]) -> None:
    assert predict(guarded, headers).status_code == 200


WRONG = {
    "none": {},
    "another": bearer("wrong"),
    "empty": bearer(""),
    "its hash": bearer(hashlib.sha256(KEY.encode()).hexdigest()),
    "as a user": basic(KEY, ""),
    "another password": basic("labeling", "wrong"),
    "no base64": {"authorization": "Basic %%%"},
    "another scheme": {"authorization": f"Digest {KEY}"},
    "no scheme": {"authorization": KEY},
    "a wrong one before a right one": {**bearer("wrong"), "x-api-key": KEY},
    "an admin's": bearer(ADMIN),
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_without_a_key_it_is_401_with_a_challenge(
    guarded: TestClient, headers: dict[str, str]
) -> None:
    response = predict(guarded, headers)
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["www-authenticate"].startswith('Bearer realm="camserve", Basic ')
    assert response.headers["x-request-id"] == response.json()["request_id"]


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "No API key was sent; send one"),
        ({"x-api-key": ""}, "No API key was sent; send one"),
        ({"authorization": "Digest secret-of-it"}, "The Authorization header contains no API key"),
        ({"authorization": "secret-of-it"}, "The Authorization header contains no API key"),
        ({"authorization": "Basic secret-of-it"}, "The Authorization header contains no API key"),
        (bearer("secret-of-it"), "The API key that was sent is not one of this service"),
        (basic("me", "secret-of-it"), "The API key that was sent is not one of this service"),
        ({"x-api-key": "secret-of-it"}, "The API key that was sent is not one of this service"),
    ],
)
def test_no_key_a_wrong_key_and_a_wrong_header_are_told_apart(
    guarded: TestClient, headers: dict[str, str], said: str
) -> None:
    detail = predict(guarded, headers).json()["detail"]
    assert detail.startswith(said)
    assert "Authorization: Bearer KEY, X-API-Key: KEY" in detail
    assert "secret-of-it" not in detail


NOBODY = {
    "no header": {},
    "an empty bearer": {"authorization": "Bearer "},
    "bearer alone": {"authorization": "Bearer"},
    "an empty password": basic("labeling", ""),
    "a blank password": basic("", " "),
    "no password": {"authorization": "Basic " + base64.b64encode(b"labeling").decode()},
    "Basic alone": {"authorization": "Basic "},
    "another scheme": {"authorization": "Digest x"},
    "an empty X-API-Key": {"x-api-key": ""},
    "an empty Token": {"token": ""},
    "empty everywhere": {"authorization": "", "x-api-key": " ", "token": ""},
}


@pytest.mark.parametrize("headers", NOBODY.values(), ids=NOBODY)
def test_no_key_is_nobody_even_where_a_line_holds_the_hash_of_nothing(
    serve, files, headers: dict[str, str]
) -> None:
    """As if the check of the file had been passed: keys of both kinds, each with a blank one."""
    with serve(**files) as client:
        service = client.app.state.service
        for keys in (service.api_keys, service.admin_keys):
            blank = {
                f"blank-{n}": _blank_key(f"blank-{n}", text) for n, text in enumerate(("", " "))
            }
            keys._keys = {**keys._keys, **blank}
        assert predict(client, headers).status_code == 401
        assert client.post("/v2/repository/index", headers=headers).status_code == 401


def _blank_key(name: str, text: str) -> keys_module.Key:
    return keys_module.Key(name, hashlib.sha256(text.encode()).hexdigest())


@pytest.mark.parametrize("setting", ["api_keys_file", "admin_keys_file"])
def test_a_service_does_not_start_with_the_hash_of_an_empty_key(
    tmp_path: Path, setting: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(line("one", ""))
    with pytest.raises(ConfigurationError, match=r"keys, line 1: .*hash of an empty key"):
        create_app(Settings(models=("tiny:small",), workers=1, **{setting: path}))


def test_every_route_wants_a_key_but_those_that_are_open(guarded: TestClient) -> None:
    """Asked of the routes themselves: a new one is closed until somebody opens it."""
    is_open = {
        "/",
        "/docs",
        "/docs/static/x",
        "/favicon.ico",
        "/health/live",
        "/health/ready",
        "/integrations/label-studio/overlay.png",
        "/integrations/label-studio/webhook",
        "/metrics",
        "/openapi.json",
        "/page/x",
        "/ping",
        "/v2/health/live",
        "/v2/health/ready",
    }
    document = guarded.get("/openapi.json").json()
    paths = [(m.upper(), path) for path, item in document["paths"].items() for m in item]
    paths += [("GET", path) for path in is_open] + [("GET", "/nothing/here")]
    assert len(paths) > 20
    for method, path in paths:
        refused = guarded.request(method, path.replace("{", "x").replace("}", "x")).status_code
        expected = path not in is_open or path.startswith("/v2/repository/")
        assert (refused == 401) == expected, (method, path, refused)


@pytest.mark.parametrize(
    "path", ["/docs/../explain", "//explain", "/page/../explain", "/explain/", "/EXPLAIN", "/ping/"]
)
def test_no_spelling_of_a_path_goes_round_the_key(guarded: TestClient, path: str) -> None:
    response = guarded.post(path, content=pictures.png(), headers=PNG)
    assert response.status_code in (401, 404, 405)
    assert "predictions" not in response.text


def test_a_prefix_of_a_proxy_goes_round_nothing(serve, files) -> None:
    with serve(**files, root_path="/docs/static") as client:
        for path in ("/explain", "/docs/static/explain"):
            assert client.post(path, content=pictures.png(), headers=PNG).status_code == 401
            sent = client.post(path, content=pictures.png(), headers=PNG | bearer(KEY))
            assert sent.status_code == 200
        assert client.get("/docs/static/health/live").status_code == 200


def test_api_keys_do_not_open_the_repository_and_admin_keys_nothing_else(
    guarded: TestClient,
) -> None:
    index = "/v2/repository/index"
    assert guarded.post(index, headers=bearer(KEY)).status_code == 401
    assert guarded.post(index, headers=basic("ops", ADMIN)).status_code == 401
    assert guarded.post(index, headers=bearer(ADMIN)).status_code == 200
    assert guarded.get("/models", headers=bearer(ADMIN)).status_code == 401


def test_metrics_can_be_closed(serve, files) -> None:
    with serve(**files, open_metrics=False) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=bearer(KEY)).status_code == 200
        assert client.get("/health/ready").status_code == 200


def test_a_key_is_changed_without_a_restart(
    serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "CHECK_SECONDS", 0)
    path = tmp_path / "keys"
    path.write_text(line("one", "old"))
    with serve(api_keys_file=path) as client:
        assert predict(client, bearer("old")).status_code == 200
        path.write_text(line("one", "old") + line("one-next", "new"))
        assert predict(client, bearer("old")).status_code == 200
        assert predict(client, bearer("new")).status_code == 200
        path.write_text(line("one-next", "new"))
        assert predict(client, bearer("old")).status_code == 401
        path.write_text("oops")
        assert predict(client, bearer("new")).status_code == 200


# ---- bounds of a key


def test_a_key_has_so_many_requests_at_once(guarded: TestClient) -> None:
    with ThreadPoolExecutor(1) as threads, Gate(guarded.app.state.service.scheduler) as gate:
        first = threads.submit(predict, guarded, bearer(TIGHT))
        gate.wait_for_a_batch()
        refused = predict(guarded, bearer(TIGHT))
        assert (refused.status_code, refused.json()["code"]) == (429, "key_limit")
        assert int(refused.headers["retry-after"]) >= 1
        gate.open()
        assert predict(guarded, bearer(KEY)).status_code == 200
        assert first.result(10).status_code == 200
    assert predict(guarded, bearer(TIGHT)).status_code == 200


def test_a_key_has_so_many_requests_a_minute(serve, files) -> None:
    with serve(**files, key_rate=2) as client:
        statuses = [predict(client, bearer(KEY)).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert predict(client, {}).status_code == 401
        assert client.get("/health/live").status_code == 200


def test_what_a_key_can_never_pay_is_refused_before_any_work(guarded: TestClient) -> None:
    assert predict(guarded, bearer(TIGHT), method="rise", samples=50).status_code == 200
    response = predict(guarded, bearer(TIGHT), method="rise", samples=150)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_option")
    assert "'tight'" in response.json()["detail"]
    assert predict(guarded, bearer(KEY), method="rise", samples=150).status_code == 200
    files = [("image", pictures.png())] * 3
    query = {"method": "rise", "samples": 50}
    several = guarded.post("/explain", params=query, files=files, headers=bearer(TIGHT))
    assert several.status_code == 422


def test_what_is_drawn_is_on_a_key_s_bill(guarded: TestClient) -> None:
    """Three overlays and three heatmaps of up to 2048 x 2048 are 1.26 forward passes more."""
    drawn = {"method": "gradcam", "explain_top": 3, "include": ["overlay", "heatmap"]}
    response = predict(guarded, bearer(FRUGAL), **drawn)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_option")
    assert "costs 2.25829 forward passes" in response.json()["detail"]
    assert predict(guarded, bearer(FRUGAL), **drawn, size="model").status_code == 200
    assert predict(guarded, bearer(FRUGAL), **drawn | {"explain_top": 1}).status_code == 200


def test_heatmaps_of_the_v2_protocol_are_on_a_key_s_bill(guarded: TestClient) -> None:
    """Seven of up to 2048 x 2048 are 1.47 forward passes more."""
    body = _v2(1)["json"] | {"outputs": [{"name": "heatmap"}]}
    for top, status in ((1, 200), (7, 400)):
        asked = {"json": body | {"parameters": {"explain_top": top}}}
        answer = guarded.post("/v2/models/small/explain", **asked, headers=bearer(FRUGAL))
        assert answer.status_code == status, answer.text
    assert "costs 2.46801" in answer.text


def test_what_is_captured_is_on_a_key_s_bill(guarded: TestClient) -> None:
    service = guarded.app.state.service
    with service.pool.use("small") as model:
        options = PredictOptions(activations=["features.0"])
        price = resolve_options(model, options, service.limits, 4).price
        floats = math.prod(model.layer("features.0").shape)
    assert price == pytest.approx(4 * (1 + 0.02 * 4 * floats / 2**20))


def _v1(count: int, **more: Any) -> dict[str, Any]:
    image = base64.b64encode(pictures.png()).decode()
    instances = [
        {"b64": image} | ({"target": str(number)} if more else {}) for number in range(count)
    ]
    return {"json": {"instances": instances}}


def _v2(count: int) -> dict[str, Any]:
    data = [base64.b64encode(pictures.png()).decode()] * count
    tensor = {"name": "image", "shape": [count], "datatype": "BYTES", "data": data}
    return {"json": {"inputs": [tensor]}}


def _tensor(count: int) -> dict[str, Any]:
    tensor = {"name": "image", "shape": [count, 8, 8, 3], "datatype": "UINT8"}
    return {"json": {"inputs": [tensor | {"data": [7] * (count * 192)}]}}


def _form(count: int, part: str = "data") -> dict[str, Any]:
    return {"files": [(part, pictures.png())] * count}


def _tasks(count: int) -> dict[str, Any]:
    image = "data:image/png;base64," + base64.b64encode(pictures.png()).decode()
    config = (
        '<View><Image name="i" value="$i"/><BrushLabels name="c" toName="i">'
        '<Label value="class 0"/></BrushLabels></View>'
    )
    tasks = [{"id": number, "data": {"i": image}} for number in range(count)]
    return {"json": {"tasks": tasks, "project": "1.1", "label_config": config, "params": {}}}


def _images_of_a_task(count: int) -> dict[str, Any]:
    made = _tasks(1)["json"]
    image = made["tasks"][0]["data"]["i"]
    config = "".join(
        f'<Image name="i{number}" value="$i{number}"/><BrushLabels name="c{number}" '
        f'toName="i{number}"><Label value="class 0"/></BrushLabels>'
        for number in range(count)
    )
    data = {f"i{number}": image for number in range(count)}
    tasks = [{"id": 1, "data": data}]
    return {"json": made | {"tasks": tasks, "label_config": f"<View>{config}</View>"}}


SPLIT = [
    ("/explain", lambda count: _form(count, "image")),
    ("/predict", lambda count: _form(count, "image")),
    ("/v1/models/small:predict", _v1),
    ("/v1/models/small:explain", _v1),
    ("/v1/models/small:explain", lambda count: _v1(count, target=True)),
    ("/v2/models/small/infer", _v2),
    ("/v2/models/small/explain", _v2),
    ("/v2/models/small/explain", _tensor),
    ("/predictions/small", _form),
    ("/explanations/small", _form),
    ("/integrations/label-studio/predict", _tasks),
    ("/integrations/label-studio/predict", _images_of_a_task),
]
"""Requests of so many images to a route. With another target each their options differ."""


@pytest.mark.parametrize(("route", "body"), SPLIT)
def test_a_request_that_is_split_costs_the_sum_of_its_parts(
    guarded: TestClient, route: str, body: Any
) -> None:
    """Of a key with `cost=2`; none of the parts costs more than a little over one pass."""
    query = "?include=none" if route.startswith(("/explain", "/explanations", "/v1")) else ""
    query = "" if route.endswith(":predict") else query
    assert guarded.post(route + query, **body(1), headers=bearer(FRUGAL)).status_code == 200
    assert guarded.post(route + query, **body(3), headers=bearer(KEY)).status_code == 200
    refused = guarded.post(route + query, **body(3), headers=bearer(FRUGAL))
    assert refused.status_code in {400, 422}, refused.text
    assert "costs 3" in refused.text
    assert "'frugal'" in refused.text


def test_many_targets_at_an_early_layer_are_on_a_key_s_bill(guarded: TestClient) -> None:
    asked = {"method": "gradcam", "layer": "features.0", "include": "none"}
    assert predict(guarded, bearer(FRUGAL), **asked).status_code == 200
    refused = predict(guarded, bearer(FRUGAL), **asked, explain_top=7)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_option")


# ---- headers and origins

ROUTES = ["/", "/docs", "/health/live", "/models", "/nothing", "/openapi.json", "/metrics"]


@pytest.mark.parametrize("route", ROUTES)
def test_every_answer_has_the_security_headers(client: TestClient, route: str) -> None:
    headers = client.get(route).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "server" not in headers


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_the_pages_have_nothing_inline_that_the_policy_would_stop(
    client: TestClient, page: str
) -> None:
    text = client.get(page).text.lower()
    assert "<script>" not in text
    assert "<style" not in text
    assert " style=" not in text
    assert " onclick=" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_other_origins_are_told_nothing_until_they_are_allowed(client: TestClient, serve) -> None:
    asked = {"origin": "https://label.example.org"}
    preflight = asked | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key",
    }
    assert "access-control-allow-origin" not in client.get("/models", headers=asked).headers
    assert client.options("/explain", headers=preflight).status_code == 405
    with serve(cors_origins=("https://label.example.org",)) as allowing:
        answer = allowing.get("/models", headers=asked).headers
        assert answer["access-control-allow-origin"] == "https://label.example.org"
        assert "access-control-allow-credentials" not in answer
        assert allowing.options("/explain", headers=preflight).status_code == 200
        other = {"origin": "https://evil.example"}
        assert "access-control-allow-origin" not in allowing.get("/models", headers=other).headers


@pytest.mark.parametrize(
    ("given", "write"),
    [
        ("label.example.org", "https://label.example.org"),
        ("https://label.example.org/", "https://label.example.org"),
        ("https://Label.example.org", "https://label.example.org"),
        ("http://localhost:8080/tasks?page=1", "http://localhost:8080"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused_with_the_one_that_it_does(
    given: str, write: str
) -> None:
    with pytest.raises(ValidationError, match=f"write {re.escape(write)}"):
        Settings(cors_origins=f"https://other.example.org,{given}")


@pytest.mark.parametrize("given", ["*", "http://[::1]:8080", "moz-extension://1a2b", "https://a.b"])
def test_an_origin_of_any_scheme_is_taken(given: str) -> None:
    assert Settings(cors_origins=given).cors_origins == (given,)


SENT = (
    ["accept", "authorization", "content-encoding", "content-type"],
    ["inference-header-content-length", "token", "traceparent", "tracestate"],
    ["x-api-key", "x-request-id", "x-request-timeout"],
)


def test_another_origin_may_send_and_read_every_header_that_is_documented(serve) -> None:
    origin = "https://label.example.org"
    with serve(cors_origins=(origin,)) as client:
        for name in (name for names in SENT for name in names):
            asked = {"access-control-request-method": "POST"}
            asked |= {"origin": origin, "access-control-request-headers": name}
            assert client.options("/explain", headers=asked).status_code == 200, name
        read = client.get("/models", headers={"origin": origin}).headers
    assert {each.strip() for each in read["access-control-expose-headers"].split(",")} == {
        *("Inference-Header-Content-Length", "Retry-After", "Server-Timing", "WWW-Authenticate"),
        *("X-Kernels", "X-Kernels-Left-Out", "X-Request-ID"),
    }


def test_a_preflight_needs_no_key_and_a_refusal_can_be_read(serve, files) -> None:
    origin = {"origin": "https://label.example.org"}
    with serve(**files, cors_origins=("https://label.example.org",)) as client:
        preflight = origin | {"access-control-request-method": "POST"}
        assert client.options("/explain", headers=preflight).status_code == 200
        refused = client.post("/explain", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin["origin"]


# ---- the log


@pytest.mark.parametrize(
    ("host", "keys", "warns"),
    [
        ("0.0.0.0", False, True),  # noqa: S104 - nothing listens
        ("::", False, True),
        ("192.168.1.5", False, True),
        ("camserve.example", False, True),
        ("0.0.0.0", True, False),  # noqa: S104
        ("127.0.0.1", False, False),
        ("::1", False, False),
        ("localhost", False, False),
    ],
)
def test_a_public_address_without_keys_is_warned_of(
    files, caplog: pytest.LogCaptureFixture, *, host: str, keys: bool, warns: bool
) -> None:
    values: dict[str, Any] = {"models": ("tiny:small",), "workers": 1, "host": host}
    with TestClient(create_app(Settings(**values, **(files if keys else {})))):
        assert ("open_to_all" in caplog.text) == warns


def test_the_log_says_who_asked_and_never_what_they_know_or_sent(
    guarded: TestClient, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """No key, no hash of one, no byte of a picture, no signature of a URL, wherever it stood."""
    logs.configure("json", level=logging.DEBUG)
    caplog.clear()
    data = pictures.png()
    text = base64.b64encode(data).decode()
    secret = "X-Signature=geheim"  # noqa: S105
    sent = predict(guarded, bearer(KEY), method="gradcam", include="overlay")
    predict(guarded, basic("me", KEY))
    predict(guarded, bearer("nearly " + KEY))
    predict(guarded, bearer(KEY), model=KEY)
    guarded.post("/explain", json={"images": [{"data": text}]}, headers=bearer(KEY))
    guarded.post("/explain", json={"images": [{"data": text[:-9] + "%"}]}, headers=bearer(KEY))
    guarded.post("/explain", content=data[:-50], headers=PNG | bearer(KEY))
    guarded.post("/explain", files=[("image", data), ("other", data)], headers=bearer(KEY))
    url = f"http://images.example/cat.png?{secret}"
    guarded.post("/explain", json={"images": [{"url": url}]}, headers=bearer(KEY))
    guarded.get(f"/models?key={KEY}", headers=bearer(KEY))
    log = capfd.readouterr().err
    assert log
    forbidden = [KEY, hashlib.sha256(KEY.encode()).hexdigest(), text[100:140], secret, ADMIN]
    forbidden += [sent.json()["results"][0]["explanations"][0]["overlay"]["data"][100:140]]
    forbidden += [basic("me", KEY)["authorization"], data[60:76].hex(), repr(data[60:76])[2:-1]]
    ours = [each for each in log.splitlines() if '"httpx' not in each and "testserver" not in each]
    for each in forbidden:
        assert each not in "\n".join(ours)
    requests = [json.loads(each) for each in ours if '"event": "request"' in each]
    assert len(requests) == 10
    first = requests[0]
    assert first["request_id"] == sent.headers["x-request-id"]
    assert (first["key"], first["model"], first["status"]) == ("labeling", "small", 200)
    assert {"decode", "queue", "inference", "render", "total"} <= set(first)
    assert [each["status"] for each in requests[1:4]] == [200, 401, 404]
    assert "key" not in requests[2]
