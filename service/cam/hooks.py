"""Record activations and gradients of a model's layers during one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Calls = dict[str, list[Tensor]]


@dataclass(slots=True)
class Recording:
    """What the hooks of one `record` stored: by dotted path, one tensor per call of the module.

    Where a module returns (or takes) a tuple or a dict, each tensor in it has a separate entry,
    such as `encoder[0]` or `encoder[hidden]`. A module that was not called has no entry.
    """

    targets: Calls = field(default_factory=dict)
    outputs: Calls = field(default_factory=dict)
    inputs: Calls = field(default_factory=dict)
    input_targets: Calls = field(default_factory=dict)


@contextmanager
def record(
    model: nn.Module,
    *,
    targets: Collection[str] = (),
    outputs: Collection[str] = (),
    inputs: Collection[str] = (),
    input_targets: Collection[str] = (),
) -> Iterator[Recording]:
    """Record layers of every forward pass inside the `with`; no hook remains after it.

        with record(model, targets=["layer4"], outputs=["conv1"]) as recording:
            logits = model(batch)
        (activation,) = recording.targets["layer4"]
        (gradient,) = torch.autograd.grad(logits[:, 281].sum(), activation)

    ============= ==================================================================================
    targets       Dotted paths whose output becomes a point to differentiate at. Where nothing
                  before it needs a gradient the output is cut loose, so autograd records only what
                  lies behind the layer; where an earlier target is recorded too, the layers stay
                  connected.
    outputs       Dotted paths whose output is copied, so that a later in-place operation cannot
                  change what was recorded.
    inputs        Dotted paths whose input is copied, likewise.
    input_targets Dotted paths whose input becomes a point to differentiate at, like `targets`.
    ============= ==================================================================================

    Gradients are computed at the recorded tensors and not by backward hooks, which fail with
    in-place operations and, on composite modules, once saw only the last operation.

    The forward pass continues with a clone of a target: an in-place ReLU behind the layer would
    otherwise overwrite the activation that is to be explained.

    Raises AttributeError for a path that is not in the model; the hooks already set are removed.
    """
    recording = Recording()
    with ExitStack() as hooks:
        for path in dict.fromkeys(inputs):
            hook = _input_hook(path, recording.inputs, _copy)
            _register(hooks, model, path, hook, before=True)
        for path in dict.fromkeys(input_targets):
            hook = _input_hook(path, recording.input_targets, _leaf)
            _register(hooks, model, path, hook, before=True)
        for path in dict.fromkeys(outputs):
            _register(hooks, model, path, _output_hook(path, recording.outputs, _copy))
        for path in dict.fromkeys(targets):
            # Before the model's own hooks: one that keeps the output for later keeps the leaf.
            hook = _output_hook(path, recording.targets, _leaf)
            _register(hooks, model, path, hook, first=True)
        yield recording


@contextmanager
def watch(model: nn.Module, paths: Collection[str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """The arguments and the output of the last call of some modules inside the `with`, by path.

    They are those of the model itself, not copies; keyword arguments are a dict behind the others.
    Paths that are not in the model are left out.
    """
    seen: dict[str, tuple[Any, Any]] = {}

    def noted(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[path] = (*args, kwargs) if kwargs else args, output

        return hook

    known = {path for path, _ in model.named_modules()}
    with ExitStack() as hooks:
        for path in known.intersection(paths):
            part = model.get_submodule(path)
            hooks.callback(part.register_forward_hook(noted(path), with_kwargs=True).remove)
        yield seen


@contextmanager
def replace_output(model: nn.Module, path: str, value: Tensor, *, call: int = 0) -> Iterator[None]:
    """Let one call of a layer return `value` instead of its output, inside the `with`."""
    calls = iter(range(1 << 62))

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return value if next(calls) == call else output

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def altering_gradients(
    model: nn.Module, path: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Change the gradient at a layer's output on its way back, inside the `with`.

    change: makes another gradient of the same shape. What is recorded at this layer, and at all
    before it, is what is left behind the change. The graphs of passes inside the `with` keep it.
    """

    def keep(tensor: Tensor) -> tuple[Tensor, Tensor]:
        if tensor.requires_grad:
            # A clone: a later in-place operation, or another use of the same tensor, has no part.
            tensor = tensor.clone()
            tensor.register_hook(change)
        return tensor, tensor

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return _walk(output, path, {}, keep)

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def gradients(
    output: Tensor,
    at: Sequence[Tensor],
    weights: Tensor,
    *,
    keep_graph: bool = False,
    together: bool = True,
) -> list[Tensor]:
    """Differentiate weighted sums of `output` at recorded tensors, never touching any `.grad`.

    output:  (B, C), of a forward pass inside `record`.
    at:      recorded targets, each (B, ...).
    weights: (K, B, C): K sums to differentiate, each `(weights[k] * output).sum()`. A one-hot row
             for each image gives the gradient of that class's logit.

    keep_graph: whether another backward pass through the same graph follows.
    together: whether one backward pass computes all K (`is_grads_batched`), which a custom
              `autograd.Function` without a vmap rule does not allow; else one pass for each.

    Returns a tensor (K, B, ...) for each entry of `at`, zeros where the output does not depend on
    it.
    """
    if not at:
        return []
    count, several = weights.shape[0], weights.shape[0] > 1
    if several and not together:
        rows = [
            gradients(output, at, one[None], keep_graph=keep_graph or number < count - 1)
            for number, one in enumerate(weights)
        ]
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]
    values: tuple[Tensor | None, ...] = (None,) * len(at)
    if output.requires_grad:
        values = torch.autograd.grad(
            output,
            at,
            weights if several else weights[0],
            is_grads_batched=several,
            retain_graph=keep_graph,
            allow_unused=True,
        )
    return [
        tensor.new_zeros((count, *tensor.shape))
        if gradient is None
        else gradient.reshape(count, *tensor.shape)
        for tensor, gradient in zip(at, values, strict=True)
    ]


def calls_of(calls: Calls, path: str) -> Iterator[tuple[str, int, Tensor]]:
    """Each (part, call, tensor) recorded at a path; `part` is "" for a module that gives one."""
    for key, tensors in calls.items():
        if key == path or key.startswith(f"{path}["):
            for call, tensor in enumerate(tensors):
                yield key.removeprefix(path), call, tensor


def tensors_in(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a module's inputs or outputs, each with the part that names it there."""
    calls: Calls = {}
    _walk(tree, "", calls, lambda tensor: (tensor, tensor))
    for part, tensors in calls.items():
        for tensor in tensors:
            yield part, tensor


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """A tree of tuples, lists and dicts with each tensor changed, in the order of `tensors_in`."""
    return _walk(tree, "", {}, lambda tensor: (tensor, change(tensor)))


def taken_by(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's inputs as one tree: the only input itself, else all by position and name."""
    if len(args) == 1 and not kwargs:
        return args[0]
    return dict(enumerate(args)) | kwargs


def _register(
    hooks: ExitStack,
    model: nn.Module,
    path: str,
    hook: Callable[..., Any],
    *,
    before: bool = False,
    first: bool = False,
) -> None:
    module = model.get_submodule(path)
    if before:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        handle = module.register_forward_hook(hook, prepend=first)
    hooks.callback(handle.remove)


_Keep = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a tensor to what is recorded and what the forward pass continues with."""


def _copy(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor.detach().clone(), tensor


def _leaf(tensor: Tensor) -> tuple[Tensor, Tensor]:
    if not tensor.is_floating_point():
        return tensor, tensor
    # Other modules may use the tensor too, as a residual: the gradient at the clone is that of this
    # module's use alone, as a backward hook would see it.
    leaf = tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()
    return leaf, leaf.clone()


def _output_hook(path: str, calls: Calls, keep: _Keep) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return _walk(output, path, calls, keep)

    return hook


def _input_hook(path: str, calls: Calls, keep: _Keep) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # As `taken_by` names the parts.
        if len(args) == 1 and not kwargs:
            return (_walk(args[0], path, calls, keep),), kwargs
        return _walk(args, path, calls, keep), _walk(kwargs, path, calls, keep)

    return hook


def _walk(tree: Any, key: str, calls: Calls, keep: _Keep) -> Any:
    """Record every tensor in a tree of tuples, lists and dicts; the tree to continue with."""
    if isinstance(tree, Tensor):
        recorded, onward = keep(tree)
        calls.setdefault(key, []).append(recorded)
        return onward
    if isinstance(tree, Mapping):
        items = {name: _walk(value, f"{key}[{name}]", calls, keep) for name, value in tree.items()}
        if type(tree) is dict or not all(isinstance(name, str) for name in items):
            return items
        return type(tree)(**items)
    if isinstance(tree, (tuple, list)):
        parts = [_walk(value, f"{key}[{i}]", calls, keep) for i, value in enumerate(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree
