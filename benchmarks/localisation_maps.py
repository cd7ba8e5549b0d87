"""The maps of `localisation.py`: ours, pytorch-grad-cam's, and two that look at no image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam import (
    AblationCAM,
    EigenCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    ScoreCAM,
    XGradCAM,
)
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from api_schemas.methods import METHODS
from service.cam.heatmap import resample
from service.errors import CamserveError
from service.images.decode import Geometry
from service.inference.batch import Unfinished, run
from service.inference.questions import Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica

Map = NDArray[np.float32]

PEERS: Mapping[str, Callable[..., Any]] = {
    "gradcam": GradCAM,
    "gradcampp": GradCAMPlusPlus,
    "hirescam": HiResCAM,
    "layercam": LayerCAM,
    "xgradcam": XGradCAM,
    "eigencam": EigenCAM,
    "ablationcam": AblationCAM,
    "scorecam": ScoreCAM,
}

_OF_ALL_MODELS = [each for each in METHODS.values() if "attention" not in each.needs]
CAMS = tuple(each.name for each in _OF_ALL_MODELS if not each.runs)
TO_THE_INPUT = tuple(each.name for each in _OF_ALL_MODELS if each.runs and each.times == "once")
FAST = (*CAMS, *TO_THE_INPUT)
SLOW = tuple(each.name for each in _OF_ALL_MODELS if each.times != "once")
"""What runs the model, or its tail, a hundred times and more; asked about fewer images."""

NO_EPSILON = "gradcampp (no ε)"
"""Grad-CAM++ beside the peer's with its epsilon made negligible."""

SCALE = 1e6
"""Gradients times this and activations divided by it leave the map of the paper as it is."""


def ours(
    replica: Replica, pixels: Tensor, method: str, targets: Sequence[int], *, libra: bool = False
) -> list[Map] | CamserveError:
    """The service's maps (h, w) at the size of the image, as drawn: not negative.

    Computed by `service.inference.batch.run`, on whatever size `pixels` has. libra: with corrected
    gradients. The error where the service refuses the method for this model.
    """
    layer = replica.model.target_layer
    assert layer is not None
    layers = (layer,) if METHODS[method].has_layer else ()
    question = Question(pixels, targets=tuple(targets), method=method, layers=layers, libra=libra)
    (answer,) = run(replica, [question])
    while isinstance(answer, Unfinished):
        finished = answer.step(replica)
        answer = answer if finished is None else finished
    if isinstance(answer, CamserveError):
        return answer
    size = (int(pixels.shape[1]), int(pixels.shape[2]))
    return [enlarged(np.abs(each.grid), size) for each in answer.explanations]


def enlarged(cam: Map, size: tuple[int, int]) -> Map:
    """A map laid over an image of (h, w), by the service's own interpolation."""
    height, width = size
    window = (0.0, 0.0, float(width), float(height))
    return resample(
        cam, Geometry((width, height), (width, height), window), (width, height), window
    )


class _Remembering(nn.Module):
    """A layer that gives its last output again for the same input, as the start of a graph.

    Every class of the peer runs the whole model for itself. What is behind the layer, and the
    gradient at it, are computed as ever; Score-CAM's masked images are other inputs.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self._last is None or not torch.equal(self._last[0], values):
            with torch.no_grad():
                self._last = values, self.layer(values)
        return self._last[1].clone().requires_grad_()


class Peer:
    """pytorch-grad-cam on its own copy of a model, at the layer where ours explains."""

    def __init__(self, model: LoadedModel) -> None:
        assert model.target_layer is not None
        self._model = model
        self._net = copy.deepcopy(model.module)
        self._layer = _Remembering(self._net.get_submodule(model.target_layer))
        self._net.set_submodule(model.target_layer, self._layer)

    def maps(self, pixels: Tensor, method: str, target: int) -> dict[tuple[str, str], Map]:
        """By (row of the table, side): its raw map, enlarged as ours is, and what it hands out.

        The raw map is what `get_cam_image` returns, after the ReLU that it applies next. What it
        hands out has gone through its `scale_cam_image` twice: the least value subtracted, divided
        by the greatest plus 1e-7, enlarged by OpenCV.

        Its Grad-CAM++ adds 1e-6 to a denominator of the size of the squared gradient, whose median
        at these layers is 7e-7 and 3e-8: weak gradients then count by their cube. The same code on
        gradients scaled up and activations scaled down as much, where 1e-6 is nothing, is
        NO_EPSILON.
        """
        kept: list[NDArray[np.float32]] = []
        with PEERS[method](model=self._net, target_layers=[self._layer]) as cam:
            plain = cam.get_cam_image

            def keep(*arguments: Any) -> NDArray[np.float32]:
                kept.append(plain(*arguments))
                if method == "gradcampp":
                    *before, activations, gradients, smooth = arguments
                    kept.append(plain(*before, activations / SCALE, gradients * SCALE, smooth))
                return kept[0]

            cam.get_cam_image = keep
            batch = self._model.normalised(pixels[None])
            (delivered,) = cam(batch, [ClassifierOutputTarget(target)])
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        raw = [enlarged(np.maximum(each[0], 0), size) for each in kept]
        found = {(method, "peer"): raw[0], (method, "delivered"): delivered}
        return found if len(raw) == 1 else found | {(NO_EPSILON, "peer"): raw[1]}


def trivial(size: tuple[int, int], seed: int) -> dict[str, Map]:
    """Maps that know nothing: a Gaussian in the centre, and noise.

    The deviation of the Gaussian is a quarter of each side. The noise is seeded, uniform on 7×7
    cells, enlarged as a map of a layer is.
    """
    rows, columns = (
        np.exp(-0.5 * (((np.arange(length) + 0.5) / length - 0.5) / 0.25) ** 2) for length in size
    )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(7, 7, generator=generator).numpy()
    return {
        "centre": np.outer(rows, columns).astype(np.float32),
        "random": enlarged(noise, size),
    }
