"""The compiled lane of detectors and segmenters: some of their modules run by OpenVINO.

Their graphs cannot be cut, because they read sizes from tensors and select boxes. But the modules
that are most of the work take and return tensors: the backbone, and the head behind it. In a copy
of the model each of them is replaced by a module that OpenVINO runs. Whether it gives the same
numbers is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import structlog
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from service.cam.hooks import map_tensors, tensors_in, watch
from service.errors import first_line
from service.models.compiled.folding import Folded
from service.models.compiled.front import (
    NotCompiled,
    Program,
    Tolerance,
    alone,
    difference,
    is_alone,
)
from service.models.loaded import LoadedModel
from service.models.probes.sensitivity import natural_noise
from service.models.probes.torch_state import kept_torch_state
from service.models.replicas import replicate
from service.models.tasks import (
    Detections,
    compilable_parts,
    detections_in,
    per_image,
    region_logits,
)

_log = structlog.get_logger(__name__)

Compile = Callable[..., Program]
"""Compiles a module of tensors for any number and size of images: `(module, examples, path,
reconvert=)`; `reconvert`: convert in any case, and replace what a cache has."""

Call = tuple[Any, Any]
"""Arguments and output of a module."""

SMALLEST = 2
"""Cells a side, at least, of the feature maps that a part is tried on."""

SAME_BOX = 0.9
"""The smallest overlap (IoU) of a box in one lane with its box in the other."""

SAME_EDGES = 0.01
"""Or the largest distance of their edges, in pixels."""

SWAPPED = 0.1
"""The largest share of boxes without such a box. Of candidates with nearly the same score,
non-maximum suppression may keep one in one lane and another in the other."""


class CompiledPart(nn.Module):
    """A module that a compiled program runs, or torch if a gradient has to pass.

    module:   the module itself, which also runs what the program was not compiled for.
    program:  maps the tensors in the arguments to those in the output.
    taken, given: the structures of arguments and output, with a tensor in each place.
    """

    def __init__(self, module: nn.Module, program: Program, taken: Any, given: Any) -> None:
        super().__init__()
        self.module = module
        self._program = _Shared(program, taken, given)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module."""
        tensors = _tensors(args)
        if kwargs or not self._program.takes(tensors):
            return self.module(*args, **kwargs)
        return self._program(tensors)


class _Shared:
    """A program with its structures, which the copies of a model share."""

    def __init__(self, program: Program, taken: Any, given: Any) -> None:
        self._program = program
        self._ranks = [tensor.ndim for tensor in _tensors(taken)]
        self._given = map_tensors(given, lambda _: torch.empty(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        is_plain = not any(tensor.requires_grad for tensor in tensors)
        return is_plain and [tensor.ndim for tensor in tensors] == self._ranks

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        outputs = iter(self._program(*tensors, wide=is_alone.get()))
        return map_tensors(self._given, lambda _: next(outputs))


class _Flat(nn.Module):
    """A module as a function of tensors that returns a tuple of tensors."""

    def __init__(self, module: nn.Module, taken: Any) -> None:
        super().__init__()
        self.module = module
        self._taken = taken

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        args = map_tensors(self._taken, lambda _: next(left))
        return tuple(_tensors(self.module(*args)))


def with_compiled_parts(model: LoadedModel, compiled: Compile, tolerance: Tolerance) -> LoadedModel:
    """A detector or a segmenter with a form whose backbone, and head if possible, is compiled.

    Raises NotCompiled with the reason.
    """
    paths = _paths(model)
    trials = [_Trial(model, paths, images) for images in _images(model)]
    module = model.replicate()
    for path in paths:
        try:
            made = _part(module, path, compiled, trials, tolerance)
            made.module = module.get_submodule(path)
            module.set_submodule(path, made)
        except NotCompiled as error:
            if path == paths[0]:
                raise
            _log.info("part_not_compiled", model=model.name, part=path, detail=f"{error}")
    parts = tuple(path for path in paths if isinstance(module.get_submodule(path), CompiledPart))
    form = replicate(module)  # a pass may leave something in it
    gap = max(trial.gap(form) for trial in trials)
    if gap > tolerance.logits:
        raise NotCompiled(f"its predictions differ from the hooked lane's by {gap:.1g}.")
    _log.info("parts_compiled", model=model.name, parts=parts, predictions=gap)
    inner = tuple(f"{path}." for path in parts)
    layers = frozenset(layer.path for layer in model.layers if layer.path.startswith(inner))
    folded = Folded(module.eval, layers, parts)
    return replace(model, folded=folded, not_compiled=None)


def _paths(model: LoadedModel) -> tuple[str, ...]:
    """The modules to compile, the backbone first. Raises NotCompiled."""
    if model.device.type != "cpu":
        raise NotCompiled(f"parts of a model are compiled for the CPU, not for {model.device}.")
    if model.dtype != torch.float32:
        name = str(model.dtype).removeprefix("torch.")
        raise NotCompiled(f"its parameters are {name}, not float32.")
    modules = {path.partition("[")[0].partition(".")[0] for path in model.default_layers}
    if len(modules) != 1:
        raise NotCompiled("its default layers are not in one module.")
    others = (path for path in compilable_parts(model.module) if path not in modules)
    return (*modules, *others)


class _Trial:
    """A pass of the hooked lane: images, what each part took and returned, and the output."""

    def __init__(self, model: LoadedModel, paths: Sequence[str], images: Tensor) -> None:
        self._model = model
        self._images = model.normalised(images)
        module = model.replicate()
        with watch(module, paths) as self.calls:
            self._raw = self._run(module)

    def _run(self, module: nn.Module) -> Any:
        with torch.no_grad(), kept_torch_state(random=False):
            return self._model.outputs(module, self._images)

    def gap(self, module: nn.Module) -> float:
        """The largest difference of the output of another form of the model."""
        raw = self._run(module)
        if self._model.task == "segmentation":
            return difference(region_logits(self._raw), region_logits(raw))
        pairs = zip(self._detections(self._raw), self._detections(raw), strict=True)
        return max(difference_of_boxes(*pair) for pair in pairs)

    def _detections(self, raw: Any) -> list[Detections]:
        size = self._images.shape[3], self._images.shape[2]
        return [detections_in(each, size, self._model.output) for each in per_image(raw)]


def difference_of_boxes(expected: Detections, actual: Detections) -> float:
    """The largest difference of scores of the same box; infinite if too many boxes have none."""
    one, other = (_matched(*pair) for pair in ((expected, actual), (actual, expected)))
    counts = [(~gaps.isfinite()).float().mean() for gaps in (one, other) if len(gaps)]
    if any(count > SWAPPED for count in counts):
        return float("inf")
    gaps = torch.cat([one, other])
    return float(gaps[gaps.isfinite()].max()) if bool(gaps.isfinite().any()) else 0.0


def _matched(expected: Detections, actual: Detections) -> Tensor:
    """How far the score of the same box is, for each expected one (N,); infinite without one."""
    if not len(actual.scores):
        return torch.full(expected.scores.shape, float("inf"))
    same = box_iou(expected.boxes, actual.boxes) >= SAME_BOX
    # Boxes without an area overlap nothing.
    same |= torch.cdist(expected.boxes, actual.boxes, p=float("inf")) <= SAME_EDGES
    same &= expected.labels[:, None] == actual.labels
    gaps = (expected.scores[:, None] - actual.scores).abs()
    return gaps.masked_fill(~same, float("inf")).amin(dim=1)


def _images(model: LoadedModel) -> Iterator[Tensor]:
    """Batches of uint8 (B, C, h, w): one image, and two of another shape."""
    generator = torch.Generator().manual_seed(0)
    shorter, channels = min(model.preprocessing.crop), model.preprocessing.channels
    for count, width in ((1, shorter * 4 // 3), (2, shorter)):
        yield natural_noise((channels, shorter, width), count, generator)


def _part(
    module: nn.Module,
    path: str,
    compiled: Compile,
    trials: Sequence[_Trial],
    tolerance: Tolerance,
) -> CompiledPart:
    """A compiled module of a model, with verified numbers. Raises NotCompiled."""
    part = replicate(module.get_submodule(path))  # traced and run, which may leave something in it
    calls = [trial.calls[path] for trial in trials if path in trial.calls]
    is_called = len(calls) == len(trials) and bool(_tensors(calls[0][0]))
    if not is_called or not all(_is_plain(args) for args, _ in calls):
        raise NotCompiled(f"{path!r} does not take tensors alone.")
    calls.append(_smaller(part, calls[-1][0]))
    try:
        # As of a classifier's front, the cache may contain that of other code.
        return _verified(part, path, partial(compiled, reconvert=False), calls, tolerance)
    except NotCompiled:
        return _verified(part, path, partial(compiled, reconvert=True), calls, tolerance)


def _verified(
    part: nn.Module,
    path: str,
    compiled: Callable[..., Program],
    calls: Sequence[Call],
    tolerance: Tolerance,
) -> CompiledPart:
    taken, given = calls[0]
    try:
        program = compiled(_Flat(part, taken).eval(), _tensors(taken), path)
        made = CompiledPart(part, program, taken, given)
        gap = _gap(made, calls)
    except Exception as error:
        # Compilers raise errors of many types, all of which are a reason.
        raise NotCompiled(f"{path!r} cannot be compiled: {first_line(error)}") from error
    if gap > tolerance.activation:
        raise NotCompiled(f"the output of {path!r} differs from the hooked lane's by {gap:.1g}.")
    return made


def _is_plain(tree: Any) -> bool:
    """Whether there is nothing but images, or feature maps in lists and dicts."""
    if isinstance(tree, Mapping):
        return all(map(_is_plain, tree.values()))
    if isinstance(tree, list | tuple):
        return all(map(_is_plain, tree))
    return isinstance(tree, Tensor) and tree.ndim == 4 and tree.is_floating_point()


def _smaller(part: nn.Module, args: Any) -> Call:
    """A call with one more image, and a quarter of the size unless that is too small for it."""
    more = map_tensors(args, lambda tensor: torch.cat([tensor, tensor[:1]]))
    smaller = map_tensors(more, _quarter)
    with torch.no_grad(), kept_torch_state(random=False):
        try:
            return smaller, part(*smaller)
        except RuntimeError:
            return more, part(*more)


def _quarter(tensor: Tensor) -> Tensor:
    rows, columns = (max(SMALLEST, side // 4) for side in tensor.shape[2:])
    return tensor[:, :, :rows, :columns].contiguous()


def _gap(part: CompiledPart, calls: Iterable[Call]) -> float:
    """The largest difference of the output, in both programs."""
    gaps = []
    for number, (args, expected) in enumerate(calls):
        with torch.no_grad(), alone(number % 2 == 1):
            pairs = zip(_tensors(expected), _tensors(part(*args)), strict=True)
        gaps += [difference(*pair) for pair in pairs]
    return max(gaps)


def _tensors(tree: Any) -> list[Tensor]:
    return [tensor for _, tensor in tensors_in(tree)]
