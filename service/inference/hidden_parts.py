"""RISE and occlusion of detectors and segmenters: what a value loses where the image is hidden."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from service.inference.perturbation import random_masks, windows
from service.inference.questions import Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica

LONGEST = 1333
"""Images are scaled down to this many pixels on the longer side before parts of them are hidden."""

CHUNK_BYTES = 64 << 20
"""Bytes of the images of one forward pass, float32; at least one image."""

CHUNK = 8


def hidden_part_maps(
    model: LoadedModel, question: Question, own: Tensor, values: Callable[[Any], Tensor]
) -> Generator[None, Replica, list[Tensor]]:
    """The map (h, w) of each target, over the whole image, signed.

    own:    the value (K,) of each target in the image itself.
    values: (n, K) of the output for n images; of a detector score · IoU with the explained box
            (D-RISE), of a segmenter the probability over the explained region.

    Petsiuk et al., "Black-box Explanation of Object Detectors via Saliency Maps", CVPR 2021,
    equations 2 to 4, without its factor for objectness, which detectors include in the score.
    """
    size = model.preprocessing.canvas
    is_rise = question.method == "rise"
    masks = _rise_masks(question, size) if is_rise else _squares(size)
    image, scale = scaled_down(question.pixels)
    grey = (torch.tensor(model.preprocessing.mean)[:, None, None] * 255).round()
    if model.preprocessing.resize == 0:
        grey = torch.full_like(grey, 128)
    chunk = images_at_once(model, image)
    kept: list[Tensor] = []
    results: list[Tensor] = []
    waiting: list[Tensor] = []
    total, weight = torch.zeros(len(own), *size), torch.zeros(size)
    count = sum(1 for _ in (_rise_masks(question, size) if is_rise else _squares(size)))
    for number, mask in enumerate(masks, start=1):
        waiting.append(mask)
        if len(waiting) < chunk and number < count:
            continue
        replica = yield
        shown = torch.stack([_dimmed(image, each, grey) for each in waiting])
        with torch.no_grad():
            raw = model.outputs(replica.module, model.normalised(shown))
        results.append(values(to_source(raw, scale)).cpu())
        kept, waiting = waiting, []
        for each, value in zip(kept, results[-1], strict=True):
            part = each if is_rise else 1 - each
            total += (value if is_rise else own - value)[:, None, None] * part
            weight += part
    mean = torch.where(weight > 0, total / weight, 0)
    if not is_rise:
        return list(mean)
    centre = torch.cat(results).mean(dim=0)[:, None, None]
    return list(torch.where(weight > 0, mean - centre, 0))


def images_at_once(model: LoadedModel, image: Tensor) -> int:
    """How many copies of an image (C, h, w) go through the model in one forward pass."""
    most = max(1, min(CHUNK, CHUNK_BYTES // (4 * image.numel())))
    return most if model.behaviour.batchable else 1


def _rise_masks(question: Question, size: tuple[int, int]) -> Iterator[Tensor]:
    yield from random_masks(question.samples, question.seed, size)


def _squares(size: tuple[int, int]) -> Iterator[Tensor]:
    for top, bottom in windows(size[0]):
        for left, right in windows(size[1]):
            mask = torch.ones(size)
            mask[top:bottom, left:right] = 0
            yield mask


def scaled_down(pixels: Tensor) -> tuple[Tensor, float]:
    """The image (C, h, w), uint8, with sides of at most LONGEST, and its size by the source's."""
    height, width = pixels.shape[1:]
    scale = min(1.0, LONGEST / max(height, width))
    if scale == 1.0:
        return pixels, scale
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = functional.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8), scale


def to_source(raw: Any, scale: float) -> Any:
    """A detector's output with its boxes in pixels of the image before it was scaled."""
    if scale == 1.0 or not isinstance(raw, (list, tuple)):
        return raw
    return [{**each, "boxes": each["boxes"] / scale} for each in raw]


def _dimmed(image: Tensor, mask: Tensor, grey: Tensor) -> Tensor:
    """The image through a mask (h, w) of another size: 1 shows it, 0 the mean color."""
    large = functional.interpolate(mask[None, None], image.shape[1:], mode="bilinear")[0]
    return torch.lerp(grey.expand(image.shape), image.float(), large).round_().to(torch.uint8)
