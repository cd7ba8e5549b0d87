"""The `Host` of a request, over HTTP: a page whose name is led here by DNS gets nothing."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pictures
import pytest
from starlette.testclient import TestClient

from service.errors import ConfigurationError

EVIL = {"host": "evil.example:8000"}
LOCAL = {"host": "localhost:8000"}
PNG = {"content-type": "image/png"}


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAMSERVE_ALLOWED_HOSTS")


@pytest.fixture
def client(serve) -> Iterator[TestClient]:
    """A service as it is by default: on loopback, without keys."""
    with serve() as client:
        yield client


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/docs/static/swagger-ui.css",
        "/health/live",
        "/health/ready",
        "/integrations/label-studio/health",
        "/metrics",
        "/models",
        "/models/small",
        "/nothing",
        "/openapi.json",
        "/page/app.js",
        "/ping",
        "/v1/models",
        "/v2/models/small",
    ],
)
def test_a_rebound_name_reads_no_route_and_localhost_reads_each(
    client: TestClient, path: str
) -> None:
    refused = client.get(path, headers=EVIL)
    assert refused.status_code == 421
    assert "evil.example:8000" in refused.text
    assert "CAMSERVE_ALLOWED_HOSTS" in refused.text
    assert client.get(path, headers=LOCAL).status_code != 421


def test_a_rebound_name_has_nothing_explained_and_learns_what_to_do(client: TestClient) -> None:
    sent = {"content": pictures.png(), "headers": PNG | EVIL}
    for route in ("/explain", "/predict", "/predictions/small"):
        refused = client.post(route, **sent)
        assert refused.status_code == 421
    body = client.post("/explain", **sent).json()
    assert (body["code"], body["status"]) == ("host_not_allowed", 421)
    assert "accepts localhost, loopback addresses, and the names that" in body["detail"]
    assert "CAMSERVE_ALLOWED_HOSTS lists. Add the name to that" in body["detail"]
    assert client.post("/explain", content=pictures.png(), headers=PNG | LOCAL).status_code == 200


def test_a_long_host_is_cut_in_the_answer(client: TestClient) -> None:
    refused = client.get("/", headers={"host": "a" * 10_000})
    assert refused.status_code == 421
    assert len(refused.content) < 1000


def test_a_refusal_names_neither_the_machine_nor_what_is_listed(
    serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page that was led here can read it."""
    monkeypatch.setattr(socket, "gethostname", lambda: "build-host-17")
    for settings in ({"host": "0.0.0.0"}, {"allowed_hosts": ("inside.example",)}):  # noqa: S104
        with serve(**settings) as client:
            text = client.get("/models", headers=EVIL).text
            assert "evil.example" in text
            assert "build-host-17" not in text
            assert "inside.example" not in text


@pytest.mark.parametrize("pair", [("localhost", "evil.example"), ("evil.example", "localhost")])
def test_of_two_hosts_both_must_be_accepted(client: TestClient, pair: tuple[str, str]) -> None:
    refused = client.get("/models", headers=[("host", each) for each in pair])
    assert refused.status_code in (400, 421)


def test_a_prefix_of_a_proxy_changes_nothing(serve) -> None:
    with serve(root_path="/vision") as client:
        for path in ("/models", "/vision/models"):
            assert client.get(path, headers=EVIL).status_code == 421
            assert client.get(path, headers=LOCAL).status_code == 200


def test_beyond_loopback_probes_by_address_and_compose_by_name_are_answered(serve) -> None:
    with serve(host="0.0.0.0") as client:  # noqa: S104 - nothing listens
        for host in ("10.244.0.7:8000", "camserve:8000", "[fd00::7]:8000", "127.0.0.1:8000"):
            assert client.get("/health/ready", headers={"host": host}).status_code == 200
        assert client.get("/models", headers=EVIL).status_code == 421


def test_with_keys_every_host_is_answered_until_some_are_listed(serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"one:{hashlib.sha256(b'key').hexdigest()}\n")
    with serve(api_keys_file=keys) as client:
        assert client.get("/models", headers=EVIL | {"x-api-key": "key"}).status_code == 200
        assert client.get("/models", headers=EVIL).status_code == 401
    with serve(api_keys_file=keys, allowed_hosts=("vision.example",)) as client:
        assert client.get("/models", headers=EVIL | {"x-api-key": "key"}).status_code == 421
        named = {"host": "vision.example", "x-api-key": "key"}
        assert client.get("/models", headers=named).status_code == 200


def test_the_setting_is_read_from_the_environment(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMSERVE_ALLOWED_HOSTS", "vision.example.org, *.cam.example")
    with serve() as client:
        for host in ("vision.example.org", "a.cam.example:443", "localhost"):
            assert client.get("/models", headers={"host": host}).status_code == 200
        assert client.get("/models", headers=EVIL).status_code == 421


def test_an_entry_that_is_no_host_stops_the_start(serve) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"'https://vision\.example'"),
        serve(allowed_hosts=("https://vision.example",)),
    ):
        pass


def ask(address: tuple[str, int], *lines: str, body: bytes = b"") -> bytes:
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_real_server_answers_421_before_it_has_read_the_body(run_server) -> None:
    image = pictures.png()
    head = ["POST /explain HTTP/1.1", "content-type: image/png", "connection: close"]
    length = f"content-length: {len(image)}"
    with run_server() as server:
        refused = ask(server.address, *head, "host: evil.example", length, body=image)
        assert refused.startswith(b"HTTP/1.1 421 ")
        # The request line may name another host: what counts is what a browser cannot choose.
        line = "GET http://localhost/models HTTP/1.1"
        refused = ask(server.address, line, "host: evil.example", "connection: close")
        assert refused.startswith(b"HTTP/1.1 421 ")
        answered = ask(server.address, *head, "host: localhost", length, body=image)
        assert answered.startswith(b"HTTP/1.1 200 ")


def test_a_program_without_a_host_is_answered_over_http_1_0(run_server) -> None:
    """As some balancers probe; a browser cannot leave it out."""
    with run_server() as server:
        answered = ask(server.address, "GET /health/ready HTTP/1.0")
    assert answered.split()[1] == b"200"
