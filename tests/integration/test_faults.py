"""What fails inside stays with the request it belongs to; the next one finds a clean service."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pictures
import pytest
import structlog
import tiny
from gates import together
from starlette.testclient import TestClient

from service import logs
from service.cam.heatmap import render_heatmap
from service.images.upload import open_upload
from service.models.pool import ModelPool
from service.scheduling.scheduler import Scheduler

PNG = {"content-type": "image/png"}


def scheduler_of(client: TestClient) -> Scheduler:
    return client.app.state.service.scheduler


def pool_of(client: TestClient) -> ModelPool:
    return client.app.state.service.pool


def send(client: TestClient, data: bytes, route: str = "/explain", **options: Any) -> Any:
    return client.post(route, content=data, headers=PNG, params=options)


def asks(
    client: TestClient, files: list[bytes], route: str = "/explain", **options: Any
) -> list[Callable[[], Any]]:
    return [functools.partial(send, client, data, route, **options) for data in files]


def check_failure(response: Any, code: str) -> None:
    """A 500 problem of that code with the request's id, and nothing of the cause."""
    body = response.json()
    assert (response.status_code, body["code"]) == (500, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert body["request_id"] == response.headers["x-request-id"]
    assert "planted" not in response.text
    assert "Traceback" not in response.text


def check_whole(client: TestClient) -> None:
    """Every replica idle and as it was built, no hook, no permit held, ready."""
    service = client.app.state.service
    until(lambda: not service.pool.faults())  # a replica that was given up is built by a worker
    assert service.pool.hooks_live() == 0
    assert service.admission.images == 0
    assert client.get("/health/ready").status_code == 200


def metric(client: TestClient, line: str) -> float:
    """The value of one line of /metrics, named with its labels."""
    found = re.search(rf"^{re.escape(line)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found, f"no metric {line}"
    return float(found[1])


@contextmanager
def logged_as(form: logs.LogFormat) -> Iterator[None]:
    """Log in that form to the standard error of this moment."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers, root.level
    logs.configure(form)
    try:
        yield
    finally:
        structlog.configure(**before)
        root.handlers = handlers
        root.setLevel(level)


def values_of(result: Any) -> Any:
    """What of a result may differ in the last digits between two batch sizes, as numbers."""
    return [each["logit"] for each in result["predictions"]]


# ---- the model fails on one picture of a batch

FAULTS = {
    "fails_in_forward": "inference_failed",
    "fails_in_hook": "inference_failed",
    "fails_in_backward": "inference_failed",
    "gives_nan": "non_finite_output",
}


@pytest.mark.parametrize(("fault", "code"), FAULTS.items())
@pytest.mark.parametrize("place", [0, 3])
def test_a_failing_picture_fails_alone_in_its_batch(
    serve, fault: str, code: str, place: int
) -> None:
    files = [pictures.png(seed=seed) for seed in range(4)]
    with serve(models=(f"tiny:{fault}",), max_batch=4) as client:
        expected = [send(client, data).json()["results"][0] for data in files]
        files[place] = pictures.RED_PNG
        responses = together(scheduler_of(client), asks(client, files))
        for index, response in enumerate(responses):
            if index == place:
                check_failure(response, code)
                continue
            assert response.status_code == 200
            (result,) = response.json()["results"]
            assert values_of(result) == pytest.approx(values_of(expected[index]), rel=1e-4)
            assert (
                result["explanations"][0]["class_id"]
                == (expected[index]["explanations"][0]["class_id"])
            )
        assert metric(client, 'camserve_batch_size_bucket{le="2.0"}') < metric(
            client, 'camserve_batch_size_bucket{le="4.0"}'
        )
        check_whole(client)
        assert set(pool_of(client).replaced.values()) == {0}


@pytest.mark.parametrize("fault", ["fails_in_forward", "fails_in_hook"])
def test_predict_fails_alone_too(serve, fault: str) -> None:
    files = [pictures.png(), pictures.RED_PNG, pictures.png(seed=2)]
    with serve(models=(f"tiny:{fault}",), max_batch=4) as client:
        responses = together(scheduler_of(client), asks(client, files, "/predict"))
        assert [response.status_code for response in responses] == [200, 500, 200]
        check_failure(responses[1], "inference_failed")
        check_whole(client)


def test_predict_needs_no_gradient_and_so_survives_a_failing_backward_pass(serve) -> None:
    with serve(models=("tiny:fails_in_backward",)) as client:
        assert send(client, pictures.RED_PNG, "/predict").status_code == 200
        check_failure(send(client, pictures.RED_PNG), "inference_failed")


@pytest.mark.parametrize(("fault", "code"), FAULTS.items())
def test_a_failing_picture_of_one_request_is_an_error_in_its_place(
    serve, fault: str, code: str
) -> None:
    sent = [("image", pictures.png()), ("image", pictures.RED_PNG), ("image", pictures.png())]
    with serve(models=(f"tiny:{fault}",)) as client:
        response = client.post("/explain", files=sent)
        assert response.status_code == 200
        results = response.json()["results"]
        assert results[1]["error"]["code"] == code
        assert results[1]["error"]["status"] == 500
        assert values_of(results[0]) == pytest.approx(values_of(results[2]), rel=1e-4)
        assert results[0]["explanations"]
        check_whole(client)


def test_the_same_service_fails_and_answers_many_times(serve) -> None:
    with serve(models=("tiny:fails_in_backward",), workers=2) as client:
        statuses = [
            send(client, data).status_code for data in [pictures.RED_PNG, pictures.png()] * 5
        ]
        assert statuses == [500, 200] * 5
        check_whole(client)
        requests = 'camserve_requests_total{route="/explain",status="%d"}'
        assert metric(client, requests % 500) == 5
        assert metric(client, requests % 200) == 5


# ---- what is ours fails


def test_a_picture_that_cannot_be_drawn_fails_alone(serve, monkeypatch) -> None:
    def render(grid: Any, geometry: Any, style: Any, *more: Any) -> Any:
        if style.colormap == "bone":
            raise RuntimeError("planted: render")
        return render_heatmap(grid, geometry, style, *more)

    monkeypatch.setattr("service.pipeline.response.render_heatmap", render)
    with serve(max_batch=4) as client:
        every = [
            functools.partial(send, client, pictures.png(), colormap=colormap)
            for colormap in ("turbo", "bone", "jet")
        ]
        responses = together(scheduler_of(client), every)
        assert [response.status_code for response in responses] == [200, 500, 200]
        check_failure(responses[1], "render_failed")
        assert "include=none" in responses[1].json()["detail"]
        assert send(client, pictures.png(), colormap="bone", include="none").status_code == 200
        check_whole(client)


def test_an_overlay_that_cannot_be_drawn_is_a_problem(serve, monkeypatch) -> None:
    """Also where the overlay itself was to be the answer."""

    def render(*_: Any, **__: Any) -> Any:
        raise ValueError("planted: overlay")

    monkeypatch.setattr("service.pipeline.response.render_overlay", render)
    with serve() as client:
        response = client.post(
            "/explain", content=pictures.png(), headers={**PNG, "accept": "image/png"}
        )
        check_failure(response, "render_failed")
        check_failure(send(client, pictures.png(), include="overlay"), "render_failed")
        assert send(client, pictures.png()).status_code == 200


def test_an_unforeseen_exception_while_decoding_fails_alone(serve, monkeypatch) -> None:
    def fail_when_red(data: bytes, *more: Any, **options: Any) -> Any:
        if data == pictures.RED_PNG:
            raise RuntimeError("planted: decode")
        return open_upload(data, *more, **options)

    monkeypatch.setattr("service.pipeline.process.open_upload", fail_when_red)
    files = [pictures.png(), pictures.RED_PNG, pictures.png(seed=1)]
    with serve(max_batch=4) as client:
        responses = together(scheduler_of(client), asks(client, files), jobs=2)
        assert [response.status_code for response in responses] == [200, 500, 200]
        check_failure(responses[1], "internal_error")
        check_whole(client)


def test_an_unforeseen_exception_in_a_route_is_a_problem(serve, monkeypatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("planted: route")

    monkeypatch.setattr("service.routes.classify.bodies.media_type", fail)
    with serve() as client:
        check_failure(send(client, pictures.png()), "internal_error")
        monkeypatch.undo()
        assert send(client, pictures.png()).status_code == 200
        check_whole(client)


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_cause_of_a_failure_is_in_the_log_and_not_in_the_answer(serve, capsys, form) -> None:
    """The log holds no local variables: among them are the pictures that people sent."""
    with logged_as(form), serve(models=("tiny:fails_in_forward",)) as client:
        response = send(client, pictures.RED_PNG)
    logged = capsys.readouterr().err
    check_failure(response, "inference_failed")
    assert "planted: forward" in logged
    assert response.headers["x-request-id"] in logged
    assert "IHDR" not in logged
    assert len(logged) < 20_000


# ---- a replica comes back dirty

SOILING = [
    *("leaves_training_mode", "leaves_a_gradient", "leaves_a_hook"),
    *("changes_a_buffer", "changes_its_weights"),
]


@pytest.mark.parametrize("fault", SOILING)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_dirty_replica_is_replaced_and_the_next_answer_is_right(
    serve, fault: str, workers: int
) -> None:
    with serve(models=(f"dirty:{fault}",), workers=workers) as client:
        replaced = f'camserve_replicas_replaced_total{{model="{fault}"}}'
        before = send(client, pictures.png(), include="grid").json()["results"]
        assert metric(client, replaced) == 0
        assert send(client, pictures.RED_PNG, "/predict").status_code == 200
        assert metric(client, replaced) == 1
        for _ in range(2 * workers):
            assert send(client, pictures.png(), include="grid").json()["results"] == before
        assert metric(client, replaced) == 1
        assert metric(client, "camserve_hooks_live") == 0
        check_whole(client)


# ---- metrics


def test_metrics_have_every_name_and_sane_values(serve) -> None:
    with serve(models=("tiny:small", "other=tiny:other")) as client:
        assert send(client, pictures.png()).status_code == 200
        sent = [("image", pictures.png()), ("image", b"no picture")]
        assert client.post("/predict?model=other", files=sent).status_code == 200
        assert send(client, b"").status_code == 400
        client.get("/no/such/route")
        requests = 'camserve_requests_total{route="%s",status="%d"}'
        assert metric(client, requests % ("/explain", 200)) == 1
        assert metric(client, requests % ("/explain", 400)) == 1
        assert metric(client, requests % ("/predict", 200)) == 1
        assert metric(client, requests % ("unmatched", 404)) == 1
        for stage in ("decode", "queue", "inference", "render", "total"):
            name = "camserve_stage_duration_seconds_%s" + f'{{stage="{stage}"}}'
            assert metric(client, name % "count") == 2
            assert 0 <= metric(client, name % "sum") < 60
        assert metric(client, "camserve_batch_size_count") == 2
        assert metric(client, "camserve_batch_size_sum") == 2
        for gauge in ("queue_size", "images_held", "hooks_live"):
            assert metric(client, f"camserve_{gauge}") == 0
        for model in ("small", "other"):
            assert metric(client, f'camserve_replicas_replaced_total{{model="{model}"}}') == 0
        content_type = client.get("/metrics").headers["content-type"]
        assert content_type.startswith("text/plain; version=")


def test_routes_in_metrics_are_templates_and_not_what_clients_make_up(serve) -> None:
    """A name a client chooses would make a new series each time."""
    with serve() as client:
        for name in ("a", "b", "c"):
            client.get(f"/models/{name}")
            client.get(f"/{name}")
        text = client.get("/metrics").text
        assert 'route="/models/{name}",status="404"} 3.0' in text
        assert 'route="unmatched",status="404"} 3.0' in text


# ---- what hangs


@pytest.mark.timeout(30)
def test_a_model_that_hangs_costs_its_own_request_and_nobody_elses(serve) -> None:
    """Its thread and replica are replaced; should it end after all, they are thrown away."""
    tiny.HANGING.clear()
    tiny.RELEASED.clear()
    with serve(models=("tiny:hangs",), hang_timeout=0.3, max_batch=1) as client:
        try:
            with ThreadPoolExecutor(1) as threads:
                hanging = threads.submit(send, client, pictures.RED_PNG)
                assert tiny.HANGING.wait(10)
                assert send(client, pictures.png()).status_code == 200, "another thread answers"
                check_failure(hanging.result(10), "inference_hangs")
            assert metric(client, "camserve_workers_hanging") == 1
            assert metric(client, 'camserve_replicas_replaced_total{model="hangs"}') == 1
            assert client.app.state.service.pool.hooks_live() == 0, "those of the lost one are gone"
            check_whole(client)
        finally:
            tiny.RELEASED.set()
        until(lambda: metric(client, "camserve_workers_hanging") == 0)
        assert send(client, pictures.png()).status_code == 200
        check_whole(client)


@pytest.mark.timeout(30)
def test_who_shares_a_batch_with_one_that_hangs_is_answered(serve) -> None:
    tiny.HANGING.clear()
    tiny.RELEASED.clear()
    files = [pictures.png(), pictures.RED_PNG, pictures.png(seed=2)]
    with serve(models=("tiny:hangs",), hang_timeout=0.3) as client:
        try:
            answers = together(client.app.state.service.scheduler, asks(client, files))
            assert [answer.status_code for answer in answers] == [200, 500, 200]
            check_failure(answers[1], "inference_hangs")
            check_whole(client)
        finally:
            tiny.RELEASED.set()
        until(lambda: metric(client, "camserve_workers_hanging") == 0)
        check_whole(client)


@pytest.mark.timeout(30)
def test_where_too_many_threads_hang_the_service_is_neither_ready_nor_live(serve) -> None:
    """One worker, so three that hang are past the bound.

    A balancer sends requests elsewhere, and what restarts containers restarts this one, unless a
    thread comes back before.
    """
    tiny.HANGING.clear()
    tiny.RELEASED.clear()
    with serve(models=("tiny:hangs",), hang_timeout=0.5, max_batch=1) as client:
        try:
            for _ in range(3):
                check_failure(send(client, pictures.RED_PNG), "inference_hangs")
            for probe in ("/health/ready", "/health/live"):
                answer = client.get(probe)
                assert (answer.status_code, answer.json()["code"]) == (503, "shutting_down")
                assert client.head(probe).status_code == 503
                assert client.get(f"/v2{probe}").status_code == 503
        finally:
            tiny.RELEASED.set()
        until(lambda: client.get("/health/ready").status_code == 200)
        assert client.get("/health/live").status_code == 200
        assert send(client, pictures.png()).status_code == 200


def until(condition: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(1000):
        if condition():
            return
        waited.wait(0.01)
    pytest.fail("it did not come true")
