"""Cut a model at a layer: front and tail as separate modules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from service.models.probes.condition import Condition
from service.models.probes.torch_state import kept_torch_state

_tracing = threading.Lock()
"""torch.fx patches `nn.Module` itself while it traces; two traces at once would undo each other."""


class Uncuttable(Exception):
    """The model's graph cannot be traced, or more than the layer's output crosses the cut."""


def tail(model: nn.Module, layer: str) -> fx.GraphModule:
    """The part behind a layer: a module from the layer's output to the model's output.

    It uses the model's submodules and parameters; nothing is copied or changed. If the layer runs
    several times, the cut is after its last call.

    Raises Uncuttable.
    """
    graph, crossing = _traced(model, layer)
    return fx.GraphModule(model, _behind(graph, crossing))


def split(model: nn.Module, layer: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A model as two modules: from its input to a layer's output, and the `tail` from there.

    Raises Uncuttable.
    """
    graph, crossing = _traced(model, layer)
    back = fx.GraphModule(model, _behind(graph, crossing))
    return fx.GraphModule(model, _before(graph, crossing)), back


def traced(model: nn.Module) -> fx.Graph:
    """The model's graph, each of its leaf modules a node. Raises Uncuttable."""
    return _trace(model, _Tracer(None))


def _traced(model: nn.Module, layer: str) -> tuple[fx.Graph, fx.Node]:
    """The model's graph, and the node of the layer's output."""
    tracer = _Tracer(model.get_submodule(layer))
    graph = _trace(model, tracer)
    if tracer.crossing is None:
        raise Uncuttable(f"the traced graph does not call {layer!r} with one tensor as its output")
    return graph, tracer.crossing


def _trace(model: nn.Module, tracer: _Tracer) -> fx.Graph:
    before = Condition.of(model)
    try:
        with _tracing, kept_torch_state(random=False):
            return tracer.trace(model)
    except Exception as error:
        raise Uncuttable(f"the graph of the model cannot be traced: {error}") from error
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


def _before(graph: fx.Graph, crossing: fx.Node) -> fx.Graph:
    """The nodes that the crossing node depends on."""
    needed = {crossing}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    cut = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = cut.node_copy(node, copies.__getitem__)
    cut.output(copies[crossing])
    cut.lint()
    return cut


def _behind(graph: fx.Graph, crossing: fx.Node) -> fx.Graph:
    """The nodes that depend on the crossing node; they may use only it and constants."""
    cut = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {crossing: cut.placeholder("activation")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node.op != "get_attr":
                raise Uncuttable(f"{node.name!r} crosses the cut beside the layer's output")
            copies[node] = cut.node_copy(node)
        return copies[node]

    behind = {crossing}
    for node in graph.nodes:
        if node is not crossing and behind.intersection(node.all_input_nodes):
            behind.add(node)
            copies[node] = cut.node_copy(node, copied)
    if not any(node.op == "output" for node in behind):
        raise Uncuttable("the model's output does not depend on the layer")
    cut.lint()
    return cut
