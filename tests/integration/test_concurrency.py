"""Many clients at once get what each would have got alone, and leave nothing behind."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny
import torch
import torchvision  # noqa: F401 - slow to import, and no clock runs here
from crowd import nothing_is_left, served, together
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from structlog.testing import capture_logs

from api_schemas.client.calls import CONNECTION_LIMITS
from service.app import create_app
from service.inference.batch import run
from service.inference.questions import InferenceResult, Question, lane_of
from service.metrics import Metrics
from service.pipeline.service import Service
from service.scheduling.scheduler import Scheduler
from service.settings import Settings

REQUESTS = 500
WEIGHTS = Path(__file__).parent.parent.parent.parent / "shared/data/weights"
REAL = WEIGHTS / "mobilenet_v2.fp16.safetensors"
LAST = dict.fromkeys(("small", "other", "mobilenet_v2"), ("features",))
INNER = {"small": "features.0", "other": "features.3", "mobilenet_v2": "features.14"}
SEEN = {"small": "features.1", "other": "features.4", "mobilenet_v2": "features.17.conv.*"}
CLASSES = {"small": 7, "other": 5, "mobilenet_v2": 1000}
SIDES = {"small": (64, 48), "other": (64, 48), "mobilenet_v2": (224, 192)}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, in terms that hold for `submit` and for HTTP alike."""

    model: str
    picture: NDArray[np.uint8]
    top_k: int
    targets: tuple[int, ...]
    explain_top: int
    layers: tuple[str, ...]
    activations: tuple[str, ...]
    explains: bool


@dataclass(frozen=True, slots=True)
class Got:
    """What came back: `shape` says what kind of answer it is, `arrays` are its numbers.

    maps: the names of the arrays that are maps, and the layers they were made at.
    """

    shape: tuple[object, ...]
    arrays: dict[str, NDArray[np.float32]]
    maps: dict[str, tuple[str, ...]]


def asks(seed: int, count: int = REQUESTS) -> list[Ask]:
    """Distinct pictures, and every kind of question about them; the large net's come in fours."""
    random = np.random.default_rng(seed)
    return [_ask(random, index) for index in range(count)]


def _ask(random: np.random.Generator, index: int) -> Ask:
    model = "mobilenet_v2" if index % 64 < 4 else ("small", "other")[random.integers(2)]
    side = SIDES[model][int(random.random() < 0.25)]
    kind = ("top", "targets", "several", "inner", "both", "predict")[random.integers(6)]
    classes = random.permutation(CLASSES[model])[: random.integers(1, 4)]
    layers = {"inner": (INNER[model],), "both": (*LAST[model], INNER[model]), "predict": ()}
    return Ask(
        model=model,
        picture=_picture(random, side),
        top_k=int(random.integers(1, 6)),
        targets=tuple(map(int, classes)) if kind in {"targets", "inner"} else (),
        explain_top=int(random.integers(2, 4)) if kind == "several" else 1,
        layers=layers.get(kind, LAST[model]),
        activations=(SEEN[model],) if random.random() < 0.2 else (),
        explains=kind != "predict",
    )


def _picture(random: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """A few colours in large blocks, under grain: no two alike, and far from each other."""
    blocks = random.integers(0, 256, (4, 4, 3)).repeat(side // 4, axis=0).repeat(side // 4, axis=1)
    grain = random.integers(-20, 21, blocks.shape)
    return np.clip(blocks + grain, 0, 255).astype(np.uint8)


# ---- the two ways in


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two small nets that take 64×64 pixels, and a real one, with real weights where they are.

    The heads of the small ones lean to the positive: of evidence that cancels out to nothing, only
    the noise of float32 would be left to compare.
    """
    folder = tmp_path_factory.mktemp("weights")
    for name, net in (("small", tiny.small()), ("other", tiny.other())):
        tensors = net.state_dict()
        tensors["head.weight"] += 0.2
        save_file(tensors, folder / f"{name}.safetensors", {"resize": "64", "crop": "64"})
    return (
        f"tiny:small@{folder}/small.safetensors",
        f"tiny:other@{folder}/other.safetensors",
        f"torchvision/mobilenet_v2@{REAL}" if REAL.exists() else "torchvision/mobilenet_v2",
    )


@pytest.fixture
def app(models: tuple[str, ...]) -> FastAPI:
    """The service with two workers; its threads run only while it is served."""
    return create_app(Settings(models=models, workers=2, allow_random_weights=not REAL.exists()))


def question(ask: Ask, parts: Service) -> Question:
    return Question(
        pixels=torch.from_numpy(ask.picture).permute(2, 0, 1).contiguous(),
        top_k=ask.top_k,
        targets=ask.targets,
        explain_top=ask.explain_top,
        layers=ask.layers,
        activations=parts.pool.model(ask.model).captured_layers(ask.activations),
    )


def got_from_run(answer: object) -> Got:
    assert isinstance(answer, InferenceResult)
    return got(
        [(each.class_id, each.logit, each.score) for each in answer.predictions],
        [(each.class_id, each.layers, each.grid, each.high) for each in answer.explanations],
        [(each.layer, each.values) for each in answer.activations],
    )


def ask_over_http(client: httpx.Client, ask: Ask) -> Got:
    body = io.BytesIO()
    Image.fromarray(ask.picture).save(body, "PNG", compress_level=1)
    query: dict[str, Any] = {"model": ask.model, "top_k": ask.top_k}
    if ask.activations:
        query |= {"activations": ask.activations, "activation_as": ["stats", "array"]}
    if ask.explains:
        query |= {"layer": ask.layers, "include": ["grid"]}
        query |= {"targets": ask.targets} if ask.targets else {"explain_top": ask.explain_top}
    response = client.post(
        "/explain" if ask.explains else "/predict",
        params=query,
        content=body.getvalue(),
        headers={"content-type": "image/png"},
    )
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return got(
        [(each["class_id"], each["logit"], each["score"]) for each in result["predictions"]],
        [
            (each["class_id"], each["layer"], decoded(each["grid"], "<f4"), each["range"][1])
            for each in result.get("explanations", ())
        ],
        [
            (each["layer"], decoded(each["array"] | {"shape": each["shape"]}, "<f2"))
            for each in result.get("activations", ())
        ],
    )


def decoded(array: dict[str, Any], dtype: str) -> NDArray[np.float32]:
    values = np.frombuffer(base64.b64decode(array["data"]), dtype).astype(np.float32)
    return values.reshape(array["shape"])


def got(
    predictions: Sequence[tuple[int, float, float]],
    explanations: Sequence[tuple[int, Any, NDArray[np.float32], float]],
    activations: Sequence[tuple[str, NDArray[np.float32]]],
) -> Got:
    arrays = {
        "logits": np.array([logit for _, logit, _ in predictions], np.float32),
        "scores": np.array([score for _, _, score in predictions], np.float32),
    }
    maps = {}
    for place, (_, layers, grid, high) in enumerate(explanations):
        at = (layers,) if isinstance(layers, str) else tuple(layers)
        maps[f"map {place}"] = at
        arrays[f"map {place}"] = grid * np.float32(high)
    for place, (layer, values) in enumerate(activations):
        arrays[f"activation {place} of {layer}"] = values
    shape = (
        tuple(class_id for class_id, _, _ in predictions),
        tuple(class_id for class_id, _, _, _ in explanations),
        tuple((name, values.shape) for name, values in arrays.items()),
    )
    return Got(shape, arrays, maps)


# ---- what must hold

LAST_BOUND, INNER_BOUND = 1e-5, 5e-2
"""Of the largest value. Among inner layers a ReLU may change its mind about a zero."""


def difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The largest difference as a share of the largest value."""
    largest = max(float(np.abs(one).max()), float(np.abs(other).max()))
    return float(np.abs(one - other).max()) / largest if largest else 0.0


def same(
    wishes: Sequence[Ask], found: Sequence[Got], alone: Sequence[Got], half: float = 0.0
) -> None:
    """Every answer is what it was alone; `half` is the rounding of float16, where that was sent."""
    for index, (ask, one, twin) in enumerate(zip(wishes, found, alone, strict=True)):
        assert one.shape == twin.shape, index
        for name, values in one.arrays.items():
            bound = LAST_BOUND
            if name.startswith("activation"):
                bound = max(bound, half)
            elif one.maps.get(name, LAST[ask.model]) != LAST[ask.model]:
                bound = INNER_BOUND
            off = difference(values, twin.arrays[name])
            assert off <= bound, (index, name, off)


def nearest_to_their_twins(found: Sequence[Got], alone: Sequence[Got]) -> None:
    """No answer is nearer to another request's answer than to its own, among those of one form."""
    forms = defaultdict(list)
    for index, each in enumerate(alone):
        forms[tuple((name, v.shape) for name, v in each.arrays.items())].append(index)
    crowd = 0
    for members in forms.values():
        mine, theirs = (
            [np.concatenate([v.ravel() for v in each[i].arrays.values()]) for i in members]
            for each in (found, alone)
        )
        for place, one in enumerate(mine):
            distances = [float(np.abs(one - other).mean()) for other in theirs]
            assert int(np.argmin(distances)) == place, members[place]
        crowd += len(members) if len(members) > 1 else 0
    assert crowd > len(alone) // 2, "most answers need others that they could be mistaken for"


def bit_equal(found: Sequence[Got], alone: Sequence[Got]) -> None:
    for one, twin in zip(found, alone, strict=True):
        assert one.shape == twin.shape
        assert all(np.array_equal(one.arrays[name], twin.arrays[name]) for name in one.arrays)


def images_a_batch(metrics: Metrics) -> float:
    images, batches = (
        metrics.registry.get_sample_value(f"camserve_batch_size_{each}") or 0.0
        for each in ("sum", "count")
    )
    return images / batches


@contextmanager
def scheduler(parts: Service, metrics: Metrics, max_batch: int) -> Iterator[Scheduler]:
    found = Scheduler(parts.pool, metrics, workers=2, max_batch=max_batch)
    found.start()
    try:
        yield found
    finally:
        found.close()


def one_by_one(parts: Service, questions: Sequence[tuple[str, Question]]) -> list[Got]:
    answers = []
    for model, each in questions:
        lane = lane_of(parts.pool.model(model), each)
        with parts.pool.lease(model, folded=lane == "folded") as replica:
            answers += run(replica, [each])
    return [got_from_run(answer) for answer in answers]


# ---- the tests


@pytest.mark.timeout(120)
def test_500_questions_of_64_threads_are_answered_as_if_alone(app: FastAPI) -> None:
    """Through `Scheduler.submit`, batches as they form; then bit for bit where none may form."""
    parts: Service = app.state.service
    wishes = asks(seed=1)
    questions = [(ask.model, question(ask, parts)) for ask in wishes]
    alone = one_by_one(parts, questions)
    for max_batch in (4, 1):
        metrics = Metrics()
        with scheduler(parts, metrics, max_batch) as running:
            timed = together(lambda each: running.submit(*each).result(60), questions)
        found = [got_from_run(each.result) for each in timed]
        same(wishes, found, alone)
        nearest_to_their_twins(found, alone)
        if max_batch == 1:
            bit_equal(found, alone)
            assert images_a_batch(metrics) == 1
        else:
            assert images_a_batch(metrics) > 1.5
        nothing_is_left(parts)


@pytest.mark.timeout(120)
def test_500_requests_of_64_clients_are_answered_as_if_alone(app: FastAPI) -> None:
    """Over real HTTP, from PNG files to base64."""
    parts: Service = app.state.service
    wishes = asks(seed=2)
    with (
        capture_logs(),
        served(app) as url,
        httpx.Client(base_url=url, timeout=60, limits=CONNECTION_LIMITS) as client,
    ):
        alone = [ask_over_http(client, ask) for ask in wishes]
        found = together(lambda ask: ask_over_http(client, ask), wishes)
    same(wishes, found, alone, half=1e-3)
    nearest_to_their_twins(found, alone)
    assert images_a_batch(parts.metrics) > 1
    nothing_is_left(parts)
