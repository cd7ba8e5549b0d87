"""What one forward pass of a model shows: its layers, their shapes, and where to explain."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Layer:
    """One module of a model.

    shape:      of its output for one image, without the batch dimension; None where it was not
                called or returns something else than one tensor.
    parameters: how many numbers the module and its children hold.
    target:     whether it returns a feature map (C, h, w) wider than one pixel, so that a CAM can
                be drawn from it.
    calls:      how often one forward pass calls it.
    """

    path: str
    type: str
    shape: tuple[int, ...] | None
    parameters: int
    target: bool
    calls: int


@dataclass(slots=True)
class _Seen:
    shape: tuple[int, ...] | None = None
    unchanged: bool = False
    finished: int = -1
    calls: int = 0


def probe(model: nn.Module, image: Tensor) -> Probe:
    """Run `model` once on `image` (1, C, H, W), with hooks on every module, all removed after it.

    Raises whatever the model raises, and TypeError where its output is not logits (1, classes).
    """
    seen = {path: _Seen() for path, _ in model.named_modules() if path}
    clock = iter(range(1 << 62))

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            now = seen[path]
            now.calls += 1
            now.finished = next(clock)
            now.shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else None
            now.unchanged = bool(args) and output is args[0]

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for path in seen:
            hooks.callback(model.get_submodule(path).register_forward_hook(watch(path)).remove)
        logits = model(image)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 1:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"the model must return logits of shape (batch, classes), not {got}")
    layers = tuple(_layer(model, path, now) for path, now in seen.items())
    return Probe(layers, _default_target(model, seen, logits.shape[1]), logits.shape[1])


@dataclass(frozen=True, slots=True)
class Probe:
    """The layers in definition order, the target layer that the rule finds, and the class count."""

    layers: tuple[Layer, ...]
    target_layer: str | None
    classes: int


def _is_map(shape: Sequence[int] | None) -> bool:
    return shape is not None and len(shape) == 3 and shape[1] * shape[2] > 1


def _layer(model: nn.Module, path: str, seen: _Seen) -> Layer:
    module = model.get_submodule(path)
    return Layer(
        path=path,
        type=type(module).__name__,
        shape=seen.shape,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        target=_is_map(seen.shape),
        calls=seen.calls,
    )


def _default_target(model: nn.Module, seen: dict[str, _Seen], classes: int) -> str | None:
    """The module that finishes last with a feature map, as the output of the last block does.

    Pooling, modules that hand their input on, and maps with one channel a class (SqueezeNet's
    classifier is a convolution) come behind the features and do not count. None where tokens
    follow the last map: there the map is only the patch embedding.
    """
    order = sorted((now.finished, path) for path, now in seen.items() if now.calls)
    for _, path in reversed(order):
        now, kind = seen[path], type(model.get_submodule(path)).__name__
        if now.shape is not None and len(now.shape) == 2:
            return None
        if _is_map(now.shape) and "Pool" not in kind and not now.unchanged:
            assert now.shape is not None
            if now.shape[0] != classes:
                return path
    return None
