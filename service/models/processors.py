"""The transform of an image processor of Hugging Face as a `Preprocessing`, or why there is none.

The result is verified: both transform the same images, and must agree to one level of 255.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import first_line
from service.images.decode import Preprocessing, Source, fit_to_model
from service.models.catalog import Interpolation, Task

_INTERPOLATIONS: Mapping[int, Interpolation] = MappingProxyType({2: "bilinear", 3: "bicubic"})
"""By Pillow's number."""

_LEVELS = 1.01
"""Largest difference from the processor's own pixels, in levels of 0..255."""

Resize = tuple[Literal["crop", "squash"], int | tuple[int, int], tuple[int, int]]
"""Fit, resize and crop, as in `Preprocessing`."""

WHOLE_SIZES = ((301, 436), (537, 250), (40, 31), (60, 400))
"""The (height, width) of images to compare on where each keeps its shape; one is very long."""

OF_YOLOS = 16
"""YOLOS cuts sides down to multiples of its patches, whatever their size."""


class UnsupportedProcessor(Exception):
    """The processor transforms images in a way that `Preprocessing` cannot express."""


def preprocessing_of(processor: Any, task: Task = "classification") -> tuple[Preprocessing, bool]:
    """The transform of a processor for RGB images, and whether its model takes BGR.

    Raises UnsupportedProcessor, which names the processor.
    """
    name = type(processor).__name__
    settings = {key: value for key, value in processor.to_dict().items() if value is not None}
    mean, std = _mean_and_std(settings)
    swapped = bool(settings.get("do_flip_channel_order"))
    preprocessing = replace(
        _resized(name, settings, task),
        mean=mean[::-1] if swapped else mean,
        std=std[::-1] if swapped else std,
        interpolation=_interpolation(name, settings),
        rounding="down",
    )
    _verify(processor, preprocessing, swapped)
    return preprocessing, swapped


def _resized(name: str, settings: Mapping[str, Any], task: Task) -> Preprocessing:
    """The size and the shape of the model input."""
    size = dict(settings.get("size") or {})
    is_bounded = set(size) == {"shortest_edge", "longest_edge"} and settings.get("do_resize")
    if task != "classification" and is_bounded:
        return _whole(name, size["shortest_edge"], size["longest_edge"])
    fit, resize, crop = _resize(name, settings)
    if task == "detection" and (fit != "squash" or resize != crop):
        raise UnsupportedProcessor(f"{name} crops images, and boxes are those of whole ones")
    return Preprocessing(resize=resize, crop=crop, fit=fit)


def _whole(name: str, shorter: int, longer: int) -> Preprocessing:
    """The whole image in its own shape; the images of a trial are the largest ones."""
    multiple = OF_YOLOS if "Yolos" in name else 1
    trial = shorter - shorter % multiple, max(shorter, longer - longer % multiple)
    return Preprocessing(
        resize=shorter, crop=trial, whole=True, longest_edge=longer, multiple=multiple
    )


def _interpolation(name: str, settings: Mapping[str, Any]) -> Interpolation:
    number = int(settings.get("resample", 2))
    if number not in _INTERPOLATIONS:
        raise UnsupportedProcessor(
            f"{name} resizes with Pillow's filter {number}, and only 2 (bilinear) and 3 (bicubic) "
            "are supported"
        )
    return _INTERPOLATIONS[number]


def _resize(name: str, settings: Mapping[str, Any]) -> Resize:
    size = dict(settings.get("size") or {})
    if not settings.get("do_resize") or set(size) not in ({"height", "width"}, {"shortest_edge"}):
        given = f"size {size}" if settings.get("do_resize") else "do_resize off"
        raise UnsupportedProcessor(
            f"{name} with {given} gives images no fixed size that is known in advance"
        )
    if "height" in size:
        sides = size["height"], size["width"]
        return "squash", sides, _crop(settings) or sides
    edge = int(size["shortest_edge"])
    if "ConvNext" in name:  # for these `size` is that of the model input
        if edge >= 384:
            return "squash", (edge, edge), (edge, edge)
        return "crop", int(edge / settings["crop_pct"]), (edge, edge)
    crop = _crop(settings)
    if crop is None:
        raise UnsupportedProcessor(f"{name} without a crop gives images of different sizes")
    return "crop", _before_crop(name, edge, settings), crop


def _before_crop(name: str, edge: int, settings: Mapping[str, Any]) -> int:
    """The length of the shorter side before the crop."""
    if "Levit" in name:
        return int(256 / 224 * edge)
    return int(edge / settings.get("crop_pct", 1))


def _crop(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    if not settings.get("do_center_crop"):
        return None
    size = settings["crop_size"]
    return size["height"], size["width"]


def _mean_and_std(settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for values in 0..1, of three channels."""
    scale = 255 * (settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale") else 1.0)
    normalizes = settings.get("do_normalize")
    mean = _three(settings["image_mean"] if normalizes else 0.0)
    std = _three(settings["image_std"] if normalizes else 1.0)
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _three(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values)) if isinstance(values, (list, tuple)) else (float(values),) * 3


def _verify(processor: Any, preprocessing: Preprocessing, swapped: bool) -> None:
    """Raise UnsupportedProcessor if the two differ on a wide, a tall or a small image."""
    name, (height, width) = type(processor).__name__, preprocessing.crop
    sizes = ((height + 101, 2 * width + 36), (2 * height + 37, width + 50), (40, 31))
    for size in WHOLE_SIZES if preprocessing.whole else sizes:
        pixels = _noise(size)
        try:
            given = processor(pixels, return_tensors="pt")
            theirs = given["pixel_values"][0]
        except Exception as error:  # the processor's own check of its settings
            raise UnsupportedProcessor(f"{name} fails ({first_line(error)})") from error
        if not bool(given.get("pixel_mask", torch.ones(1)).all()):
            raise UnsupportedProcessor(f"{name} pads single images, and boxes would be shifted")
        ours = _normalised(pixels, preprocessing)
        expected = theirs.flip(0) if swapped else theirs
        std = torch.tensor(preprocessing.std)[:, None, None]
        if ours.shape != expected.shape or _levels(ours - expected, std) > _LEVELS:
            raise UnsupportedProcessor(
                f"{name} transforms images in a way that this service does not reproduce exactly"
            )


def _levels(difference: Tensor, std: Tensor) -> float:
    return float((difference * std).abs().max()) * 255


def _noise(size: tuple[int, int]) -> NDArray[np.uint8]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy()


def _normalised(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    fed = fit_to_model(Source(pixels, "PNG", ""), preprocessing).pixels.float() / 255
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std)
    )
    return (fed - mean) / std
