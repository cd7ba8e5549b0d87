"""Requests are isolated from what a model keeps, changes, loses and breaks; the service says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pictures
import pytest
import torch
from fastapi.testclient import TestClient
from keeping import KEEPS, LEAVES, OPEN, Copied
from tiny import SmallNet

from service.app import create_app
from service.models.probes.torch_state import kept_torch_state
from service.settings import Settings

PNG = {"content-type": "image/png"}

pytestmark = pytest.mark.timeout(60)


def logits(client: TestClient, data: bytes, **query: Any) -> list[float]:
    answer = client.post("/predict", params={"top_k": 7, **query}, content=data, headers=PNG)
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    found = {each["class_id"]: each["logit"] for each in result["predictions"]}
    return [found[class_id] for class_id in sorted(found)]


@pytest.mark.parametrize("kind", KEEPS)
def test_no_request_leaks_into_the_next(serve, kind: str) -> None:
    """An attribute that kept the features of one request moved the logits of the next."""
    images = [pictures.png(seed=seed) for seed in range(3)]
    alone: list[list[float]] = []
    for image in images:
        with serve(models=(f"keeping:{kind}",)) as client:
            alone.append(logits(client, image))
    with serve(models=(f"keeping:{kind}",)) as client:
        for _ in range(2):
            assert [logits(client, image) for image in images] == alone
        shown = client.get(f"/models/{kind}").json()
        assert shown["stateful"]
        assert shown["state"] == "ready"
        replaced = f'camserve_replicas_replaced_total{{model="{kind}"}} 0.0'
        assert replaced in client.get("/metrics").text


@pytest.mark.parametrize("compiled", [False, True], ids=["hooked", "compiled"])
def test_a_model_that_keeps_features_answers_the_same_in_both_lanes(serve, compiled: bool) -> None:
    with serve(models=("keeping:attribute",), compile=compiled) as client:
        images = [pictures.png(seed=seed) for seed in range(3)]
        first = [logits(client, image) for image in images]
        assert [logits(client, image) for image in images] == first


@pytest.mark.parametrize("kind", LEAVES)
def test_a_model_that_changes_torch_changes_no_other_models_answers(serve, kind: str) -> None:
    """After `torch.set_grad_enabled(False)` no other model could explain until a restart."""
    image = pictures.png()

    def explained(client: TestClient) -> Any:
        answer = client.post("/explain?model=small&include=grid", content=image, headers=PNG)
        assert answer.status_code == 200, answer.text
        return answer.json()["results"]

    with kept_torch_state():
        with serve(models=("tiny:small",)) as client:
            before = explained(client)
        with serve(models=("tiny:small", f"keeping:{kind}"), workers=1) as client:
            for _ in range(4):
                client.post(f"/explain?model={kind}", content=image, headers=PNG)
                assert explained(client) == before
        OPEN.clear()


def test_a_model_without_state_says_nothing_of_it(serve) -> None:
    with serve(models=("tiny:small",)) as client:
        assert "stateful" not in client.get("/models/small").json()


# ---- what is lost


def fail() -> None:
    raise RuntimeError("planted: cannot be copied")


def lose(client: TestClient, patch: pytest.MonkeyPatch) -> None:
    """Make the only replica of each form dirty while none can be built."""
    patch.setattr(Copied, "before", staticmethod(fail))
    for folded in (False, True):
        with client.app.state.service.pool.lease("copied", folded=folded) as replica:
            replica.module.train()


def test_a_model_without_a_replica_is_not_ready_and_comes_back_by_the_probe(serve) -> None:
    """It answered 504 for ever, while both probes said 200."""
    with serve(models=("keeping:copied",)) as client:
        pool = client.app.state.service.pool
        clock = Seconds()
        pool._clock = clock
        with pytest.MonkeyPatch.context() as patch:
            lose(client, patch)
            refused = client.post("/predict", content=pictures.png(), headers=PNG)
            assert (refused.status_code, refused.json()["code"]) == (503, "model_not_ready")
            assert refused.headers["retry-after"] == "1"
            assert "planted" not in refused.text
            assert client.get("/health/ready").status_code == 503
            assert client.get("/v2/health/ready").status_code == 503
            assert client.get("/v2/models/copied/ready").status_code == 503
            assert client.get("/v1/models/copied").status_code == 503
            assert client.get("/health/live").status_code == 200
            shown = client.get("/models/copied").json()
            assert (shown["state"], shown["replicas"]) == ("failed", 0)
            assert "No replica" in shown["reason"]
        clock.now += 1
        until(lambda: client.get("/health/ready").status_code == 200)
        assert client.get("/models/copied").json()["state"] == "ready"
        assert len(logits(client, pictures.png())) == 7
        assert pool.faults() == []


def test_one_model_without_a_replica_leaves_the_service_ready_for_the_others(serve) -> None:
    with serve(models=("tiny:small", "keeping:copied")) as client:
        pool = client.app.state.service.pool
        pool._clock = clock = Seconds()
        with pytest.MonkeyPatch.context() as patch:
            lose(client, patch)
            ready = client.get("/health/ready")
            assert ready.status_code == 200
            assert ready.json()["states"] == {"copied": "failed"}
            assert len(logits(client, pictures.png(), model="small")) == 7
        clock.now += 1
        pool.replace_missing()


def until(holds: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(1000):
        if holds():
            return
        waited.wait(0.01)
    pytest.fail("it did not come true")


class Seconds:
    """A clock that stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


ROUTES = [
    "/health/live", "/health/ready", "/metrics", "/models", "/models/copied",
    "/models/copied/layers", "/v2", "/v2/health/ready", "/v2/models/copied",
    "/v2/models/copied/ready", "/v1/models", "/v1/models/copied",
]  # fmt: skip


@pytest.mark.parametrize("what", ["a replica is built", "weights are read again"])
def test_probes_and_routes_answer_while_a_builder_sleeps(serve, what: str) -> None:
    """Reading weights again for five seconds stopped the event loop for five seconds."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert go_on.wait(20)

    with serve(models=("keeping:copied",), workers=2) as client, ThreadPoolExecutor(2) as threads:
        pool = client.app.state.service.pool

        def soil() -> None:
            with pool.lease("copied") as replica:
                if what == "a replica is built":
                    replica.module.train()
                else:
                    with torch.no_grad():
                        replica.module.head.weight.add_(1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Copied, "before", staticmethod(wait))
            soiling = threads.submit(soil)
            assert inside.wait(20)
            try:
                answers = threads.submit(lambda: [client.get(r).status_code for r in ROUTES])
                statuses = dict(zip(ROUTES, answers.result(20), strict=True))
            finally:
                go_on.set()
            soiling.result(20)
        assert statuses["/health/live"] == statuses["/metrics"] == statuses["/models"] == 200
        assert set(statuses.values()) <= {200, 503}
        assert client.get("/health/ready").status_code == 200


# ---- what fails and passes


def test_a_failed_model_is_loaded_again_by_a_request_once_its_delay_has_passed(
    tmp_path,
) -> None:
    """A share that was away for a second failed the model until somebody loaded it by hand."""
    weights = tmp_path / "weights.pt"
    settings = Settings(models=("tiny:small", f"late=tiny:small@{weights}"), workers=1)
    app = create_app(settings, background=True)
    library = app.state.service.library
    clock = Seconds()
    library._clock = clock
    with TestClient(app) as client:
        for future in app.state.loading:
            future.exception(20)
        refused = client.post("/predict?model=late", content=pictures.png(), headers=PNG)
        assert (refused.status_code, refused.json()["code"]) == (503, "model_not_ready")
        assert refused.headers["retry-after"] == "5"
        torch.save(SmallNet().state_dict(), weights)
        clock.now += 5
        assert len(logits(client, pictures.png(), model="late")) == 7
        assert client.get("/models/late").json()["state"] == "ready"


def test_a_retry_that_fails_again_says_when_to_come_back(tmp_path) -> None:
    settings = Settings(models=("tiny:small", f"late=tiny:small@{tmp_path / 'no'}"), workers=1)
    app = create_app(settings, background=True)
    clock = Seconds()
    app.state.service.library._clock = clock
    with TestClient(app) as client:
        for future in app.state.loading:
            future.exception(20)
        clock.now += 5
        refused = client.post("/predict?model=late", content=pictures.png(), headers=PNG)
        assert (refused.status_code, refused.json()["code"]) == (503, "model_not_ready")
        assert refused.headers["retry-after"] == "10"
        assert client.get("/health/ready").status_code == 200
