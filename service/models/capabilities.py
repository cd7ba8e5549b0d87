"""What compiled, scripted and quantised modules support: hooks, gradients, or only predictions.

A module that `torch.compile` wrapped is served as the module inside it, whose layers accept hooks.
A TorchScript module and an exported program run as a whole; they are served for predictions and for
the methods that use only outputs.
"""

from __future__ import annotations

import re
from contextlib import nullcontext, suppress
from dataclasses import replace

import structlog
import torch
from torch import Tensor, fx, nn
from torch.jit import ScriptModule

from service.cam.hooks import record
from service.errors import first_line
from service.models.catalog import Select
from service.models.probes.attention import WatchedAttention, may_attend
from service.models.probes.behaviour import Trial
from service.models.probes.layers import LayerTrace, default_target
from service.models.probes.logits import logits_in
from service.models.probes.torch_state import kept_torch_state

_log = structlog.get_logger(__name__)

_FOLDERS = re.compile(r"(?:/[\w.@+~-]+)+/")


def unwrap_compiled(module: nn.Module, name: str) -> nn.Module:
    """The module without `torch.compile` wrappers, at the root and inside."""
    unwrapped = _inside(module)
    count = int(unwrapped is not module)
    for parent in list(unwrapped.modules()):
        if isinstance(parent, ScriptModule):
            continue
        for path, child in list(parent.named_children()):
            if _inside(child) is not child:
                setattr(parent, path, _inside(child))
                count += 1
    if count:
        _log.info("compiled_modules_unwrapped", model=name, count=count)
    return unwrapped


def _inside(module: nn.Module) -> nn.Module:
    # By name: importing torch._dynamo for its class takes a second at every start.
    while type(module).__name__ == "OptimizedModule":
        inner = module.get_submodule("_orig_mod")
        module = inner
    return module


def in_eval_mode(module: nn.Module) -> nn.Module:
    """The module in eval mode with frozen parameters.

    Raises ValueError if it was exported in training mode, which cannot be changed.
    """
    if isinstance(module, fx.GraphModule):
        _check_exported(module)
    with suppress(NotImplementedError):  # of an exported program, which has no modes
        module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def _is_exported(module: nn.Module) -> bool:
    """Whether `torch.export` created it: its graph calls no modules except its guards."""
    if not isinstance(module, fx.GraphModule):
        return False
    called = {node.target for node in module.graph.nodes if node.op == "call_module"}
    return called <= {"_guards_fn"}


def _check_exported(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for index, argument in enumerate(schema.arguments if schema else ()):
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if argument.name in ("train", "training") and value is True:
                raise ValueError(
                    f"it was exported in training mode ({node.name}); export model.eval() instead"
                )


def why_no_layers(module: nn.Module) -> str | None:
    """Why nothing can be recorded inside the model; None if hooks work."""
    if isinstance(module, ScriptModule):
        return (
            "it is a TorchScript module, which runs as a whole and accepts no hooks; serve the "
            "module that it was made from"
        )
    if _is_exported(module):
        return (
            "it is an exported program, which runs as one graph and accepts no hooks; serve the "
            "module that it was made from"
        )
    return None


def why_no_gradients(
    module: nn.Module, image: Tensor, layer: str | None, select: Select
) -> str | None:
    """Why the layer (None: the image) gets no gradient; None if it gets one.

    module: a replica. image: normalised (1, C, H, W).
    """
    taken = image if layer else image.clone().requires_grad_()
    try:
        with (
            kept_torch_state(random=False),
            record(module, targets=[layer] if layer else []) as seen,
        ):
            logits = logits_in(module(taken), select)
        at = seen.targets[layer][-1] if layer else taken
        gradient: Tensor | None = torch.autograd.grad(logits.max(), at, allow_unused=True)[0]
    except Exception as error:  # noqa: BLE001 - a backward pass may raise anything
        return f"its backward pass fails ({_without_folders(error)})"
    if gradient is None:
        return (
            f"no gradient reaches {layer or 'its input'} from its output, as in a quantised model"
        )
    return None


def differentiable_layer(trial: Trial, tried: LayerTrace, likely: str | None) -> str | None:
    """The likely layer if the logits depend on it, else the last mappable one with a gradient.

    likely: a mappable layer. Costs a forward and a backward pass, which follow the attention, too.

    Another layer needs a gradient at more than half of its cells, because behind the last attention
    only the class token reaches the head. `default_target` selects among them; if it selects none,
    norms take precedence, because their outputs have the same scale. None: no such layer exists.
    """
    known = {layer.path: layer for layer in tried.layers if layer.layout is not None}
    paths = [path for path in tried.order if path in known][-MAX_CANDIDATES:]
    paths += [likely] if likely and likely not in paths else []
    watched = WatchedAttention()
    try:
        with (
            kept_torch_state(random=False),
            record(trial.served, targets=paths) as seen,
            watched if may_attend(tried.layers) else nullcontext(),
        ):
            logits = trial.logits(trial.served(trial.images[:1].clone()))
        at = {path: calls[-1] for path, calls in seen.targets.items() if path in known}
        points = [*at.values(), *watched.zeros]
        layer_gradients = torch.autograd.grad(logits.max(), points, allow_unused=True)
    except Exception:  # noqa: BLE001 - a backward pass may raise anything
        # Several layers at once may fail where a single one does not.
        image = trial.images[:1]
        works = likely and not why_no_gradients(trial.served, image, likely, trial.select)
        return likely if works else None
    gradients = dict(zip(at, layer_gradients, strict=False))
    if watched.points and not watched.too_large:
        trial.attention = watched.followed(layer_gradients[len(at) :])
    if likely and gradients.get(likely) is not None:
        return likely
    usable = []
    for path, gradient in gradients.items():
        layout = known[path].layout
        if gradient is not None and layout is not None:
            cells = layout.as_map(layout.by_image(gradient)).abs().sum(dim=1)
            usable += [path] if float((cells > 0).float().mean()) > 0.5 else []
    usable.sort(key=tried.order.index)
    rule = default_target(replace(tried, order=tuple(usable)), tried.layers)
    norms = [path for path in usable if "Norm" in known[path].type]
    return rule or next(reversed(norms or usable), None)


MAX_CANDIDATES = 48
"""Number of last layers that `differentiable_layer` examines."""


def _without_folders(error: Exception) -> str:
    """The first line of an error, without folders, because clients read it."""
    return _FOLDERS.sub("", first_line(error))
