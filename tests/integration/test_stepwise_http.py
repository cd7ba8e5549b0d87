"""Methods of many passes over HTTP: their cost, their seed, and what happens between two chunks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nets
import pictures
import pytest
from gates import PATIENCE, jobs_waiting, wait_until
from starlette.testclient import TestClient

from api_schemas.methods import BACKWARD
from service.inference.perturbation import CHUNK, windows

PNG = {"content-type": "image/png"}
COUNTED = ("nets:counted",)

pytestmark = pytest.mark.timeout(30)


class Passes:
    """Every forward pass of the counted net, as it begins; the one with number `stop` waits.

    sizes: how many images each had. came, go: the pass to be stopped is there, and may go on.
    """

    def __init__(self, stop: int | None = None) -> None:
        self.sizes: list[int] = []
        self.came, self.go = threading.Event(), threading.Event()
        self._stop = stop

    def __call__(self, size: int) -> None:
        self.sizes.append(size)
        if len(self.sizes) == self._stop:
            self.came.set()
            assert self.go.wait(PATIENCE), "the pass was never let go"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Passes]:
    def watch(stop: int | None = None) -> Passes:
        passes = Passes(stop)
        monkeypatch.setattr(nets.Counted, "before", passes)
        return passes

    return watch


@pytest.fixture(scope="module")
def counted(serve: Any) -> Iterator[TestClient]:
    with serve(models=COUNTED) as client:
        yield client


def post(client: Any, route: str = "/explain", **options: Any) -> Any:
    return client.post(route, content=pictures.png(), headers=PNG, params=options)


def explained(client: TestClient, **options: Any) -> list[Any]:
    response = post(client, include="grid", **options)
    assert response.status_code == 200, response.text
    found = response.json()["results"][0]["explanations"]
    assert isinstance(found, list)
    return found


# ---- cost


@pytest.mark.parametrize(
    ("options", "images", "cost"),
    [
        ({"method": "gradcam"}, 1, 1.0),
        ({"method": "rise", "samples": 20}, 21, 21.0),
        ({"method": "rise", "samples": 20, "targets": ["0", "1"]}, 21, 21.0),
        ({"method": "rise", "samples": 1}, 2, 2.0),
        ({"method": "occlusion"}, 1 + len(windows(224)) ** 2, 1 + len(windows(224)) ** 2),
        ({"method": "scorecam"}, 17, 17.0),
        ({"method": "scorecam", "layer": ["features.0", "features"]}, 25, 25.0),
        (
            {"method": "integrated_gradients", "steps": 10},
            11,
            1 + (1 + BACKWARD) * 10,
        ),
    ],
)
def test_the_cost_reported_is_the_forward_passes_that_ran(
    counted: TestClient, watch: Any, options: Any, images: int, cost: float
) -> None:
    """In images; of a gradient at the input the forward pass is one, the cost that of both ways."""
    passes = watch()
    for explanation in explained(counted, **options):
        assert explanation["cost"] == {"forwards": cost}
    assert sum(passes.sizes) == images
    assert max(passes.sizes) <= CHUNK


def test_a_mask_costs_twice(counted: TestClient, watch: Any) -> None:
    passes = watch()
    explained(counted, method="rise", samples=9, mask='{"boxes": [[10, 10, 40, 40]]}')
    assert sum(passes.sizes) == 2 * 10


def test_what_costs_too_much_is_refused_before_any_work_with_the_number(
    serve: Any, watch: Any
) -> None:
    with serve(models=COUNTED, max_cost=50) as client:
        passes = watch()
        for options, cost in (
            ({"method": "rise", "samples": 50}, "51"),
            ({"method": "occlusion"}, "170"),
            ({"method": "integrated_gradients", "steps": 20}, "51"),
            ({"method": "rise", "samples": 25, "mask": '{"boxes": [[1, 1, 5, 5]]}'}, "52"),
        ):
            response = post(client, **options)
            assert response.status_code == 422
            detail = response.json()["detail"]
            assert f"costs {cost} forward passes" in detail
            assert "at most 50" in detail
        assert passes.sizes == []
        assert len(explained(client, method="rise", samples=49)) == 1


# ---- seed


@pytest.mark.parametrize("method", ["rise", "scorecam", "occlusion", "integrated_gradients"])
def test_the_same_request_has_the_same_map_bit_by_bit(counted: TestClient, method: str) -> None:
    asked = {"method": method, "samples": 12, "steps": 4, "targets": "1"}
    assert explained(counted, **asked) == explained(counted, **asked)


def test_another_seed_has_another_map(counted: TestClient) -> None:
    asked = {"method": "rise", "samples": 12, "targets": "1"}
    (first,), (second,) = explained(counted, **asked, seed=1), explained(counted, **asked, seed=2)
    assert first["grid"] != second["grid"]
    (again,) = explained(counted, **asked, seed=1)
    assert again == first
    assert explained(counted, **asked) == explained(counted, **asked, seed=0)


# ---- between two chunks


def test_chunks_that_the_deadline_overtakes_never_run(serve: Any, watch: Any) -> None:
    """504 at the deadline, while a chunk still runs; the ones behind it are dropped."""
    with serve(models=COUNTED, request_timeout=0.5) as client:
        post(client, "/predict")
        passes = watch(stop=3)
        response = post(client, method="rise", samples=10 * CHUNK)
        assert response.status_code == 504
        assert response.json()["code"] == "deadline_exceeded"
        assert passes.came.is_set(), "the deadline passed before the chunk that was to be stopped"
        passes.go.set()
        assert post(client, "/predict").status_code == 200
        assert passes.sizes == [1, CHUNK, CHUNK, 1]


def test_no_chunk_runs_for_a_client_that_has_gone(run_server: Any, watch: Any) -> None:
    with run_server(models=COUNTED) as server:
        passes = watch(stop=3)
        body = pictures.png()
        head = (
            f"POST /explain?method=rise&samples={10 * CHUNK} HTTP/1.1\r\nhost: here\r\n"
            f"content-type: image/png\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(server.address, timeout=PATIENCE) as client:
            client.sendall(head.encode("ascii") + body)
            assert passes.came.wait(PATIENCE)
        until = time.monotonic() + PATIENCE
        while server.service.admission.images:
            assert time.monotonic() < until, "the server does not notice that the client has gone"
            threading.Event().wait(0.01)
        passes.go.set()
        assert predicted_by(server.address)
        assert passes.sizes == [1, CHUNK, CHUNK, 1]


def predicted_by(address: tuple[str, int]) -> bool:
    """Whether a cheap request on a new connection is answered."""
    body = pictures.png()
    head = (
        "POST /predict HTTP/1.1\r\nhost: here\r\ncontent-type: image/png\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(address, timeout=PATIENCE) as client:
        client.sendall(head.encode("ascii") + body)
        return client.recv(100).startswith(b"HTTP/1.1 200")


def test_a_cheap_request_is_answered_between_the_chunks(serve: Any, watch: Any) -> None:
    """One worker; the cheap request comes during the first chunk of ten."""
    with serve(models=COUNTED) as client, ThreadPoolExecutor(2) as threads:
        scheduler = client.app.state.service.scheduler
        passes = watch(stop=2)
        done: list[str] = []
        long = threads.submit(post, client, method="rise", samples=10 * CHUNK)
        long.add_done_callback(lambda _: done.append("long"))
        assert passes.came.wait(PATIENCE)
        cheap = threads.submit(post, client)
        cheap.add_done_callback(lambda _: done.append("cheap"))
        wait_until(scheduler, jobs_waiting(1))
        passes.go.set()
        assert cheap.result(PATIENCE).status_code == 200
        assert long.result(PATIENCE).status_code == 200
    assert done == ["cheap", "long"]
    assert sorted(passes.sizes) == [1, 1] + [CHUNK] * 10
    assert passes.sizes.index(1, 1) < 6, "the cheap one waited for all the chunks"


def test_two_long_requests_take_turns(serve: Any, watch: Any) -> None:
    """Neither waits for the other's end, and each has the map that it has alone."""
    asked = [{"method": "rise", "samples": 5 * CHUNK, "seed": seed} for seed in (1, 2)]
    with serve(models=COUNTED) as client, ThreadPoolExecutor(2) as threads:
        watch()
        alone = [explained(client, **options) for options in asked]
        futures = [threads.submit(explained, client, **options) for options in asked]
        assert [future.result(PATIENCE) for future in futures] == alone
