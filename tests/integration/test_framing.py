"""Where a request begins and ends: what is read, what is refused, what comes after it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pictures
import pytest
from raw import ask, chunked, connected, head, last_of, post, read_one, read_to_the_end, statuses
from structlog.testing import capture_logs

from service.routes.server import bounded_connection, draining, framing

CLOSE = "connection: close"
SMUGGLED = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_connection, "LINGER_SECONDS", 0.05)


@pytest.fixture(scope="module")
def server(run_server) -> Any:
    with run_server() as running:
        yield running


def problem_of(answer: bytes) -> tuple[int, str, str]:
    """Status, code and detail of the last answer."""
    last = last_of(answer)
    fields = last.partition(b"\r\n\r\n")[0].lower()
    assert b"content-type: application/problem+json" in fields
    assert b"connection: close" in fields
    assert b"x-content-type-options: nosniff" in fields
    body = json.loads(last.partition(b"\r\n\r\n")[2])
    assert body["status"] == statuses(answer)[-1]
    return body["status"], body["code"], body["detail"]


# ---- Host


@pytest.mark.parametrize(
    ("version", "hosts"),
    [
        ("1.1", []),
        ("1.1", ["host: a", "host: b"]),
        ("1.1", ["host: a", "Host: a"]),
        ("1.0", ["host: a", "host: a"]),
    ],
)
@pytest.mark.parametrize("target", ["GET /health/live", "HEAD /", "POST /nowhere", "OPTIONS /"])
def test_a_request_without_one_host_is_refused(server, target: str, version: str, hosts) -> None:
    request = head(target, *hosts, version=version) + SMUGGLED
    answer = ask(server.address, request)
    assert len(statuses(answer)) == 1
    status, code, detail = problem_of(answer)
    assert (status, code) == (400, "malformed_request")
    assert "Host" in detail


def test_http_1_0_knows_no_host(server) -> None:
    assert statuses(ask(server.address, head("GET /health/live", version="1.0"))) == [200]


# ---- how a body is sent


@pytest.mark.parametrize("more", [[], ["content-length: 5"], ["content-length: 0"]])
def test_a_chunked_body_of_http_1_0_is_refused_and_nothing_after_it_is_read(server, more) -> None:
    """A proxy that speaks HTTP/1.0 takes what follows the head for another request."""
    lines = ["host: x", "content-type: image/png", "transfer-encoding: chunked"]
    request = head("POST /predict", *lines, *more, version="1.0") + b"0\r\n\r\n" + SMUGGLED
    answer = ask(server.address, request)
    assert statuses(answer) == [400]
    problem_of(answer)


@pytest.mark.parametrize(
    "lines",
    [
        ["transfer-encoding: gzip, chunked"],
        ["transfer-encoding: gzip"],
        ["transfer-encoding: identity"],
        ["transfer-encoding: chunked, chunked"],
        ["transfer-encoding: chunked", "transfer-encoding: chunked"],
        ["transfer-encoding: chunked", "content-length: 5"],
        ["content-length: 5", "transfer-encoding: chunked"],
        ["content-length: 5", "content-length: 5"],
        ["content-length: 5, 5"],
        ["content-length: +5"],
        ["connection: upgrade", "upgrade: h2c", "transfer-encoding: gzip"],
        ["connection: upgrade", "upgrade: h2c", "content-length: 5", "transfer-encoding: chunked"],
    ],
)
def test_a_body_whose_end_is_not_certain_is_refused_and_nothing_after_it_is_read(
    server, lines: list[str]
) -> None:
    request = head("POST /predict", "host: x", *lines) + b"0\r\n\r\n" + SMUGGLED
    answer = ask(server.address, request)
    assert statuses(answer) == [400]
    problem_of(answer)


@pytest.mark.parametrize(
    "request_of",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        head("GET /", "host: x", version="2.0"),
        head("CONNECT example.org:443", "host: example.org:443"),
        head("CONNECT /predict", "host: x"),
        head("GET http://[", "host: x"),
        head("GET /", "host: x", "a b: c"),
        b"GET / HTTP/1.1\nhost: x\n\n",
    ],
)
def test_what_is_no_request_is_answered_with_what_to_do(server, request_of: bytes) -> None:
    with capture_logs() as logs:
        status, code, detail = problem_of(ask(server.address, request_of))
    assert (status, code) == (400, "malformed_request")
    assert detail.endswith(".")
    assert {"event": "malformed_request", "client": "127.0.0.1", "log_level": "info"} in logs


def test_a_client_that_insists_on_http_2_gets_to_know_what_is_spoken_here(server) -> None:
    """By its preface and an empty SETTINGS frame, as they come from curl and gRPC."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    detail = problem_of(ask(server.address, preface))[2]
    assert "HTTP/2" in detail
    assert "HTTP/1.1" in detail
    assert "proxy" in detail


def test_a_refused_request_does_not_cut_into_the_answers_before_it(server) -> None:
    answer = ask(server.address, post() + post() + b"no request\r\n\r\n")
    assert statuses(answer) == [200, 200, 400]
    assert answer.count(b'"predictions"') == 2
    problem_of(answer)


# ---- upgrades

UPGRADES = {
    "h2c": ["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABk"],
    "websocket": ["connection: keep-alive, upgrade", "upgrade: websocket"],
}


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_body_with_a_request_for_an_upgrade_is_read(
    server, upgrade: list[str], is_chunked: bool, piece: int
) -> None:
    """Also where it comes in pieces; what follows on the connection is answered too."""
    data = pictures.png(9, 9)
    length = "transfer-encoding: chunked" if is_chunked else f"content-length: {len(data)}"
    request = head("POST /predict", "host: x", "content-type: image/png", length, *upgrade)
    request += chunked(data, 50) if is_chunked else data
    request += post(data, *upgrade) + head("GET /health/live", "host: x", *upgrade, CLOSE)
    with connected(server.address) as connection:
        for start in range(0, len(request), piece):
            connection.sendall(request[start : start + piece])
        answer = read_to_the_end(connection)
    assert statuses(answer) == [200, 200, 200]
    assert answer.count(b'"predictions"') == 2
    assert b"upgrade" not in answer.lower()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("header", ["expect:", "transfer-encoding: chunked"])
def test_curl_that_would_rather_speak_http_2_is_answered(
    server, tmp_path: Path, header: str
) -> None:
    file = tmp_path / "noise.png"
    file.write_bytes(pictures.png())
    command = ["curl", "--silent", "--show-error", "--max-time", "5", "--http2"]
    command += ["--header", "content-type: image/png", "--header", header]
    command += ["--data-binary", f"@{file}", f"{server.url}/predict"]
    told = subprocess.run(command, capture_output=True, check=False, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    assert "predictions" in json.loads(told.stdout)["results"][0]


# ---- what comes beside a body


def chunked_post(body: bytes, *headers: str) -> bytes:
    lines = ["host: x", "content-type: image/png", "transfer-encoding: chunked", *headers]
    return head("POST /predict", *lines) + body


def endless(connection: Any, start: bytes, more: bytes, most: int) -> None:
    """Send `start` and then `more` over and over, until the other side has enough."""
    connection.sendall(start)
    with pytest.raises(OSError, match=r"reset|pipe|abort"):
        connection.sendall(more * (most // len(more)))


PNG = pictures.png()

BESIDE = {
    "trailers": (chunked(PNG, 999)[:-2], b"x-trailer: " + b"y" * 999 + b"\r\n"),
    "a name of a trailer": (chunked(PNG, 999)[:-2], b"x" * 999),
    "a value of a trailer": (chunked(PNG, 999)[:-2] + b"x: ", b"y" * 999),
    "an extension": (b"5;", b"x" * 999),
    "extensions": (b"", b"1;" + b"x" * 9999 + b"\r\ny\r\n"),
    "a size": (b"", b"0" * 999),
}


@pytest.mark.parametrize(("start", "more"), BESIDE.values(), ids=BESIDE)
def test_what_comes_beside_a_body_ends(
    server, http, monkeypatch: pytest.MonkeyPatch, start: bytes, more: bytes
) -> None:
    """Trailers and chunk extensions without end were parsed, and trailers kept, without end."""
    monkeypatch.setattr(bounded_connection, "LINGER_SECONDS", 0)
    with connected(server.address) as connection:
        endless(connection, chunked_post(start), more, 100_000_000)
    assert http.get(f"{server.url}/health/live").status_code == 200
    assert server.service.admission.is_idle


@pytest.mark.parametrize("more", [b"x: y\r\n" * 90_000, b"x: " + b"y" * 500_000])
@pytest.mark.parametrize("earlier", [0, 2])
def test_too_many_trailers_are_refused_with_what_to_do(server, more: bytes, earlier: int) -> None:
    """What was asked before on the connection is answered first."""
    with connected(server.address) as connection:
        connection.sendall(post() * earlier + chunked_post(chunked(PNG, 999)[:-2]))
        connection.sendall(more)
        answer = read_to_the_end(connection)
    assert statuses(answer) == [200] * earlier + [400]
    assert "trailers" in problem_of(answer)[2]


def test_a_few_trailers_and_extensions_are_dropped(server) -> None:
    body = chunked(PNG, 100, b";name=value", b"x-request-id: trailer\r\naccept: image/jpeg\r\n")
    answer = ask(server.address, chunked_post(body, CLOSE))
    assert statuses(answer) == [200]
    assert b"trailer" not in answer


def test_a_body_in_chunks_of_one_byte_is_read(server) -> None:
    assert statuses(ask(server.address, chunked_post(chunked(PNG, 1), CLOSE))) == [200]


@pytest.mark.parametrize(("content", "pieces"), [(0, 65), (1, 66), (100, 655), (500, None)])
def test_framing_is_bounded_beside_its_content(content: int, pieces: int | None) -> None:
    """64 KiB and eight bytes to each byte of content; pieces of 1000 bytes come."""
    counted = framing.Framing()
    came = 0
    while came < 5000:
        counted.content += content
        if counted.is_excessive(1000, content):
            break
        came += 1
    assert came == (5000 if pieces is None else pieces)


# ---- what comes between requests


@pytest.mark.parametrize("extra", [b"\r\n", b"\n", b"\r\n\r\n", b"\r\n" * 100])
def test_empty_lines_keep_no_answered_connection_open(
    run_server, monkeypatch: pytest.MonkeyPatch, extra: bytes
) -> None:
    monkeypatch.setattr(draining, "KEEP_ALIVE_SECONDS", 0.3)
    with run_server() as server, connected(server.address) as connection:
        connection.sendall(head("GET /health/live", "host: x"))
        assert statuses(read_one(connection)) == [200]
        connection.sendall(extra)
        assert read_to_the_end(connection) == b""


def test_empty_lines_without_end_are_refused(server) -> None:
    answer = ask(server.address, b"\r\n" * 1000)
    assert statuses(answer) == [400]
    assert "empty lines" in problem_of(answer)[2]


def test_an_empty_line_before_a_request_is_none_of_it(server) -> None:
    request = b"\r\n" + post() + b"\r\n\r\n" + post(None, CLOSE)
    assert statuses(ask(server.address, request)) == [200, 200]


@pytest.mark.parametrize("count", [5, 16])
def test_requests_that_come_before_their_turn_are_answered_in_turn(server, count: int) -> None:
    request = b"".join(post(pictures.png(seed=seed)) for seed in range(count))
    answer = ask(server.address, request + head("GET /health/live", "host: x", CLOSE))
    assert statuses(answer) == [200] * (count + 1)


def test_a_connection_takes_few_requests_before_their_turn(server) -> None:
    """The last that is answered says that the others are not."""
    answer = ask(server.address, post() + head("GET /health/live", "host: x") * 5000)
    assert set(statuses(answer)) == {200}
    assert len(statuses(answer)) <= 2 + bounded_connection.MAX_PIPELINED
    assert b"connection: close" in last_of(answer)


def test_what_follows_a_request_that_closes_its_connection_is_not_read(server) -> None:
    answer = ask(server.address, post(None, CLOSE) + SMUGGLED * 100)
    assert statuses(answer) == [200]
