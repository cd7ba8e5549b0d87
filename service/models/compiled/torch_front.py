"""The front of a cut model, run by torch on the model's own device: a GPU."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import structlog
import torch
from torch import Tensor, fx, nn

from service.errors import first_line
from service.models.catalog import Floating
from service.models.compiled.cut import traced
from service.models.compiled.front import Normalised
from service.models.loaded import LoadedModel
from service.models.replicas import replicate

_log = structlog.get_logger(__name__)

Run = Callable[[Tensor], tuple[Tensor, ...]]
"""Pixels (B, C, h, w) on the device to tensors (B, ...) there, float32 where not integers."""

Recorded = tuple[Callable[[], None], tuple[Tensor, ...]]
"""A function that replays a recording on the current pixels, and its outputs."""


class TorchFront:
    """Maps pixels to what crosses the cut; see `Front`.

    On CUDA a batch is one CUDA graph, so that the CPU launches a graph instead of each kernel. The
    module in the graphs is compiled by `torch.compile` if possible (it needs a C compiler). On
    other devices the module runs unchanged, without graphs.

    front:     the part of the model before the cut, on its device.
    precision: `bf16` runs it under autocast.
    largest:   images of the largest batch with a graph; a larger batch runs without.
    cache:     a folder for compiled code; None: torch's default.
    """

    def __init__(
        self,
        model: LoadedModel,
        front: nn.Module,
        *,
        precision: Floating = "float32",
        largest: int = 1,
        cache: Path | None = None,
    ) -> None:
        self._device, self._bf16 = model.device, precision == "bf16"
        layout = torch.channels_last if model.channels_last else torch.contiguous_format
        preprocessing = model.preprocessing
        whole = Normalised(
            _in_bf16(front) if self._bf16 else front, preprocessing.mean, preprocessing.std, layout
        ).to(self._device)
        # A flat graph with separate code: torch.compile stops after eight compilations of the
        # same code.
        self._module: Run = fx.GraphModule(whole, traced(whole))
        self._graphs: Graphs | None = None
        if self._device.type != "cuda":
            return
        height, width = preprocessing.crop
        pixels = torch.zeros(
            largest, preprocessing.channels, height, width, dtype=torch.uint8, device=self._device
        )
        with torch.cuda.device(self._device):
            if _can_compile():
                self._compile(pixels[:2], cache)
            self._graphs = Graphs(self._run, pixels, cuda_graph())

    def __call__(self, pixels: Tensor, *, wide: bool = False) -> tuple[Tensor, ...]:  # noqa: ARG002
        if self._graphs is not None and len(pixels) <= self._graphs.largest:
            with torch.cuda.device(self._device):
                return self._graphs(pixels)
        return self._run(pixels.to(self._device, non_blocking=True))

    def release(self) -> None:
        """Nothing: torch's allocator shares what it keeps."""

    def _run(self, pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), self._autocast():
            # Copies: the layer may return its own input, which crosses beside its output then.
            return tuple(_in_float32(output).clone() for output in self._module(pixels))

    def _compile(self, pixels: Tensor, cache: Path | None) -> None:
        """Compile the module for any batch size; it does not change if torch cannot."""
        if cache is not None:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
        plain = self._module
        self._module = torch.compile(plain, dynamic=True)
        try:
            self._run(pixels)
        except Exception as error:  # noqa: BLE001 - compilers raise errors of many types
            self._module = plain
            _log.warning("front_runs_uncompiled", detail=first_line(error))

    def _autocast(self) -> AbstractContextManager[object]:
        if not self._bf16:
            return nullcontext()
        # Its cache of cast weights is not valid beyond a recording.
        return torch.autocast(self._device.type, torch.bfloat16, cache_enabled=False)


def _in_float32(output: Tensor) -> Tensor:
    return output.float() if output.is_floating_point() else output


class Graphs:
    """Recordings of one function for batches of 1, 2, 4 … images and of the largest.

    A batch of another size runs in the next larger recording; the remaining rows contain pixels of
    earlier batches, and their output is discarded.

    pixels: the input of all recordings, uint8 (largest, C, h, w).
    record: records a function with its input.
    """

    def __init__(self, run: Run, pixels: Tensor, record: Callable[[Run, Tensor], Recorded]) -> None:
        self.largest = len(pixels)
        self._pixels = pixels
        # They share memory: only one may run at a time, and the largest is recorded first.
        self._lock = threading.Lock()
        self._recorded = {
            size: record(run, pixels[:size]) for size in reversed(sizes(self.largest))
        }

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Pixels (B, C, h, w), at most `largest`, to tensors (B, ...) in new memory."""
        count = len(pixels)
        replay, outputs = self._recorded[min(size for size in self._recorded if size >= count)]
        with self._lock:
            self._pixels[:count].copy_(pixels, non_blocking=True)
            replay()
            return tuple(output[:count].clone() for output in outputs)


def sizes(largest: int) -> list[int]:
    """1, 2, 4 … and the largest: the batch sizes that are recorded."""
    return sorted({1 << power for power in range(largest.bit_length())} | {largest})


def cuda_graph() -> Callable[[Run, Tensor], Recorded]:
    """Record CUDA graphs on the current device, all in one pool of memory.

    All work goes to the default stream, so that it runs in order.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(run: Run, pixels: Tensor) -> Recorded:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries select their kernels in the first runs
            for _ in range(3):
                run(pixels)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Not "global": other threads run batches meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = run(pixels)
        return graph.replay, outputs

    return record


def _can_compile() -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and find_spec("triton") is not None


def _in_bf16(front: nn.Module) -> nn.Module:
    """A copy with large weights in bf16, so that autocast does not cast them."""
    copy = replicate(front)
    for module in copy.modules():
        # Not a subclass, whose weight may be used outside its forward pass.
        if type(module) in {nn.Conv2d, nn.Linear}:
            module.to(torch.bfloat16)
    return copy
