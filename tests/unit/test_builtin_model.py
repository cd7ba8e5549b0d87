"""The built-in model: what its file promises, and that it names flowers where they stand."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from service.models.builtin.network import FlowerNet

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "service/models/builtin/weights.safetensors"
FLOWERS = ROOT.parent / "shared/data/flowers128.tar"
TOOLS = ROOT / "tools" / "builtin_model"
LABELS = ["daisy", "dandelion", "rose", "sunflower", "tulip"]


@pytest.fixture(scope="module")
def photos() -> SimpleNamespace:
    """What the training makes of photographs: `tools/builtin_model/photos.py`."""
    return SimpleNamespace(**runpy.run_path(str(TOOLS / "photos.py")))


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safe_open(WEIGHTS, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    model = FlowerNet(len(LABELS))
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sample() -> Tensor:
    image = Image.open(ROOT / "examples/sunflower.jpg").convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def prepare(image: Tensor, metadata: dict[str, str]) -> Tensor:
    """A batch of one, prepared as the service does it."""
    resized = transforms.resize(image, [int(metadata["resize"])], antialias=True)
    crop = transforms.center_crop(resized, [int(metadata["crop"])] * 2)
    mean, std = ([float(x) for x in metadata[key].split(",")] for key in ("mean", "std"))
    return transforms.normalize(crop / 255, mean, std)[None]


def grad_cam(net: nn.Module, layer: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the plain Grad-CAM of the best class."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()

    with net.get_submodule(layer).register_forward_hook(keep):
        logits = net(batch)
    (gradient,) = torch.autograd.grad(logits.max(), kept[0])
    cam = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu()[0]
    return logits[0].detach(), cam.detach()


def test_weights_are_small():
    """The file that everybody downloads with the package stays within 4 MB."""
    assert WEIGHTS.stat().st_size <= 4_000_000


def test_metadata_says_all_that_a_server_must_know(metadata):
    """Labels, preparation, target layer, licence and source travel in the weights file."""
    assert json.loads(metadata["labels"]) == LABELS
    assert [float(x) for x in metadata["mean"].split(",")] == [0.485, 0.456, 0.406]
    assert [float(x) for x in metadata["std"].split(",")] == [0.229, 0.224, 0.225]
    assert int(metadata["resize"]) >= int(metadata["crop"]) >= 128
    assert metadata["target_layer"]
    assert metadata["licence"]
    assert metadata["source"]


def test_training_prepares_images_as_the_service_does(metadata, sample, photos):
    """The accuracy in the model card is that of the pixels which the service feeds the model."""
    trained = photos.normalise(photos.centre(sample)[None])
    torch.testing.assert_close(prepare(sample, metadata), trained)


def test_logits_are_one_row_an_image(net):
    """Five logits for each image of a batch."""
    assert net(torch.zeros(3, 3, 160, 160)).shape == (3, len(LABELS))


def test_target_layer_has_a_fine_grid(net, metadata):
    """The map has at least 7 x 7 cells, and all of them can be seen by the head."""
    side = int(metadata["crop"])
    _, cam = grad_cam(net, metadata["target_layer"], torch.rand(1, 3, side, side))
    assert min(cam.shape) >= 7


def test_sample_is_a_sunflower(net, metadata, sample):
    """The picture in the README is named right, and with confidence."""
    scores = net(prepare(sample, metadata)).softmax(1)[0]
    assert LABELS[int(scores.argmax())] == "sunflower"
    assert scores.max() > 0.8


def test_map_of_the_sample_peaks_on_the_flower(net, metadata, sample):
    """The hottest cell of the map is centred on the off-centre flower head."""
    drawn = runpy.run_path(str(ROOT / "examples/draw_sample.py"))
    _, cam = grad_cam(net, metadata["target_layer"], prepare(sample, metadata))
    row, column = divmod(int(cam.argmax()), cam.shape[1])
    _, height, width = sample.shape
    seen = height * int(metadata["crop"]) / int(metadata["resize"])  # side, in source pixels
    x = (width - seen) / 2 + (column + 0.5) * seen / cam.shape[1]
    y = (height - seen) / 2 + (row + 0.5) * seen / cam.shape[0]
    distance = np.hypot(x - drawn["FLOWER_CENTRE"][0], y - drawn["FLOWER_CENTRE"][1])
    assert distance < drawn["FLOWER_RADIUS"]


@pytest.mark.skipif(not FLOWERS.exists(), reason=f"no photographs at {FLOWERS.name}")
@pytest.mark.timeout(60)
def test_unseen_photographs_are_named_right(net, photos):
    """More than four in five of 40 photographs that training never saw."""
    val = photos.read_photos(FLOWERS, "val")
    some = val[torch.linspace(0, len(val.labels) - 1, 40).long()]
    counts = torch.stack([net(photos.normalise(photos.centre(x)[None]))[0] for x in some.images])
    assert (counts.argmax(1) == some.labels).float().mean() > 0.8
