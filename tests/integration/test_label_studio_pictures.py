"""Where pictures of Label Studio's tasks come from, and the overlays of its pages."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pictures
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner
from webhosts import Forbidden, Web, forbidden, web

from service.cli.main import app
from service.errors import ConfigurationError
from service.security.overlay_tokens import Grant, sign
from service.settings import Settings

BASE = "/integrations/label-studio"
PNG = pictures.png()
IMAGE = {"content-type": "image/png"}
ACCESS_TOKEN = "head.personal.signature"  # noqa: S105
LEGACY_TOKEN = "0123456789abcdef" * 2 + "01234567"
SECRET = "a secret of sixteen"  # noqa: S105
CONFIG = """<View><Image name="i" value="$image"/>
  <BrushLabels name="c" toName="i"><Label value="cam"/></BrushLabels></View>"""


class Studio:
    """A host that answers as Label Studio does to its tokens, and remembers what it was sent."""

    def __init__(self, server: Web) -> None:
        self.url = f"http://127.0.0.1:{server.port}"
        self.server = server
        self.sent: list[tuple[str, str | None]] = []
        self.exchanged: list[Any] = []
        self.good = {f"Token {LEGACY_TOKEN}"}
        server.pages["/api/token/refresh/"] = self._exchange

    def serve(self, path: str, status: int = 200, headers: Any = None, body: bytes = PNG) -> None:
        def page(request: BaseHTTPRequestHandler) -> None:
            given = request.headers["authorization"]
            self.sent.append((request.path, given))
            ok = given in self.good
            request.send_response(status if ok else 401)
            for name, value in (headers or IMAGE).items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(body if ok else b"")

        self.server.pages[path] = page

    def _exchange(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        self.exchanged.append(body)
        assert request.command == "POST"
        ok = body == {"refresh": ACCESS_TOKEN}
        access = f"access-{len(self.exchanged)}"
        self.good.add(f"Bearer {access}")
        request.send_response(200 if ok else 401)
        request.send_header("content-type", "application/json")
        request.end_headers()
        request.wfile.write(json.dumps({"access": access}).encode())


@pytest.fixture
def studio() -> Iterator[Studio]:
    with web() as server:
        found = Studio(server)
        found.serve("/data/upload/1/ab-cat.png")
        yield found


@pytest.fixture(scope="module")
def cloud() -> Iterator[Web]:
    """A storage's host, behind links that are signed."""
    with web() as server:
        server.pages["/bucket/cat.png?X-Signature=s&X-Expires=9"] = (200, IMAGE, PNG)
        yield server


@pytest.fixture(scope="module")
def inside() -> Iterator[Forbidden]:
    with forbidden() as listener:
        yield listener


@pytest.fixture
def client(serve, studio: Studio, cloud: Web) -> Iterator[TestClient]:
    """A service with a personal access token, and with the storage's host allowed."""
    with serve(
        label_studio_url=studio.url,
        label_studio_token=ACCESS_TOKEN,
        allowed_image_hosts=(f"private:127.0.0.1:{cloud.port}",),
        overlay_secret=SECRET,
        image_url_timeout=5,
    ) as client:
        yield client


def found(client: TestClient, *sources: Any, task: int = 7) -> list[bool]:
    """For each picture, whether there is a prediction."""
    tasks = [{"id": task, "data": {"image": source}} for source in sources]
    body = {"tasks": tasks, "label_config": CONFIG}
    answer = client.post(f"{BASE}/predict", json=body)
    assert answer.status_code == 200, answer.text
    return [bool(each) for each in answer.json()["results"]]


# ---- tokens


def test_a_personal_access_token_is_exchanged_once_and_its_access_token_sent(
    client, studio: Studio
) -> None:
    assert all(found(client, *["/data/upload/1/ab-cat.png"] * 5))
    assert studio.exchanged == [{"refresh": ACCESS_TOKEN}]
    assert {given for _, given in studio.sent} == {"Bearer access-1"}


def test_a_legacy_token_goes_as_token(serve, studio: Studio) -> None:
    with serve(label_studio_url=studio.url, label_studio_token=LEGACY_TOKEN) as client:
        assert found(client, "/data/upload/1/ab-cat.png") == [True]
    assert studio.sent == [("/data/upload/1/ab-cat.png", f"Token {LEGACY_TOKEN}")]
    assert studio.exchanged == []


def test_a_token_that_is_refused_leaves_tasks_empty(serve, studio: Studio) -> None:
    for token in ("head.of.another", None):
        with serve(label_studio_url=studio.url, label_studio_token=token) as client:
            assert found(client, "/data/upload/1/ab-cat.png") == [False]
    assert ("/data/upload/1/ab-cat.png", None) in studio.sent


def test_an_access_token_that_is_old_is_exchanged_anew(client, studio: Studio, monkeypatch) -> None:
    monkeypatch.setattr("service.integrations.label_studio.host.ACCESS_SECONDS", -1.0)
    assert all(found(client, *["/data/upload/1/ab-cat.png"] * 2))
    assert len(studio.exchanged) == 2


def test_the_token_is_in_no_repr_of_the_settings() -> None:
    settings = Settings(label_studio_token=ACCESS_TOKEN, overlay_secret=SECRET)
    assert ACCESS_TOKEN not in repr(settings)
    assert SECRET not in repr(settings)


# ---- sources


def test_pictures_of_every_kind_of_source_are_found(client, studio: Studio, cloud: Web) -> None:
    address = base64.urlsafe_b64encode(b"s3://bucket/cat.png").decode()
    signed = f"http://127.0.0.1:{cloud.port}/bucket/cat.png?X-Signature=s&X-Expires=9"
    studio.serve("/data/local-files/?d=cats/a%20cat.png")
    studio.serve(f"/tasks/7/resolve/?fileuri={address}", 303, {"location": signed})
    sources = {
        "an upload": "/data/upload/1/ab-cat.png",
        "an upload by its URL": f"{studio.url}/data/upload/1/ab-cat.png",
        "a local file": "/data/local-files/?d=cats/a cat.png",
        "a storage": "s3://bucket/cat.png",
        "a signed link": signed,
        "a data: URI": "data:image/png;base64," + base64.b64encode(PNG).decode(),
    }
    kept = dict(zip(sources, found(client, *sources.values()), strict=True))
    assert kept == dict.fromkeys(sources, True)


def test_a_host_that_is_not_allowed_is_not_asked_by_a_redirect(
    client, studio: Studio, inside: Forbidden
) -> None:
    address = base64.urlsafe_b64encode(b"gs://bucket/a.png").decode()
    there = {"location": f"http://127.0.0.1:{inside.port}/a.png"}
    studio.serve(f"/tasks/7/resolve/?fileuri={address}", 302, there)
    assert found(client, "gs://bucket/a.png") == [False]
    assert not inside.was_asked()


def test_a_storage_hears_no_token(serve, studio: Studio) -> None:
    heard: list[str | None] = []

    def storage(request: BaseHTTPRequestHandler) -> None:
        heard.append(request.headers["authorization"])
        request.send_response(200)
        request.send_header("content-type", "image/png")
        request.end_headers()
        request.wfile.write(PNG)

    address = base64.urlsafe_b64encode(b"gs://bucket/a.png").decode()
    with web() as other:
        other.pages["/a.png"] = storage
        there = f"http://127.0.0.1:{other.port}/a.png"
        studio.serve(f"/tasks/7/resolve/?fileuri={address}", 302, {"location": there})
        with serve(
            label_studio_url=studio.url,
            label_studio_token=ACCESS_TOKEN,
            allowed_image_hosts=(f"private:127.0.0.1:{other.port}",),
        ) as client:
            assert found(client, "gs://bucket/a.png", there) == [True, True]
    assert heard == [None, None]


def test_only_paths_of_pictures_are_asked_for_with_the_token(client, studio: Studio) -> None:
    sources = (
        "/api/users",
        "/user/logout",
        "/data/upload/../../api/users",
        "/data/upload/%2e%2e/%2e%2e/api/users",
        "/data/upload/..\\..\\api",
        "//127.0.0.1/data/upload/1/ab-cat.png",
        f"{studio.url}/api/users",
        f"{studio.url}",
        "data/upload/1/ab-cat.png",
    )
    assert not any(found(client, *sources))
    assert studio.sent == []


def test_the_host_that_a_request_names_is_not_asked(client, inside: Forbidden) -> None:
    named = {
        "project": "1.1",
        "schema": CONFIG,
        "hostname": f"http://127.0.0.1:{inside.port}",
        "access_token": "0" * 40,
    }
    assert client.post(f"{BASE}/setup", json=named).status_code == 200
    assert found(client, "/data/upload/1/ab-cat.png") == [True]
    assert found(client, f"http://127.0.0.1:{inside.port}/data/upload/1/a.png") == [False]
    assert not inside.was_asked()


def test_a_label_studio_below_a_path_is_asked_there(serve, studio: Studio) -> None:
    studio.serve("/tool/data/upload/1/ab-cat.png")
    url = f"{studio.url}/tool/"
    with serve(label_studio_url=url, label_studio_token=LEGACY_TOKEN) as client:
        sources = ("/data/upload/1/ab-cat.png", "/tool/data/upload/1/ab-cat.png")
        assert all(found(client, *sources))


@pytest.mark.parametrize(
    "url", ["localhost:8080", "ftp://h", "http://", "http://h?x=1", "http://h:x"]
)
def test_an_address_of_no_label_studio_is_a_mistake_at_the_start(serve, url: str) -> None:
    with pytest.raises(ConfigurationError, match="label-studio-url"), serve(label_studio_url=url):
        pass


# ---- overlays


def grant(**changes: Any) -> str:
    fields = {"prefixes": ("/data/upload/1/",), "origin": "http://ls.test:8080"} | changes
    return sign(Grant(**fields), SECRET)


def test_the_overlay_is_the_photo_with_its_evidence(client) -> None:
    answer = client.get(f"{BASE}/overlay.png?key={grant()}&src=/data/upload/1/ab-cat.png")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["access-control-allow-origin"] == "http://ls.test:8080"
    assert "private" in answer.headers["cache-control"]
    query = "include=overlay&format=png"
    expected = client.post(
        f"/explain?{query}", files={"image": PNG}, headers={"accept": "image/png"}
    )
    shown = (np.asarray(pictures.opened(each.content)) for each in (answer, expected))
    np.testing.assert_array_equal(*shown)


@pytest.mark.parametrize(
    "source",
    [
        "%2Fdata%2Fupload%2F1%2Fab-cat.png",
        "http://ls.test:8080/data/upload/1/ab-cat.png",
        "http%3A%2F%2Fls.test%3A8080%2Fdata%2Fupload%2F1%2Fab-cat.png",
    ],
)
def test_the_source_may_be_encoded_or_begin_with_the_pages_own_address(client, source) -> None:
    assert client.get(f"{BASE}/overlay.png?key={grant()}&src={source}").status_code == 200


def test_all_that_follows_src_is_the_source(client, cloud: Web) -> None:
    """A signed link has parameters of its own, and nobody encodes them."""
    host = f"http://127.0.0.1:{cloud.port}/"
    source = f"{host}bucket/cat.png?X-Signature=s&X-Expires=9"
    key = grant(prefixes=(host,))
    assert client.get(f"{BASE}/overlay.png?key={key}&src={source}").status_code == 200


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("key={}&src=/data/upload/2/a.png", 400),
        ("key={}&src=/data/upload/1/../2/a.png", 400),
        ("key={}&src=http://127.0.0.1:9/a.png", 400),
        ("key={}&src=data:image/png;base64,AAAA", 400),
        ("key={}&src=/data/upload/1/missing.png", 424),
        ("key={}x&src=/data/upload/1/ab-cat.png", 401),
        ("src=/data/upload/1/ab-cat.png", 400),
        ("key={}", 400),
        ("", 400),
    ],
)
def test_an_overlay_of_something_else_is_refused(client, studio: Studio, query, status) -> None:
    studio.serve("/data/upload/1/missing.png", 404)
    answer = client.get(f"{BASE}/overlay.png?{query.format(grant())}")
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_a_key_may_name_model_and_method(serve, studio: Studio) -> None:
    studio.serve("/data/upload/1/ab-cat.png")
    with serve(
        models=("tiny:small", "other=tiny:other"),
        label_studio_url=studio.url,
        label_studio_token=LEGACY_TOKEN,
        overlay_secret=SECRET,
    ) as client:
        key = grant(model="other", method="input_gradient")
        answer = client.get(f"{BASE}/overlay.png?key={key}&src=/data/upload/1/ab-cat.png")
        query = "include=overlay&format=png&model=other&method=input_gradient"
        expected = client.post(
            f"/explain?{query}", files={"image": PNG}, headers={"accept": "image/png"}
        )
    assert answer.content == expected.content


def test_without_a_secret_there_are_no_overlays(serve) -> None:
    with serve() as client:
        answer = client.get(f"{BASE}/overlay.png?key={grant()}&src=/data/upload/1/ab-cat.png")
        assert answer.status_code == 401


def test_the_overlay_needs_no_api_key_but_its_own(serve, studio: Studio, tmp_path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"labeling:{'0' * 64}")
    with serve(
        api_keys_file=keys,
        overlay_secret=SECRET,
        label_studio_url=studio.url,
        label_studio_token=LEGACY_TOKEN,
    ) as client:
        path = f"{BASE}/overlay.png?key={{}}&src=/data/upload/1/ab-cat.png"
        assert client.get(path.format(grant())).status_code == 200
        assert client.get(path.format("forged")).status_code == 401


def test_the_command_makes_a_tag_that_the_service_takes(client) -> None:
    flags = ["--prefix", "/data/upload/1/", "--origin", "http://ls.test:8080", "--days", "1"]
    flags += ["--overlay-secret", SECRET, "--url", "http://camserve.test"]
    made = CliRunner().invoke(app, ["overlay-token", *flags])
    assert made.exit_code == 0, made.output
    tag = made.stdout.strip()
    assert tag.startswith('<Image name="heat" value="http://camserve.test/integrations/')
    address = tag.split('value="')[1].removesuffix('"/>').replace("&amp;", "&")
    path = address.removeprefix("http://camserve.test").replace(
        "$image", "/data/upload/1/ab-cat.png"
    )
    assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    "flags", [[], ["--prefix", "x"], ["--prefix", "/data/", "--method", "magic"]]
)
def test_the_command_refuses_what_would_open_nothing(flags: list[str]) -> None:
    made = CliRunner().invoke(app, ["overlay-token", *flags, "--overlay-secret", SECRET])
    assert made.exit_code == 2
