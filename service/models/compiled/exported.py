"""Cut a model that torch.fx cannot trace, such as Hugging Face's: by `torch.export`.

The batch size is a symbol, so that no number of images becomes a constant of front or tail.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from service.errors import first_line
from service.models.catalog import Select
from service.models.compiled.cut import Uncuttable, depending_on, light_nodes, parts, tracing
from service.models.probes.logits import logits_in
from service.models.probes.torch_state import kept_torch_state

_METHODS = {
    torch.ops.aten.sym_size.int: "size",
    torch.ops.aten.view.default: "view",
    torch.ops.aten.expand.default: "expand",
    torch.ops.aten.reshape.default: "reshape",
}
"""Operators of sizes as methods: torch.jit makes the sizes of operators, but not of these,
constants, and batches of another size would be wrong."""

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default

_FUNCTIONS = {
    _ATTENTION: (functional.scaled_dot_product_attention, 6),
    torch.ops.aten.softmax.int: (torch.softmax, 3),
    torch.ops.aten.layer_norm.default: (functional.layer_norm, 5),
    torch.ops.aten.rms_norm.default: (functional.rms_norm, 4),
    torch.ops.aten.gelu.default: (functional.gelu, 1),
    torch.ops.aten.silu.default: (functional.silu, 1),
    torch.ops.aten.hardswish.default: (functional.hardswish, 1),
}
"""Operators as functions, with the number of positional arguments that these take: a correction of
gradients sees functions alone."""

MOST_IMAGES = 1 << 16
"""Largest batch of an exported graph."""


def split_exported(
    model: nn.Module, layer: str, image: Tensor, select: Select
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Front and tail of a model, as `cut.split` returns them.

    image:  normalised, (1, C, h, w). select: where the logits are in the output; the tail returns
            them in the same place.

    Raises Uncuttable.
    """
    batch = {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)}
    try:
        with tracing, kept_torch_state(random=False), torch.no_grad():
            # Of two images: export takes the sizes 0 and 1 as constants.
            program = torch.export.export(
                _Logits(model, select),
                (image.repeat(2, 1, 1, 1),),
                dynamic_shapes={"image": batch},
                strict=False,
            )
        module = program.module(check_guards=False)
    except Exception as error:
        raise Uncuttable(f"the model cannot be exported: {first_line(error)}") from error
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    for node in graph.nodes:
        if node.target in _METHODS:
            node.op, node.target = "call_method", _METHODS[node.target]
    _without_masks(graph)
    crossing = _last_of(graph, f"model.{layer}")
    _size_from(graph, crossing)
    _select(graph, select)
    graph.eliminate_dead_code()
    front, tail = parts(module, graph, crossing)
    _call_functions(tail)
    return front, tail


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, select: Select) -> None:
        super().__init__()
        self.model = model
        self.select = select

    def forward(self, image: Tensor) -> Tensor:
        return logits_in(self.model(image), self.select)


def _last_of(graph: fx.Graph, path: str) -> fx.Node:
    """The last node that a module at a path added, its output. Raises Uncuttable."""
    found = [node for node in graph.nodes if path in _modules_of(node)]
    if not found:
        raise Uncuttable(f"the exported graph has nothing of {path.removeprefix('model.')!r}")
    last: fx.Node = found[-1]
    return last


def _modules_of(node: fx.Node) -> Iterator[str]:
    """The paths of the modules inside which a node was added."""
    stack = node.meta.get("nn_module_stack") or {}
    return (path for path, _ in stack.values())


def _size_from(graph: fx.Graph, crossing: fx.Node) -> None:
    """Have the nodes behind a cut read the batch size off what crosses it, not off the image."""
    image = next(node for node in graph.nodes if node.op == "placeholder")
    behind, again = depending_on(graph, crossing), light_nodes(graph)
    with graph.inserting_after(crossing):
        last = graph.call_method("size", (crossing, 0))
    copies = {node: last for node in image.users if node.args == (image, 0)}
    is_past = False
    for node in list(graph.nodes):
        is_past = is_past or node is crossing
        if node in again and copies.keys() & set(node.all_input_nodes):
            # Past the cut what else the node takes, such as parts of a weight, may come late.
            with graph.inserting_after(node if is_past else last):
                copies[node] = graph.node_copy(node, lambda each: copies.get(each, each))
            last = last if is_past else copies[node]
    for node in behind:
        for used in copies.keys() & set(node.all_input_nodes):
            node.replace_input_with(used, copies[used])


def _select(graph: fx.Graph, select: Select) -> None:
    """Return the logits where the model has them."""
    output = next(iter(reversed(graph.nodes)))
    (logits,) = output.all_input_nodes
    output.args = (logits if select is None else {select: logits},)


def _call_functions(tail: fx.GraphModule) -> None:
    """Call functions in place of operators, where there is one."""
    for node in tail.graph.nodes:
        if node.target in _FUNCTIONS:
            node.target, most = _FUNCTIONS[node.target]
            node.args = node.args[:most]
    tail.recompile()


def _without_masks(graph: fx.Graph) -> None:
    """Remove attention masks that hide nothing: transformers builds one for every image."""
    constant = light_nodes(graph)
    for node in graph.nodes:
        mask = node.args[3] if node.target is _ATTENTION and len(node.args) > 3 else None
        if isinstance(mask, fx.Node) and mask in constant and _hides_nothing(mask):
            node.update_arg(3, None)


def _hides_nothing(mask: fx.Node) -> bool:
    if mask.meta["val"].dtype != torch.bool:  # added to the scores, as position biases are
        return False
    return bool(_value(mask).all())


def _value(node: fx.Node) -> Any:
    """The value of a node that follows from constants, for a batch of two."""
    if node.target == "size":
        return 2
    if node.op == "get_attr":
        return attrgetter(str(node.target))(node.graph.owning_module)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), _value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
