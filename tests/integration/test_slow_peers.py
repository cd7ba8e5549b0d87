"""Clients that send or read slowly, or not at all, keep nothing from the others."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pictures
import pytest
from gates import Emptied, Gate
from raw import (
    ask,
    chunked,
    connected,
    head,
    last_of,
    post,
    read_one,
    read_to_the_end,
    statuses,
    wait_until,
)
from structlog.testing import capture_logs
from webhosts import web

from service.routes.server import bounded_connection, outbox
from service.scheduling import transfers

PNG = {"content-type": "image/png"}
EVER = 1e9
LARGE = pictures.png(300, 240)
OVERLAY = "/explain?include=overlay&format=png"
"""Answers an image of that size with some hundred kilobytes."""

BODIES = (
    "/explain",
    "/predict",
    "/v1/models/small:predict",
    "/v1/models/small:explain",
    "/v2/models/small/infer",
    "/v2/models/small/explain",
    "/predictions/small",
    "/explanations/small",
    "/integrations/x-anylabeling/v1/predict",
    "/integrations/label-studio/predict",
    "/integrations/label-studio/setup",
)
"""Routes that read a body."""


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_connection, "LINGER_SECONDS", 0.05)


@pytest.fixture
def slow_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not move is slow after a moment; `are_slow` waits for it."""
    monkeypatch.setattr(transfers, "PATIENCE", 0.1)


def are_slow(server: Any) -> bool:
    """Whether everybody makes room for others that need it."""
    return all(each.is_slow for each in server.service.transfers._all.copy())


@pytest.fixture
def never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody makes room for others before its time is over."""
    monkeypatch.setattr(transfers, "PATIENCE", EVER)


def begun(path: str = "/predict", length: int = 1000) -> bytes:
    """The head of a POST and the first byte of its body."""
    lines = ["host: x", "content-type: image/png", f"content-length: {length}"]
    return head(f"POST {path}", *lines) + b"x"


@contextlib.contextmanager
def silent(server: Any, request: bytes, count: int = 1, buffer: int | None = None) -> Iterator[Any]:
    """Connections that send this and then do nothing."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(connected(server.address, receive_buffer=buffer))
            for _ in range(count)
        ]
        for client in clients:
            client.sendall(request)
        yield clients


def good(server: Any, data: bytes | None = None, path: str = "/predict") -> httpx.Response:
    data = pictures.png() if data is None else data
    with httpx.Client(timeout=10, trust_env=False) as client:
        return client.post(f"{server.url}{path}", content=data, headers=PNG)


def refused(answer: bytes) -> tuple[int, str]:
    """Status and code of an answer that is a problem."""
    return statuses(answer)[0], answer.partition(b'"code":"')[2].partition(b'"')[0].decode()


# ---- uploads


def test_an_upload_takes_its_place_when_it_is_complete(run_server) -> None:
    with run_server(max_queue=2) as server, silent(server, begun(), 10):
        wait_until(lambda: server.service.transfers.arriving == 10)
        assert server.service.admission.images == 0
        assert not server.service.admission.is_idle
        assert good(server).status_code == 200
    assert server.service.admission.is_idle


@pytest.mark.parametrize("lines", [["content-length: 90000"], ["transfer-encoding: chunked"]])
def test_bytes_are_counted_as_they_come(run_server, lines: list[str]) -> None:
    """Not as they are declared."""
    request = head("POST /predict", "host: x", "content-type: image/png", *lines)
    with run_server(max_queue_bytes=100_000) as server, silent(server, request, 10):
        wait_until(lambda: server.service.transfers.arriving == 10)
        assert good(server).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_body_that_comes_too_slowly_is_not_waited_for(run_server, path: str) -> None:
    with run_server(transfer_grace=0.2) as server, connected(server.address) as client:
        client.sendall(begun(path))
        answer = read_to_the_end(client)
        assert statuses(answer) == [408]
        assert b"16384 bytes a second" in answer
        assert server.service.admission.is_idle
        assert good(server).status_code == 200


def test_a_body_of_the_repository_is_bounded_too(run_server, tmp_path) -> None:
    keys = tmp_path / "admins"
    keys.write_text(f"ops:{hashlib.sha256(b'secret').hexdigest()}\n")
    with run_server(admin_keys_file=keys, transfer_grace=0.2) as server:
        with connected(server.address) as client:
            lines = ["host: x", "content-type: application/json", "x-api-key: secret"]
            client.sendall(head("POST /v2/repository/index", *lines, "content-length: 9") + b"{")
            assert statuses(read_to_the_end(client)) == [408]
        large = httpx.post(
            f"{server.url}/v2/repository/index",
            content=b" " * 1_000_000,
            headers={"x-api-key": "secret"},
            trust_env=False,
        )
        assert large.status_code == 413


def test_what_comes_fast_enough_may_take_longer_than_the_grace(run_server) -> None:
    body = pictures.png()
    with (
        run_server(transfer_grace=1, min_transfer_rate=1) as server,
        connected(server.address) as client,
    ):
        client.sendall(post(body, "connection: close")[:-25])
        for byte in body[-25:]:
            client.settimeout(0.05)
            with pytest.raises(TimeoutError):
                client.recv(1)
            client.sendall(bytes([byte]))
        client.settimeout(10)
        assert statuses(read_to_the_end(client)) == [200]


def test_what_came_at_once_earns_no_time_for_later(run_server) -> None:
    """Bodies that lack their last byte, each as large as may be, would hold all bytes a minute."""
    with run_server(transfer_grace=0.2, min_transfer_rate=1000) as server:
        request = begun(length=1_000_000) + bytes(900_000)
        with silent(server, request) as (client,):
            assert refused(read_to_the_end(client)) == (408, "slow_upload")


@pytest.mark.usefixtures("slow_soon")
@pytest.mark.parametrize("bound", ["max_uploads", "max_uploads_per_client"])
@pytest.mark.parametrize("request_of", [begun(), b"POST /predict HT"])
def test_the_slowest_upload_makes_room_for_another(
    run_server, bound: str, request_of: bytes
) -> None:
    """Whether its head or its body is missing."""
    with run_server(**{bound: 3}) as server, silent(server, request_of, 3) as clients:
        wait_until(lambda: server.service.transfers.arriving == 3)
        wait_until(lambda: are_slow(server))
        assert good(server).status_code == 200
        assert good(server).status_code == 200
        wait_until(lambda: server.service.transfers.arriving == 2)
        ended = read_to_the_end(clients[0])
        assert ended == b"" or refused(ended) == (408, "slow_upload")


@pytest.mark.usefixtures("never_slow")
@pytest.mark.parametrize("bound", ["max_uploads", "max_uploads_per_client"])
@pytest.mark.parametrize("request_of", [begun(), b"POST /predict HT"])
def test_more_uploads_than_may_be_are_refused_at_once(
    run_server, bound: str, request_of: bytes
) -> None:
    with run_server(**{bound: 3}) as server, silent(server, request_of, 3):
        wait_until(lambda: server.service.transfers.arriving == 3)
        with connected(server.address) as client:
            client.sendall(request_of)
            answer = read_to_the_end(client)
        assert refused(answer) == (429, "queue_full")
        assert b"retry-after: " in answer.lower()
        assert b"3 requests are arriving" in answer


@pytest.mark.usefixtures("slow_soon")
def test_the_bytes_of_a_silent_upload_make_room_for_another(run_server) -> None:
    request = begun(length=90_000) + bytes(80_000)
    with run_server(max_queue_bytes=100_000) as server, silent(server, request) as clients:
        wait_until(lambda: server.service.admission._bytes > 80_000)
        wait_until(lambda: are_slow(server))
        assert good(server, pictures.png(100, 80)).status_code == 200
        assert refused(read_to_the_end(clients[0])) == (408, "slow_upload")


def test_a_body_that_is_complete_when_the_queue_is_full_is_refused(run_server, http) -> None:
    data = pictures.png()
    with (
        run_server(max_queue=1) as server,
        ThreadPoolExecutor(1, thread_name_prefix="client") as threads,
        connected(server.address) as client,
    ):
        client.sendall(post(data)[:-1])
        wait_until(lambda: server.service.transfers.arriving == 1)
        with Gate(server.service.scheduler) as gate:
            first = threads.submit(good, server)
            gate.wait_for_a_batch()
            client.sendall(data[-1:])
            answer = read_one(client)
        assert refused(answer) == (429, "queue_full")
        assert b"retry-after: 1" in answer.lower()
        assert first.result(10).status_code == 200
        client.sendall(post(data))
        assert statuses(read_one(client)) == [200]


def test_what_arrives_when_the_service_is_closed_is_finished(run_server) -> None:
    data = pictures.png()
    with run_server() as server, connected(server.address) as client:
        client.sendall(post(data)[:-1])
        wait_until(lambda: server.service.transfers.arriving == 1)
        server.service.admission.close()
        assert not server.service.admission.is_idle
        assert good(server).status_code == 503
        client.sendall(data[-1:])
        assert statuses(read_one(client)) == [200]


# ---- a body is read once


LABEL_STUDIO = "/integrations/label-studio/predict"


def tasks(image: str = "data:image/png;base64,AA==", result: str = "[]") -> bytes:
    """A body of Label Studio with one task."""
    config = '<View><Image name=\\"i\\" value=\\"$i\\"/>'
    config += '<Choices name=\\"c\\" toName=\\"i\\"><Choice value=\\"a\\"/></Choices></View>'
    return (
        f'{{"tasks": [{{"id": 1, "data": {{"i": "{image}"}}}}], "project": "1.1", '
        f'"label_config": "{config}", "params": {{"context": {{"result": {result}}}}}}}'
    ).encode()


@pytest.mark.parametrize("full", ["images", "bytes"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_was_read_before_the_queue_was_full_is_not_read_again(
    run_server, full: str, is_chunked: bool
) -> None:
    """Label Studio waits for a place; a body that was read is gone: 500."""
    body = tasks()
    length = "transfer-encoding: chunked" if is_chunked else f"content-length: {len(body)}"
    lines = ["host: x", "content-type: application/json", "x-request-timeout: 0.5", length]
    request = head(f"POST {LABEL_STUDIO}", *lines) + (chunked(body, 99) if is_chunked else body)
    with run_server(max_queue=1 if full == "images" else 9, max_queue_bytes=1000) as server:
        with server.service.admission.admit(900), connected(server.address) as client:
            client.sendall(request)
            assert refused(read_one(client)) == (429, "queue_full")
        with connected(server.address) as client:
            client.sendall(request)
            assert statuses(read_one(client)) == [200]


def test_a_click_whose_image_has_no_room_is_answered_so(run_server) -> None:
    """Its bytes are counted when they are fetched, long after the body was read."""
    image = pictures.png()
    with web() as studio:
        path = "/data/upload/1/noise.png"
        studio.pages[path] = (200, {"content-type": "image/png"}, image)
        settings = {"label_studio_url": f"http://127.0.0.1:{studio.port}"}
        click = '[{"from_name": "c", "type": "choices", "value": {"choices": ["a"]}}]'
        body = tasks(path, click)
        lines = ["host: x", "content-type: application/json", f"content-length: {len(body)}"]
        with run_server(max_queue_bytes=len(image), **settings) as server:
            with server.service.admission.admit(1), connected(server.address) as client:
                client.sendall(head(f"POST {LABEL_STUDIO}", *lines) + body)
                assert refused(read_one(client)) == (429, "queue_full")
            with connected(server.address) as client:
                client.sendall(head(f"POST {LABEL_STUDIO}", *lines) + body)
                assert statuses(read_one(client)) == [200]


def test_a_place_that_is_free_in_time_is_waited_for(run_server) -> None:
    body = b'{"tasks": [], "project": "1.1", "label_config": "<View/>", "params": {}}'
    with run_server(max_queue=1) as server, connected(server.address) as client:
        permit = server.service.admission.admit()
        lines = ["host: x", "content-type: application/json", f"content-length: {len(body)}"]
        client.sendall(head("POST /integrations/label-studio/predict", *lines) + body)
        wait_until(lambda: server.service.admission._bytes == len(body))
        permit.release()
        assert statuses(read_one(client)) in ([200], [422])


# ---- readers

SMALL_BUFFERS = {"send_buffer": 4096}


def reader(server: Any, request: bytes, count: int = 1) -> Any:
    """Clients that do not read what is answered, with hardly any buffers."""
    return silent(server, request, count, buffer=4096)


@pytest.mark.usefixtures("never_slow")
@pytest.mark.parametrize("close", [[], ["connection: close"]])
def test_a_place_is_held_until_the_answer_is_read(run_server, close: list[str]) -> None:
    with run_server(**SMALL_BUFFERS, max_queue=1) as server:
        emptied = Emptied(server.service.admission)
        with reader(server, post(LARGE, *close, path=OVERLAY)) as (client,):
            wait_until(lambda: server.service.transfers.leaving == 1)
            assert server.service.admission.images == 1
            assert good(server).status_code == 429
            assert statuses(read_one(client)) == [200]
            emptied.wait()
            assert good(server).status_code == 200
        wait_until(lambda: server.service.transfers.leaving == 0)


@pytest.mark.usefixtures("never_slow")
def test_a_place_is_held_until_its_reader_has_gone(run_server) -> None:
    with run_server(**SMALL_BUFFERS, max_queue=1) as server:
        emptied = Emptied(server.service.admission)
        with reader(server, post(LARGE, path=OVERLAY)):
            wait_until(lambda: server.service.transfers.leaving == 1)
            assert server.service.admission.images == 1
        emptied.wait()


@pytest.mark.usefixtures("never_slow")
def test_a_reader_that_does_not_read_is_disconnected(
    run_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it asked for, and also where the connection closes behind the answer."""
    monkeypatch.setattr(outbox, "LOOK_SECONDS", 0.05)
    with run_server(**SMALL_BUFFERS, transfer_grace=0.2) as server, capture_logs() as logs:
        requests = [post(LARGE, path=OVERLAY), post(LARGE, "connection: close", path=OVERLAY)]
        paths = ("/docs/static/swagger-ui-bundle.js", "/openapi.json")
        requests += [head(f"GET {path}", "host: x") for path in paths]
        for number, request in enumerate(requests, 1):
            with reader(server, request) as (client,):
                wait_until(functools.partial(has_ended, logs, number))
                assert len(read_to_the_end(client)) < 100_000
        assert server.service.admission.images == 0
        ended = [line for line in logs if line["event"] == "slow_reader"]
        assert all(line["client"] == "127.0.0.1" and line["unsent"] for line in ended)


def has_ended(logs: list[Any], count: int) -> bool:
    """Whether the log says of so many readers that they were disconnected."""
    return [line["event"] for line in logs].count("slow_reader") == count


@pytest.mark.usefixtures("never_slow")
def test_a_reader_that_is_fast_enough_may_take_longer_than_the_grace(
    run_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "LOOK_SECONDS", 0.02)
    request = post(LARGE, "connection: close", path=OVERLAY)
    with run_server(**SMALL_BUFFERS, transfer_grace=1, min_transfer_rate=1000) as server:
        whole = ask(server.address, request)
        with reader(server, request) as (client,):
            parts = []
            while part := client.recv(len(whole) // 60):
                parts.append(part)
                threading.Event().wait(0.02)  # it reads slowly
            assert len(b"".join(parts)) == pytest.approx(len(whole), abs=500)


@pytest.mark.usefixtures("slow_soon")
def test_a_reader_that_does_not_read_makes_room_for_others(run_server) -> None:
    with run_server(**SMALL_BUFFERS, max_queue=2) as server:
        for _ in range(5):
            with reader(server, post(LARGE, path=OVERLAY), 2):
                wait_until(lambda: server.service.transfers.leaving == 2)
                wait_until(lambda: are_slow(server))
                assert server.service.admission.images == 2
                assert good(server).status_code == 200


@pytest.mark.usefixtures("never_slow")
def test_one_connection_holds_one_answer_that_is_not_read(run_server) -> None:
    """However many requests it sends before it reads."""
    with (
        run_server(**SMALL_BUFFERS) as server,
        reader(server, post(LARGE, path=OVERLAY)) as (client,),
    ):
        wait_until(lambda: server.service.transfers.leaving == 1)
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sendall(post(LARGE, path=OVERLAY) * 1000)
        assert server.service.admission.images == 1
        assert server.service.transfers.leaving == 1


def test_answers_are_whole_however_slowly_they_are_read(run_server) -> None:
    """Three requests before the first byte is read."""
    with run_server(**SMALL_BUFFERS) as server:
        expected = good(server, LARGE, OVERLAY)
        requests = post(LARGE, path=OVERLAY) * 2 + post(LARGE, "connection: close", path=OVERLAY)
        with connected(server.address, receive_buffer=4096) as client:
            with ThreadPoolExecutor(1, thread_name_prefix="client") as threads:
                sent = threads.submit(client.sendall, requests)
                answers = [read_one(client) for _ in range(3)]
                sent.result(10)
            assert client.recv(1) == b""
    image = expected.json()["results"][0]["explanations"][0]["overlay"]["data"]
    for answer in answers:
        assert statuses(answer) == [200]
        assert image.encode() in answer


# ---- all at once


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("slow_soon")
def test_good_requests_are_all_answered_beside_hundreds_of_silent_clients(run_server) -> None:
    """200 that do not read, 200 that do not send: half of those with a head in part."""
    with (
        run_server(**SMALL_BUFFERS, max_uploads_per_client=512) as server,
        silent(server, begun(), 100),
        silent(server, b"POST /explain HTTP/1.1\r\nhost", 100),
        reader(server, post(LARGE, path=OVERLAY), 200),
        ThreadPoolExecutor(4, thread_name_prefix="client") as threads,
    ):
        wait_until(lambda: server.service.transfers.arriving == 200)
        wait_until(lambda: server.service.transfers.leaving >= 60, 60)
        wait_until(lambda: are_slow(server))
        answers = [threads.submit(good, server, path="/explain") for _ in range(100)]
        assert {answer.result(60).status_code for answer in answers} == {200}
        assert server.service.admission.images <= server.service.admission.max_images


def test_the_last_answer_of_a_connection_says_so(run_server) -> None:
    with run_server() as server:
        answer = ask(server.address, post(None, "connection: close"))
        assert b"connection: close" in last_of(answer).lower()
