"""Too much, too late, gone, or going down: what is refused, what is dropped, what is finished."""

from __future__ import annotations

import functools
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pictures
import pytest
from gates import Emptied, Gate, queued
from raw import wait_until
from starlette.testclient import TestClient

from service.routes.server.draining import DrainingServer

PNG = {"content-type": "image/png"}
LARGE = 20_000_000


def send(client: TestClient, data: bytes, route: str = "/explain") -> Any:
    return client.post(route, content=data, headers=PNG)


@contextmanager
def in_background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4, thread_name_prefix="client") as threads:
        yield threads


def head_of_a_post(length: int, *more: str) -> bytes:
    lines = ["POST /explain HTTP/1.1", "host: x", "content-type: image/png", *more]
    return "\r\n".join([*lines, f"content-length: {length}", "", ""]).encode()


def read_to_the_end(connection: socket.socket) -> bytes:
    return b"".join(iter(functools.partial(connection.recv, 65536), b""))


def value(client: httpx.Client, server: Any, line: str) -> float:
    text = client.get(f"{server.url}/metrics").text
    found = [each for each in text.splitlines() if each.startswith(line)]
    return float(found[0].split()[-1]) if found else 0.0


# ---- the queue is full


@pytest.fixture
def full(run_server, http) -> Iterator[Any]:
    """A server of one place, which is taken."""
    with run_server(max_queue=1) as server, in_background() as threads:
        with Gate(server.service.scheduler) as gate:
            first = threads.submit(
                http.post, f"{server.url}/explain", content=pictures.png(), headers=PNG
            )
            gate.wait_for_a_batch()
            yield server
        assert first.result(10).status_code == 200
        wait_until(lambda: server.service.admission.images == 0)  # after its response is sent


def test_a_full_queue_refuses_at_once_and_says_when_to_try_again(full, http) -> None:
    began = time.monotonic()
    response = http.post(f"{full.url}/explain", content=pictures.png(), headers=PNG)
    assert time.monotonic() - began < 1
    assert (response.status_code, response.json()["code"]) == (429, "queue_full")
    assert int(response.headers["retry-after"]) >= 1
    assert "Retry-After" in response.json()["detail"]
    assert full.service.admission.images == 1


@pytest.mark.parametrize("route", ["/explain", "/predict"])
def test_what_is_refused_for_want_of_a_place_is_not_looked_into(full, http, route: str) -> None:
    """Its options would take longer to understand than all the rest of a refusal."""
    count = f'camserve_requests_total{{route="{route}",status="429"}}'
    before = value(http, full, count)
    response = http.post(f"{full.url}{route}?metod=x", content=b"x", headers=PNG)
    assert (response.status_code, response.json()["code"]) == (429, "queue_full")
    assert value(http, full, count) == before + 1
    assert http.post(f"{full.url}/nowhere", content=b"x").status_code == 404


@pytest.mark.parametrize("path", ["/explain", "/vision/explain", "/predict", "/vision/predict"])
def test_behind_a_prefix_too_what_is_refused_is_not_looked_into(serve, path: str) -> None:
    """Whether the proxy takes the prefix away or hands it on."""
    with serve(root_path="/vision", max_queue=1) as client:
        sent = {"content": b"x", "headers": PNG}
        with client.app.state.service.admission.admit():
            refused = client.post(f"{path}?metod=x", **sent)
            assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
            route = path.removeprefix("/vision")
            count = f'camserve_requests_total{{route="{route}",status="429"}} 1.0'
            assert count in client.get("/metrics").text
        assert client.post(f"{path}?metod=x", **sent).status_code == 422


def test_probes_models_and_metrics_answer_while_the_queue_is_full(full, http) -> None:
    for route in ("/health/live", "/health/ready", "/models", "/models/small/layers"):
        assert http.get(f"{full.url}{route}").status_code == 200
    assert value(http, full, "camserve_images_held ") == 1


def test_a_client_of_a_large_refused_body_reads_the_answer(full, http) -> None:
    """Not a connection reset: what it still sends is read and thrown away."""
    response = http.post(f"{full.url}/explain", content=b"x" * LARGE, headers=PNG)
    assert response.status_code == 429


def test_a_refusal_does_not_wait_for_a_body_that_never_comes(full) -> None:
    with socket.create_connection(full.address, timeout=5) as connection:
        connection.sendall(head_of_a_post(LARGE) + b"x" * 1000)
        answer = read_to_the_end(connection)
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"connection: close" in answer.lower()


def test_a_client_that_asks_before_it_sends_is_refused_without_a_body(full) -> None:
    """`Expect: 100-continue` is what curl sends with more than 1 MB."""
    with socket.create_connection(full.address, timeout=5) as connection:
        connection.sendall(head_of_a_post(LARGE, "expect: 100-continue"))
        answer = read_to_the_end(connection)
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"100 Continue" not in answer
    assert b"connection: close" in answer.lower()


def test_a_client_that_asks_before_it_sends_is_answered(run_server) -> None:
    with run_server() as server, socket.create_connection(server.address, timeout=5) as connection:
        data = pictures.png()
        connection.sendall(head_of_a_post(len(data), "expect: 100-continue", "connection: close"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(data)
        assert read_to_the_end(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("header", ["content-type: image/png", "expect:"])
def test_curl_prints_the_answer_to_a_large_refused_body(full, tmp_path: Path, header: str) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(b"x" * LARGE)
    command = ["curl", "--silent", "--show-error", "--max-time", "5", "--write-out", "%{http_code}"]
    command += ["--header", "content-type: image/png", "--header", header]
    command += ["--data-binary", f"@{file}", f"{full.url}/explain"]
    told = subprocess.run(command, capture_output=True, check=False, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.endswith("429")
    assert '"code":"queue_full"' in told.stdout.replace('": "', '":"')


def test_the_images_of_a_form_are_counted_one_by_one(serve) -> None:
    """Two places, one taken: two images are one too many."""
    with serve(max_queue=2, workers=2) as client, in_background() as threads:
        with Gate(client.app.state.service.scheduler) as gate:
            first = threads.submit(send, client, pictures.png())
            gate.wait_for_a_batch()
            response = client.post("/explain", files=[("image", pictures.png())] * 2)
            assert (response.status_code, response.json()["code"]) == (429, "queue_full")
            assert client.app.state.service.admission.images == 1
        assert first.result(10).status_code == 200
        assert client.app.state.service.admission.images == 0


def test_more_images_than_there_are_places_are_answered_when_nobody_else_is_there(serve) -> None:
    with serve(max_queue=2) as client:
        response = client.post("/predict", files=[("image", pictures.png())] * 5)
        assert response.status_code == 200
        assert len(response.json()["results"]) == 5
        assert client.app.state.service.admission.images == 0


def test_bytes_that_were_not_declared_are_counted_as_they_come(run_server, http) -> None:
    """Chunked bodies cannot get round the bound on bytes."""
    with run_server(max_queue_bytes=100_000) as server, in_background() as threads:
        with Gate(server.service.scheduler) as gate:
            first = threads.submit(
                http.post, f"{server.url}/explain", content=pictures.png(200, 200), headers=PNG
            )
            gate.wait_for_a_batch()
            chunks = (b"x" * 10_000 for _ in range(10))
            response = http.post(f"{server.url}/explain", content=chunks, headers=PNG)
            assert (response.status_code, response.json()["code"]) == (429, "queue_full")
        assert first.result(10).status_code == 200
        assert server.service.admission.images == 0


# ---- the deadline passes


def test_the_deadline_is_kept_while_the_batch_still_runs(serve) -> None:
    with serve(request_timeout=0.5) as client:
        with Gate(client.app.state.service.scheduler) as gate:
            response = send(client, pictures.png())
            assert gate.batches == [1]  # and it still stands there
            assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
            assert "0.5 seconds" in response.json()["detail"]
            assert client.app.state.service.admission.images == 0
        assert send(client, pictures.png()).status_code == 200


def test_a_client_may_ask_for_less_time(serve) -> None:
    with serve(request_timeout=30) as client, Gate(client.app.state.service.scheduler):
        hurried = PNG | {"x-request-timeout": "0.4"}
        response = client.post("/explain", content=pictures.png(), headers=hurried)
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
        assert "0.4 seconds" in response.json()["detail"]


def test_a_client_gets_no_more_time_than_the_service_gives(serve) -> None:
    with serve(request_timeout=0.4) as client, Gate(client.app.state.service.scheduler):
        patient = PNG | {"x-request-timeout": "900"}
        response = client.post("/explain", content=pictures.png(), headers=patient)
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
        assert "0.4 seconds" in response.json()["detail"]


@pytest.mark.parametrize("said", ["0", "-1", "soon", "nan", "inf", "1e3", "", "1" * 50, "0.0"])
def test_a_time_that_is_none_is_said_so(serve, said: str) -> None:
    with serve() as client:
        odd = PNG | {"x-request-timeout": said}
        response = client.post("/explain", content=pictures.png(), headers=odd)
        assert (response.status_code, response.json()["code"]) == (400, "malformed_request")
        assert "X-Request-Timeout" in response.json()["detail"]


def test_what_waited_past_its_deadline_is_never_run(serve) -> None:
    with serve(request_timeout=1.5) as client:
        scheduler = client.app.state.service.scheduler
        with Gate(scheduler) as gate:
            gate.open()
            asks = [functools.partial(send, client, pictures.png(seed=seed)) for seed in range(2)]
            with queued(scheduler, asks) as answers:
                assert [answer.result(5).status_code for answer in answers] == [504, 504]
            assert send(client, pictures.png()).status_code == 200
            assert gate.batches == [1]


def test_a_slow_upload_is_ended(run_server) -> None:
    with (
        run_server(request_timeout=0.3) as server,
        socket.create_connection(server.address, timeout=5) as connection,
    ):
        connection.sendall(head_of_a_post(1000) + b"x" * 10)
        answer = read_to_the_end(connection)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"slow_upload"' in answer
        assert server.service.admission.images == 0


# ---- the client hangs up


def test_an_image_whose_client_has_gone_is_never_run(run_server, http) -> None:
    with run_server() as server:
        scheduler, emptied = server.service.scheduler, Emptied(server.service.admission)
        connection = socket.create_connection(server.address, timeout=5)
        data = pictures.png()
        with Gate(scheduler) as gate:
            gate.open()
            hang_on = functools.partial(connection.sendall, head_of_a_post(len(data)) + data)
            with queued(scheduler, [hang_on]):
                connection.close()
                emptied.wait()
            response = http.post(f"{server.url}/predict", content=data, headers=PNG)
            assert response.status_code == 200
            assert gate.batches == [1]
        assert value(http, server, 'camserve_requests_total{route="/explain",status="499"}') == 1


def test_a_client_that_goes_while_its_batch_runs_leaves_nothing_behind(run_server, http) -> None:
    with run_server() as server:
        emptied = Emptied(server.service.admission)
        data = pictures.png()
        with Gate(server.service.scheduler) as gate:
            with socket.create_connection(server.address, timeout=5) as connection:
                connection.sendall(head_of_a_post(len(data)) + data)
                gate.wait_for_a_batch()
            emptied.wait()
        response = http.post(f"{server.url}/explain", content=data, headers=PNG)
        assert response.status_code == 200


def test_a_client_that_goes_in_the_middle_of_its_upload_is_no_error(run_server, http, caplog):
    with run_server() as server:
        emptied = Emptied(server.service.admission)
        with socket.create_connection(server.address, timeout=5) as connection:
            connection.sendall(head_of_a_post(1000) + b"x" * 10)
        emptied.wait()
        response = http.post(f"{server.url}/explain", content=pictures.png(), headers=PNG)
        assert response.status_code == 200
        requests = 'camserve_requests_total{route="/explain",status="%d"}'
        assert value(http, server, requests % 499) == 1
        assert value(http, server, requests % 500) == 0
    assert "Traceback" not in caplog.text


# ---- the end


def test_a_closed_service_takes_nothing_new_and_finishes_what_it_took(serve) -> None:
    with serve() as client, in_background() as threads:
        service = client.app.state.service
        with Gate(service.scheduler) as gate:
            accepted = threads.submit(send, client, pictures.png())
            gate.wait_for_a_batch()
            service.admission.close()
            refused = send(client, pictures.png())
            ready, live = client.get("/health/ready"), client.get("/health/live")
            gate.open()
            assert accepted.result(10).status_code == 200
        assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        assert (ready.status_code, ready.json()["code"]) == (503, "shutting_down")
        assert live.status_code == 200
        assert service.admission.images == 0


def test_an_idle_connection_outlives_the_minute_that_balancers_keep_theirs(serve) -> None:
    with serve() as client:
        server = DrainingServer(client.app, grace=1, delay=0)
        assert server.config.timeout_keep_alive > 60


def test_a_form_that_was_accepted_is_finished_after_the_close(run_server, http) -> None:
    """Its images come out of the queue several batches later."""
    with run_server(max_batch=1) as server, in_background() as threads:
        with Gate(server.service.scheduler) as gate:
            accepted = threads.submit(
                http.post, f"{server.url}/explain", files=[("image", pictures.png())] * 3
            )
            gate.wait_for_a_batch()
            server.stop()
            assert not accepted.done()
            gate.open()
            response = accepted.result(10)
        assert response.status_code == 200
        assert all("explanations" in result for result in response.json()["results"])
        assert gate.batches == [1, 1, 1]
