"""What compiled, scripted and quantised modules allow: where hooks fire and gradients come through.

A module that `torch.compile` wrapped is served as the module inside it, whose layers take hooks. A
TorchScript module runs as a whole; it is served for predictions and for the methods that only look
at its answers.
"""

from __future__ import annotations

import re

import structlog
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from service.cam.hooks import record
from service.models.catalog import Select
from service.models.output import logits_in
from service.models.torch_state import kept_torch_state

_log = structlog.get_logger(__name__)

_FOLDERS = re.compile(r"(?:/[\w.@+~-]+)+/")


def eager(module: nn.Module, name: str) -> nn.Module:
    """The module with every `torch.compile` wrapper taken off, at the root and inside."""
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
    # By name: to import torch._dynamo for its class takes a second of every start.
    while type(module).__name__ == "OptimizedModule":
        inner = module.get_submodule("_orig_mod")
        module = inner
    return module


def why_no_layers(module: nn.Module) -> str | None:
    """Why nothing can be recorded inside the model; None where hooks fire."""
    if isinstance(module, ScriptModule):
        return (
            "it is a TorchScript module, which runs as a whole and takes no hooks; serve the "
            "module that it was made from"
        )
    return None


def why_no_gradients(
    module: nn.Module, image: Tensor, layer: str | None, select: Select
) -> str | None:
    """Why no gradient comes through, tried at the layer (None: at the image); None where it does.

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
        return f"its backward pass fails ({_first_line(error)})"
    if gradient is None:
        return (
            f"no gradient comes from its output to {layer or 'its input'}, as in a quantised model"
        )
    return None


def _first_line(error: Exception) -> str:
    """The beginning of what it says, without folders of files: clients read it."""
    text = str(error).strip() or type(error).__name__
    return _FOLDERS.sub("", text.splitlines()[0][:200]).rstrip(".")
