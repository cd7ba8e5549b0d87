"""Captures over HTTP: globs, kinds, forms, and what is refused before any work is done."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import nets
import numpy as np
import pictures
import pytest
import torch
import torchvision  # noqa: F401 - slow to import; here no clock runs
from numpy.typing import NDArray
from starlette.testclient import TestClient

from service.cam.tiles import channel_grid

PNG = {"content-type": "image/png"}
KINDS = ("output", "input", "grad_output", "grad_input")

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def odd(serve: Any) -> Iterator[TestClient]:
    """A client of a small ResNet (the default) and of the net of unusual layers."""
    with serve(models=("nets:resnet", "nets:loud")) as client:
        yield client


def ask(client: TestClient, route: str = "/explain", seed: int = 0, **options: Any) -> Any:
    """The activations of one image."""
    data = pictures.png(seed=seed)
    response = client.post(route, content=data, headers=PNG, params=options)
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return result["activations"]


def refused(client: TestClient, status: int, route: str = "/explain", **options: Any) -> str:
    """The sentence of a refusal."""
    response = client.post(route, content=pictures.png(), headers=PNG, params=options)
    assert response.status_code == status, response.text
    return str(response.json()["detail"])


def numbers(activation: dict[str, Any]) -> NDArray[Any]:
    array = activation["array"]
    dtype = {"float16": "<f2", "float32": "<f4"}[array["dtype"]]
    values = np.frombuffer(base64.b64decode(array["data"], validate=True), dtype)
    return values.reshape(activation["shape"])


def sheet(activation: dict[str, Any]) -> NDArray[np.uint8]:
    image = activation["image"]
    picture = pictures.opened(base64.b64decode(image["data"], validate=True))
    assert picture.size == (image["width"], image["height"])
    return np.asarray(picture)


# ---- globs


STAGES = (1, 2, 3, 4)
CONVOLUTIONS = [
    name for name, module in nets.resnet().named_modules() if isinstance(module, torch.nn.Conv2d)
]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("layer?.0.conv1", [f"layer{stage}.0.conv1" for stage in STAGES]),
        ("**.bn1", [f"layer{stage}.0.bn1" for stage in STAGES]),
        ("layer*", [f"layer{stage}" for stage in STAGES]),
        ("layer2.*.conv?", ["layer2.0.conv1", "layer2.0.conv2"]),
        ("layer4**.1", ["layer4.0.downsample.1"]),
        ("type:Conv2d", CONVOLUTIONS),
        ("type:BasicBlock", [f"layer{stage}.0" for stage in STAGES]),
    ],
)
def test_globs_name_the_layers_that_they_match(
    odd: TestClient, pattern: str, layers: list[str]
) -> None:
    found = ask(odd, "/predict", activations=pattern)
    assert [each["layer"] for each in found] == layers


def test_a_layer_that_runs_twice_is_captured_twice(odd: TestClient) -> None:
    first, second = ask(odd, activations="layer1.0.relu", activation_as="array")
    assert (first["call"], second["call"]) == (0, 1)
    assert not np.array_equal(numbers(first), numbers(second))


def test_a_name_that_matches_nothing_is_refused_in_words(odd: TestClient) -> None:
    assert "'layer4.0.conv1'" in refused(odd, 404, activations="layer4.0.conv11")
    assert "matches 'features.*'" in refused(odd, 404, activations="features.*")
    assert "matches 'type:Conv3d'" in refused(odd, 404, activations="type:Conv3d")


# ---- kinds


def test_the_four_kinds_are_those_of_plain_autograd(serve: Any) -> None:
    """At a convolution before an in-place ReLU, of the class that was asked for."""
    model = torch.nn.Module.eval(nets.SmallNet())
    path, kept = "features.3", {}

    def keep(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        kept["input"], kept["output"] = args[0], output
        args[0].retain_grad()
        output.retain_grad()
        return output.clone()

    model.get_submodule(path).register_forward_hook(keep)
    with serve() as client:
        size = client.get("/models/small").json()["input"]
        x = torch.from_numpy(pictures.noise(size["width"], size["height"])).permute(2, 0, 1)
        mean, std = (torch.tensor(size[name])[:, None, None] for name in ("mean", "std"))
        model((((x / 255) - mean) / std)[None])[0, 0].backward()
        expected = {
            "output": kept["output"].detach(),
            "input": kept["input"].detach(),
            "grad_output": kept["output"].grad,
            "grad_input": kept["input"].grad,
        }
        for kind in KINDS:
            (activation,) = client.post(
                "/explain",
                content=pictures.png(size["width"], size["height"]),
                headers=PNG,
                params={
                    "activations": path,
                    "activation_kind": kind,
                    "activation_as": "array",
                    "targets": "0",
                    "fit": "squash",
                },
            ).json()["results"][0]["activations"]
            values, theirs = numbers(activation), expected[kind][0].numpy()
            assert activation["kind"] == kind
            assert values.dtype == (np.float32 if "grad" in kind else np.float16)
            assert np.abs(values - theirs).max() <= 1e-3 * np.abs(theirs).max(), kind


def test_gradients_are_of_exactly_one_target(odd: TestClient) -> None:
    asked = {"activations": "conv1", "activation_kind": "grad_output"}
    assert "one target" in refused(odd, 422, **asked, targets=["0", "1"])
    assert "one target" in refused(odd, 422, **asked, explain_top=2)
    assert len(ask(odd, **asked, targets="1")) == 1


def test_gradients_follow_the_contrast(odd: TestClient) -> None:
    """At the logits: one at the target, minus one at the class it is held against."""
    asked = {"activations": "fc", "activation_kind": "grad_output", "activation_as": "array"}
    (activation,) = ask(odd, **asked, targets="2", contrast="0")
    assert numbers(activation).tolist() == [-1.0, 0.0, 1.0, 0.0]


def test_predict_takes_outputs_and_inputs_and_refuses_gradients(odd: TestClient) -> None:
    for kind in ("output", "input"):
        (activation,) = ask(odd, "/predict", activations="fc", activation_kind=kind)
        assert activation["kind"] == kind
    for kind in ("grad_output", "grad_input"):
        words = refused(odd, 422, "/predict", activations="fc", activation_kind=kind)
        assert "activation_kind" in words
        assert "'input'" in words


def test_each_image_of_a_request_has_its_own_gradients(odd: TestClient) -> None:
    asked = {"activations": "layer2", "activation_kind": "grad_output", "activation_as": "array"}
    files = [("image", pictures.png(seed=seed)) for seed in (1, 2)]
    results = odd.post("/explain", files=files, params=asked).json()["results"]
    for seed, result in zip((1, 2), results, strict=True):
        (together,), (alone,) = result["activations"], ask(odd, seed=seed, **asked)
        largest = np.abs(numbers(alone)).max()
        assert np.abs(numbers(together) - numbers(alone)).max() <= 1e-4 * largest


# ---- forms


def test_arrays_decode_to_the_very_numbers(odd: TestClient) -> None:
    """float16 is the nearest to what `stats` says of the float32 values; gradients are float32."""
    asked = {"activations": "layer1", "activation_as": ["stats", "array", "image"]}
    (activation,) = ask(odd, **asked)
    values = numbers(activation)
    assert activation["array"]["dtype"] == "float16"
    assert float(values.max()) == float(np.float16(activation["stats"]["max"]))
    assert float(values.min()) == float(np.float16(activation["stats"]["min"]))
    (gradient,) = ask(odd, **asked, activation_kind="grad_output")
    assert gradient["array"]["dtype"] == "float32"
    assert float(numbers(gradient).max()) == gradient["stats"]["max"]
    assert np.array_equal(
        sheet(gradient), np.asarray(pictures.opened(channel_grid(numbers(gradient))[0].data))
    )


def test_values_beyond_float16_are_sent_as_float32(odd: TestClient) -> None:
    (activation,) = ask(
        odd, "/predict", model="loud", activations="loud", activation_as=["array", "stats"]
    )
    assert activation["array"]["dtype"] == "float32"
    assert float(numbers(activation).max()) == activation["stats"]["max"] > 65504


@pytest.mark.parametrize("kind", ["output", "grad_output"])
def test_the_statistics_of_channels_are_those_of_the_array(odd: TestClient, kind: str) -> None:
    """The mean of a gradient is the weight of the channel in Grad-CAM."""
    options = {"activations": "layer2", "activation_kind": kind, "include": "none"}
    (found,) = ask(odd, activation_as=["channels", "array"], **options)
    values = numbers(found).astype(np.float64)
    assert len(found["channels"]["mean"]) == len(values)
    np.testing.assert_allclose(found["channels"]["mean"], values.mean(axis=(1, 2)), atol=2e-3)
    np.testing.assert_allclose(found["channels"]["max"], values.max(axis=(1, 2)), rtol=2e-3)


def test_channels_that_find_no_place_in_the_picture_are_counted(odd: TestClient) -> None:
    """Nine maps of 224 pixels lie side by side in 2,048, so that 81 of 90 are shown."""
    asked = {"model": "loud", "activation_as": "image"}
    (many,) = ask(odd, "/predict", activations="many", **asked)
    assert many["shape"] == [90, 224, 224]
    assert many["image"]["channels_left_out"] == 9
    assert max(sheet(many).shape) <= 2048
    (few,) = ask(odd, "/predict", activations="features.0", **asked)
    assert few["image"]["channels_left_out"] == 0


@pytest.mark.parametrize("layer", ["windows", "table", "number", "features", "head"])
def test_a_layer_of_any_shape_has_a_picture(odd: TestClient, layer: str) -> None:
    asked = {"model": "loud", "activations": layer, "activation_as": ["image", "array"]}
    (activation,) = ask(odd, "/predict", **asked)
    assert sheet(activation).max() > 0
    assert numbers(activation).size > 0


def test_what_cannot_be_drawn_is_said_and_its_numbers_are_there(odd: TestClient) -> None:
    asked = {"model": "loud", "activations": "endless"}
    assert "'endless' cannot be drawn" in refused(
        odd, 500, "/predict", **asked, activation_as="image"
    )
    (activation,) = ask(odd, "/predict", **asked, activation_as="array")
    assert np.isinf(numbers(activation)).all()


# ---- the byte budget


def test_too_many_bytes_are_refused_before_any_work_with_the_number(serve: Any) -> None:
    """All calls count, and all images of the request."""
    path, each = "features.0", 4 * 8 * 112 * 112
    with serve(models=("nets:counted",), max_activation_bytes=2 * each) as client:
        before = nets.Counted.images
        words = refused(client, 422, activations="features.*")
        assert f"at most {2 * each}" in words
        sizes = [8 * 112 * 112, 8 * 112 * 112, 8 * 112 * 112, 16 * 56 * 56, 16 * 56 * 56]
        assert f"take {4 * sum(sizes)} bytes" in words
        files = [("image", pictures.png(seed=seed)) for seed in range(3)]
        response = client.post("/predict", files=files, params={"activations": path})
        assert response.status_code == 422
        assert f"take {3 * each} bytes" in response.json()["detail"]
        assert nets.Counted.images == before
        response = client.post("/predict", files=files[:2], params={"activations": path})
        assert response.status_code == 200


def test_inputs_are_counted_as_inputs(serve: Any) -> None:
    """A convolution with few outputs and a large input, and the other way round."""
    with serve(max_activation_bytes=4 * 3 * 224 * 224 - 1) as client:
        asked = {"activations": "features.0", "activation_kind": "input"}
        assert f"take {4 * 3 * 224 * 224} bytes" in refused(client, 422, **asked)
        ask(client, activations="features.0")


# ---- AlexNet, as in the tutorials


def test_features_of_alexnet_are_all_layers_of_its_five_convolutions(serve: Any) -> None:
    shapes = {
        "features.0": [64, 55, 55],
        "features.3": [192, 27, 27],
        "features.6": [384, 13, 13],
        "features.8": [256, 13, 13],
        "features.10": [256, 13, 13],
    }
    with serve(models=("torchvision/alexnet",), allow_random_weights=True) as client:
        found = ask(client, "/predict", activations="features.*", activation_as="image")
        convs = ask(client, "/predict", activations="type:Conv2d", activation_as=["image", "stats"])
    assert [each["layer"] for each in found] == [f"features.{index}" for index in range(13)]
    assert {each["layer"]: each["shape"] for each in convs} == shapes
    by_layer = {each["layer"]: each for each in found}
    for each in convs:
        assert each["image"] == by_layer[each["layer"]]["image"]
        assert each["image"]["channels_left_out"] == 0
        assert each["stats"]["std"] > 0
        assert sheet(each).min() == 0
        assert sheet(each).max() == 255
