"""The compiled lane: a model cut at its target layer, the front compiled, the tail under autograd.

A gradient at the target layer needs only the tail in torch. The front, which is nearly the whole
work, may run in any engine with the same numbers: this is verified here, and otherwise the model
has no compiled lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import structlog
import torch
from torch import Tensor, fx, nn

from service.cam.hooks import record
from service.errors import first_line
from service.models.catalog import Floating
from service.models.compiled.cut import Uncuttable, split
from service.models.compiled.exported import split_exported
from service.models.compiled.front import (
    CompiledLane,
    Front,
    NotCompiled,
    Parity,
    Program,
    Tolerance,
    difference,
)
from service.models.compiled.parts import with_compiled_parts
from service.models.loaded import LoadedModel
from service.models.probes.sensitivity import natural_noise
from service.models.probes.torch_state import kept_torch_state

_log = structlog.get_logger(__name__)


TOLERANCES: Mapping[Floating, Tolerance] = {
    "float32": Tolerance(3e-3, 2e-3, 2e-3),
    "bf16": Tolerance(0.15, 0.1, 0.1),
}
"""Differences due to rounding. bf16 rounds by up to 1/256 in every operation."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """How fronts are compiled.

    cache:        a folder that keeps converted fronts for the next start; None: none.
    streams:      concurrent requests, one thread each.
    single_request_threads: threads of a single request.
    largest:      images in the largest batch.
    precision:    `bf16` if the numbers are within TOLERANCES, otherwise float32.
    """

    cache: Path | None = None
    streams: int = 1
    single_request_threads: int = 1
    largest: int = 4
    precision: Floating = "float32"

    def compiled(self, model: LoadedModel) -> LoadedModel:
        """The model with a compiled lane, or with the reason for having none.

        Raises ConfigurationError as `lane` does.
        """
        try:
            if model.task != "classification":
                return self._with_parts(model)
            return replace(model, compiled=self.lane(model), not_compiled=None)
        except NotCompiled as error:
            _log.info("front_not_compiled", model=model.name, detail=f"{error}")
            return replace(model, not_compiled=f"{error}")

    def _with_parts(self, model: LoadedModel) -> LoadedModel:
        """A detector or a segmenter in float32, whatever precision is configured."""
        behaves = model.behaviour
        if not (behaves.isolated and behaves.batchable and behaves.deterministic):
            # It could not be compared.
            raise NotCompiled(next(one.result for one in model.findings if not one.passed))
        try:
            return with_compiled_parts(model, partial(self._part, model), TOLERANCES["float32"])
        except NotCompiled:
            raise
        except Exception as error:  # a user's module may raise anything without its own backbone
            raise NotCompiled(f"it cannot be compiled: {first_line(error)}") from error

    def _part(
        self,
        model: LoadedModel,
        module: nn.Module,
        examples: Sequence[Tensor],
        path: str,
        *,
        reconvert: bool,
    ) -> Program:
        from service.models.compiled import openvino_front  # noqa: PLC0415 - as in _on_the_cpu

        graph = openvino_front.converted(
            module, examples, self.cache, f"{identity(model)} {path}", reconvert=reconvert
        )
        return openvino_front.OpenVinoFront(graph, self.streams, self.single_request_threads)

    def lane(self, model: LoadedModel) -> CompiledLane:
        """The compiled lane of a model.

        Raises NotCompiled with the reason; ConfigurationError for an int8 front of another model.
        """
        layer = layer_to_cut(model)
        if model.spec.int8 is not None:
            return self._quantised(model, layer, model.spec.int8)
        precision = model.spec.precision or self.precision
        if precision == "float32":
            return self._checked(model, layer, precision)
        try:
            return self._checked(model, layer, precision)
        except NotCompiled as error:
            _log.warning("front_in_float32_instead", model=model.name, detail=f"{error}")
            return replace(self._checked(model, layer, "float32"), instead=f"In bf16 {error}")

    def _checked(self, model: LoadedModel, layer: str, precision: Floating) -> CompiledLane:
        """A lane with verified numbers. Raises NotCompiled."""
        # The code of a user's module may change while the digest of its weights does not, so that
        # the cache may contain another front: verification detects this.
        for reconvert in (False, True) if self.cache else (True,):
            lane, parity = self._tried(model, layer, precision, reconvert)
            if parity.is_within(TOLERANCES[precision]):
                _log.info(
                    "front_compiled",
                    model=model.name,
                    layer=layer,
                    precision=precision,
                    **asdict(parity),
                )
                return lane
        raise NotCompiled(f"its numbers differ from the hooked lane's: {parity}.")

    def _tried(
        self, model: LoadedModel, layer: str, precision: Floating, reconvert: bool
    ) -> tuple[CompiledLane, Parity]:
        try:
            if model.device.type == "cpu":
                front, tail, batches = self._on_the_cpu(model, layer, precision, reconvert)
            else:
                front, tail, batches = self._on_its_device(model, layer, precision)
            lane = CompiledLane(layer, front, tail, precision=precision)
            parity = parity_on(model, lane, _parity_images(model, batches))
            front.release()
        except Uncuttable as error:
            raise NotCompiled(f"{error}.") from error
        except NotCompiled:
            raise
        except Exception as error:
            # Compilers raise errors of many types, all of which are a reason.
            raise NotCompiled(f"it cannot be compiled: {first_line(error)}") from error
        return replace(lane, parity=parity), parity

    def _on_the_cpu(
        self, model: LoadedModel, layer: str, precision: Floating, reconvert: bool
    ) -> tuple[Front, fx.GraphModule, list[int]]:
        # The import takes half a second, which commands that compile nothing save.
        from service.models.compiled import openvino_front  # noqa: PLC0415

        if precision == "bf16" and not openvino_front.has_bf16():
            raise NotCompiled("this processor cannot compute: it has no AVX512-BF16 and no AMX.")
        front, tail = _split(model, model.module, layer)
        key = f"{identity(model)} {front.code}"
        graph = openvino_front.graph_of(model, front, self.cache, key, reconvert=reconvert)
        compiled_front = openvino_front.OpenVinoFront(
            graph, self.streams, self.single_request_threads, precision, self.largest
        )
        return compiled_front, tail, compiled_front.trials

    def _on_its_device(
        self, model: LoadedModel, layer: str, precision: Floating
    ) -> tuple[Front, fx.GraphModule, list[int]]:
        from service.models.compiled.torch_front import TorchFront, sizes  # noqa: PLC0415 - for GPUs alone

        folded = model.folded
        whole = folded.module if folded and layer not in folded.layers else model.module
        front, tail = _split(model, whole, layer)
        compiled_front = TorchFront(
            model, front, precision=precision, largest=self.largest, cache=self.cache
        )
        return compiled_front, tail, [3, *sizes(self.largest)]

    def _quantised(self, model: LoadedModel, layer: str, folder: Path) -> CompiledLane:
        from service.models.compiled import openvino_front  # noqa: PLC0415 - as in _on_the_cpu

        if model.device.type != "cpu":
            raise NotCompiled(f"its int8 front is for the CPU, and it is on {model.device}.")
        try:
            _, tail = _split(model, model.module, layer)
        except Uncuttable as error:
            raise NotCompiled(f"{error}.") from error
        graph = openvino_front.read(folder, identity(model))
        compiled = openvino_front.OpenVinoFront(
            graph, self.streams, self.single_request_threads, largest=self.largest
        )
        _log.info("front_int8", model=model.name, layer=layer, folder=str(folder))
        return CompiledLane(layer, compiled, tail, precision="int8")


def _split(
    model: LoadedModel, module: nn.Module, layer: str
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A form of the model cut at a layer, by torch.fx, otherwise by export. Raises Uncuttable."""
    try:
        return split(module, layer)
    except Uncuttable as error:
        shape = (1, model.preprocessing.channels, *model.preprocessing.crop)
        image = model.normalised(torch.zeros(shape, dtype=torch.uint8))
        try:
            return split_exported(module, layer, image, model.select)
        except Uncuttable as second:
            raise Uncuttable(f"{error}; {second}") from second


def identity(model: LoadedModel) -> str:
    """The properties of a model that determine its front, in one line."""
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
    if reason is None and model.dtype != torch.float32:
        reason = f"its parameters are {str(model.dtype).removeprefix('torch.')}, not float32"
    if reason is not None or model.target_layer is None:
        raise NotCompiled(f"{reason}.")
    if model.layer(model.target_layer).calls > 1:
        raise NotCompiled(f"its target layer {model.target_layer!r} runs several times.")
    return model.target_layer


def parity_on(model: LoadedModel, lane: CompiledLane, batches: Iterable[Tensor]) -> Parity:
    """Compare a lane with the hooked lane on images, uint8 (B, C, h, w), in both programs."""
    module, worst = model.replicate(), Parity(0.0, 0.0, 0.0)
    layout = model.layer(lane.layer).layout
    assert layout is not None
    for number, pixels in enumerate(batches):
        with kept_torch_state(random=False), record(module, targets=[lane.layer]) as seen:
            logits = model.logits(module(model.normalised(pixels)))
        expected = seen.targets[lane.layer][-1]
        gradient = torch.autograd.grad(logits.amax(dim=1).sum(), expected)[0]
        lane_activation, *beside = lane.front(pixels, wide=number % 2 == 1)
        lane_activation.requires_grad_()
        with kept_torch_state(random=False):
            lane_logits = model.logits(lane.tail(lane_activation.clone(), *beside))
        same = lane_logits.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
        slope = torch.autograd.grad(same, lane_activation)[0]
        maps = [
            _signed_map(
                layout.as_map(layout.by_image(activation)), layout.as_map(layout.by_image(slopes))
            )
            for activation, slopes in (
                (expected.detach(), gradient),
                (lane_activation.detach(), slope),
            )
        ]
        worst = Parity(
            max(worst.activation, difference(expected.detach(), lane_activation.detach())),
            max(worst.map, difference(*maps)),
            max(worst.logits, difference(logits.detach(), lane_logits.detach())),
        )
    return worst


def _signed_map(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM before its ReLU, which could leave nothing to compare."""
    return (activation * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1)


def _parity_images(model: LoadedModel, batches: Sequence[int]) -> Iterator[Tensor]:
    """Batches of uint8 (B, C, h, w): white noise for two images, otherwise 1/f noise."""
    generator = torch.Generator().manual_seed(0)
    channels, (height, width) = model.preprocessing.channels, model.preprocessing.crop
    for batch in batches:
        if batch != 2:
            yield natural_noise((channels, height, width), batch, generator)
            continue
        white = torch.randn(batch, channels, height, width, generator=generator)
        yield (white * 50 + 120).clamp(0, 255).to(torch.uint8)
