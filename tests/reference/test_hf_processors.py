"""Image processors of Hugging Face: the model input is theirs to one level, or they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from service.images.decode import Preprocessing, Source, fit_to_model
from service.models.processors import UnsupportedProcessor, preprocessing_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [pytest.mark.reference, pytest.mark.timeout(120)]

SQUARE, LARGER = {"height": 64, "width": 64}, {"height": 80, "width": 80}

MAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("BeitImageProcessor", {}),
    "bit": ("BitImageProcessor", {}),
    "clip": ("CLIPImageProcessor", {}),
    "convnext, crop_pct": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    "convnext, large": ("ConvNextImageProcessor", {}),
    "deit": ("DeiTImageProcessor", {}),
    "dinov2": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406]},
    ),
    "levit": ("LevitImageProcessor", {}),
    "mobilenet_v1": ("MobileNetV1ImageProcessor", {}),
    "mobilenet_v2": ("MobileNetV2ImageProcessor", {}),
    "mobilevit, BGR": ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}}),
    "poolformer": ("PoolFormerImageProcessor", {}),
    "pvt": ("PvtImageProcessor", {}),
    "segformer": ("SegformerImageProcessor", {}),
    "siglip": ("SiglipImageProcessor", {}),
    "vit": ("ViTImageProcessor", {}),
    "vit, not square": ("ViTImageProcessor", {"size": {"height": 160, "width": 256}}),
    "vit, not normalized": ("ViTImageProcessor", {"do_normalize": False}),
    "vit, one number": ("ViTImageProcessor", {"image_mean": 0.4, "image_std": 0.3}),
    "vit, -1..1": (
        "ViTImageProcessor",
        {"do_normalize": True, "image_mean": [1.0] * 3, "image_std": [1.0] * 3,
         "rescale_factor": 1 / 127.5},
    ),
    "vit, levels": ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
}  # fmt: skip

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a second normalization": ("EfficientNetImageProcessor", {}),
    "nearest": ("EfficientNetImageProcessor", {"resample": 0}),
    "Lanczos": ("ViTImageProcessor", {"resample": 1}),
    "patches": ("Siglip2ImageProcessor", {}),
    "a crop before the resize": ("PerceiverImageProcessor", {}),
    "clusters of colors": ("ImageGPTImageProcessor", {"clusters": np.zeros((2, 3))}),
    "sides that depend on the image": ("TextNetImageProcessor", {}),
    "a thumbnail": ("DonutImageProcessor", {}),
    "no resize": ("ViTImageProcessor", {"do_resize": False}),
    "no crop": ("BitImageProcessor", {"do_center_crop": False}),
    "both edges": ("BitImageProcessor", {"size": {"shortest_edge": 64, "longest_edge": 80}}),
    "padding": ("ViTImageProcessor", {"size": SQUARE, "do_pad": True, "pad_size": LARGER}),
    "a black margin": ("DeiTImageProcessor", {"size": SQUARE, "crop_size": LARGER}),
}  # fmt: skip


BOUNDED = {"shortest_edge": 96, "longest_edge": 150}
OF_DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "conditional detr": ("ConditionalDetrImageProcessor", {"size": BOUNDED}),
    "deformable detr": ("DeformableDetrImageProcessor", {"size": BOUNDED}),
    "detr": ("DetrImageProcessor", {}),
    "detr, not padded": ("DetrImageProcessor", {"size": BOUNDED, "do_pad": False}),
    "detr, stretched": ("DetrImageProcessor", {"size": {"height": 96, "width": 128}}),
    "rt-detr": ("RTDetrImageProcessor", {}),
    "yolos": ("YolosImageProcessor", {"size": BOUNDED}),
}
NOT_OF_DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "a crop": ("BitImageProcessor", {}),
    "a fixed padding": ("DetrImageProcessor", {"size": BOUNDED, "pad_size": LARGER}),
    "a margin": ("RTDetrImageProcessor", {"size": SQUARE, "do_pad": True, "pad_size": LARGER}),
    "two bounds": ("DetrImageProcessor", {"size": {"max_height": 64, "max_width": 96}}),
    "no resize": ("DetrImageProcessor", {"do_resize": False}),
    "a resize of floats": ("RfDetrImageProcessor", {"size": SQUARE}),
}


def processor_of(name: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, name)(**settings)


def fed(pixels: np.ndarray, preprocessing: Preprocessing) -> torch.Tensor:
    levels = fit_to_model(Source(pixels, "JPEG", ""), preprocessing).pixels
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std)
    )
    return (levels / 255 - mean) / std


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> list[np.ndarray]:
    files = sorted((shared_data / "coco_free" / "images").iterdir())[:12]
    assert len(files) == 12
    return [np.array(Image.open(file).convert("RGB")) for file in files]


@pytest.mark.parametrize("case", MAPPED)
def test_the_pixels_are_those_of_the_processor(case: str, photographs) -> None:
    processor = processor_of(*MAPPED[case])
    preprocessing, swapped = preprocessing_of(processor)
    std = torch.tensor(preprocessing.std)[:, None, None]
    for pixels in photographs:
        theirs = processor(pixels, return_tensors="pt")["pixel_values"][0]
        ours = fed(pixels, preprocessing)
        difference = ours - (theirs.flip(0) if swapped else theirs)
        assert float((difference * std).abs().max()) * 255 <= 1.01


@pytest.mark.parametrize("case", OF_DETECTORS)
def test_the_pixels_of_whole_images_are_those_of_the_processor(case: str, photographs) -> None:
    """Alone an image has no padding: its `pixel_mask` is 1 everywhere."""
    processor = processor_of(*OF_DETECTORS[case])
    preprocessing, swapped = preprocessing_of(processor, "detection")
    assert not swapped
    std = torch.tensor(preprocessing.std)[:, None, None]
    long = np.random.default_rng(0).integers(0, 256, (60, 400, 3), dtype=np.uint8)
    upright = np.ascontiguousarray(long.transpose(1, 0, 2))
    for pixels in (*photographs[:6], long, upright, np.zeros((1, 1, 3), np.uint8)):
        given = processor(pixels, return_tensors="pt", input_data_format="channels_last")
        assert bool(given.get("pixel_mask", torch.ones(1)).all())
        difference = fed(pixels, preprocessing) - given["pixel_values"][0]
        assert float((difference * std).abs().max()) * 255 <= 1.01


@pytest.mark.parametrize("sides", [(66, 1344), (1344, 66), (1, 1400), (97, 151), (640, 480)])
@pytest.mark.parametrize("name", ["DetrImageProcessor", "YolosImageProcessor"])
def test_sides_are_rounded_as_theirs_but_never_to_nothing(name: str, sides) -> None:
    processor = processor_of(name, {"size": {"shortest_edge": 800, "longest_edge": 1333}})
    preprocessing, _ = preprocessing_of(processor, "detection")
    ours = preprocessing.resized(sides[::-1])[::-1]
    assert min(ours) > 0
    if name == "DetrImageProcessor" or min(sides) > 16:
        pixels = np.zeros((*sides, 3), np.uint8)
        given = processor(pixels, return_tensors="pt", input_data_format="channels_last")
        assert tuple(given["pixel_values"].shape[2:]) == ours


@pytest.mark.parametrize("case", NOT_OF_DETECTORS)
def test_a_transform_that_would_shift_boxes_is_refused_by_name(case: str) -> None:
    name, settings = NOT_OF_DETECTORS[case]
    with pytest.raises(UnsupportedProcessor, match=name):
        preprocessing_of(processor_of(name, settings), "detection")


@pytest.mark.parametrize("case", REFUSED)
def test_another_transform_is_refused_by_name(case: str) -> None:
    name, settings = REFUSED[case]
    with pytest.raises(UnsupportedProcessor, match=name):
        preprocessing_of(processor_of(name, settings))


def test_a_crop_between_two_pixels_begins_as_theirs(photographs) -> None:
    """Torchvision rounds to the even pixel, Hugging Face down: 1.5 becomes 2, and 1."""
    processor = processor_of("BitImageProcessor", {"size": {"shortest_edge": 227}})
    preprocessing, _ = preprocessing_of(processor)
    assert preprocessing.crop_start((227, 227)) == (1, 1)
    assert Preprocessing(227).crop_start((227, 227)) == (2, 2)
