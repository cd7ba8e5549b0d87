"""The Python client against a real server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from gates import Emptied, Gate
from PIL import Image
from pycocotools import mask as coco

from api_schemas import answers
from api_schemas.client import AsyncClient, Client, errors

ALL = {"include": ["grid", "heatmap", "overlay", "regions"]}


@pytest.fixture(scope="module")
def server(run_server) -> Iterator[Any]:
    with run_server(models=("tiny:small", "other=tiny:other")) as server:
        yield server


@pytest.fixture
def client(server) -> Iterator[Client]:
    with Client(server.url, timeout=10, trust_env=False) as client:
        yield client


def asynchronous(server: Any) -> AsyncClient:
    return AsyncClient(server.url, timeout=10, trust_env=False)


# ---- pictures


@pytest.mark.parametrize("kind", ["str", "path", "bytes", "file", "pil", "pixels"])
def test_every_kind_of_picture_gets_the_same_answer(client, tmp_path: Path, kind: str) -> None:
    data = pictures.png()
    path = tmp_path / "noise.png"
    path.write_bytes(data)
    image = {
        "str": str(path),
        "path": path,
        "bytes": data,
        "file": io.BytesIO(data),
        "pil": pictures.opened(data),
        "pixels": pictures.noise(),
    }[kind]
    expected = client.explain(data, include="grid")[0]
    found = client.explain(image, include="grid")[0]
    assert found.image.width == 80
    assert found.predictions == expected.predictions
    assert np.array_equal(found.explanations[0].grid, expected.explanations[0].grid)


def test_a_url_is_fetched_by_the_service(server, client) -> None:
    """Which refuses here, because no host is allowed; it was not taken for a path."""
    with pytest.raises(errors.ImageRefused, match="URLs are not allowed") as caught:
        client.explain("http://127.0.0.1/cat.jpg")
    assert (caught.value.code, caught.value.status) == ("invalid_image_data", 400)


def test_an_open_picture_is_sent_upright(client) -> None:
    turned = pictures.jpeg(orientation=6)
    found = client.predict(pictures.opened(turned))[0]
    assert (found.image.width, found.image.height) == (60, 80)
    assert found.image.format == "PNG"


def test_one_broken_picture_of_several_says_so_in_its_place(client) -> None:
    answer = client.explain([pictures.png(), b"not a picture", pictures.png(seed=1)])
    assert len(answer) == 3
    assert [result.error is None for result in answer] == [True, False, True]
    error = answer[1].error
    assert isinstance(error, errors.ImageRefused)
    assert (error.code, error.status) == ("unsupported_image", 415)
    assert error.request_id == answer.id
    assert answer[1].explanations == []


def test_a_picture_that_cannot_be_read_is_refused_before_a_request(client, tmp_path) -> None:
    with pytest.raises(errors.UnreadableImage, match="No such file"):
        client.explain(tmp_path / "none.png")


# ---- what is answered


def test_arrays_are_those_of_the_json(client, http, server) -> None:
    asked = {**ALL, "activations": ["features.*", "head"], "activation_as": ["array", "stats"]}
    answer = client.explain(pictures.png(), **asked)
    raw = http.post(
        f"{server.url}/explain",
        params=asked,
        content=pictures.png(),
        headers={"content-type": "image/png"},
    ).json()["results"][0]
    found = answer[0].explanations[0]
    grid = raw["explanations"][0]["grid"]
    numbers = np.frombuffer(base64.b64decode(grid["data"]), "<f4").reshape(grid["shape"])
    assert found.grid.dtype == np.float32
    assert np.array_equal(found.grid, numbers)
    assert found.grid.max() == 1
    assert len(answer[0].activations) == len(raw["activations"]) == 6
    for activation, said in zip(answer[0].activations, raw["activations"], strict=True):
        values = np.frombuffer(base64.b64decode(said["array"]["data"]), "<f2")
        assert activation.array.dtype == np.float16
        assert np.array_equal(activation.array, values.reshape(said["shape"]))
        assert activation.stats.max == said["stats"]["max"]


def test_pictures_are_those_of_the_json(client) -> None:
    answer = client.explain(pictures.png(), size="native", format="png", **ALL)
    found = answer[0].explanations[0]
    assert found.heatmap.mode == "P"
    assert np.array_equal(np.asarray(found.heatmap), np.round(255 * found.grid))
    assert found.overlay.format == "PNG"
    assert found.overlay.size == found.heatmap.size


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_mask_is_what_pycocotools_reads(client) -> None:
    regions = client.explain(pictures.png(), threshold=0.3, **ALL)[0].explanations[0].regions
    rle = {"size": list(regions.rle.size), "counts": regions.rle.counts}
    assert regions.mask.shape == (60, 80)
    assert regions.mask.dtype == np.bool_
    assert regions.mask.any()
    assert np.array_equal(regions.mask, coco.decode(rle).astype(bool))


def test_a_hidden_part_is_answered_too(client) -> None:
    result = client.explain(pictures.png(), mask={"boxes": [[0, 0, 40, 60]]}, include="grid")[0]
    change = result.masked.changes[0]
    assert change.class_id == result.predictions[0].class_id
    assert result.masked.explanations[0].grid.shape == result.explanations[0].grid.shape


@pytest.mark.parametrize("verify", [True, "search"])
def test_a_verdict_is_read_with_its_numbers_by_threads_and_tasks(server, client, verify) -> None:
    async def ask() -> Any:
        async with asynchronous(server) as other:
            return (await other.explain(pictures.png(), verify=verify, include="none"))[0]

    answer = client.explain(pictures.png(), verify=verify, include="none")
    found = answer[0].explanations[0].verify
    assert isinstance(found, answers.Verification)
    sent = json.loads(answer.json)["results"][0]["explanations"][0]["verify"]
    assert found.model_dump(exclude_unset=True) == sent
    assert found.verdict in {"supported", "inconclusive", "refuted"}
    assert -1 <= found.agreement_by_fill.mean <= 1
    if found.verdict == "inconclusive":
        assert found.tried if verify == "search" else found.try_layer
    assert asyncio.run(ask()).explanations[0].verify.verdict == found.verdict
    assert client.explain(pictures.png(), include="none")[0].explanations[0].verify is None


def test_a_mask_too_long_for_a_query_travels_in_the_body(client) -> None:
    boxes = [[x, y, 1, 1] for x in range(40) for y in range(20)]
    result = client.explain(pictures.png(), mask={"boxes": boxes})[0]
    assert result.masked is not None


def test_models_layers_and_kernels(client) -> None:
    assert [model.name for model in client.models()] == ["small", "other"]
    assert len(client.model("other").labels) == 5
    assert len(client.model().labels) == 7
    layers = client.layers()
    convolutions = [layer.path for layer in layers if layer.type == "Conv2d"]
    assert convolutions == ["features.0", "features.3"]
    assert client.kernels("features.0").format == "PNG"
    assert client.kernels("features.0", "other").size == client.kernels("features.0").size
    assert client.health().status == "ready"


# ---- what is refused


def test_an_unknown_layer_names_the_nearest(client) -> None:
    with pytest.raises(errors.NotFound, match="features") as caught:
        client.explain(pictures.png(), layer="featurs.3")
    assert (caught.value.code, caught.value.status) == ("unknown_layer", 404)
    assert caught.value.request_id
    with pytest.raises(errors.NotFound, match="small"):
        client.predict(pictures.png(), model="smal")
    with pytest.raises(errors.NotFound, match="features"):
        client.kernels("feature.0")


def test_options_are_refused_before_a_request(server, client) -> None:
    before = server.service.metrics.render()
    with pytest.raises(TypeError, match="did you mean 'method'"):
        client.explain(pictures.png(), metod="gradcam")
    with pytest.raises(ValueError, match="top_k"):
        client.explain(pictures.png(), top_k=0)
    with pytest.raises(TypeError, match="there is no option 'targets'"):
        client.predict(pictures.png(), targets=[1])
    with pytest.raises(TypeError, match="there is no option"):
        client.explain_many([pictures.png()], metod="gradcam")
    with pytest.raises(ValueError, match="list of images is empty"):
        client.explain([])
    assert count_of_explain(server.service.metrics.render()) == count_of_explain(before)


def count_of_explain(metrics: bytes) -> list[str]:
    lines = metrics.decode().splitlines()
    return [line for line in lines if line.startswith('camserve_requests_total{route="/explain"')]


def test_a_key_is_sent(run_server, tmp_path) -> None:
    key, keys = "a long random text", tmp_path / "keys"
    keys.write_text(f"tests:{hashlib.sha256(key.encode()).hexdigest()}\n")
    with run_server(api_keys_file=keys) as server:
        with Client(server.url, api_key=key, trust_env=False) as client:
            assert client.explain(pictures.png())[0].explanations
        with Client(server.url, trust_env=False) as client:
            with pytest.raises(errors.Unauthorized, match="API key"):
                client.predict(pictures.png())
            with pytest.raises(errors.Unauthorized):
                list(client.explain_many([pictures.png()] * 20))


# ---- load, time and hang-ups


def test_a_busy_service_is_asked_again_when_it_said(run_server) -> None:
    """One place, taken until the refused client waits for its second attempt."""
    waits = []
    with run_server(max_queue=1) as server, Client(server.url, trust_env=False) as client:
        with ThreadPoolExecutor(1) as threads, Gate(server.service.scheduler) as gate:
            first = threads.submit(client.explain, pictures.png())
            gate.wait_for_a_batch()

            def wait(seconds: float) -> None:
                waits.append(seconds)
                gate.open()
                first.result(10)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("api_schemas.client.client.time.sleep", wait)
                answer = client.explain(pictures.png())
        assert answer[0].predictions
        assert len(waits) == 1
        assert waits[0] >= 1  # Retry-After is whole seconds


def test_a_late_answer_is_the_services_own_504(run_server) -> None:
    with run_server() as server, Client(server.url, timeout=0.3, trust_env=False) as client:
        with Gate(server.service.scheduler) as gate:
            with pytest.raises(errors.DeadlineExceeded, match="within 0") as caught:
                client.explain(pictures.png())
            gate.open()
        assert (caught.value.code, caught.value.status) == ("deadline_exceeded", 504)


def test_nobody_there_is_a_connection_that_failed() -> None:
    with (
        Client("http://127.0.0.1:9", timeout=0.2, trust_env=False) as client,
        pytest.raises(errors.ConnectionFailed, match=r"127\.0\.0\.1:9"),
    ):
        client.explain(pictures.png())


def test_a_cancelled_task_drops_its_work(run_server) -> None:
    """Its place is given back while its batch still stands at the gate."""
    with run_server() as server:
        scheduler, emptied = server.service.scheduler, Emptied(server.service.admission)

        async def main() -> None:
            async with asynchronous(server) as client:
                task = asyncio.create_task(client.explain(pictures.png()))
                await asyncio.to_thread(gate.wait_for_a_batch)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        with Gate(scheduler) as gate:
            asyncio.run(main())
            emptied.wait()
            assert gate.batches == [1]


# ---- many


def test_many_are_answered_in_order_and_a_broken_one_stops_nobody(client, tmp_path) -> None:
    images = [pictures.png(seed=seed) for seed in range(6)]
    expected = [client.explain(image)[0].image.sha256 for image in images]
    seen: list[tuple[int, int | None]] = []
    broken = [*images[:3], b"broken", tmp_path / "none.png", *images[3:]]
    results = list(
        client.explain_many(broken, concurrency=2, on_progress=lambda *at: seen.append(at))
    )
    assert [r.image.sha256 for r in results if r.image] == expected
    assert isinstance(results[3].error, errors.ImageRefused)
    assert isinstance(results[4].error, errors.UnreadableImage)
    assert seen == [(done, 8) for done in range(1, 9)]


def test_tasks_answer_many_in_order_too(server) -> None:
    async def main() -> list[Any]:
        async with asynchronous(server) as client:
            images = (pictures.png(seed=seed) for seed in range(5))
            many = client.explain_many([*images, b"broken"], concurrency=3, include="grid")
            return [result async for result in many]

    results = asyncio.run(main())
    with Client(server.url, trust_env=False) as client:
        for seed, result in enumerate(results[:5]):
            expected = client.explain(pictures.png(seed=seed), include="grid")[0]
            assert np.array_equal(result.explanations[0].grid, expected.explanations[0].grid)
    assert results[5].error.status == 415


def test_what_would_refuse_every_image_is_raised(client) -> None:
    with pytest.raises(errors.NotFound):
        list(client.explain_many([pictures.png()] * 50, model="none"))


def test_few_pictures_are_read_ahead(client) -> None:
    """A generator of many is asked for as many as results may wait."""
    asked = 0

    def endless() -> Iterator[bytes]:
        nonlocal asked
        while True:
            asked += 1
            yield pictures.png(8, 8)

    many = client.explain_many(endless(), concurrency=2)
    for _ in range(3):
        assert next(many).error is None
    many.close()
    assert asked <= 3 + 4


def test_no_thread_waits_behind_the_last_result(client) -> None:
    """`zip(pictures, results)` never asks for one more, and its generator may live for long."""
    several = [pictures.png(seed=seed) for seed in range(3)]
    many = client.explain_many(several, concurrency=2)
    assert len(list(zip(several, many, strict=False))) == 3
    threads = [t for t in threading.enumerate() if t.name.startswith("camserve-client")]
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert next(many, None) is None


def test_tasks_ask_everything_that_threads_do(server) -> None:
    async def main() -> list[Any]:
        async with asynchronous(server) as client:
            return [
                await client.models(),
                await client.model(),
                await client.layers("other"),
                (await client.kernels("features.0")).size,
                await client.health(),
                (await client.predict(Image.new("RGB", (40, 30))))[0].predictions,
            ]

    with Client(server.url, trust_env=False) as client:
        assert asyncio.run(main()) == [
            client.models(),
            client.model(),
            client.layers("other"),
            client.kernels("features.0").size,
            client.health(),
            client.predict(Image.new("RGB", (40, 30)))[0].predictions,
        ]
