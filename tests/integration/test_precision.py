"""A service in bf16 says so wherever it answers, and where it is not, why."""

from __future__ import annotations

import pytest
from pictures import png

from service.models.compiled import openvino_front

pytestmark = pytest.mark.timeout(60)


def compiled_lane(client):
    lanes = client.get("/models/small").json()["lanes"]
    return next(lane for lane in lanes if lane["name"] == "compiled")


@pytest.mark.skipif(not openvino_front.has_bf16(), reason="this processor computes no bf16")
def test_answers_and_models_say_bf16(serve) -> None:
    with serve(compile=True, precision="bf16") as client:
        lane = compiled_lane(client)
        assert (lane["ready"], lane["precision"]) == (True, "bf16")
        for path in ("/explain", "/predict"):
            (result,) = client.post(path, files={"image": png()}).json()["results"]
            assert result["precision"] == "bf16"
        captured = client.post("/explain?activations=features", files={"image": png()})
        assert "precision" not in captured.json()["results"][0], "the hooked lane is float32"


def test_a_processor_without_it_answers_in_float32_and_says_why(serve, monkeypatch) -> None:
    monkeypatch.setattr(openvino_front, "has_bf16", lambda: False)
    with serve(compile=True, precision="bf16") as client:
        lane = compiled_lane(client)
        assert lane["ready"]
        assert "this processor cannot compute" in lane["reason"]
        (result,) = client.post("/explain", files={"image": png()}).json()["results"]
        assert "precision" not in result
