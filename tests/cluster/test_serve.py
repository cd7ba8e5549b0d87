"""The service under Ray Serve: grown, crowded, drained, and robbed of a node."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pictures
import pytest
from ray_cluster import HEAD, ROOT, URL, WORKER, Clients, Cluster, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SMALL = {"models": ["tiny:small"]}
PHOTO = pictures.jpeg(64, 48)
SLOW = "/explain?method=rise&samples=150&include=none"
"""Long enough for the work to outweigh Ray's proxy."""


def post(path: str, client: httpx.Client | None = None, **headers: str) -> httpx.Response:
    """Ask about a photo."""
    asker = client or httpx.Client(trust_env=False, timeout=60)
    headers = {"content-type": "image/jpeg", **headers}
    try:
        return asker.post(URL + path, content=PHOTO, headers=headers)
    finally:
        if client is None:
            asker.close()


def slow(client: httpx.Client) -> httpx.Response:
    return post(SLOW, client)


def rate(clients: int, seconds: float) -> float:
    """Answers a second."""
    begun = time.monotonic()
    with Clients(clients, slow).asking() as load:
        until(lambda: time.monotonic() - begun > seconds)
    assert set(load.statuses) == {200}
    return len(load.statuses) / (time.monotonic() - begun)


def test_answers_are_those_of_the_service_itself(cluster: Cluster) -> None:
    cluster.deploy(SMALL)
    answer = post("/explain?include=grid").json()
    assert answer["results"][0]["explanations"][0]["grid"]["shape"] == [56, 56]
    refused = post("/explain?layer=featurs")
    assert (refused.status_code, refused.json()["code"]) == (404, "unknown_layer")
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{URL}/health/ready").json() == {"status": "ready"}
        form = client.post(f"{URL}/predict", files={"image": PHOTO})
    assert form.json()["results"][0]["predictions"] == answer["results"][0]["predictions"]


def test_two_replicas_share_the_load_and_answer_more(cluster: Cluster) -> None:
    """How much more is written to build/ray.json: cores that others use decide it."""
    cluster.deploy(SMALL, num_replicas=1)
    alone = [rate(4, 4)]
    cluster.deploy(SMALL, num_replicas=2, max_replicas_per_node=1)
    until(lambda: cluster.replicas() == [HEAD, WORKER], said=cluster.status)
    together = [rate(4, 4), rate(4, 4)]
    cluster.deploy(SMALL, num_replicas=1)
    until(lambda: len(cluster.replicas()) == 1, said=cluster.status)
    alone.append(rate(4, 4))
    found = {"one": alone, "two": together, "ratio": sum(together) / sum(alone)}
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    (build / "ray.json").write_text(json.dumps(found))
    assert found["ratio"] > 0


def test_replicas_come_with_ongoing_requests_and_go_when_they_end(cluster: Cluster) -> None:
    bounds = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
    delays = {"upscale_delay_s": 1, "downscale_delay_s": 2, "look_back_period_s": 2}
    cluster.deploy(SMALL, autoscaling_config=bounds | delays, max_ongoing_requests=2)
    with Clients(6, slow).asking() as load:
        until(lambda: len(cluster.replicas()) == 2, said=cluster.status)
    until(lambda: len(cluster.replicas()) == 1, said=cluster.status)
    assert set(load.statuses) == {200}


def test_what_is_over_the_queue_is_refused_with_retry_after(cluster: Cluster) -> None:
    cluster.deploy(SMALL, max_ongoing_requests=1, max_queued_requests=1)
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda _: post(SLOW), range(12)))
    counted = Counter(answer.status_code for answer in answers)
    assert set(counted) == {200, 503}
    for answer in answers:
        assert answer.status_code == 200 or int(answer.headers["Retry-After"]) >= 1


def test_a_replica_that_goes_finishes_what_it_took(cluster: Cluster) -> None:
    """No client needs a retry while replicas come and go."""
    cluster.deploy(SMALL, num_replicas=2)
    with Clients(4, slow).asking() as load:
        cluster.deploy(SMALL, num_replicas=1)
        until(lambda: len(cluster.replicas()) == 1, said=cluster.status)
    assert set(load.statuses) == {200}
    assert not load.retried


def test_many_models_share_replicas(cluster: Cluster) -> None:
    """Five models, three at most in each replica: all answer, whatever was asked for before."""
    names = ["a", "b", "c", "d", "paper"]
    models = [*(f"{name}=tiny:small" for name in names[:4]), "paper=tiny:paper"]
    cluster.deploy({"models": models}, "many_models", num_replicas=2, max_ongoing_requests=4)
    for name in [*names, *names]:
        answer = post("/predict", serve_multiplexed_model_id=name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"]["name"] == name
        assert len(answer.json()["results"][0]["predictions"]) == (2 if name == "paper" else 5)
    assert post("/predict?model=b").json()["model"]["name"] == "b"
    assert post("/predict").json()["model"]["name"] == "a"
    unknown = post("/predict", serve_multiplexed_model_id="papr")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_model")
    assert "'paper'" in unknown.json()["detail"]


def test_many_models_ask_for_the_key_before_they_load_one(cluster: Cluster, tmp_path: Path) -> None:
    """The replica is ready with none loaded; tests/integration counts the loads."""
    keys = tmp_path / "keys"
    keys.write_text(f"one:{hashlib.sha256(b'key').hexdigest()}\n")
    arguments = {"models": ["a=tiny:small", "b=tiny:small"], "api_keys_file": str(keys)}
    cluster.deploy(arguments, "many_models", num_replicas=1)
    assert post("/predict?model=b").status_code == 401
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{URL}/health/ready").json() == {"status": "ready"}
    answer = post("/predict?model=b", **{"x-api-key": "key"})
    assert answer.json()["model"]["name"] == "b"


def test_a_node_that_dies_under_load_loses_no_request_that_is_tried_again(cluster: Cluster) -> None:
    cluster.deploy(
        SMALL,
        num_replicas=2,
        max_replicas_per_node=1,
        health_check_period_s=1,
        health_check_timeout_s=5,
    )
    until(lambda: cluster.replicas() == [HEAD, WORKER], said=cluster.status)
    with Clients(3, slow).asking() as load:
        until(lambda: len(load.statuses) > 10)
        cluster.kill(WORKER)
        answered = len(load.statuses)
        until(lambda: cluster.replicas() == [HEAD], said=cluster.status)
        until(lambda: len(load.statuses) > answered + 20)
        cluster.start(WORKER)
        until(lambda: cluster.replicas() == [HEAD, WORKER], said=cluster.status)
    assert set(load.statuses) == {200}
    (Path(ROOT) / "build" / "ray-node.json").write_text(
        json.dumps({"answered": len(load.statuses), "retried": Counter(load.retried)})
    )
