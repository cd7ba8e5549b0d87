"""Cut a model at a layer: front and tail as separate modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from service.models.probes.condition import Condition
from service.models.probes.torch_state import kept_torch_state

tracing = threading.Lock()
"""torch.fx patches `nn.Module` itself while it traces; two traces at once would undo each other."""


class Uncuttable(Exception):
    """The model's graph cannot be traced, or has no such layer before its output."""


def split(model: nn.Module, layer: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A model as two modules, cut at a layer: `tail(*front(image))` is the model's output.

    The front returns a tuple: the layer's output first, then every other tensor that crosses the
    cut, such as the residual beside a transformer's norm. The tail takes them in this order. A
    gradient at the first alone is the gradient at the layer. Constants and sizes do not cross: the
    tail computes them again.

    Both use the model's submodules and parameters; nothing is copied or changed. If the layer runs
    several times, the cut is after its last call. Arguments of `forward` behind the first have
    their defaults.

    Raises Uncuttable.
    """
    tracer = _Tracer(model.get_submodule(layer))
    with _graph_of(model, tracer) as graph:
        crossing = tracer.crossing
        if crossing is None:
            raise Uncuttable(
                f"the traced graph does not call {layer!r} with one tensor as its output"
            )
        return parts(model, graph, crossing)


def parts(
    root: nn.Module, graph: fx.Graph, crossing: fx.Node
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Front and tail of a graph, cut at one of its nodes; see `split`.

    root: has what the graph refers to. Raises Uncuttable if the output does not depend on the node.
    """
    behind = depending_on(graph, crossing)
    if not any(node.op == "output" for node in behind):
        raise Uncuttable("the model's output does not depend on the layer")
    again, beside = _used_by(graph, behind, crossing)
    points = (crossing, *beside)
    front, back = _before(graph, points), _behind(graph, points, behind | again)
    return fx.GraphModule(root, front), fx.GraphModule(root, back)


def traced(model: nn.Module) -> fx.Graph:
    """The model's graph, each of its leaf modules a node. Raises Uncuttable."""
    with _graph_of(model, _Tracer(None)) as graph:
        return graph


@contextmanager
def _graph_of(model: nn.Module, tracer: _Tracer) -> Iterator[fx.Graph]:
    """The model's graph; inside the `with` the model has the constants that it uses."""
    before = Condition.of(model)
    try:
        try:
            with tracing, kept_torch_state(random=False):
                graph = tracer.trace(model)
        except Exception as error:
            raise Uncuttable(f"the graph of the model cannot be traced: {error}") from error
        yield graph
    finally:
        before.restore()  # forward() may assign proxies while it is traced


class _Tracer(fx.Tracer):
    """Records the node that a module returned.

    The patches of torch.fx apply to every thread. Other threads that run replicas of the same
    parameters would get proxies: for them the patches are bypassed.
    """

    def __init__(self, target: nn.Module | None) -> None:
        super().__init__()
        self.target = target
        self.crossing: fx.Node | None = None
        self.thread = threading.get_ident()

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Any, list[Any]]:
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [*args[:2], *map(_default, args[2:])]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        output = super().call_module(m, forward, args, kwargs)
        if m is self.target:
            self.crossing = output.node if isinstance(output, fx.Proxy) else None
        return output


def _default(argument: fx.Proxy) -> Any:
    """The default of an argument of `forward`; the argument itself if it has none."""
    name = str(argument.node.target)
    if name.startswith("*"):
        return {} if name.startswith("**") else ()
    return argument.node.args[0] if argument.node.args else argument


def depending_on(graph: fx.Graph, root: fx.Node) -> set[fx.Node]:
    """All nodes that depend on one, without itself."""
    found = {root}
    for node in graph.nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found - {root}


_SIZES = {"shape", "size", "dim", "ndim", "numel", "dtype", "device"}


def _reads_size(node: fx.Node) -> bool:
    """Whether a node reads the shape of a tensor, its dtype or its device, and no values."""
    if node.op == "call_method":
        return node.target in _SIZES
    return node.target is getattr and node.args[1] in _SIZES


def light_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that follow from constants and the sizes of tensors alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        alone = node.op not in ("placeholder", "output")
        if _reads_size(node) or (alone and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _used_by(
    graph: fx.Graph, behind: set[fx.Node], crossing: fx.Node
) -> tuple[set[fx.Node], list[fx.Node]]:
    """What the nodes behind a cut use from before it: to be computed again, and to cross it."""
    light, used, beside = light_nodes(graph), set[fx.Node](), list[fx.Node]()
    for node in reversed(graph.nodes):
        if node in behind or (node in used and node in light):
            used.update(node.all_input_nodes)
        elif node in used and node is not crossing:
            beside.append(node)
    return used & light - behind, beside[::-1]


def _before(graph: fx.Graph, points: Sequence[fx.Node]) -> fx.Graph:
    """The nodes that some nodes depend on; it returns these as a tuple."""
    needed = {next(iter(graph.nodes)), *points}  # the first node is the input
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    cut = fx.Graph()
    copies = _copied(graph, needed, cut, {})
    cut.output(tuple(copies[node] for node in points))
    cut.lint()
    return cut


def _behind(graph: fx.Graph, points: Sequence[fx.Node], nodes: set[fx.Node]) -> fx.Graph:
    """A graph of some nodes that takes the values of `points`."""
    cut = fx.Graph()
    _copied(graph, nodes, cut, {node: cut.placeholder(f"{node.name}_") for node in points})
    cut.lint()
    return cut


def _copied(
    graph: fx.Graph, nodes: set[fx.Node], cut: fx.Graph, copies: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """`copies` with the copy of each of the nodes in `cut`, in the order of their graph."""
    for node in graph.nodes:
        if node in nodes:
            copies[node] = cut.node_copy(node, copies.__getitem__)
    return copies
