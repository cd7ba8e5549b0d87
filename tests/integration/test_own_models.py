"""Models as teams bring them, from a models.toml to an explained picture over HTTP."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from own_models import DictOutput
from PIL import Image
from starlette.testclient import TestClient
from tiny import SmallNet

from service.errors import ConfigurationError

pytestmark = pytest.mark.timeout(60)

CATALOGUE = """
[[model]]
name = "ten"
builder = "own_models:many_channels"
input = { size = 32, mean = 0.5, std = 0.25, channels = 10 }

[[model]]
name = "grey"
builder = "own_models:many_channels"
arguments = { channels = 1, classes = 3 }
labels = ["a", "b", "c"]
input = { size = 32, channels = 1 }

[[model]]
name = "several"
builder = "own_models:three_outputs"
input.size = 32
output = { select = 1 }

[[model]]
name = "data"
builder = "own_models:data_output"
input.size = 32
output = { select = "logits" }

[[model]]
name = "tags"
builder = "own_models:dict_output"
weights = "tags.pt"
labels = "tags.txt"
input = { size = 32, mean = 0, std = 1 }
output = { select = "logits", activation = "sigmoid" }

[[model]]
name = "half"
builder = "own_models:net"
dtype = "float16"
input.size = 32

[[model]]
name = "brain"
builder = "own_models:net"
dtype = "bfloat16"
input.size = 32

[[model]]
name = "whole"
builder = "own_models:net"
input.size = 32

[[model]]
name = "scripted"
builder = "own_models:scripted"
input.size = 32

[[model]]
name = "wrapped"
builder = "own_models:wrapped"
input.size = 32

[[model]]
name = "inside"
builder = "own_models:compiled_inside"
input.size = 32

[[model]]
name = "quantised"
builder = "own_models:quantised"
input.size = 32
"""


@pytest.fixture(scope="module")
def own(serve, tmp_path_factory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "models.toml").write_text(CATALOGUE)
    (folder / "tags.txt").write_text("".join(f"tag {index}\n" for index in range(7)))
    trained = DictOutput(seed=5).state_dict()
    wrapped = {f"module.model.{key}": value for key, value in trained.items()}
    torch.save({"epoch": 2, "model_state_dict": wrapped}, folder / "tags.pt")
    with serve(models=(), config=folder / "models.toml") as client:
        yield client


def pages(count: int) -> bytes:
    stack = [Image.fromarray(pictures.noise(40, 30, seed=page)[:, :, 0]) for page in range(count)]
    buffer = io.BytesIO()
    stack[0].save(buffer, "TIFF", save_all=True, append_images=stack[1:])
    return buffer.getvalue()


def explain(client: TestClient, model: str, data: bytes, **options: object) -> dict:
    response = client.post(
        "/explain",
        params={"model": model, "include": ["grid", "overlay", "heatmap"], **options},
        content=data,
        headers={"content-type": "image/tiff"},
    )
    assert response.status_code == 200, response.text
    return response.json()["results"][0]


def grid_of(result: dict) -> np.ndarray:
    grid = result["explanations"][0]["grid"]
    return np.frombuffer(base64.b64decode(grid["data"]), "<f4").reshape(grid["shape"])


def test_ten_channels_are_the_pages_of_a_tiff(own) -> None:
    result = explain(own, "ten", pages(10))
    assert grid_of(result).shape == (16, 16)
    assert grid_of(result).any()
    assert len(result["predictions"]) == 3
    photo = Image.open(io.BytesIO(base64.b64decode(result["explanations"][0]["overlay"]["data"])))
    assert photo.size == (40, 30)
    body = {"content": pictures.png(), "headers": {"content-type": "image/png"}}
    refused = own.post("/explain?model=ten", **body)
    assert refused.status_code == 415
    assert "TIFF of 10 pages" in refused.json()["detail"]
    assert own.get("/models/ten").json()["input"]["channels"] == 10


@pytest.mark.parametrize("method", ["scorecam", "ablationcam", "occlusion", "integrated_gradients"])
def test_every_way_of_explaining_works_on_ten_channels(own, method: str) -> None:
    assert grid_of(explain(own, "ten", pages(10), method=method, steps=2)).any()


def test_one_channel_is_grey_and_takes_colour_pictures(own) -> None:
    result = explain(own, "grey", pictures.png())
    assert grid_of(result).any()
    assert [each["label"] for each in result["predictions"]] != []
    grey = Image.open(io.BytesIO(pictures.png())).convert("L")
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    assert explain(own, "grey", buffer.getvalue())["predictions"] == result["predictions"]


@pytest.mark.parametrize("method", ["gradcam", "ablationcam", "input_gradient", "rise"])
@pytest.mark.parametrize("model", ["several", "data"])
def test_the_logits_may_be_one_of_three_outputs(own, model: str, method: str) -> None:
    """Its layers keep their paths; the answers are those of the model that returns logits alone."""
    options = {"method": method, "samples": 20}
    one, other = (explain(own, name, pictures.png(), **options) for name in (model, "whole"))
    assert one["predictions"] == other["predictions"]
    assert np.allclose(grid_of(one), grid_of(other), atol=1e-4)


def test_many_labels_have_scores_of_their_own_in_order(own) -> None:
    result = explain(own, "tags", pictures.png(), top_k=7)
    scores = [each["score"] for each in result["predictions"]]
    assert scores == sorted(scores, reverse=True)
    for each in result["predictions"]:
        assert each["score"] == pytest.approx(1 / (1 + np.exp(-each["logit"])), abs=1e-6)
        assert each["label"] == f"tag {each['class_id']}"
    assert own.get("/models/tags").json()["labels"][3] == "tag 3"


def test_a_certain_tag_is_flagged_as_saturated(own) -> None:
    model = own.app.state.service.pool.model("tags")
    assert model.scores(torch.tensor([30.0, -30.0])).tolist() == pytest.approx([1, 0])


@pytest.mark.parametrize(
    "method",
    [
        *("gradcam", "gradcampp", "eigencam", "cam", "scorecam", "ablationcam"),
        *("occlusion", "rise"),
        *("input_gradient", "integrated_gradients", "guided_backprop", "guided_gradcam"),
    ],
)
@pytest.mark.parametrize("model", ["half", "brain"])
def test_half_precision_explains_as_single_precision_does(own, model: str, method: str) -> None:
    options = {"method": method, "samples": 30, "steps": 3, "targets": "2"}
    low, full = (explain(own, name, pictures.png(), **options) for name in (model, "whole"))
    best, expected = (each["predictions"][0]["score"] for each in (low, full))
    assert best == pytest.approx(expected, abs=0.01)
    difference = np.abs(grid_of(low) - grid_of(full))
    assert float(np.median(difference)) < 0.1


def test_what_compile_wrapped_is_served_by_its_layers(own) -> None:
    whole = explain(own, "whole", pictures.png())
    for model in ("wrapped", "inside"):
        assert own.get(f"/models/{model}").json()["target_layer"] == "features"
        assert np.array_equal(grid_of(explain(own, model, pictures.png())), grid_of(whole))


@pytest.mark.parametrize(
    ("model", "reason"), [("scripted", "accepts no hooks"), ("quantised", "backward")]
)
def test_what_carries_no_hooks_or_gradients_predicts_and_says_why_not_more(
    own, model: str, reason: str
) -> None:
    body = {"content": pictures.png(), "headers": {"content-type": "image/png"}}
    predicted = own.post(f"/predict?model={model}", **body)
    assert predicted.status_code == 200
    whole = own.post("/predict?model=whole", **body).json()["results"][0]["predictions"]
    got = predicted.json()["results"][0]["predictions"]
    assert got[0]["logit"] == pytest.approx(whole[0]["logit"], abs=0.02)
    refused = own.post(f"/explain?model={model}", **body)
    assert refused.status_code == 422
    assert reason in refused.json()["detail"]
    lanes = own.get(f"/models/{model}").json()["lanes"]
    assert [(lane["name"], lane["ready"]) for lane in lanes] == [
        ("hooked", False),
        ("compiled", False),
    ]
    assert all(reason in lane["reason"] for lane in lanes)
    looked_at = own.post(f"/explain?model={model}&method=rise&samples=20&include=grid", **body)
    assert looked_at.status_code == 200


def broken(serve, folder: Path, text: str) -> str:
    path = folder / "models.toml"
    path.write_text(f'[[model]]\nname = "a"\nbuilder = "own_models:net"\n{text}')
    with pytest.raises(ConfigurationError) as error, serve(models=(), config=path):
        pass
    return error.value.detail


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("it-ran"),))


def test_what_is_wrong_with_a_model_is_a_sentence_and_nothing_is_run(
    serve, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"head.weight": Trap()}, tmp_path / "code.pt")
    assert "it tries to run" in broken(serve, tmp_path, "weights = 'code.pt'").lower()
    assert not (tmp_path / "it-ran").exists()
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    assert "not a safetensors file" in broken(serve, tmp_path, "weights = 'bad.safetensors'")
    state = SmallNet().state_dict()
    other = {key.replace("features", "trunk_features"): value for key, value in state.items()}
    torch.save(other, tmp_path / "other.pt")
    detail = broken(serve, tmp_path, "weights = 'other.pt'")
    assert "missing: features.0.weight (the file has trunk_features.0.weight)" in detail
    assert "unexpected: trunk_features.0.weight" in detail
    torch.save(SmallNet(classes=4).state_dict(), tmp_path / "four.pt")
    detail = broken(serve, tmp_path, "weights = 'four.pt'\narguments = { classes = 7 }")
    assert "head.weight: (4, 16) in the file, (7, 16) here" in detail
    (tmp_path / "labels.json").write_text(json.dumps(["one"]))
    assert "7 classes and 1 labels" in broken(serve, tmp_path, "labels = 'labels.json'")


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        ("raises", "planted: no such data set"),
        ("two_inputs", "must accept a single tensor of images"),
    ],
)
def test_a_builder_that_cannot_be_used_is_told(serve, tmp_path: Path, builder, words) -> None:
    (tmp_path / "models.toml").write_text(
        f'[[model]]\nname = "a"\nbuilder = "own_models:{builder}"\n'
    )
    with (
        pytest.raises(ConfigurationError, match=words),
        serve(models=(), config=tmp_path / "models.toml"),
    ):
        pass


def test_models_of_the_file_and_of_flags_are_served_together(serve, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[[model]]\nname = "a"\nbuilder = "own_models:net"\n')
    config = tmp_path / "models.toml"
    with serve(models=("tiny:small",), config=config) as client:
        names = [each["name"] for each in client.get("/models").json()["models"]]
        assert names == ["a", "small"]
    with (
        pytest.raises(ConfigurationError, match="two models are called 'a'"),
        serve(models=("a=tiny:small",), config=config),
    ):
        pass
