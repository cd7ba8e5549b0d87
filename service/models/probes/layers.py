"""Trace one forward pass: the layers of a model, their shapes, and the default target layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from service.cam.hooks import taken_by, tensors_in
from service.cam.layouts import Layout, layout_of
from service.models.catalog import Select
from service.models.probes.logits import logits_in

Shapes = dict[tuple[str, int], tuple[int, ...]]
"""Shapes by part and call (`service.cam.hooks.calls_of`), with the batch dimension."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One module of a model; `api_schemas.models.Layer` is its wire form.

    shape:      of its output for one image, without the batch dimension; None if it was not called
                or does not return a single tensor.
    parameters: number of values in the parameters of the module and its children.
    layout:     the dimensions of cells and channels in that output; None: no map can be drawn.
    calls:      number of calls in one forward pass.
    taken, given: shapes of all input and output tensors of these calls, for one image.
    share:      share of the model's operations that is done when it has run, 0..1.
    before:     share that is done when its first call starts.
    """

    path: str
    type: str
    shape: tuple[int, ...] | None
    parameters: int
    layout: Layout | None
    calls: int
    taken: Shapes
    given: Shapes
    share: float
    before: float = 0.0

    @property
    def target(self) -> bool:
        """Whether a map can be drawn from this layer."""
        return self.layout is not None


@dataclass(slots=True)
class _LayerCalls:
    shape: tuple[int, ...] | None = None
    whole: bool = False
    real: bool = False
    unchanged: bool = False
    finished: int = -1
    calls: int = 0
    taken: Shapes = field(default_factory=dict)
    given: Shapes = field(default_factory=dict)
    operations: int = 0
    begun: list[int] = field(default_factory=list)


class _Operations(TorchDispatchMode):
    """Counts the operations of this thread inside the `with`.

    Not torch's FlopCounterMode: it sets hooks on the modules of every thread, and models are traced
    while others are served.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += int(count(*args, **(kwargs or {}), out_val=output))
        return output


def _type_name(module: nn.Module) -> str:
    """The name of its class; of a TorchScript module that of the class that it was made from."""
    return str(getattr(module, "original_name", type(module).__name__))


def trace_layers(
    model: nn.Module,
    image: Tensor | list[Tensor],
    select: Select = None,
    classes: int | None = None,
) -> LayerTrace:
    """Run `model` once on `image` (1, C, H, W), with temporary hooks on every module.

    image: or a list of one (C, H, W), for a detector that takes lists.
    select: where the logits are in the model's output. classes: the number of classes of a model
    whose output has no logits of a whole image, and is not read.

    Raises the exceptions of the model, and TypeError if there are no logits (1, classes).
    """
    parts = {path: part for path, part in model.named_modules() if path}
    seen = {path: _LayerCalls() for path in parts}
    clock = iter(range(1 << 62))

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            now = seen[path]
            now.calls += 1
            _note(now.taken, taken_by(args, kwargs))
            _note(now.given, output)
            now.finished = next(clock)
            now.operations = counter.total
            now.shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else None
            # A model that splits the image into windows has more rows here than images.
            now.whole = isinstance(output, Tensor) and output.ndim > 1 and len(output) == 1
            now.real = isinstance(output, Tensor) and output.is_floating_point()
            now.unchanged = bool(args) and output is args[0]

        return hook

    def begin(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            seen[path].begun.append(counter.total)

        return hook

    counter = _Operations()
    with ExitStack() as hooks, torch.no_grad(), counter:
        for path, module in parts.items():
            if isinstance(module, ScriptModule):  # accepts no hooks
                continue
            handle = module.register_forward_hook(watch(path), with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.callback(module.register_forward_pre_hook(begin(path)).remove)
        output = model(image)
    classes = _class_count(output, select) if classes is None else classes
    size, total = (image[0].shape[1], image[0].shape[2]), max(1, counter.total)
    layers = tuple(
        Layer(
            path=path,
            type=_type_name(parts[path]),
            shape=now.shape,
            parameters=sum(p.numel() for p in parts[path].parameters()),
            layout=layout_of(now.shape, size) if now.whole and now.real else None,
            calls=now.calls,
            taken=now.taken,
            given=now.given,
            share=now.operations / total,
            before=min(now.begun, default=0) / total,
        )
        for path, now in seen.items()
    )
    finished = sorted((now.finished, path) for path, now in seen.items() if now.calls)
    order = tuple(path for _, path in finished)
    unchanged = frozenset(path for path, now in seen.items() if now.unchanged)
    trace = LayerTrace(layers, None, classes, order, unchanged)
    return replace(trace, target_layer=default_target(trace, layers))


def _class_count(output: Any, select: Select) -> int:
    logits = logits_in(output, select)
    if logits.ndim != 2 or logits.shape[0] != 1:
        got = tuple(logits.shape)
        raise TypeError(f"the model must return logits of shape (batch, classes), not {got}")
    return logits.shape[1]


def with_parts(
    layers: Sequence[Layer], layout: Callable[[Layer], Layout | None] | None = None
) -> tuple[Layer, ...]:
    """The layers, and each feature map that a layer returns in a dict or a tuple as a layer.

    Its path names the part: `backbone[0]`. layout: that of a layer; by default only outputs
    (channels, height, width) are feature maps, at any aspect ratio: a detector resizes and pads its
    images itself.
    """
    found: list[Layer] = []
    for layer in layers:
        found.append(replace(layer, layout=(layout or _map_layout)(layer)))
        for (part, call), shape in layer.given.items():
            if part and call == 0 and len(shape) == 4 and shape[0] == 1:
                of_part = Layout("chw", (shape[2], shape[3]))
                path = f"{layer.path}{part}"
                found.append(replace(layer, path=path, shape=shape[1:], layout=of_part))
    return tuple(found)


def _map_layout(layer: Layer) -> Layout | None:
    shape = layer.shape or ()
    is_map = layer.layout is not None and len(shape) == 3
    return Layout("chw", (shape[1], shape[2])) if is_map else None


def query_layout(layer: Layer, size: tuple[int, int], queries: int) -> Layout | None:
    """The layout of a layer of YOLOS: maps, and tokens of an image of `size` before the queries."""
    shape = layer.shape or ()
    if len(shape) != 2:
        return _map_layout(layer)
    return layout_of((shape[0] - queries, shape[1]), size)


def _note(shapes: Shapes, tree: Any) -> None:
    for part, tensor in tensors_in(tree):
        call = sum(known == part for known, _ in shapes)
        shapes[part, call] = tuple(tensor.shape)


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """The layers in definition order, the default target layer, and the number of classes.

    order:     the paths of the modules that ran, in the order in which they last finished.
    unchanged: the paths of modules that return their input.
    """

    layers: tuple[Layer, ...]
    target_layer: str | None
    classes: int
    order: tuple[str, ...] = ()
    unchanged: frozenset[str] = frozenset()


def default_target(trace: LayerTrace, layers: Sequence[Layer]) -> str | None:
    """The module that finishes last with a feature map, such as the last block.

    layers: those of `found`, with the layouts to go by.

    Pooling, modules that return their input, and maps with one channel per class (SqueezeNet's
    classifier is a convolution) do not count.

    If tokens follow the last map, it is only the patch embedding. Then the result is the norm
    before the last attention: behind that attention only the class token reaches the head.
    """
    known = {layer.path: layer for layer in layers}
    for path in reversed(trace.order):
        layer = known[path]
        shape = layer.shape or ()
        if len(shape) == 2 and (layer.layout is not None or _is_whole(layer)):
            return _norm_before_attention([known[path] for path in trace.order])
        is_map = len(shape) == 3 and layer.layout is not None
        channels = shape[layer.layout.channel_axis] if is_map and layer.layout else None
        if is_map and not _passes_on(layer, trace) and channels != trace.classes:
            return path
    return None


LEVELS = (
    "decoder_input_proj",
    "input_proj",
    "input_projection",
    "backbone.projector.scale_layers",
    "backbone.projector",
)
"""Where the maps end that the decoder of a detector of Hugging Face attends to, the later first."""


def query_levels(module: nn.Module, layers: Sequence[Layer], trace: LayerTrace) -> tuple[str, ...]:
    """The layers of an explanation of a detector or a segmenter of Hugging Face.

    Of a detector the maps that its decoder attends to; if it has no decoder (YOLOS), and of a
    segmenter, what `default_target` says of its backbone. Empty: there is none.
    """
    mappable = [layer for layer in layers if layer.target]
    for name in LEVELS:
        at = f"model.{name}"
        inside = [each.path for each in mappable if each.path.rpartition(".")[0] == at]
        if paths := [each.path for each in mappable if each.path == at] or inside:
            return tuple(paths)
    prefix = "backbone" if hasattr(module, "backbone") else str(module.base_model_prefix)
    order = tuple(path for path in trace.order if path.startswith(f"{prefix}."))
    chosen = default_target(replace(trace, order=order), layers)
    return () if chosen is None else (chosen,)


def _is_whole(layer: Layer) -> bool:
    """Whether the layer's output has one row for one image; false if it is split into windows."""
    shape = layer.given.get(("", layer.calls - 1), ())
    return len(shape) > 1 and shape[0] == 1


def _passes_on(layer: Layer, trace: LayerTrace) -> bool:
    return "Pool" in layer.type or layer.path in trace.unchanged


def _norm_before_attention(finished: Sequence[Layer]) -> str | None:
    attentions = [
        index
        for index, layer in enumerate(finished)
        if "Attention" in layer.type or "Attn" in layer.type
    ]
    # A block named after its attention finishes after the norms that follow the attention.
    outer = [
        index
        for index in attentions
        if any(finished[other].path.startswith(f"{finished[index].path}.") for other in attentions)
    ]
    last = max(set(attentions) - set(outer), default=None)
    if last is None:
        return None
    inside = f"{finished[last].path}."
    norms = [
        layer.path for layer in finished[:last] if "Norm" in layer.type and layer.layout is not None
    ]
    return next((path for path in reversed(norms) if not path.startswith(inside)), None)
