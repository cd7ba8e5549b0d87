"""What the peers share: the model, the way from bytes to its input, and the image they answer.

Written as their users would: OpenCV to decode and to draw (at 12 MP it is faster than Pillow), and
torchvision's transform on a tensor, its fastest. All draw the overlay that the service draws, so
that the work is the same: the image at its size, 2048 px at most, the map over the part that
the model saw, JPEG at quality 90, base64.
"""

from __future__ import annotations

import base64
import importlib
import os
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

LONGEST = 2048
RESIZE, CROP = 256, 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

LAYER = os.environ.get("BENCH_LAYER", "layer4")
TUNED = bool(os.environ.get("BENCH_TUNED"))


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def load() -> nn.Module:
    """The model, in eval mode."""
    name, weights = os.environ["BENCH_MODEL"], os.environ.get("BENCH_WEIGHTS")
    if ":" in name:
        module, _, function = name.partition(":")
        model: nn.Module = getattr(importlib.import_module(module), function)()
    else:
        model = torchvision.models.get_model(name, weights=None)
    if weights:
        model.load_state_dict(load_file(weights))
    if TUNED:  # what the libraries' documents do not tell: a graph that begins at the target layer
        model.to(memory_format=torch.channels_last).requires_grad_(False)
        list(model.get_submodule(LAYER).parameters())[-1].requires_grad_()
    return model.eval()


def opened(data: bytes) -> tuple[Tensor, NDArray[np.uint8]]:
    """The model input (1, 3, 224, 224) and the image, uint8 (h, w, 3)."""
    encoded = np.frombuffer(data, np.uint8)
    photo = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB), np.uint8)
    pixels = torch.from_numpy(photo).permute(2, 0, 1)
    small = transforms.resize(pixels, [RESIZE], antialias=True)
    cut = transforms.center_crop(small, [CROP, CROP])
    values = transforms.normalize(transforms.to_dtype(cut, torch.float32, scale=True), MEAN, STD)
    return values[None], photo


def overlay(cam: NDArray[np.float32], photo: NDArray[np.uint8]) -> str:
    """The map (h, w), 0..1, over the part of the image that the model saw."""
    longest = max(photo.shape[:2])
    if longest > LONGEST:
        height, width = (round(side * LONGEST / longest) for side in photo.shape[:2])
        photo = np.asarray(cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA))
    height, width = photo.shape[:2]
    side = round(min(height, width) * CROP / RESIZE)
    top, left = (height - side) // 2, (width - side) // 2
    heat = np.uint8(255 * np.clip(cv2.resize(cam, (side, side)), 0, 1))
    drawn = cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)
    part = drawn[top : top + side, left : left + side]
    part[:] = cv2.addWeighted(cv2.applyColorMap(heat, cv2.COLORMAP_TURBO), 0.5, part, 0.5, 0.0)
    _, encoded = cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return base64.b64encode(encoded).decode()


def scaled(cam: NDArray[np.float32]) -> NDArray[np.float32]:
    """The map divided by its maximum."""
    return cam / max(float(cam.max()), 1e-8)


def predicted(logits: Tensor) -> dict[str, Any]:
    """The five best classes of logits (classes,)."""
    scores, ids = logits.softmax(0).topk(min(5, len(logits)))
    return {
        "predictions": [
            {"class_id": i, "score": score}
            for i, score in zip(ids.tolist(), scores.tolist(), strict=True)
        ]
    }


def answer(
    logits: Tensor, cam: NDArray[np.float32], photo: NDArray[np.uint8], grid: bool
) -> dict[str, Any]:
    """What /explain answers; with `grid` also the map, which the benchmark checks once."""
    found = predicted(logits) | {"overlay": overlay(cam, photo)}
    return found | ({"grid": cam.tolist()} if grid else {})
