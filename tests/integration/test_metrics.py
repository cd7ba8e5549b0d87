"""What /metrics counts, under labels that a client cannot add to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pictures
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service import __version__

PNG = {"content-type": "image/png"}
KEY = {"x-api-key": "a key"}


def samples(client: TestClient, name: str) -> dict[tuple[str, ...], float]:
    """The values of a metric by those of its labels, in their alphabetical order."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"labeling:{hashlib.sha256(b'a key').hexdigest()} rate=3\n")
    return path


def explain(client: TestClient, query: str = "", **headers: str) -> Any:
    return client.post(f"/explain{query}", content=pictures.png(), headers=PNG | headers)


def test_latency_is_by_route_model_and_method(serve) -> None:
    with serve(models=("tiny:small", "other=tiny:other")) as client:
        explain(client)
        explain(client, "?method=layercam&model=other")
        client.post("/predict", content=pictures.png(), headers=PNG)
        image = [{"data": "aGk="}]
        client.post("/experiments", json={"images": image, "edits": []})
        assert explain(client, "?method=none").status_code == 422
        assert explain(client, "?model=unknown").status_code == 404
        client.get("/nothing/at/all")
        client.get("/models/small")
        found = samples(client, "camserve_request_duration_seconds_count")
    assert found == {  # method, model, route
        ("gradcam", "small", "/explain"): 1,
        ("layercam", "other", "/explain"): 1,
        ("", "small", "/predict"): 1,
        ("", "", "/models/{name}"): 1,
    }


def test_a_refused_request_is_counted_under_its_own_route_and_by_its_key(serve, keys) -> None:
    with serve(api_keys_file=keys) as client:
        assert explain(client).status_code == 401
        assert client.get("/models/small/layers", headers={"x-api-key": "x"}).status_code == 401
        assert client.get("/unknown").status_code == 401
        statuses = [client.get("/models", headers=KEY).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        requests = samples(client, "camserve_requests_total")
        refusals = samples(client, "camserve_refusals_total")
    assert {pair: count for pair, count in requests.items() if pair[1] in ("401", "429")} == {
        ("/explain", "401"): 1,
        ("/models/{name}/layers", "401"): 1,
        ("unmatched", "401"): 1,
        ("/models", "429"): 1,
    }
    assert refusals == {("", "401"): 3, ("labeling", "429"): 1}


def test_a_refusal_behind_a_proxys_prefix_has_its_route(serve, keys) -> None:
    with serve(api_keys_file=keys, root_path="/vision") as client:
        client.get("/vision/models/small")
        client.get("/models/small")
        assert samples(client, "camserve_requests_total")["/models/{name}", "401"] == 2


def test_a_path_that_is_too_long_is_matched_with_nothing(client: TestClient) -> None:
    before = samples(client, "camserve_requests_total").get(("unmatched", "431"), 0)
    assert client.get(f"/models/{'x' * 5000}").status_code == 431
    assert samples(client, "camserve_requests_total")["unmatched", "431"] == before + 1


def test_versions_and_states_of_models_are_shown(serve, tmp_path: Path) -> None:
    with serve(models=("tiny:small", "other=tiny:other")) as client:
        library = client.app.state.service.library
        assert samples(client, "camserve_models") == {
            ("failed",): 0,
            ("loading",): 0,
            ("ready",): 2,
            ("unloaded",): 0,
        }
        library.unload("other")
        assert samples(client, "camserve_models")["unloaded",] == 1
        assert samples(client, "camserve_last_reload_successful") == {(): 1}
        ((python, torch, version),) = samples(client, "camserve_build_info")
    assert version == __version__
    assert python.startswith("3.")
    assert torch


def test_the_last_reload_failed_until_files_can_be_read_again(serve, keys) -> None:
    with serve(api_keys_file=keys) as client:
        service = client.app.state.service
        good = keys.read_text()
        for text, value in (("not a key\n", 0), (good, 1)):
            keys.write_text(text)
            service.api_keys.reread()
            assert samples(client, "camserve_last_reload_successful") == {(): value}
        service.library.has_read_config = False
        assert samples(client, "camserve_last_reload_successful") == {(): 0}


def test_the_last_reload_failed_where_a_new_version_cannot_be_loaded(
    serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as client:
        library = client.app.state.service.library

        def fail(spec: Any) -> Any:
            raise OSError(spec.name)

        monkeypatch.setattr(library, "_load", fail)
        assert library.load("small").exception(20) is not None
        assert samples(client, "camserve_models")["ready",] == 1, "the older version is served"
        assert samples(client, "camserve_last_reload_successful") == {(): 0}
