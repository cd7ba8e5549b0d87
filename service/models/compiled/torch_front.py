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

from service.models.catalog import Floating
from service.models.compiled.cut import traced
from service.models.compiled.front import Normalised
from service.models.loaded import LoadedModel
from service.models.replicas import replicate

_log = structlog.get_logger(__name__)

Run = Callable[[Tensor], Tensor]
"""Pixels (B, C, h, w) on the device to float32 (B, ...) there."""

Recorded = tuple[Callable[[], None], Tensor]
"""What computes anew from what is now in the pixels that were recorded with, and where to."""


class TorchFront:
    """Pixels to the activation of the layer where the model was cut; see `Front`.

    On CUDA a batch is one CUDA graph, so that the CPU launches one thing and not each kernel. What
    the graphs hold is compiled by `torch.compile` where that can work (it needs a C compiler);
    elsewhere it is the module as it is. On other devices the module runs as it is, without graphs.

    front:     the part of the model before the cut, on its device.
    precision: `bf16` runs it under autocast.
    largest:   images of the largest batch that has a graph; a larger one runs without.
    cache:     a folder for what torch compiles; None: torch's own choice.
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
        # One flat graph, whose code is its own: torch.compile counts by code how often it compiled,
        # and after eight times compiles no more.
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

    def __call__(self, pixels: Tensor, *, wide: bool = False) -> Tensor:  # noqa: ARG002
        if self._graphs is not None and len(pixels) <= self._graphs.largest:
            with torch.cuda.device(self._device):
                return self._graphs(pixels)
        return self._run(pixels.to(self._device, non_blocking=True))

    def _run(self, pixels: Tensor) -> Tensor:
        with torch.no_grad(), self._autocast():
            return self._module(pixels).float()

    def _compile(self, pixels: Tensor, cache: Path | None) -> None:
        """Have the module compiled for any batch size; it stays as it is where torch cannot."""
        if cache is not None:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
        plain = self._module
        self._module = torch.compile(plain, dynamic=True)
        try:
            self._run(pixels)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises is a reason
            self._module = plain
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            _log.warning("front_runs_uncompiled", detail=first)

    def _autocast(self) -> AbstractContextManager[object]:
        if not self._bf16:
            return nullcontext()
        # Its cache of weights that it cast would not outlive a recording.
        return torch.autocast(self._device.type, torch.bfloat16, cache_enabled=False)


class Graphs:
    """Recordings of one function for batches of 1, 2, 4 … images and of the largest.

    A batch of another size runs in the next larger recording; the rows behind it hold pixels of
    earlier batches, and what becomes of them is thrown away.

    pixels: what all recordings read from, uint8 (largest, C, h, w).
    record: makes a recording of a function and its input.
    """

    def __init__(self, run: Run, pixels: Tensor, record: Callable[[Run, Tensor], Recorded]) -> None:
        self.largest = len(pixels)
        self._pixels = pixels
        # They share memory, which is why only one may be at work, and why the largest comes first.
        self._lock = threading.Lock()
        self._recorded = {
            size: record(run, pixels[:size]) for size in reversed(sizes(self.largest))
        }

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, h, w), at most `largest`, to float32 (B, ...) in memory of its own."""
        count = len(pixels)
        replay, output = self._recorded[min(size for size in self._recorded if size >= count)]
        with self._lock:
            self._pixels[:count].copy_(pixels, non_blocking=True)
            replay()
            return output[:count].clone()


def sizes(largest: int) -> list[int]:
    """1, 2, 4 … and the largest: the batches that have a recording of their own."""
    return sorted({1 << power for power in range(largest.bit_length())} | {largest})


def cuda_graph() -> Callable[[Run, Tensor], Recorded]:
    """Record CUDA graphs on the current device, all in one pool of memory.

    All work goes to the default stream, so that what is queued later sees what was queued before.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(run: Run, pixels: Tensor) -> Recorded:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries choose their kernels in the first runs
            for _ in range(3):
                run(pixels)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads answer requests meanwhile, and what they do is no business of the recording.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = run(pixels)
        return graph.replay, output

    return record


def _can_compile() -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and find_spec("triton") is not None


def _in_bf16(front: nn.Module) -> nn.Module:
    """A copy whose large weights are in bf16 already, so that autocast need not cast them."""
    copy = replicate(front)
    for module in copy.modules():
        # Not a subclass, whose weight may be used without its forward pass, beside others.
        if type(module) in {nn.Conv2d, nn.Linear}:
            module.to(torch.bfloat16)
    return copy
