"""Models come, go and are replaced while requests run."""

from __future__ import annotations

import base64
import gc
import hashlib
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from fastapi.testclient import TestClient
from tiny import SmallNet

from service.app import create_app
from service.models.catalog import ModelSpec
from service.routes import bodies
from service.settings import Settings

KEY = "let me in"
ADMIN = {"authorization": f"Bearer {KEY}"}
PNG = {"content-type": "image/png"}

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weights file of `tiny:small`, to be written anew."""
    path = tmp_path / "weights.pt"
    torch.save(SmallNet(seed=0).state_dict(), path)
    return path


@pytest.fixture
def settings(tmp_path: Path, weights: Path) -> Settings:
    keys = tmp_path / "admins"
    keys.write_text(f"# who may\nops:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    models = (f"first=tiny:small@{weights}", "second=tiny:other")
    return Settings(models=models, workers=2, admin_keys_file=keys)


def explained(client: TestClient, **query: object) -> Any:
    return client.post("/explain", params=query, content=pictures.png(), headers=PNG)


def states(client: TestClient) -> dict[str, str]:
    lines = client.post("/v2/repository/index", headers=ADMIN).json()
    return {line["name"]: line["state"] for line in lines}


def test_the_index_lists_every_model_with_version_and_state(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        lines = client.post("/v2/repository/index", headers=ADMIN).json()
        assert [line["name"] for line in lines] == ["first", "second"]
        assert {line["state"] for line in lines} == {"READY"}
        assert lines[0]["version"] == client.get("/models/first").json()["version"]
        assert (
            client.post("/v2/repository/index", headers=ADMIN, json={"ready": True}).json() == lines
        )


@pytest.mark.parametrize("path", ["index", "models/first/load", "models/first/unload"])
@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}])
def test_only_an_admin_key_opens_the_repository(
    settings: Settings, path: str, headers: dict[str, str]
) -> None:
    with TestClient(create_app(settings)) as client:
        refused = client.post(f"/v2/repository/{path}", headers=headers)
        assert refused.status_code == 401
        assert "Bearer" in refused.json()["error"]
        assert states(client) == {"first": "READY", "second": "READY"}
    without = create_app(settings.model_copy(update={"admin_keys_file": None}))
    with TestClient(without) as client:
        assert client.post(f"/v2/repository/{path}", headers=ADMIN).status_code == 403


def test_an_unloaded_model_is_gone_until_it_is_loaded(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        answer = client.post("/v2/repository/models/second/unload", headers=ADMIN)
        assert answer.json() == {"name": "second", "unload": True}
        gone = explained(client, model="second")
        assert (gone.status_code, gone.json()["code"]) == (404, "unknown_model")
        assert "unloaded" in gone.json()["detail"]
        assert states(client)["second"] == "UNAVAILABLE"
        assert explained(client, model="first").status_code == 200
        answer = client.post("/v2/repository/models/second/load", headers=ADMIN)
        assert answer.json() == {"name": "second", "load": True}
        assert explained(client, model="second").status_code == 200


def test_the_default_model_stays_the_first_that_was_named(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        for verb in ("unload", "load"):
            client.post(f"/v2/repository/models/first/{verb}", headers=ADMIN)
        assert explained(client).json()["model"]["name"] == "first"


def test_an_unknown_model_is_404_in_the_protocols_own_form(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        for verb in ("load", "unload"):
            answer = client.post(f"/v2/repository/models/frist/{verb}", headers=ADMIN)
            assert answer.status_code == 404
            assert "Did you mean 'first'" in answer.json()["error"]


def test_a_new_version_that_cannot_be_loaded_leaves_the_old_one_serving(
    settings: Settings, weights: Path
) -> None:
    with TestClient(create_app(settings)) as client:
        before = explained(client).json()["model"]["version"]
        weights.write_bytes(b"no weights")
        refused = client.post("/v2/repository/models/first/load", headers=ADMIN)
        assert refused.status_code == 400
        assert "without running code" in refused.json()["error"]
        assert explained(client).json()["model"]["version"] == before
        ready = client.get("/health/ready")
        assert ready.status_code == 200
        assert ready.json() == {"status": "ready", "states": {"first": "ready"}}
        assert "without running code" in client.get("/models/first").json()["reason"]


def test_replacing_a_model_fifty_times_under_load_fails_no_request(
    settings: Settings, weights: Path
) -> None:
    """Each answer is whole and of one version; old versions are freed."""
    states_of = [SmallNet(seed=seed).state_dict() for seed in range(3)]
    done = threading.Event()
    failures: list[Any] = []
    answers: dict[str, list[Any]] = {}
    app = create_app(settings)
    service = app.state.service
    old: list[weakref.ref[Any]] = []

    def ask(client: TestClient) -> int:
        count = 0
        while not done.is_set():
            answer = explained(client, include="grid", model="first")
            if answer.status_code != 200:
                failures.append(answer.text)
                break
            body = answer.json()
            (result,) = body["results"]
            data = base64.b64decode(result["explanations"][0]["grid"]["data"])
            answers.setdefault(body["model"]["version"], []).append(np.frombuffer(data, "<f4"))
            count += 1
        return count

    with TestClient(app) as client, ThreadPoolExecutor(3) as clients, ExitStack() as stack:
        stack.callback(done.set)  # a failure in here must not wait for clients that never end
        counts = [clients.submit(ask, client) for _ in range(3)]
        for turn in range(50):
            torch.save(states_of[turn % 3], weights)
            old.append(weakref.ref(service.pool.model("first").module))
            service.library.load("first").result(30)
        done.set()
        assert sum(count.result(30) for count in counts) > 50
    assert not failures
    assert len(answers) == 3
    for grids in answers.values():  # images of a batch differ from one alone in the last bits
        assert np.abs(np.stack(grids) - grids[0]).max() < 1e-5, "an answer mixed two versions"
    first, second, third = (grids[0] for grids in answers.values())
    apart = min(np.abs(a - b).max() for a, b in ((first, second), (second, third), (third, first)))
    assert apart > 1e-2
    assert service.pool.faults() == []
    gc.collect()
    assert sum(reference() is not None for reference in old) <= 1  # the one that serves now


def test_over_the_memory_bound_the_least_recently_used_model_is_put_aside() -> None:
    """And loaded again when it is asked for."""
    size = sum(t.nbytes for t in (*SmallNet().parameters(), *SmallNet().buffers()))
    models = ("a=tiny:small", "b=tiny:small", "c=tiny:small")
    settings = Settings(models=models, workers=1, max_model_bytes=2 * size)
    app = create_app(settings)
    library = app.state.service.library
    with TestClient(app) as client:
        assert {name: e.state for name, e in library.entries.items()} == {
            "a": "unloaded", "b": "ready", "c": "ready"
        }  # fmt: skip
        assert explained(client, model="b").status_code == 200
        assert explained(client, model="a").status_code == 200
        assert {name: e.state for name, e in library.entries.items()} == {
            "a": "ready", "b": "ready", "c": "unloaded"
        }  # fmt: skip
        assert set(app.state.service.pool.models) == {"a", "b"}


def test_models_load_while_probes_are_answered_and_one_failure_leaves_the_others() -> None:
    release = threading.Event()
    app = create_app(
        Settings(models=("good=tiny:small", "bad=tiny:nothing"), workers=1), background=True
    )
    library = app.state.service.library
    load = library._load

    def held(spec: ModelSpec) -> Any:
        assert release.wait(10)
        return load(spec)

    library._load = held
    with TestClient(app) as client:
        assert client.get("/health/live").status_code == 200
        waiting = client.get("/health/ready")
        assert (waiting.status_code, waiting.json()["code"]) == (503, "model_not_ready")
        assert client.get("/models/good").json()["progress"]
        early = explained(client)
        assert (early.status_code, early.headers["retry-after"]) == (503, "5")
        release.set()
        for future in app.state.loading:
            future.exception(10)
        assert explained(client).status_code == 200
        shown = client.get("/models/bad").json()
        assert shown["state"] == "failed"
        assert "tiny:nothing" in shown["reason"]
        assert [m["state"] for m in client.get("/models").json()["models"]] == ["ready", "failed"]
        failed = explained(client, model="bad")
        assert failed.status_code == 503
        assert "GET /models/bad" in failed.json()["detail"]
        assert client.get("/health/ready").json()["states"] == {"bad": "failed"}


def test_reading_the_settings_again_serves_new_models_and_drops_others(settings: Settings) -> None:
    """What SIGHUP does."""
    app = create_app(settings)
    library = app.state.service.library
    with TestClient(app) as client:
        for future in library.replace_all(
            (ModelSpec("second", "tiny:other"), ModelSpec("third", "tiny:paper"))
        ):
            future.result(30)
        assert states(client) == {"second": "READY", "third": "READY"}
        assert explained(client).json()["model"]["name"] == "second"
        assert explained(client, model="first").status_code == 404


def test_a_body_without_an_admin_key_is_not_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was read whole, and parsed on the event loop, before the key was looked at."""
    monkeypatch.setattr(bodies, "read_body", lambda *_: pytest.fail("it was read"))
    with TestClient(create_app(settings)) as client:
        response = client.post("/v2/repository/index", content=b"{no JSON")
    assert response.status_code == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{" + b" " * 70_000 + b"}", 413), (b"{", 400), (b'{"ready": 3}', 400), (b"[]", 400)],
)
def test_the_body_of_the_index_is_bounded(settings: Settings, body: bytes, status: int) -> None:
    with TestClient(create_app(settings)) as client:
        response = client.post("/v2/repository/index", headers=ADMIN, content=body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
