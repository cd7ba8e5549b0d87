"""Replicas of many models, without a cluster: whose request may have a model loaded."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pictures
import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.errors import ConfigurationError
from service.security.overlay_tokens import Grant, sign
from service.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Ray imports
    ray_serve = pytest.importorskip("service.ray_serve")

pytestmark = pytest.mark.timeout(60)

PNG = {"content-type": "image/png"}
KEY, ADMIN = {"x-api-key": "key"}, {"x-api-key": "admin"}
SECRET = "a secret of sixteen"  # noqa: S105
OVERLAY = "/integrations/label-studio/overlay.png"

Replica = Callable[..., AbstractContextManager[tuple[TestClient, list[str]]]]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """Settings of a service with keys."""
    for name in ("key", "admin"):
        line = f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n"
        (tmp_path / name).write_text(line)
    return {"api_keys_file": tmp_path / "key", "admin_keys_file": tmp_path / "admin"}


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Replica:
    """A replica of the models a, b and c, and the names that it loads, as it loads them."""
    monkeypatch.setattr(ray_serve, "replica_settings", lambda arguments: Settings(**arguments))

    @contextmanager
    def started(**settings: Any) -> Iterator[tuple[TestClient, list[str]]]:
        loads: list[str] = []
        open_models: dict[str, Any] = {}

        class ManyModels(ray_serve.ManyModels):
            async def _model(self, name: str) -> Any:
                """As Ray's decorator would, but it forgets none."""
                loads.append(name)
                if name not in open_models:
                    model = ray_serve._ModelApp(create_app(self._settings, only=name))
                    await model.open()
                    open_models[name] = model
                    self._loaded.append(model)
                return open_models[name]

        values = {"models": tuple(f"{name}=tiny:small" for name in "abc"), "workers": 1}
        with TestClient(ManyModels({**values, **settings}).__serve_build_asgi_app__()) as client:
            try:
                yield client, loads
            finally:
                for model in open_models.values():
                    client.portal.call(model.close)

    return started


def predict(client: TestClient, path: str = "/predict?model=b", **headers: str) -> Any:
    return client.post(path, content=pictures.png(), headers=PNG | headers)


ROUTES = [
    ("GET", "/"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/metrics"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/v2/health/ready"),
    ("GET", "/ping"),
    ("GET", "/models"),
    ("GET", "/models/b/layers"),
    ("GET", "/nothing"),
    ("POST", "/predict"),
    ("POST", "/explain"),
    ("POST", "/v1/models/b:predict"),
    ("POST", "/v2/models/b/infer"),
    ("POST", "/predictions/b"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/b/load"),
    ("GET", OVERLAY),
]
WRONG: dict[str, dict[str, str]] = {
    "none": {},
    "empty": {"authorization": "Bearer "},
    "wrong": {"x-api-key": "wrong"},
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_no_route_loads_a_model_for_a_request_without_a_key(
    replica: Replica, keys: dict[str, Any], headers: dict[str, str]
) -> None:
    with replica(**keys) as (client, loads):
        for method, path in ROUTES:
            answer = client.request(method, f"{path}?model=b", headers=headers)
            is_open = path in ("/", "/docs", "/openapi.json", "/metrics", "/ping")
            is_open = is_open or "health" in path
            assert (answer.status_code == 200) == is_open, (path, answer.status_code)
            assert is_open or answer.status_code in (400, 401), (path, answer.status_code)
        assert loads == []


def test_a_model_that_is_named_in_ray_s_header_waits_for_the_key_too(
    replica: Replica, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_serve.serve, "get_multiplexed_model_id", lambda: "c")
    with replica(**keys) as (client, loads):
        assert predict(client).status_code == 401
        assert loads == []
        answer = predict(client, **KEY)
        assert (answer.status_code, loads) == (404, ["c"]), "the app of c has no b"
        assert predict(client, "/predict", **KEY).json()["model"]["name"] == "c"


def test_with_its_key_a_request_has_its_model_loaded(
    replica: Replica, keys: dict[str, Any]
) -> None:
    with replica(**keys) as (client, loads):
        assert predict(client, **KEY).json()["model"]["name"] == "b"
        assert predict(client, "/predict", **KEY).json()["model"]["name"] == "a"
        assert loads == ["b", "a"]
        assert predict(client).status_code == 401
        assert client.get("/health/ready").json() == {"status": "ready"}
        assert loads == ["b", "a"]


def test_an_unknown_name_is_answered_404_only_with_a_key(
    replica: Replica, keys: dict[str, Any]
) -> None:
    with replica(**keys) as (client, loads):
        assert predict(client, "/predict?model=aa").status_code == 401
        unknown = predict(client, "/predict?model=aa", **KEY)
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_model")
        assert loads == []


def test_the_model_repository_wants_an_admin_key_before_a_model_is_loaded(
    replica: Replica, keys: dict[str, Any]
) -> None:
    index = "/v2/repository/index?model=b"
    with replica(**keys) as (client, loads):
        assert client.post(index, headers=KEY).status_code == 401
        assert client.post(index, auth=("admin", "admin")).status_code == 401
        assert loads == []
        assert client.post(index, headers=ADMIN).json()[0]["name"] == "b"
    with replica() as (client, loads):
        assert client.post(index).status_code == 403
        assert loads == []


def test_an_overlay_loads_the_model_of_its_signed_key_and_no_other(replica: Replica) -> None:
    grant = Grant(("/data/upload/1/",), "http://localhost:8080", model="c")
    good, forged = sign(grant, SECRET), sign(grant, SECRET[::-1])
    with replica(overlay_secret=SECRET) as (client, loads):
        for query in (f"key={forged}&src=/data/upload/1/x.png", f"key={good}&src=/data/2/x.png"):
            refused = client.get(f"{OVERLAY}?{query}&model=b")
            assert refused.status_code in (400, 401)
        assert loads == []
        client.get(f"{OVERLAY}?key={good}&src=/data/upload/1/x.png")
        assert loads == ["c"]


def test_a_rebound_name_has_no_model_loaded(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CAMSERVE_ALLOWED_HOSTS")
    with replica() as (client, loads):
        assert predict(client, host="evil.example").status_code == 421
        assert loads == []
        assert predict(client, host="localhost").status_code == 200
        assert loads == ["b"]


def test_behind_a_prefix_the_same_routes_are_open(replica: Replica, keys: dict[str, Any]) -> None:
    with replica(**keys, root_path="/vision") as (client, loads):
        for path in ("/health/ready", "/vision/health/ready"):
            assert client.get(path).status_code == 200
        assert client.post("/vision/v2/repository/index", headers=KEY).status_code == 401
        assert loads == []
        assert predict(client, "/vision/predict?model=b", **KEY).status_code == 200


def test_a_query_of_thousands_of_options_loads_nothing(replica: Replica) -> None:
    with replica() as (client, loads):
        assert predict(client, "/predict?" + "&".join(["model=b"] * 2000)).status_code == 422
        assert loads == []


def test_a_model_that_cannot_be_loaded_is_answered_without_its_files(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ConfigurationError("cannot read the weights file /srv/secret/weights.pt.")

    with replica() as (client, _):
        monkeypatch.setitem(globals(), "create_app", fails)
        answer = predict(client)
        assert (answer.status_code, answer.json()["code"]) == (503, "configuration_error")
        assert "/srv" not in answer.text


def test_behind_ray_a_replica_takes_itself_for_one_that_others_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's proxy listens, so its default of loopback would refuse every address of a node."""

    class Context:
        def get_assigned_resources(self) -> dict[str, float]:
            return {"CPU": 2.0}

    monkeypatch.setattr(ray_serve.ray, "get_runtime_context", Context)
    for name in ("tune_allocator", "spare_collector"):
        monkeypatch.setattr(ray_serve, name, lambda: None)
    monkeypatch.setattr(ray_serve.sys, "setswitchinterval", lambda _: None)
    settings = ray_serve.replica_settings({})
    assert (settings.host, settings.workers) == ("0.0.0.0", 2)  # noqa: S104 - only compared
    assert ray_serve.replica_settings({"host": "10.0.0.1"}).host == "10.0.0.1"
