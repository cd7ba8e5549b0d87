"""What an answer takes is reckoned before any work, bounded, and held until it is sent."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pictures
import pytest
from gates import Gate
from starlette.testclient import TestClient

from service.pipeline import process
from service.scheduling.admission import Bill, Permit

MEBIBYTE = 1 << 20
WIDE = {"include": ["heatmap", "overlay", "grid", "regions"], "format": "png", "explain_top": 5}


def noise(width: int, height: int, kind: str = "PNG") -> bytes:
    random = np.random.default_rng(3)
    few = random.integers(0, 2, (height, width, 3), dtype=np.uint8) * 140
    few[0, 0] = 0  # `tiny.RED`
    return pictures.file(few, kind)


NOISE = noise(300, 260)
B64 = base64.b64encode(NOISE).decode()


def upload(client: TestClient, images: int, data: bytes = NOISE, **query: Any) -> Any:
    return client.post("/explain", params=query, files=[("image", data)] * images)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(bytes of what was made, bytes that it was priced at), of every answer and part of one."""
    seen: list[tuple[int, int]] = []

    def note(self: Bill, size: int, priced: int | None = None) -> None:
        seen.append((size, self._total if priced is None else priced))
        inner(self, size, priced)

    inner = Bill.settle
    monkeypatch.setattr(Bill, "settle", note)
    return seen


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was opened, to see that nothing was."""
    seen: list[Any] = []

    def note(data: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(data)
        return inner(data, *args, **kwargs)

    inner = process.open_upload
    monkeypatch.setattr(process, "open_upload", note)
    return seen


# ---- the bound of one answer


def test_an_answer_that_may_be_too_large_is_refused_before_any_work_with_the_number(
    serve: Any, opened: list[Any]
) -> None:
    """Twenty overlays of noise, 3 bytes a pixel and in base64, would be 6 MiB."""
    with serve(max_answer_bytes=MEBIBYTE) as client:
        refused = upload(client, 4, include="overlay", format="png", explain_top=5)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_option")
        detail = refused.json()["detail"]
        assert "may take up to 6.07 MiB, and at most 1 MiB are allowed" in detail
        for way in ("format=jpeg", "size=model", "fewer explanations", "fewer images"):
            assert way in detail
        assert opened == []
        assert client.app.state.service.admission.answer_bytes == 0
        for less in (
            {"explain_top": 5, "format": "png", "size": "native"},
            {"explain_top": 1, "format": "jpeg"},
        ):
            assert upload(client, 4, include="overlay", **less).status_code == 200
        assert len(opened) == 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_small_images_are_not_refused_for_what_large_ones_would_take(
    client: TestClient, kind: str
) -> None:
    """32 images of five PNG overlays each: 2 GiB at the largest size, some MiB at theirs."""
    data = noise(120, 90, kind)
    answer = upload(client, 32, data, include="overlay", format="png", explain_top=5)
    assert answer.status_code == 200, answer.text
    assert all(len(each["explanations"]) == 5 for each in answer.json()["results"])


@pytest.mark.parametrize(
    ("images", "query"),
    [
        (32, {}),
        (32, {"include": ["heatmap", "regions"]}),
        (10, {"include": "overlay"}),
        (1, {"include": ["heatmap", "overlay", "grid", "regions"], "explain_top": 5}),
        (2, {"include": "overlay", "explain_top": 5}),
    ],
)
def test_what_is_asked_every_day_is_never_refused_at_the_largest_size(
    client: TestClient, images: int, query: Any
) -> None:
    """Of headers alone: what follows them breaks, and is each image's own error."""
    large = noise(8, 8)[:16] + (4000).to_bytes(4, "big") + (3000).to_bytes(4, "big")
    answer = upload(client, images, large, **query)
    assert answer.json()["code"] == "corrupt_image", answer.text


def test_a_head_that_declares_less_than_is_decoded_is_found_out(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.pipeline.answer_size.size_of", lambda _: (1, 1))
    with serve(max_answer_bytes=MEBIBYTE) as client:
        refused = upload(client, 1, noise(700, 700), include="overlay", format="png")
        assert refused.status_code == 422
        assert "may take up to 1.89 MiB" in refused.json()["detail"]
        several = upload(client, 3, noise(400, 400), include="overlay", format="png")
        codes = [each.get("error", {}).get("code") for each in several.json()["results"]]
        assert sorted(codes, key=str) == [None, "invalid_option", "invalid_option"]
        assert client.app.state.service.admission.answer_bytes == 0


def test_a_masked_image_is_priced_twice(serve: Any) -> None:
    asked = {"include": "overlay", "format": "png"}
    with serve(max_answer_bytes=500_000) as client:
        assert upload(client, 1, **asked).status_code == 200
        refused = upload(client, 1, **asked, mask='{"boxes": [[1, 1, 50, 50]]}')
        assert refused.status_code == 422
        assert "fewer explanations" in refused.json()["detail"]


@pytest.mark.parametrize("form", ["array", "image"])
def test_captured_tensors_are_priced_by_their_shapes(serve: Any, form: str) -> None:
    query = {"activations": "**", "activation_as": form}
    with serve(max_answer_bytes=MEBIBYTE // 2) as client:
        one = client.post("/predict", params=query, files={"image": NOISE})
        assert one.status_code == (422 if form == "array" else one.status_code)
        many = client.post("/predict", params=query, files=[("image", NOISE)] * 8)
        assert many.status_code == 422
        assert "activation_as=stats" in many.json()["detail"]
        assert (
            client.post(
                "/predict", params=query | {"activation_as": "stats"}, files={"image": NOISE}
            ).status_code
            == 200
        )


def test_a_search_is_priced_at_the_finest_layer_that_it_may_answer_with(
    client: TestClient, made: list[tuple[int, int]]
) -> None:
    """The map of `features` has 56 by 56 cells, that of `features.2` 112 by 112."""
    for verify in ("true", "search"):
        assert upload(client, 1, include="grid", verify=verify).status_code == 200
    (_, one), (_, search) = made
    assert search - one >= (112**2 - 56**2) * 4 * 4 / 3


# ---- every route


def _instances(client: TestClient, name: str, **parameters: Any) -> Any:
    body = {"instances": [{"b64": B64}] * 3, "parameters": parameters}
    return client.post(f"/v1/models/small:{name}", json=body)


def _infer(client: TestClient, names: list[str], *, binary: bool, **parameters: Any) -> Any:
    tensor = {"name": "image", "shape": [3], "datatype": "BYTES", "data": [B64] * 3}
    outputs = [{"name": name, "parameters": {"binary_data": binary}} for name in names]
    body = {"inputs": [tensor], "outputs": outputs, "parameters": parameters}
    return client.post("/v2/models/small/explain", json=body)


def _tasks(client: TestClient, count: int = 3, data: str = B64) -> Any:
    controls = "".join(
        f'<{kind} name="{kind}" toName="i"><Label value="evidence"/></{kind}>'
        for kind in ("BrushLabels", "RectangleLabels", "PolygonLabels", "KeyPointLabels")
    )
    tasks = [{"id": each, "data": {"i": f"data:image/png;base64,{data}"}} for each in range(count)]
    body = {
        "tasks": tasks,
        "project": "1.1",
        "label_config": f'<View><Image name="i" value="$i"/>{controls}</View>',
        "params": {},
    }
    return client.post("/integrations/label-studio/predict", json=body)


def _verified_tasks(client: TestClient) -> Any:
    setup = {"project": "1.1", "schema": "<View/>", "extra_params": {"verify": "search"}}
    assert client.post("/integrations/label-studio/setup", json=setup).status_code == 200
    try:
        return _tasks(client)
    finally:
        client.post("/integrations/label-studio/setup", json=setup | {"extra_params": {}})


def _labeling(client: TestClient) -> Any:
    body = {"model": "small", "image": B64, "params": {}}
    return client.post("/integrations/x-anylabeling/v1/predict", json=body)


EVERY_OUTPUT = ["class_ids", "labels", "scores", "logits", "targets", "grid", "heatmap", "overlay"]
ROUTES: dict[str, Callable[[TestClient], Any]] = {
    "explain": lambda client: upload(client, 3, **WIDE),
    "explain by a sharp map": lambda client: upload(client, 2, **WIDE, method="input_gradient"),
    "explain masked": lambda client: upload(client, 2, mask='{"boxes": [[1, 1, 50, 50]]}', **WIDE),
    "explain with verdicts": lambda client: upload(
        client, 2, **WIDE, verify="search", mask='{"boxes": [[1, 1, 50, 50]]}'
    ),
    "explain with verdicts alone": lambda client: upload(
        client, 3, include="none", verify="search", explain_top=7
    ),
    "explain webp": lambda client: upload(client, 3, **WIDE | {"format": "webp"}),
    "explain jpeg": lambda client: upload(client, 3, **WIDE | {"format": "jpeg"}),
    "explain of the model's size": lambda client: upload(client, 3, **WIDE, size="model"),
    "explain native": lambda client: upload(client, 3, **WIDE, size="native"),
    "explain with captures": lambda client: upload(
        client, 2, activations="**", activation_as=["stats", "channels", "image", "array"]
    ),
    "explain with gradients": lambda client: upload(
        client, 2, activations="features", activation_as="array", activation_kind="grad_output"
    ),
    "predict": lambda client: client.post(
        "/predict", params={"top_k": 7, "activations": "**"}, files={"image": NOISE}
    ),
    "an image": lambda client: client.post(
        "/explain", content=NOISE, headers={"content-type": "image/png", "accept": "image/png"}
    ),
    "kernels": lambda client: client.get("/models/small/kernels/features.0"),
    "V1 predict": lambda client: _instances(client, "predict"),
    "V1 explain": lambda client: _instances(client, "explain", **WIDE),
    "V2 in JSON": lambda client: _infer(client, EVERY_OUTPUT, binary=False, explain_top=5),
    "V2 in binary": lambda client: _infer(client, EVERY_OUTPUT, binary=True, format="png"),
    "V2 explain": lambda client: _infer(client, ["explain"], binary=False, **WIDE),
    "TorchServe predictions": lambda client: client.post(
        "/predictions/small", files=[("data", NOISE)] * 3
    ),
    "TorchServe explanations": lambda client: client.post(
        "/explanations/small?method=rise&samples=3&explain_top=5", files=[("data", NOISE)] * 3
    ),
    "V1 explain with verdicts": lambda client: _instances(
        client, "explain", include="none", verify="search"
    ),
    "V2 explain with verdicts": lambda client: _infer(
        client, ["explain"], binary=False, verify="search", explain_top=7
    ),
    "Label Studio": _tasks,
    "Label Studio with verdicts": _verified_tasks,
    "X-AnyLabeling": _labeling,
}


@pytest.mark.parametrize("name", ROUTES)
def test_no_route_answers_noise_with_more_than_it_was_priced_at(
    client: TestClient, made: list[tuple[int, int]], name: str
) -> None:
    answer = ROUTES[name](client)
    assert answer.status_code == 200, answer.text
    assert made, "nothing was counted"
    for size, priced in made:
        assert 0 < size <= priced
    if not name.startswith("Label Studio"):
        assert made == [(len(answer.content), made[0][1])]
    assert client.app.state.service.admission.answer_bytes == 0


@pytest.mark.parametrize("name", [each for each in ROUTES if not each.startswith("Label Studio")])
def test_every_route_refuses_an_answer_over_the_bound(serve: Any, name: str) -> None:
    with serve(max_answer_bytes=300) as client:
        refused = ROUTES[name](client)
        assert refused.status_code in {400, 422}, refused.text
        assert "are allowed" in refused.text


def test_an_output_that_is_named_twice_is_refused(client: TestClient) -> None:
    """Each would be drawn again; a request may name thousands."""
    assert _infer(client, ["overlay", "heatmap"], binary=True).status_code == 200
    for names in (["overlay"] * 2, ["heatmap", "overlay"] * 500):
        refused = _infer(client, names, binary=True)
        assert refused.status_code == 400
        assert "is named twice" in refused.text


@pytest.mark.parametrize("include", [5, None, {"overlay": 1}, [["overlay"]]])
def test_what_is_no_list_of_words_is_the_client_s_mistake(client: TestClient, include: Any) -> None:
    refused = _infer(client, ["overlay"], binary=True, include=include)
    assert refused.status_code == 400, refused.text
    assert "include" in refused.text


def test_tasks_of_label_studio_share_the_bound_by_what_they_really_take(
    serve: Any, made: list[tuple[int, int]]
) -> None:
    """Each may take more than the half of it, and takes little; none is lost."""
    data = base64.b64encode(noise(200, 160)).decode()
    with serve() as client:
        _tasks(client, 1, data)
        ((size, priced),) = made
        assert 4 * size < priced
    with serve(max_answer_bytes=priced + 3 * size) as client:
        results = _tasks(client, 4, data).json()["results"]
    assert all(results)
    with serve(max_answer_bytes=priced + size) as client:
        results = _tasks(client, 4, data).json()["results"]
    assert 1 <= sum(map(bool, results)) < 4, "what is over the bound has the empty place"


# ---- the bytes held over all requests


@pytest.fixture
def tight(serve: Any) -> Iterator[TestClient]:
    """A service that holds one of these answers at a time, and a little more."""
    with serve(max_held_answer_bytes=600_000) as client:
        yield client


def test_answers_over_the_budget_of_all_are_refused_and_it_is_given_back(
    tight: TestClient, opened: list[Any]
) -> None:
    admission = tight.app.state.service.admission
    asked = {"include": "overlay", "format": "png"}
    with ThreadPoolExecutor(1) as threads, Gate(tight.app.state.service.scheduler) as gate:
        first = threads.submit(upload, tight, 1, **asked)
        gate.wait_for_a_batch()
        held = admission.answer_bytes
        assert 300_000 < held < 600_000
        refused = upload(tight, 1, **asked)
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert "600000 are held at once" in refused.json()["detail"]
        assert admission.answer_bytes == held
        assert len(opened) == 1
        small = threads.submit(upload, tight, 1, include="none")
        gate.open()
        assert first.result(10).status_code == 200
        assert small.result(10).status_code == 200
    assert admission.answer_bytes == 0
    assert upload(tight, 1, **asked).status_code == 200


def test_an_answer_larger_than_the_budget_is_made_alone(tight: TestClient) -> None:
    assert upload(tight, 3, include="overlay", format="png").status_code == 200
    assert tight.app.state.service.admission.answer_bytes == 0


@pytest.mark.parametrize("data", [b"no image", NOISE[:200]])
def test_a_request_that_fails_gives_its_bytes_back(tight: TestClient, data: bytes) -> None:
    assert upload(tight, 1, data, include="overlay").status_code in {400, 415}
    assert tight.app.state.service.admission.answer_bytes == 0


def test_an_answer_in_the_making_is_held_at_what_it_takes(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From when it is made until it is sent: a slow reader holds no more than it will get."""
    held: list[int] = []
    release = Permit.release

    def note(self: Any) -> None:
        if self.answer_bytes:  # a second release finds nothing
            held.append(self.answer_bytes)
        release(self)

    monkeypatch.setattr(Permit, "release", note)
    answer = upload(client, 2, include=["heatmap", "overlay"])
    assert held == [len(answer.content)]
    assert json.loads(answer.content)["results"]
