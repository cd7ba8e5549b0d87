"""Recording what happens inside a model during one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Recording:
    """What the hooks of one `record` saw, one list entry for each call of a module.

    `targets[path]` are the tensors to differentiate at, `outputs[path]` detached copies. A module
    that the forward pass did not reach has no entry.
    """

    targets: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def record(
    model: nn.Module, *, targets: Collection[str] = (), outputs: Collection[str] = ()
) -> Iterator[Recording]:
    """Record layer outputs of every forward pass inside the `with`; no hook outlives it.

        with record(model, targets=["layer4"], outputs=["conv1"]) as recording:
            logits = model(batch)
        (activation,) = recording.targets["layer4"]
        (gradient,) = torch.autograd.grad(logits[:, 281].sum(), activation)

    ========= ======================================================================================
    targets   Dotted paths whose output becomes a point to differentiate at. Where nothing before
              it needs a gradient the output is cut loose, so autograd records only what lies
              behind the layer; where an earlier target is recorded too, the layers stay connected.
    outputs   Dotted paths whose output is copied, so that a later in-place operation cannot change
              what was recorded.
    ========= ======================================================================================

    Gradients are taken at the recorded tensors and not by backward hooks, which fail beside
    in-place operations and, on composite modules, once saw only the last operation.

    The forward pass goes on with a clone of a target: an in-place ReLU behind the layer would
    otherwise overwrite the very activation that is to be explained.

    Raises AttributeError for a path that is not in the model; the hooks already set are removed.
    """
    recording = Recording()

    def keep_target(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise TypeError(f"layer {path!r} returns {type(output).__name__}, not one tensor")
            leaf = output if output.requires_grad else output.detach().requires_grad_()
            recording.targets.setdefault(path, []).append(leaf)
            return leaf.clone()

        return hook

    def keep_output(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(f"layer {path!r} returns {type(output).__name__}, not one tensor")
            recording.outputs.setdefault(path, []).append(output.detach().clone())

        return hook

    with ExitStack() as hooks:
        for path in dict.fromkeys(outputs):
            handle = model.get_submodule(path).register_forward_hook(keep_output(path))
            hooks.callback(handle.remove)
        for path in dict.fromkeys(targets):
            handle = model.get_submodule(path).register_forward_hook(keep_target(path))
            hooks.callback(handle.remove)
        yield recording


def gradients(output: Tensor, at: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Differentiate weighted sums of `output` at recorded tensors, never touching any `.grad`.

    output:  (B, C), of a forward pass inside `record`.
    at:      recorded targets, each (B, ...).
    weights: (K, B, C): K sums to differentiate, each `(weights[k] * output).sum()`. A one-hot row
             for each image asks for the gradient of that class's logit.

    Returns a tensor (K, B, ...) for each entry of `at`, zeros where the output does not depend on
    it. The graph is walked once for all K (`is_grads_batched`).
    """
    several = weights.shape[0] > 1
    found = torch.autograd.grad(
        output,
        at,
        weights if several else weights[0],
        is_grads_batched=several,
        allow_unused=True,
    )
    shape = (weights.shape[0],)
    return [
        torch.zeros(shape + tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
        if gradient is None
        else gradient.reshape(shape + tuple(tensor.shape))
        for tensor, gradient in zip(at, found, strict=True)
    ]
