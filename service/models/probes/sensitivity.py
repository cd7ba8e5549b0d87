"""How much the maps of each method depend on the weights: maps of a copy with randomised weights.

A map that stays the same when the weights are randomised shows the image and the architecture, not
what the model has learned.

Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018: the cascading randomisation of
section 3. The values are permuted within each tensor, so that each keeps its distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from service.cam.formulas import LAYER_METHODS, over_input, precise
from service.cam.guided import GuidedReLU
from service.cam.hooks import gradients, record
from service.cam.rank_correlation import rank_correlation
from service.images.decode import Rect
from service.models.probes.behaviour import preserved, seeded
from service.models.probes.layers import Layer
from service.models.probes.torch_state import kept_torch_state
from service.models.replicas import replicate

IMAGES = 2
"""Images of noise at load, each with other random weights: these matter more than the image."""

HARDLY = 0.6
"""Least rank correlation of maps that hardly depend on the weights."""

MAX_SECONDS = 60.0
"""Time after which no further depth is randomised."""

Depth = Literal["head", "half", "all"]

States = dict[Depth | None, dict[str, list[Tensor]]]
"""By depth (None: the model as it is) and method: the map (h, w) of each image, on the CPU."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How alike the maps of a method stay when weights are randomised.

    The wire's form is `api_schemas.models.Sensitivity`.

    head, half, all: the median rank correlation of absolute maps, −1..1, with the weights of the
                     last layer, of the last half of the model's operations, and of the whole model
                     randomised; None: not measured.
    """

    method: str
    head: float | None = None
    half: float | None = None
    all: float | None = None

    @property
    def weights_hardly_matter(self) -> bool:
        """Whether the maps stay alike with half of the model, or all of it, randomised."""
        return any(value is not None and value >= HARDLY for value in (self.half, self.all))


@dataclass(frozen=True, slots=True)
class Subject:
    """What is explained: one image, by a model whose weights may be changed.

    module:  a private copy. image: normalised (1, C, h, w). layers: those of the model.
    target:  the layer of the maps; None: only maps at the pixels.
    logits:  from an output of the module. covers: the part of the input that the layer's cells see.
    seed:    of the random weights.
    """

    module: nn.Module
    image: Tensor
    layers: Sequence[Layer]
    target: str | None
    logits: Callable[[Any], Tensor]
    covers: Rect | None = None
    seed: int = 0

    def best_class(self) -> int:
        with torch.no_grad():
            return int(self._logits(self.image).argmax())

    def maps(self, class_id: int) -> Mapping[str, Tensor]:
        """The maps (h, w) of methods with few passes: two forward and two backward passes."""
        gradient, *of_layer = self._gradients(class_id)
        maps = {"input_gradient": gradient[0].sum(dim=0)}
        maps |= self._at_layer(*of_layer) if of_layer else {}
        with GuidedReLU() as mode:
            (guided, *_) = self._gradients(class_id)
        if mode.count:
            maps["guided_backprop"] = guided[0].sum(dim=0)
        if mode.count and of_layer:
            size = (guided.shape[2], guided.shape[3])
            large = over_input(maps["gradcam"][None], size, self.covers)
            maps["guided_gradcam"] = (guided[0] * large).sum(dim=0)
        return maps

    def _gradients(self, class_id: int) -> list[Tensor]:
        """The gradient of a logit at the image, the activation at the target layer, the one there.

        The first alone where there is no target layer.
        """
        pixels = self.image.detach().float().requires_grad_()
        paths = [] if self.target is None else [self.target]
        with record(self.module, targets=paths) as recording:
            logits = self._logits(pixels.to(self.image.dtype))
        points = [recording.targets[path][-1] for path in paths]
        weights = torch.zeros_like(logits)[None]
        weights[0, 0, class_id] = 1
        values = [value[0] for value in gradients(logits, [pixels, *points], weights)]
        return [values[0], *(point.detach() for point in points), *values[1:]]

    def _at_layer(self, activation: Tensor, gradient: Tensor) -> Mapping[str, Tensor]:
        layout = next(layer.layout for layer in self.layers if layer.path == self.target)
        assert layout is not None
        values, slopes = (
            precise(layout.as_map(layout.by_image(tensor))) for tensor in (activation, gradient)
        )
        maps = {
            name: function(values, slopes)[0]
            for name, function in LAYER_METHODS.items()
            if name not in {"cam", "guided_gradcam"}
        }
        # Where CAM is defined, it is Grad-CAM's map times a constant.
        return maps | {"cam": maps["gradcam"]}

    def _logits(self, images: Tensor) -> Tensor:
        with seeded(0), kept_torch_state(random=False), preserved(self.module):
            return self.logits(self.module(images.clone()))


def measure_sensitivity(subjects: Iterable[Subject]) -> tuple[Sensitivity, ...]:
    """Compare maps of a model with those of its randomised copies; empty if that is not possible.

    The modules of the subjects are randomised. An image costs 21 forward passes (a backward pass
    counts 1.5): 5 for each of 4 states of the weights, and 1 for its class.
    """
    until = time.monotonic() + MAX_SECONDS
    states: States = {}
    # A model may raise anything, also about a gradient that nobody has requested.
    with suppress(Exception):
        for subject in subjects:
            class_id = subject.best_class()
            for depth in cascade(subject.module, subject.layers, subject.seed):
                if time.monotonic() > until:
                    break
                note(states, depth, subject.maps(class_id))
    return sensitivities(states)


def note(states: States, depth: Depth | None, maps: Mapping[str, Tensor]) -> None:
    """Add the maps of an image by method."""
    for method, cam in maps.items():
        states.setdefault(depth, {}).setdefault(method, []).append(cam.detach().float().cpu())


def sensitivities(states: States) -> tuple[Sensitivity, ...]:
    """The result for each method that has maps."""
    found = []
    for method, maps in states.get(None, {}).items():
        values = {
            depth: alike(maps, changed[method])
            for depth, changed in states.items()
            if depth is not None and method in changed
        }
        found += [Sensitivity(method, **values)] if values else []
    return tuple(found)


def alike(maps: Sequence[Tensor], changed: Sequence[Tensor]) -> float | None:
    """The median rank correlation of absolute maps; None if no map has differences.

    A map that is constant or not finite after the change has nothing in common with the first: 0.
    """
    values = [
        rank_correlation(one.abs().numpy(), other.nan_to_num().abs().numpy())
        for one, other in zip(maps, changed, strict=False)  # time may have been up
        if float(one.abs().max()) > float(one.abs().min())
    ]
    return float(np.median(values)) if values else None


def private_copy(module: nn.Module) -> nn.Module:
    """A replica that shares no parameter with the module. ValueError for TorchScript inside it."""
    if any(isinstance(part, ScriptModule) for part in module.modules()):
        raise ValueError("a TorchScript module cannot be copied without its parameters")
    replica = replicate(module)
    for parameter in replica.parameters():
        parameter.data = parameter.data.clone()
    return replica


def cascade(module: nn.Module, layers: Sequence[Layer], seed: int) -> Iterator[Depth | None]:
    """Yield None for the module as it is, then each depth, with its parameters randomised.

    layers: as `trace_layers` found them. The module must be a private copy.
    """
    yield None
    generator = torch.Generator().manual_seed(seed)
    changed: set[int] = set()
    depths: tuple[Depth, ...] = ("head", "half", "all")
    for depth in depths:
        for parameter in parameters_at(module, layers, depth):
            if id(parameter) not in changed:
                changed.add(id(parameter))
                order = torch.randperm(parameter.numel(), generator=generator)
                values = parameter.data.reshape(-1)[order.to(parameter.device)]
                parameter.data = values.reshape(parameter.shape)
        if changed:
            yield depth


def parameters_at(module: nn.Module, layers: Sequence[Layer], depth: Depth) -> list[nn.Parameter]:
    """The parameters that a depth randomises.

    `head`: those of the last module that has parameters; `half`: also those of all modules that
    begin when half of the model's operations are done; `all`.
    """
    begins = {layer.path: layer.before for layer in layers if layer.calls}
    owned = [
        (_begin(path, begins), parameter)
        for path, part in module.named_modules()
        for parameter in part.parameters(recurse=False)
    ]
    last = max((begin for begin, _ in owned), default=0.0)
    least = {"head": last, "half": min(0.5, last), "all": 0.0}[depth]
    return [parameter for begin, parameter in owned if begin >= least]


def _begin(path: str, begins: Mapping[str, float]) -> float:
    """The share of the operations that is done when a module, or the one around it, begins."""
    while path and path not in begins:
        path = path.rpartition(".")[0]
    return begins.get(path, 0.0)


def natural_noise(
    shape: tuple[int, int, int], count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Images of noise, uint8 (count, C, h, w), with the spectrum of images of nature, 1/f.

    generator: of the noise; None: one with the seed 0.
    """
    channels, height, width = shape
    generator = generator or torch.Generator().manual_seed(0)
    white = torch.randn(count, channels + 1, height, width, generator=generator)
    rows, columns = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    frequency = torch.hypot(rows[:, None], columns[None]).clamp_min(1 / max(height, width))
    pink: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    pink /= pink.std(dim=(2, 3), keepdim=True)
    # The channels of an image of nature have most of their contrast in common.
    mixed = 0.9 * pink[:, :1] + 0.4 * pink[:, 1:]
    values: Tensor = (127.5 + 55 * mixed).clamp(0, 255).round()
    return values.to(torch.uint8)
