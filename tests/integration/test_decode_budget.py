"""Every route that opens an image takes its memory from one budget first."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pictures
import pytest
import tiffs
from starlette.testclient import TestClient

from service.images.budget import DecodeBudget

PNG = {"content-type": "image/png"}
DATA = pictures.png(400, 300)
ENCODED = base64.b64encode(DATA).decode()
SPARE = 6 << 20

ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "a body": ("/predict", {"content": DATA, "headers": PNG}),
    "a form": ("/explain", {"files": [("image", DATA)] * 3}),
    "JSON": ("/predict", {"json": {"images": [{"data": ENCODED}]}}),
    "a mask": (
        "/explain",
        {"content": DATA, "headers": PNG, "params": {"mask": '{"boxes":[[0,0,9,9]]}'}},
    ),
    "V1": ("/v1/models/small:predict", {"json": {"instances": [{"b64": ENCODED}]}}),
    "V2": (
        "/v2/models/small/infer",
        {
            "json": {
                "inputs": [
                    {
                        "name": "image",
                        "shape": [1, 8, 8, 3],
                        "datatype": "UINT8",
                        "data": [9] * 192,
                    }
                ]
            }
        },
    ),
    "TorchServe": ("/predictions/small", {"content": DATA, "headers": PNG}),
    "X-AnyLabeling": (
        "/integrations/x-anylabeling/v1/predict",
        {"json": {"model": "small", "image": f"data:image/png;base64,{ENCODED}", "params": {}}},
    ),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float | None]]:
    """What was taken from budgets, and until when it was waited for."""
    found: list[tuple[int, float | None]] = []
    take = DecodeBudget.take

    @contextmanager
    def watch(budget: DecodeBudget, amount: int, deadline: float | None = None) -> Iterator[None]:
        found.append((amount, deadline))
        with take(budget, amount, deadline):
            assert budget.taken <= budget.max_bytes
            yield

    monkeypatch.setattr(DecodeBudget, "take", watch)
    return found


@pytest.mark.parametrize("name", ROUTES)
def test_each_route_takes_memory_before_it_decodes(
    client: TestClient, taken: list[tuple[int, float | None]], name: str
) -> None:
    path, request = ROUTES[name]
    response = client.post(path, **request)
    assert response.status_code == 200, response.text
    assert taken
    assert all(amount > SPARE and deadline is not None for amount, deadline in taken)


def test_images_that_do_not_fit_together_are_decoded_one_after_another(
    serve, taken: list[tuple[int, float | None]]
) -> None:
    with serve(workers=2, max_decode_bytes=9_000_000) as client:
        response = client.post("/predict", files=[("image", DATA)] * 8)
    assert response.status_code == 200
    assert all("predictions" in result for result in response.json()["results"])
    assert len(taken) == 8
    assert all(amount > 4_500_000 for amount, _ in taken)


def test_an_image_over_the_whole_budget_is_too_large_and_the_others_are_answered(serve) -> None:
    with serve(max_decode_bytes=8_000_000) as client:
        response = client.post(
            "/predict", files=[("image", pictures.png(900, 800)), ("image", pictures.png())]
        )
    first, second = response.json()["results"]
    assert (first["error"]["code"], first["error"]["status"]) == ("image_too_large", 413)
    assert "the limit is 8,000,000" in first["error"]["detail"]
    assert "predictions" in second


def test_a_kind_that_is_not_read_is_415_with_its_name(client: TestClient) -> None:
    data = tiffs.tiff(pictures.noise(8, 8), 24, 2, planar=True)
    response = client.post("/predict", content=data, headers=PNG)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_image")
    assert "a TIFF of 24 bits (unsigned), 3 samples, planar, RGB" in response.json()["detail"]
