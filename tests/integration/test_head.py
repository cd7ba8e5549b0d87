"""HEAD is answered as GET is, without the body."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from raw import connected, head, read_to_the_end, statuses
from starlette.testclient import TestClient

VARYING = {"date", "x-request-id", "server-timing"}

PAGES = ["/", "/docs", "/docs/static/swagger-ui.css", "/page/app.js", "/favicon.ico"]
FAULTS = ["/nowhere", "/models/unknown", "/page/nothing.js", "/explain"]


def get_routes(client: TestClient) -> list[str]:
    """Every path of the OpenAPI document that takes GET, with its parameters filled."""
    paths = client.get("/openapi.json").json()["paths"]
    filled = {"{name}": "small", "{layer}": "features.0", "{version}": "1"}
    found = []
    for path, operations in paths.items():
        if "get" in operations:
            for parameter, value in filled.items():
                path = path.replace(parameter, value)  # noqa: PLW2901
            found.append(path)
    assert not any("{" in path for path in found)
    return found


def fields(response: Any) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name not in VARYING}


def test_every_route_of_get_answers_head(client: TestClient) -> None:
    """Pages and their files, documentation, models, probes, metrics, kernels, other protocols."""
    paths = get_routes(client)
    assert {"/models", "/models/small", "/metrics", "/health/ready"} <= set(paths)
    assert "/models/small/kernels/features.0" in paths
    for path in [*paths, *PAGES, *FAULTS, "/openapi.json"]:
        got, head_of = client.get(path), client.head(path)
        assert head_of.status_code == got.status_code, path
        assert head_of.content == b"", path
        if path not in ("/metrics", *FAULTS):  # their bodies differ in length: counts and ids
            assert fields(head_of) == fields(got), path


def test_head_of_a_route_of_post_says_what_it_takes(client: TestClient) -> None:
    for path in ("/explain", "/predict", "/v2/models/small/infer"):
        refused = client.head(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST"), path


def test_a_route_of_get_says_that_it_takes_head(client: TestClient) -> None:
    assert client.post("/models").headers["allow"] == "GET, HEAD"
    assert client.delete("/metrics").headers["allow"] == "GET, HEAD"


def test_a_page_of_another_origin_may_ask_head_with_a_key(serve) -> None:
    origin = "https://label.example.org"
    with serve(cors_origins=(origin,)) as client:
        wanted = {
            "origin": origin,
            "access-control-request-method": "HEAD",
            "access-control-request-headers": "x-api-key",
        }
        assert client.options("/models", headers=wanted).status_code == 200


def test_a_connection_goes_on_after_head(run_server) -> None:
    """No byte of a body comes between the answers."""
    with run_server() as server, connected(server.address) as connection:
        requests = [head(f"HEAD {path}", "host: x") for path in ("/", "/models", "/openapi.json")]
        last = head("HEAD /health/live", "host: x", "connection: close")
        connection.sendall(b"".join([*requests, last]))
        answer = read_to_the_end(connection)
        assert statuses(answer) == [200] * 4
        heads = answer.split(b"\r\n\r\n")
        assert len(heads) == 5
        assert heads[-1] == b""
        assert all(b"content-length: " in each for each in heads[:-1])


@pytest.mark.parametrize("prefix", ["", "/models-of-mine"])
def test_head_is_logged_and_served_behind_a_prefix(serve, prefix: str) -> None:
    from structlog.testing import capture_logs  # noqa: PLC0415

    with serve(root_path=prefix) as client, capture_logs() as logs:
        assert client.head(f"{prefix}/models").status_code == 200
    (line,) = [line for line in logs if line["event"] == "request"]
    assert (line["method"], line["route"], line["status"]) == ("HEAD", "/models", 200)


def test_head_needs_a_key_where_get_does(run_server, tmp_path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a:" + "0" * 64 + "\n")
    with run_server(api_keys_file=keys) as server:
        for path, status in (("/models", 401), ("/", 200), ("/health/live", 200)):
            response = httpx.head(f"{server.url}{path}", trust_env=False)
            assert response.status_code == status
