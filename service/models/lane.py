"""The compiled lane: a model cut at its target layer, the front compiled, the tail under autograd.

A gradient at the target layer needs only what lies behind it from torch. What lies before it, which
is nearly the whole work, may run in any engine, provided that it gives the same numbers: that is
checked here, and the lane is offered only where it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import structlog
import torch
from torch import Tensor, fx

from service.cam.hooks import record
from service.models.cut import Uncuttable, split

if TYPE_CHECKING:
    from service.models.loaded import LoadedModel

_log = structlog.get_logger(__name__)

Precision = Literal["float32", "int8"]

ACTIVATION_TOLERANCE = 3e-3
MAP_TOLERANCE = 2e-3
LOGIT_TOLERANCE = 2e-3
"""Largest differences from the hooked lane, each as a share of the largest absolute value."""


class Front(Protocol):
    """Pixels uint8 (B, C, h, w) to the target layer's output, float32 (B, ...), its own memory."""

    def __call__(self, pixels: Tensor, *, wide: bool = False) -> Tensor: ...


class NotCompiled(Exception):
    """Why a model has no compiled lane; the sentence is shown in `/models`."""


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest differences between the two lanes, as shares of the largest absolute value."""

    activation: float
    map: float
    logits: float

    def is_good(self) -> bool:
        return (
            self.activation <= ACTIVATION_TOLERANCE
            and self.map <= MAP_TOLERANCE
            and self.logits <= LOGIT_TOLERANCE
        )


@dataclass(frozen=True, slots=True)
class CompiledLane:
    """What answers the common request: predictions, and maps at `layer` from its gradient.

    tail:      from the layer's output to the model's output. It carries no hooks, so that all
               worker threads share it.
    parity:    with the hooked lane; None for an int8 front, which was measured when it was made.
    precision: of the front: `float32`, or `int8` where the operator chose that.
    """

    layer: str
    front: Front
    tail: fx.GraphModule
    parity: Parity | None = None
    precision: Precision = "float32"


@dataclass(frozen=True, slots=True)
class Compiler:
    """How fronts are compiled.

    cache:        a folder where converted fronts are kept for the next start; None keeps none.
    streams:      how many requests run side by side, one thread each.
    lone_threads: threads of a request that is alone.
    """

    cache: Path | None = None
    streams: int = 1
    lone_threads: int = 1

    def compiled(self, model: LoadedModel) -> LoadedModel:
        """The model with a compiled lane, or with the reason why it has none.

        Raises ConfigurationError as `lane` does.
        """
        try:
            return replace(model, compiled=self.lane(model), not_compiled=None)
        except NotCompiled as error:
            return replace(model, not_compiled=f"{error}")

    def lane(self, model: LoadedModel) -> CompiledLane:
        """The compiled lane of a model.

        Raises NotCompiled with the reason; ConfigurationError for an int8 front of another model.
        """
        layer = layer_to_cut(model)
        try:
            front, tail = split(model.module, layer)
        except Uncuttable as error:
            raise NotCompiled(f"{error}.") from error
        if model.spec.int8 is not None:
            return self._quantised(model, layer, tail, model.spec.int8)
        # A module written by a user keeps its weights' digest while its code changes, so that what
        # the cache holds may be another front: the check finds out.
        for anew in (False, True) if self.cache else (True,):
            lane, parity = self._tried(model, layer, front, tail, anew)
            if parity.is_good():
                _log.info("front_compiled", model=model.name, layer=layer, **asdict(parity))
                return lane
        raise NotCompiled(
            f"its numbers differ from the hooked lane's: activation by {parity.activation:.1g}, "
            f"map by {parity.map:.1g}, logits by {parity.logits:.1g} of the maximum."
        )

    def _tried(
        self,
        model: LoadedModel,
        layer: str,
        front: fx.GraphModule,
        tail: fx.GraphModule,
        anew: bool,
    ) -> tuple[CompiledLane, Parity]:
        # Its import takes half a second, which commands that compile nothing need not wait for.
        from service.models import openvino_front  # noqa: PLC0415

        try:
            graph = openvino_front.graph_of(model, front, self.cache, identity(model), anew=anew)
            compiled = openvino_front.OpenVinoFront(graph, self.streams, self.lone_threads)
            lane = CompiledLane(layer, compiled, tail)
            parity = parity_on(model, lane, _pictures(model))
        except Exception as error:
            # Two foreign compilers, each with errors of its own: whatever they raise is a reason.
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise NotCompiled(f"it cannot be compiled: {first}") from error
        return replace(lane, parity=parity), parity

    def _quantised(
        self, model: LoadedModel, layer: str, tail: fx.GraphModule, folder: Path
    ) -> CompiledLane:
        from service.models import openvino_front  # noqa: PLC0415 - as above

        graph = openvino_front.read(folder, identity(model))
        compiled = openvino_front.OpenVinoFront(graph, self.streams, self.lone_threads)
        _log.info("front_int8", model=model.name, layer=layer, folder=str(folder))
        return CompiledLane(layer, compiled, tail, precision="int8")


def identity(model: LoadedModel) -> str:
    """What a front depends on, in one line: two models of the same line have the same front."""
    spec, preprocessing = model.spec, model.preprocessing
    return (
        f"{spec.builder} {dict(spec.arguments)} {model.version} {model.target_layer} "
        f"{preprocessing.channels}×{preprocessing.crop} {preprocessing.mean} {preprocessing.std}"
    )


def layer_to_cut(model: LoadedModel) -> str:
    """The layer to cut at. Raises NotCompiled."""
    reason = model.no_layers or model.no_gradients
    if reason is None and model.target_layer is None:
        reason = "it has no target layer to be cut at"
    device = next((p.device.type for p in model.module.parameters()), "cpu")
    if reason is None and device != "cpu":
        reason = f"it is on {device}, and its front is compiled for the CPU alone"
    if reason is None and model.dtype != torch.float32:
        reason = f"its parameters are {str(model.dtype).removeprefix('torch.')}, not float32"
    if reason is not None or model.target_layer is None:
        raise NotCompiled(f"{reason}.")
    if model.layer(model.target_layer).calls > 1:
        raise NotCompiled(f"its target layer {model.target_layer!r} runs several times.")
    return model.target_layer


def parity_on(model: LoadedModel, lane: CompiledLane, batches: Iterable[Tensor]) -> Parity:
    """How near a lane is to the hooked one on pictures, uint8 (B, C, h, w), in both programs."""
    module, worst = model.replicate(), Parity(0.0, 0.0, 0.0)
    layout = model.layer(lane.layer).layout
    assert layout is not None
    for number, pixels in enumerate(batches):
        with record(module, targets=[lane.layer]) as seen:
            logits = model.logits(module(model.normalised(pixels)))
        expected = seen.targets[lane.layer][-1]
        gradient = torch.autograd.grad(logits.amax(dim=1).sum(), expected)[0]
        found = lane.front(pixels, wide=number % 2 == 1).requires_grad_()
        made = model.logits(lane.tail(found.clone()))
        same = made.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
        slope = torch.autograd.grad(same, found)[0]
        maps = [
            _signed_map(layout.as_map(activation), layout.as_map(slopes))
            for activation, slopes in ((expected.detach(), gradient), (found.detach(), slope))
        ]
        worst = Parity(
            max(worst.activation, _difference(expected.detach(), found.detach())),
            max(worst.map, _difference(*maps)),
            max(worst.logits, _difference(logits.detach(), made.detach())),
        )
    return worst


def _signed_map(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM before its ReLU, which could leave nothing to compare."""
    return (activation * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1)


def _pictures(model: LoadedModel) -> Iterator[Tensor]:
    """Batches of uint8 (B, C, h, w): noise, and noise with the spectrum of photographs (1/f)."""
    generator = torch.Generator().manual_seed(0)
    channels, (height, width) = model.preprocessing.channels, model.preprocessing.crop
    for batch in (1, 1, 3, 2):
        white = torch.randn(batch, channels, height, width, generator=generator)
        rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
        distance = (rows**2 + columns**2).sqrt().clamp(min=1 / max(height, width))
        pink = torch.fft.irfft2(torch.fft.rfft2(white) / distance, s=(height, width))
        pink = pink / pink.std(dim=(1, 2, 3), keepdim=True)
        noise = white if batch == 2 else pink
        yield (noise * 50 + 120).clamp(0, 255).to(torch.uint8)


def _difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference as a share of the largest value; infinite where shapes or NaN are."""
    if expected.shape != found.shape or not bool(found.isfinite().all()):
        return float("inf")
    largest = float(expected.abs().max())
    gap = float((expected - found).abs().max())
    return gap / largest if largest else gap
