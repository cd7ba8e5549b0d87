"""The front of a cut model, run by OpenVINO on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import json
import threading
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import openvino
import structlog
import torch
from openvino._offline_transformations import apply_moc_transformations
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from service import durable
from service.errors import ConfigurationError
from service.models.compiled.front import Normalised, Precision
from service.models.loaded import LoadedModel

_log = structlog.get_logger(__name__)

Graph: TypeAlias = openvino.Model

FIXED_UP_TO = 32 * 2**20
"""Bytes of weights up to which a front has programs for fixed batch sizes: with small layers, the
overhead of OpenVINO for dynamic batch sizes is up to a tenth of the time. In larger fronts it is
mostly less, and each program needs another copy of all weights."""

FIXED_BATCH = 8
"""Maximum size of the largest batch for a program of a fixed size: its memory is allocated at once,
on every stream."""


class OpenVinoFront:
    """Maps pixels to what crosses the cut; see `Front`.

    Two programs of one graph: the narrow one runs `streams` concurrent requests on one thread each,
    for maximum throughput; the wide one runs one request on `single_request_threads` threads, for
    the lowest single-request latency. They agree within rounding. A front with few weights
    (`FIXED_UP_TO`) has further programs for common batch sizes: 1 and `largest`.

    graph:        the converted front, for any batch size.
    single_request_threads: 1: no wide program, which saves its packed weights.
    precision:    `bf16` if the processor supports it (`has_bf16`); an int8 graph does not change.
    largest:      images in the largest batch.

    trials: batch sizes that run every program once, if every second batch is wide: 1, 3, and the
            largest up to FIXED_BATCH.
    """

    def __init__(
        self,
        graph: Graph,
        streams: int = 1,
        single_request_threads: int = 1,
        precision: Precision = "float32",
        largest: int = 1,
    ) -> None:
        hint = "bf16" if precision == "bf16" else "f32"
        has_size = graph.inputs[0].get_partial_shape()[1:].is_static
        is_small = has_size and bytes_of_weights(graph) <= FIXED_UP_TO
        alone = {1} if is_small else set()
        together = {largest} if is_small and largest <= FIXED_BATCH else set()
        if single_request_threads > 1:
            self._narrow = _Programs(graph, streams, streams, hint, together)
            self._wide = _Programs(graph, 1, single_request_threads, hint, alone)
        else:
            self._narrow = self._wide = _Programs(graph, streams, streams, hint, together | alone)
        self.trials = [1, 1, 3, 2, min(largest, FIXED_BATCH)]

    def __call__(self, *inputs: Tensor, wide: bool = False) -> tuple[Tensor, ...]:
        return (self._wide if wide else self._narrow)(*inputs)

    def release(self) -> None:
        for programs in (self._narrow, self._wide):
            programs.release()
        _release_files()


class _Programs:
    """A graph compiled for any batch size, and once more for each of the fixed ones."""

    def __init__(
        self, graph: Graph, streams: int, threads: int, hint: str, fixed: Iterable[int]
    ) -> None:
        self._any = _Program(graph, streams, threads, hint)
        self._fixed: dict[int, _Program] = {}
        for size in fixed:
            of_size = _of_batch_size(graph, size)
            program = self._fixed[size] = _Program(of_size, streams, threads, hint)
            # Each stream allocates its memory when it first runs: now, rather than under the first
            # load.
            for _ in range(streams):
                program(torch.zeros(*of_size.inputs[0].shape, dtype=torch.uint8))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._fixed.get(len(inputs[0]), self._any)(*inputs)

    def release(self) -> None:
        """Free the activations of the program for any size; the others keep theirs on purpose."""
        self._any.release()


class _Program:
    """A compiled graph, with one inference request per concurrent thread."""

    def __init__(self, graph: Graph, streams: int, threads: int, hint: str) -> None:
        self._compiled = openvino.Core().compile_model(
            graph,
            "CPU",
            {
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": threads,
                # Pinned, the streams of two programs would share one core.
                "ENABLE_CPU_PINNING": False,
                "INFERENCE_PRECISION_HINT": hint,
            },
        )
        self._lock = threading.Lock()
        self._idle: list[Any] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self._request() as request:
            # Into the request's own memory: with shared inputs OpenVINO 2026.4 writes into the
            # array of an earlier caller, and its own copying takes longer.
            for number, values in enumerate(inputs):
                input_tensor = request.get_input_tensor(number)
                input_tensor.shape = values.shape
                input_tensor.data[:] = values.numpy()
            outputs = request.infer(share_outputs=True).to_tuple()
            # Copied: the next user of the request overwrites its memory.
            return tuple(torch.from_numpy(output.copy()) for output in outputs)

    def release(self) -> None:
        """Free activations; the next batch allocates them again. No batch may run."""
        self._compiled.release_memory()

    @contextmanager
    def _request(self) -> Iterator[Any]:
        with self._lock:
            request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        yield request
        # A request that raised is not reused.
        with self._lock:
            self._idle.append(request)


_MADV_DONTNEED = 4


def _release_files() -> None:
    """Unload the pages of mapped graphs, which are packed by now; a use reads the file again.

    With Linux alone, which also would unload them, but only when it needs their memory.
    """
    maps, madvise = Path("/proc/self/maps"), getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None or not maps.exists():
        return
    for line in maps.read_text().splitlines():
        addresses, mode, *_, name = line.split(maxsplit=5)
        if mode == "r--s" and name.endswith(".bin"):
            begin, end = (int(each, 16) for each in addresses.split("-"))
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def bytes_of_weights(graph: Graph) -> int:
    """Bytes of all constants of a graph."""
    constants = (node for node in graph.get_ordered_ops() if node.get_type_name() == "Constant")
    return sum(node.data.nbytes for node in constants)


def _of_batch_size(graph: Graph, size: int) -> Graph:
    fixed = graph.clone()
    rest = graph.inputs[0].get_partial_shape()[1:]
    fixed.reshape(openvino.PartialShape([size, *rest]))
    return fixed


def has_bf16() -> bool:
    """Whether this processor supports bf16 (AVX512-BF16 or AMX)."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def graph_of(
    model: LoadedModel,
    front: nn.Module,
    cache: Path | None,
    key: str,
    *,
    reconvert: bool = False,
    fuse: bool = True,
) -> Graph:
    """The graph of a model's front, from uint8 pixels; see `converted`."""
    preprocessing = model.preprocessing
    return converted(
        Normalised(front, preprocessing.mean, preprocessing.std).eval(),
        torch.zeros(1, preprocessing.channels, *preprocessing.crop, dtype=torch.uint8),
        cache,
        key,
        reconvert=reconvert,
        fuse=fuse,
    )


def converted(
    module: nn.Module,
    example: Tensor | Sequence[Tensor],
    cache: Path | None,
    key: str,
    *,
    reconvert: bool = False,
    fuse: bool = True,
) -> Graph:
    """A module as OpenVINO's graph for any batch size; from the cache if present.

    example: uint8 (1, C, h, w); or float32 (1, C, h, w) for each argument of the module, whose
            graph is for any height and width.
    cache:   a folder, created if needed; None: no cache.
    key:     what the graph depends on, besides the versions of torch and OpenVINO.
    reconvert: convert in any case, and replace the cached graph.
    fuse:    fuse operators now, with the numbers that compiling gives. Otherwise each compiled
             program does it and keeps fused weights of its own.

    Raises the errors of torch's tracer and OpenVINO's converter.
    """
    if cache is None:
        return _convert(module, example, fuse)
    text = f"{key} torch {torch.__version__} openvino {openvino.__version__} fused {fuse}"
    path = cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.xml"
    if not reconvert and path.exists() and path.with_suffix(".bin").exists():
        return openvino.Core().read_model(path)
    graph = _convert(module, example, fuse)
    try:
        return _saved(graph, path)
    except OSError as error:
        _log.warning("front_not_cached", folder=str(cache), detail=str(error))
        return graph


def _convert(module: nn.Module, example: Tensor | Sequence[Tensor], fuse: bool) -> Graph:
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    # Not openvino.convert_model, which sends telemetry over the network.
    frontend = FrontEndManager().load_by_framework("pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace warns about every constant
        decoder = TorchScriptPythonDecoder(module, example_input=examples)
        graph = frontend.convert(frontend.load(decoder))
    for given, each in zip(graph.inputs, examples, strict=True):
        rest = [*each.shape[1:]] if each is example else [each.shape[1], -1, -1]
        given.get_node().set_partial_shape(openvino.PartialShape([-1, *rest]))
    graph.validate_nodes_and_infer_types()
    if fuse:
        apply_moc_transformations(graph, cf=False)
    return graph


def _saved(graph: Graph, path: Path) -> Graph:
    """Write a graph atomically, and read it back as mapped memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.xml")  # containers share a PID
    try:
        openvino.save_model(graph, draft, compress_to_fp16=False)
        # The graph is last, so that a graph in the cache is complete, also after a power failure.
        for suffix in (".bin", ".xml"):
            durable.sync(draft.with_suffix(suffix))
            draft.with_suffix(suffix).replace(path.with_suffix(suffix))
            durable.sync_folder(path.parent)
    finally:
        for suffix in (".bin", ".xml"):
            draft.with_suffix(suffix).unlink(missing_ok=True)
    return openvino.Core().read_model(path)


def write(graph: Graph, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a graph and its description; `about` has the `identity` that `read` compares.

    The description is removed first and written last: in between `read` finds no front.
    """
    durable.make_folder(folder)
    (folder / "calibration.json").unlink(missing_ok=True)
    durable.sync_folder(folder)
    _saved(graph, folder / "front.xml")
    durable.write_whole(folder / "calibration.json", f"{json.dumps(about, indent=2)}\n".encode())


def read(folder: Path, identity: str) -> Graph:
    """Read a graph of `write`. Raises ConfigurationError if it belongs to another model."""
    try:
        about = json.loads((folder / "calibration.json").read_text())
        stored_identity = about["identity"]
        graph = openvino.Core().read_model(folder / "front.xml")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigurationError(
            f"{folder} contains no int8 front; create one with `camserve calibrate`."
        ) from error
    if stored_identity != identity:
        raise ConfigurationError(
            f"the int8 front in {folder} was made from {stored_identity}, and this model is "
            f"{identity}: run `camserve calibrate` again."
        )
    return graph
