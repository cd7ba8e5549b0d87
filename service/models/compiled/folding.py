"""A model with its batch normalisations folded into the convolutions before them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from service.models.compiled.cut import Uncuttable, traced
from service.models.probes.condition import hooks_of
from service.models.replicas import replicate


class Folded:
    """A faster tree of modules with the same names, built when it is first used.

    build:  builds the tree, with the same numbers every time.
    layers: the paths whose input or output differs from the model's: a folded convolution returns
            the output of its normalisation. A request for one of them runs the model itself.
    compiled: of a detector or a segmenter, the modules that a compiled program runs
            (`compiled.parts`); the layers inside them are in `layers`.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        layers: frozenset[str],
        compiled: tuple[str, ...] = (),
    ) -> None:
        self.layers = layers
        self.compiled = compiled
        self._build = build
        self._lock = threading.Lock()
        self._module: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The tree; one thread builds it, and others wait for that."""
        with self._lock:
            if self._module is None:
                self._module = self._build()
            return self._module

    def drop(self) -> None:
        """Free the tree; the next use builds it again, with the same numbers."""
        with self._lock:
            self._module = None


def fold(plain: nn.Module) -> Folded | None:
    """The folded form of a model in eval mode, which does not change; None if nothing folds.

    Folds `Conv2d` and `BatchNorm2d` (not subclasses), without hooks, called once, if the graph
    shows that the convolution feeds only the normalisation. Not
    `torch.fx.experimental.optimization.fuse`, which returns a flat graph in which hooks on
    containers do not run.
    """
    copy = replicate(plain)
    try:
        pairs = _pairs(traced(copy), dict(copy.named_modules()))
    except Uncuttable:
        return None
    if not pairs:
        return None
    layers = frozenset(path for pair in pairs for path in pair)
    return Folded(lambda: _folded(plain, pairs), layers)


def _folded(plain: nn.Module, pairs: Sequence[tuple[str, str]]) -> nn.Module:
    """A copy with pairs of paths folded: a convolution, and the normalisation behind it."""
    copy = replicate(plain)
    for convolution, norm in pairs:
        fused = fuse_conv_bn_eval(
            cast(nn.Conv2d, copy.get_submodule(convolution)),
            cast(nn.BatchNorm2d, copy.get_submodule(norm)),
        )
        copy.set_submodule(convolution, fused.requires_grad_(False))
        copy.set_submodule(norm, nn.Identity().eval())
    return copy  # in eval mode as it is: models may drop lazy state when they are set to a mode


def _pairs(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """The paths of each convolution and the normalisation that can be folded into it."""
    calls: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = id(modules[str(node.target)])
            calls[module] = calls.get(module, 0) + 1
    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node):
            continue
        if before.op != "call_module" or len(before.users) != 1:
            continue
        paths = str(before.target), str(node.target)
        pair = modules[paths[0]], modules[paths[1]]
        if _can_fold(*pair) and all(calls[id(module)] == 1 for module in pair):
            pairs.append(paths)
    return pairs


def _can_fold(convolution: nn.Module, norm: nn.Module) -> bool:
    plain = type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d
    # A module with hooks (`weight_norm`) recomputes its weight in each pass.
    return (
        plain
        and norm.running_mean is not None
        and not any(
            is_parametrized(module) or any(hooks_of(module)) for module in (convolution, norm)
        )
    )
