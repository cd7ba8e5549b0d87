"""What the hook tutorials compute, by our own recording and, where a route serves it, over HTTP.

The numbers are those on paper. `tests/unit/test_hooks.py` has cases 1, 3 and half of 4 of the
recording alone; AlexNet's layers (case 5) are in `tests/integration/test_activations_http.py`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pictures
import pytest
import safetensors.torch
import torch
import torchvision
from numpy.typing import NDArray
from starlette.testclient import TestClient
from torch import Tensor, nn

from service.app import create_app
from service.cam.hooks import gradients, record
from service.inference.input_gradients import guided_backprop
from service.settings import Settings

pytestmark = [pytest.mark.reference, pytest.mark.timeout(60)]

PNG = {"content-type": "image/png"}


@contextmanager
def serving(*models: str, **settings: Any) -> Iterator[TestClient]:
    values = {"models": models, "device": "cpu", "workers": 1, **settings}
    with TestClient(create_app(Settings(**values))) as client:
        yield client


def explain(client: TestClient, picture: NDArray[np.uint8], **options: Any) -> Any:
    """The one result of a picture."""
    data = pictures.file(picture)
    response = client.post("/explain", content=data, headers=PNG, params=options)
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return result


def captured(client: TestClient, picture: NDArray[np.uint8], **options: Any) -> list[Any]:
    """The arrays of what was captured, in order."""
    result = explain(client, picture, activation_as="array", include="none", **options)
    return [
        numbers(each["array"] | {"shape": each["shape"]}).tolist() for each in result["activations"]
    ]


def numbers(array: dict[str, Any]) -> NDArray[Any]:
    dtype = {"float16": "<f2", "float32": "<f4"}[array["dtype"]]
    values = np.frombuffer(base64.b64decode(array["data"], validate=True), dtype)
    return values.reshape(array["shape"])


def white(side: int) -> NDArray[np.uint8]:
    """Ones, behind a normalisation with mean 0 and standard deviation 1."""
    return np.full((side, side, 3), 255, dtype=np.uint8)


# ---- 1, 2: gradients of inner tensors


class Function(nn.Module):
    """A function as a module to record at."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


class Product(nn.Module):
    """y = a · b with a = w + x and b = w + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Function(torch.add), Function(lambda w: w + 1)

    def forward(self, w: Tensor, x: Tensor) -> Tensor:
        return self.a(w, x) * self.b(w)


class Whole(nn.Module):
    """Logits of a batch of one, from whatever `inner` gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args).reshape(1, -1)


def test_gradients_in_a_graph_that_forks_are_those_on_paper() -> None:
    """∂y/∂a = 2; w reaches y on two ways and gets 5, x gets 2."""
    model, w, x = Whole(Product()), torch.tensor([1.0]), torch.tensor([2.0])
    with record(model, targets=["inner.a"], input_targets=["inner"]) as seen:
        y = model(w, x)
        calls = seen.targets | seen.input_targets
        points = [calls[path][0] for path in ("inner.a", "inner[0]", "inner[1]")]
        found = gradients(y, points, torch.ones(1, 1, 1))
    assert [gradient.item() for gradient in found] == [2.0, 5.0, 2.0]
    assert w.grad is x.grad is None


def test_a_hook_may_change_the_gradient_of_what_was_recorded() -> None:
    """Doubled in place and returned three times: w gets 30."""
    model = Whole(Product())

    def thirtyfold(gradient: Tensor) -> Tensor:
        gradient *= 2
        return gradient * 3

    with record(model, input_targets=["inner"]) as seen:
        y = model(torch.tensor([1.0]), torch.tensor([2.0]))
        (w,), (x,) = seen.input_targets.values()
        w.register_hook(thirtyfold)
        found = gradients(y, [w, x], torch.ones(1, 1, 1))
    assert [gradient.item() for gradient in found] == [30.0, 2.0]


def test_a_hook_on_an_inner_tensor_changes_what_comes_before_it() -> None:
    """O = w · (x + y), the gradient of the sum doubled: x gets 2 w."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    model = nn.Module()
    model.sum = Function(torch.add)
    with record(model, targets=["sum"], input_targets=["sum"]) as seen:
        o = (weights @ model.sum(torch.zeros(4), torch.ones(4))).reshape(1, 1)
        (z,) = seen.targets["sum"]
        z.register_hook(lambda gradient: 2 * gradient)
        (x,) = seen.input_targets["sum[0]"]
        (gradient,) = gradients(o, [x], torch.ones(1, 1, 1))
    assert gradient[0].tolist() == [2.0, 4.0, 6.0, 8.0]


# ---- 3: feature maps and inputs


def test_feature_maps_and_their_input_over_http(tmp_path: Path) -> None:
    with serving(f"net={nets.argument(tmp_path, nets.feature_maps, 4)}") as client:
        conv, pooled = captured(client, white(4), activations=["conv", "pool"], layer="conv")
        (taken,) = captured(
            client, white(4), activations="conv", activation_kind="input", layer="conv"
        )
        kernels = client.get("/models/net/kernels/conv")
    assert conv == [[[9.0, 9.0]] * 2, [[18.0, 18.0]] * 2]
    assert pooled == [[[9.0]], [[18.0]]]
    assert taken == [[[1.0] * 4] * 4]
    assert kernels.status_code == 200


# ---- 4: gradients in and out


PAPER = {
    ("output", "first"): [7.0, -13.0, 27.0, -29.0],
    ("output", "relu"): [7.0, 0.0, 27.0, 0.0],
    ("output", "second"): [89.0],
    ("grad_output", "relu"): [1.0, 2.0, 3.0, 4.0],
    ("grad_input", "relu"): [1.0, 0.0, 3.0, 0.0],
    ("grad_output", "first"): [1.0, 0.0, 3.0, 0.0],
    ("grad_input", "first"): [22.0, 26.0, 30.0],
}


def test_gradients_in_and_out_over_http(tmp_path: Path) -> None:
    """Of the linear layers by their type, of the ReLU by its name."""
    model = f"net={nets.argument(tmp_path, nets.perceptron, 4, output='none')}"
    plain = {"method": "input_gradient", "include": "none"}
    with serving(model) as client:
        for (kind, layer), expected in PAPER.items():
            asked = {"activations": layer, "activation_kind": kind}
            assert captured(client, white(4), **asked, method="input_gradient") == [expected]
        for kind in ("grad_output", "grad_input"):
            asked = {"activations": "type:Linear", "activation_kind": kind}
            first, second = captured(client, white(4), **asked, method="input_gradient")
            assert first == PAPER[kind, "first"]
            assert second == ([1.0] if kind == "grad_output" else [1.0, 2.0, 3.0, 4.0])
        result = explain(client, white(4), **plain)
    assert result["predictions"][0]["logit"] == 89.0


@pytest.mark.parametrize(
    ("net", "plain", "guided"),
    [(nets.perceptron, [22, 26, 30], [22, 26, 30]), (nets.negative, [-20, -22, -24], [1, 2, 3])],
)
def test_guided_backpropagation_differs_where_a_gradient_is_negative(
    tmp_path: Path, net: Any, plain: list[int], guided: list[int]
) -> None:
    """Over HTTP the map is the sum over the three colours, of a mean over 4×4 pixels."""
    with serving(f"net={nets.argument(tmp_path, net, 4, output='none')}") as client:
        for method, expected in (("input_gradient", plain), ("guided_backprop", guided)):
            (explanation,) = explain(client, white(4), method=method, include="grid")[
                "explanations"
            ]
            assert explanation["range"] == pytest.approx([sum(expected) / 16] * 2)
            sign = 1.0 if sum(expected) > 0 else -1.0
            assert numbers(explanation["grid"]) == pytest.approx(np.full((4, 4), sign))
        (at_input,) = captured(
            client,
            white(4),
            method="input_gradient",
            activations="first",
            activation_kind="grad_input",
        )
    assert at_input == plain


# ---- 5: the kernels of AlexNet, a layer of VGG


def test_kernels_of_alexnet_are_served_for_all_five_convolutions() -> None:
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3)}
    with serving("torchvision/alexnet", allow_random_weights=True) as client:
        module = client.app.state.service.pool.model(None).module  # type: ignore[attr-defined]
        for index, shape in (shapes | {10: (256, 256, 3, 3)}).items():
            assert module.features[index].weight.shape == shape
            response = client.get(f"/models/alexnet/kernels/features.{index}")
            assert response.headers["content-type"] == "image/png"
            assert np.asarray(pictures.opened(response.content)).std() > 0


def test_vgg16_bn_has_a_feature_map_at_features_18() -> None:
    """The shape as it is for 64 pixels; the recording is the same at any size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = torchvision.models.vgg16_bn(weights=None, init_weights=False).features[:20]
    model = nn.Module()
    model.features = features.eval()
    with record(model, outputs=["features.18"]) as seen, torch.no_grad():
        model.features(torch.randn(1, 3, 64, 64))
    (values,) = seen.outputs["features.18"]
    assert isinstance(model.features[18], nn.BatchNorm2d)
    assert values.shape == (1, 256, 16, 16)
    assert bool((values < 0).any()), "the in-place ReLU behind it must not have been recorded"


# ---- 6: Grad-CAM of a LeNet


def gradcam_by_hand(x: Tensor, class_id: int) -> NDArray[np.float32]:
    """Grad-CAM at conv2 of the LeNet, written out."""
    net = nets.lenet()
    maps = net.conv2(net.pool(net.conv1(x).relu()))  # type: ignore[operator, union-attr]
    maps.retain_grad()
    features = net.pool(maps.relu()).flatten(1)  # type: ignore[operator]
    logits = net.fc3(net.fc2(net.fc1(features).relu()).relu())  # type: ignore[operator]
    logits[0, class_id].backward()
    weights = maps.grad.mean(dim=(2, 3), keepdim=True)
    cam = (weights * maps).sum(dim=1)[0].relu().detach().numpy()
    return np.asarray(cam / cam.max())


def test_gradcam_of_a_lenet_and_class_0_is_a_class(tmp_path: Path) -> None:
    lenet = nets.argument(
        tmp_path, nets.lenet, 32, mean=nets.CIFAR_MEAN, std=nets.CIFAR_STD, **nets.LENET_METADATA
    )
    picture = pictures.noise(32, 32, seed=3)
    mean, std = (torch.tensor(each)[:, None, None] for each in (nets.CIFAR_MEAN, nets.CIFAR_STD))
    x = ((torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std)[None]
    with serving(f"lenet={lenet}") as client:
        best = explain(client, picture, include="none")["predictions"][0]
        assert best["class_id"] != 0, "class 0 must differ from `none given` here"
        for target, class_id in (("0", 0), ("plane", 0), ("truck", 9), ("3", 3)):
            result = explain(client, picture, targets=target, include="grid")
            (explanation,) = result["explanations"]
            assert (explanation["class_id"], explanation["layer"]) == (class_id, "conv2")
            assert explanation["label"] == nets.CIFAR[class_id]
            grid = numbers(explanation["grid"])
            assert grid.shape == (10, 10)
            assert grid == pytest.approx(gradcam_by_hand(x, class_id), abs=1e-5)
        refusal = client.post(
            "/explain", content=pictures.file(picture), headers=PNG, params={"method": "cam"}
        )
    assert refusal.status_code == 422
    assert "global average pooling" in refusal.json()["detail"]


# ---- 7: CAM


def test_cam_is_gradcam_up_to_the_number_of_cells() -> None:
    picture = pictures.noise(224, 224, seed=1)
    with serving("nets:cue_net") as client:
        for target in ("0", "1"):
            cam, gradcam = (
                explain(client, picture, targets=target, method=method, include="grid")[
                    "explanations"
                ][0]
                for method in ("cam", "gradcam")
            )
            cells = np.prod(cam["grid"]["shape"])
            assert numbers(cam["grid"]) == pytest.approx(numbers(gradcam["grid"]), abs=1e-5)
            high = cam["range"][1]
            assert high == pytest.approx(gradcam["range"][1] * cells, rel=1e-4)


# ---- 8: guided backpropagation as a picture


def test_guided_backpropagation_hardly_depends_on_the_class() -> None:
    """On AlexNet; shown as the tutorial does it: mean 0, deviation .1, plus .5, cut to 0..1."""
    picture = pictures.noise(224, 224, seed=2)
    with serving("torchvision/alexnet", allow_random_weights=True) as client:
        asked = {"method": "guided_backprop", "include": "grid", "targets": ["0", "281"]}
        first, second = explain(client, picture, **asked)["explanations"]
    assert "hardly depends on the class" in " ".join((guided_backprop.__doc__ or "").split())
    shown = [as_picture(numbers(each["grid"])) for each in (first, second)]
    assert all(0 <= each.min() < each.max() <= 1 for each in shown)
    assert np.corrcoef(shown[0].ravel(), shown[1].ravel())[0, 1] > 0.9


def as_picture(gradient: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = (gradient - gradient.mean()) / (gradient.std() + 1e-5)
    return np.asarray((centred * 0.1 + 0.5).clip(0, 1))


# ---- 9: the finding


SIDE, SKY = 32, 16
"""Pictures are squares of 32 pixels; their upper 16 rows are the sky."""

CUE, GREY_CUE = (40, 90, 230), (150, 140, 130)
OBJECT = (16, 8)
"""Width and height of the object below the sky."""


def scene(label: int, generator: np.random.Generator) -> tuple[NDArray[np.uint8], list[int]]:
    """A picture and its object's box: class 0 has a blue sky, both have an object below.

    The objects differ too, a little (a bright one and a dark one), as aeroplanes and cars do.
    """
    picture = generator.integers(60, 140, (SIDE, SIDE, 3), dtype=np.uint8)
    sky = np.array(CUE if label == 0 else GREY_CUE) + generator.integers(-12, 13, (SKY, SIDE, 3))
    picture[:SKY] = sky
    x, y = generator.integers(0, SIDE - OBJECT[0]), generator.integers(SKY + 1, SIDE - OBJECT[1])
    box = [int(x), int(y), *OBJECT]
    picture[y : y + OBJECT[1], x : x + OBJECT[0]] = 175 if label == 0 else 150
    return picture, box


def train(folder: Path) -> str:
    """Train the small net on the biased pictures; `BUILDER@WEIGHTS` of what it learnt."""
    generator = np.random.default_rng(0)
    labels = torch.arange(128) % 2
    scenes = np.stack([scene(int(label), generator)[0] for label in labels])
    x = torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 255
    net = nets.cue_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    assert (net(x).argmax(dim=1) == labels).float().mean() == 1.0
    argument = nets.argument(folder, nets.cue_net, SIDE, labels=json.dumps(["plane", "car"]))
    file = argument.partition("@")[2]
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    safetensors.torch.save_file(net.state_dict(), file, metadata)
    return argument


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of a classifier that calls aeroplane what has a blue sky."""
    argument = train(tmp_path_factory.mktemp("weights"))
    with serving(f"planes={argument}") as client:
        yield client


def predicted(result: Any) -> str:
    return str(result["predictions"][0]["label"])


def hidden(client: TestClient, picture: Any, box: list[int], hide: str) -> tuple[Any, Any]:
    """What the masked picture is called, and by how much its score as a plane changed."""
    mask = {"boxes": [box], "fill": "grey", "hide": hide}
    result = explain(client, picture, mask=json.dumps(mask), targets="plane", include="none")
    (change,) = result["masked"]["changes"]
    return predicted(result["masked"]), change["score_change"]


def test_the_map_of_a_plane_lies_on_the_sky(biased: TestClient) -> None:
    generator = np.random.default_rng(1)
    for _ in range(5):
        picture, _ = scene(0, generator)
        result = explain(biased, picture, targets="plane", include=["grid", "regions"])
        assert predicted(result) == "plane"
        (explanation,) = result["explanations"]
        grid = numbers(explanation["grid"])
        assert grid[: len(grid) // 2].sum() > 0.8 * grid.sum()
        assert explanation["regions"]["peak"][1] < SKY


def test_hiding_the_cue_changes_the_class_and_hiding_the_object_does_not(
    biased: TestClient,
) -> None:
    """Both ways round: the sky alone is a plane, the plane alone is none."""
    generator, sky = np.random.default_rng(2), [0, 0, SIDE, SKY]
    for _ in range(5):
        picture, plane = scene(0, generator)
        without_sky, lost = hidden(biased, picture, sky, "region")
        assert (without_sky, lost < -0.5) == ("car", True)
        without_plane, change = hidden(biased, picture, plane, "region")
        assert (without_plane, abs(change) < 0.1) == ("plane", True)
        sky_alone, change = hidden(biased, picture, sky, "rest")
        assert (sky_alone, abs(change) < 0.1) == ("plane", True)
        plane_alone, lost = hidden(biased, picture, plane, "rest")
        assert (plane_alone, lost < -0.5) == ("car", True)


def test_a_sky_is_a_plane_and_a_car_matters_only_where_the_map_is_hot(biased: TestClient) -> None:
    blue = np.full((SIDE, SIDE, 3), CUE, dtype=np.uint8)
    assert predicted(explain(biased, blue, include="none")) == "plane"
    picture, _ = scene(0, np.random.default_rng(3))
    car = np.full((12, SIDE, 3), GREY_CUE, dtype=np.uint8)
    cold, hot = picture.copy(), picture.copy()
    cold[SKY + 2 : SKY + 14] = car
    hot[2:14] = car
    assert predicted(explain(biased, cold, include="none")) == "plane"
    assert predicted(explain(biased, hot, include="none")) == "car"


# ---- 10: backward hooks


def test_gradients_at_recorded_tensors_need_no_backward_hooks() -> None:
    """A composite module is one layer, and an in-place operation behind it does no harm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
        x = torch.randn(2, 3)
    model = nn.Sequential(block, nn.ReLU(inplace=True)).requires_grad_(requires_grad=False)
    leaf = x.clone().requires_grad_()
    inner = block[2](block[0](leaf).relu())
    (at_input, at_output) = torch.autograd.grad(inner.relu().sum(), [leaf, inner])
    with record(model, targets=["0"], input_targets=["0"]) as seen:
        points = seen.input_targets, seen.targets
        output = model(x)
        found = gradients(output, [calls["0"][0] for calls in points], torch.ones(1, 2, 3))
    assert torch.allclose(found[0][0], at_input)
    assert torch.allclose(found[1][0], at_output)
    block.register_full_backward_hook(lambda _module, _into, _out: None)
    with pytest.raises(RuntimeError, match="modified inplace"):
        model(x.clone().requires_grad_())
