"""The model input is what the weights were trained on: torchvision's and timm's own transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from service.images.decode import Preprocessing, Source, fit_to_model
from service.models.builders import _from_entry, preprocessing_of_timm
from service.models.catalog import InputSpec, ModelSpec, parse_model
from service.models.loading import load_model

timm = pytest.importorskip("timm", reason="timm is not installed: install the extra timm")
pytestmark = [pytest.mark.reference, pytest.mark.timeout(60)]

SIZES = ((640, 480), (300, 451), (97, 412), (224, 224))


def source_of(size: tuple[int, int]) -> Source:
    """A smooth image with an edge, so that half a pixel of a shift is seen."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    edge = np.where((np.arange(width) > width // 3)[None], 255 - y, y)
    pixels = np.stack([x, y, edge], axis=2).astype(np.uint8)
    return Source(pixels, "PNG", "0" * 64)


def fed(source: Source, preprocessing: Preprocessing) -> torch.Tensor:
    pixels = fit_to_model(source, preprocessing).pixels.float() / 255
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std)
    )
    return (pixels - mean) / std


def configurations() -> dict[str, dict[str, object]]:
    """One pretrained configuration of timm of each different transform, by its name."""
    found: dict[str, dict[str, object]] = {}
    for name in timm.list_pretrained():
        config = timm.data.resolve_data_config(
            {}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()
        )
        found.setdefault(repr(sorted(config.items())), {"name": name, **config})
    return {str(each.pop("name")): each for each in found.values()}


def test_every_transform_of_timm_is_ours() -> None:
    """All 1,800 pretrained configurations, each different one once, by their mode."""
    modes: dict[str, int] = {}
    for number, (name, config) in enumerate(configurations().items()):
        ours = preprocessing_of_timm(config)
        theirs = timm.data.create_transform(**config, is_training=False)
        source = source_of(SIZES[number % len(SIZES)])
        expected = theirs(Image.fromarray(source.pixels))
        found = fed(source, ours)
        levels = (found - expected).abs() * torch.tensor(ours.std)[:, None, None] * 255
        # torchvision rounds a tensor and an image of Pillow differently by one level.
        assert levels.max() <= 2.01, f"{name}: {config}"
        modes[str(config["crop_mode"])] = modes.get(str(config["crop_mode"]), 0) + 1
    assert set(modes) == {"center", "squash", "border"}
    assert sum(modes.values()) > 150


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_a_weights_file_of_torchvision_is_fed_as_its_architecture(
    name: str, tmp_path: Path
) -> None:
    """Without building 80 models: what is taken from the weights entry is what the entry does."""
    entry = torchvision.models.get_model_weights(name).DEFAULT
    ours, labels = _from_entry(entry)
    source = source_of((640, 480))
    expected = entry.transforms()(torch.from_numpy(source.pixels).permute(2, 0, 1))
    levels = (fed(source, ours) - expected).abs() * torch.tensor(ours.std)[:, None, None] * 255
    assert levels.max() < 1.01  # torchvision's two implementations round differently
    assert len(labels) == 1000


def test_a_weights_file_is_served_with_the_transform_of_its_architecture(tmp_path: Path) -> None:
    net = torchvision.models.mobilenet_v2(num_classes=3)
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    model = load_model(parse_model(f"torchvision/mobilenet_v2@{tmp_path / 'mine.pt'}"))
    assert model.preprocessing.resize == 232
    assert "MobileNet_V2_Weights.IMAGENET1K_V2" in model.transform
    assert model.transform.startswith("resize 232, center crop 224×224, bilinear, mean 0.485")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_what_was_tuned_from_inception_transforms_its_input(name: str, tmp_path: Path) -> None:
    net = torchvision.models.get_model(name, num_classes=3, init_weights=False)
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    spec = ModelSpec("m", f"torchvision/{name}", tmp_path / "mine.pt")
    assert load_model(spec).module.transform_input is True
    said = ModelSpec("m", spec.builder, spec.weights, arguments={"transform_input": False})
    assert load_model(said).module.transform_input is False


def test_an_image_covers_an_input_of_another_shape_as_tightly_as_it_can() -> None:
    spec = ModelSpec("m", "tiny:small", input=InputSpec(size=(32, 96)))
    preprocessing = load_model(spec).preprocessing
    seen = fit_to_model(source_of((960, 320)), preprocessing).geometry.seen
    assert seen == (0.0, 0.0, 960.0, 320.0)
    x, y, width, height = fit_to_model(source_of((640, 480)), preprocessing).geometry.seen
    assert (x, width) == (0.0, 640.0)
    assert height == pytest.approx(640 / 3, abs=4)
    assert y == pytest.approx((480 - height) / 2, abs=4)


def test_a_request_overrides_how_the_model_was_trained_to_see_images() -> None:
    squashing = Preprocessing(resize=(40, 40), crop=(32, 32), fit="squash")
    source = source_of((64, 32))
    assert fit_to_model(source, squashing).geometry.seen == (6.4, 3.2, 51.2, 25.6)
    assert fit_to_model(source, squashing, "pad").geometry.seen == (0, 0, 64, 32)
    cropping = Preprocessing(resize=40, crop=(32, 32))
    assert fit_to_model(source, cropping, "squash").geometry.seen == (0, 0, 64, 32)


def test_squashed_with_a_margin_is_stretched_and_cropped() -> None:
    squashing = Preprocessing(resize=(40, 40), crop=(32, 32), fit="squash")
    source = source_of((64, 32))
    image = torch.from_numpy(source.pixels).permute(2, 0, 1)
    expected = transforms.center_crop(transforms.resize(image, [40, 40]), [32, 32])
    assert torch.equal(fit_to_model(source, squashing).pixels, expected)
