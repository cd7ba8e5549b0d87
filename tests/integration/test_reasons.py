"""Why a model is not served names files: it is shown to a client with a key, or on the machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from starlette.testclient import TestClient
from tiny import SmallNet

from service.app import create_app
from service.models.loaded import LoadedModel
from service.routes.served_models import HIDDEN
from service.settings import Settings

KEY = {"x-api-key": "key"}
PNG = {"content-type": "image/png"}
OPEN_PROBES = ("/health/ready", "/v2/health/ready", "/ping", "/health/live", "/v2/health/live")
SECRET = "folder-that-nobody-should-know"  # noqa: S105


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Weights that cannot be read, in a folder whose name must not leave."""
    path = tmp_path / SECRET / "weights.pt"
    path.parent.mkdir()
    path.write_bytes(b"no weights")
    return path


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"one:{hashlib.sha256(b'key').hexdigest()}\n")
    return path


@contextmanager
def loaded(*models: str, **settings: Any) -> Iterator[TestClient]:
    """A service that has tried all of its models, whether they could be loaded or not."""
    app = create_app(Settings(models=models, workers=1, **settings), background=True)
    with TestClient(app) as client:
        for future in app.state.loading:
            future.exception(10)
        yield client


def bad(broken: Path) -> str:
    return f"bad=tiny:small@{broken}"


def missing(broken: Path) -> str:
    return f"missing=tiny:small@{broken.parent / 'nothing.pt'}"


RAISES = "raises=test_reasons_builder:raises"


@pytest.fixture
def builder(tmp_path: Path) -> Path:
    """The folder of a builder whose error names a file."""
    text = f"def raises():\n    raise OSError('cannot read /srv/{SECRET}/labels.txt')\n"
    (tmp_path / "test_reasons_builder.py").write_text(text)
    return tmp_path


def answer_of(client: TestClient, path: str, **headers: str) -> str:
    """Headers and body of an answer."""
    answer = client.get(path, headers=headers)
    return f"{answer.headers} {answer.text}"


@pytest.mark.parametrize("with_keys", [True, False])
@pytest.mark.parametrize("good", [True, False], ids=["one serves", "none serves"])
def test_open_probes_say_which_models_are_not_served_and_never_why(
    broken: Path, keys: Path, builder: Path, *, with_keys: bool, good: bool
) -> None:
    models = [*(["good=tiny:small"] if good else []), bad(broken), missing(broken), RAISES]
    settings: dict[str, Any] = {"api_keys_file": keys} if with_keys else {}
    with loaded(*models, **settings, app_dir=builder) as client:
        for path in OPEN_PROBES:
            for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer "}):
                text = answer_of(client, path, **headers)
                assert SECRET not in text, path
                assert "without running code" not in text, path
        answer = client.get("/health/ready")
        failed = {"bad": "failed", "missing": "failed", "raises": "failed"}
        if good:
            assert answer.json() == {"status": "ready", "states": failed}
        else:
            assert answer.status_code == 503
            assert "bad is failed, missing is failed" in answer.json()["detail"]
            assert "GET /models has the reasons" in answer.json()["detail"]


def test_a_request_with_a_key_gets_the_reason_in_the_probe_and_in_models(
    broken: Path, keys: Path
) -> None:
    with loaded("good=tiny:small", bad(broken), api_keys_file=keys) as client:
        ready = client.get("/health/ready", headers=KEY).json()
        assert SECRET in ready["reasons"]["bad"]
        assert SECRET in client.get("/models/bad", headers=KEY).json()["reason"]
        assert SECRET in answer_of(client, "/models", **KEY)
    with loaded(bad(broken), api_keys_file=keys) as client:
        assert SECRET in client.get("/health/ready", headers=KEY).json()["detail"]


def test_without_keys_models_says_why_only_where_nobody_else_can_ask(broken: Path) -> None:
    models = ("good=tiny:small", bad(broken))
    with loaded(*models) as client:
        assert SECRET in client.get("/models/bad").json()["reason"]
    with loaded(*models, host="0.0.0.0") as client:  # noqa: S104 - nothing listens
        assert client.get("/models/bad").json()["reason"] == HIDDEN
        for path in ("/models", "/models/bad", "/v1/models/bad", "/v2/models/bad"):
            assert SECRET not in answer_of(client, path)


def test_why_a_lane_is_off_is_shown_like_the_reason_of_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It quotes what a compiler raised."""
    build = LoadedModel.__init__

    def uncompiled(self: LoadedModel, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **(kwargs | {"not_compiled": f"cannot read /srv/{SECRET}/gcc"}))

    monkeypatch.setattr(LoadedModel, "__init__", uncompiled)
    with loaded("tiny:small") as client:
        assert SECRET in answer_of(client, "/models/small")
    with loaded("tiny:small", host="0.0.0.0") as client:  # noqa: S104 - nothing listens
        assert SECRET not in answer_of(client, "/models/small")
        assert HIDDEN in answer_of(client, "/models/small")


@pytest.mark.parametrize("with_keys", [True, False])
def test_a_request_for_a_failed_model_learns_where_the_reason_is(
    broken: Path, keys: Path, *, with_keys: bool
) -> None:
    settings: dict[str, Any] = {"api_keys_file": keys} if with_keys else {}
    with loaded("good=tiny:small", bad(broken), **settings) as client:
        for path in (
            "/explain?model=bad",
            "/predict?model=bad",
            "/v1/models/bad:predict",
            "/v2/models/bad/infer",
            "/predictions/bad",
            "/explanations/bad",
        ):
            answer = client.post(path, content=pictures.png(), headers=PNG | KEY)
            assert answer.status_code == 503
            assert "GET /models/bad" in answer.text
            assert SECRET not in answer.text


def test_a_model_that_cannot_be_loaded_again_on_demand_names_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tmp_path / SECRET / "weights.pt"
    weights.parent.mkdir()
    torch.save(SmallNet().state_dict(), weights)
    size = sum(t.nbytes for t in (*SmallNet().parameters(), *SmallNet().buffers()))
    models = (f"a=tiny:small@{weights}", "b=tiny:small")
    with loaded(*models, max_model_bytes=size) as client:
        assert client.get("/models/a").json()["state"] == "unloaded"
        weights.write_bytes(b"no weights")
        answer = client.post("/predict?model=a", content=pictures.png(), headers=PNG)
        assert answer.status_code == 503
        assert "GET /models" in answer.text
        assert SECRET not in answer.text
        assert SECRET in caplog.text, "the log has it"
