"""Copies of a module that share its parameters."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.jit import ScriptModule


def replicate(module: nn.Module) -> nn.Module:
    """Copy a module tree with shared parameter storage, but separate hooks and buffers (ADR 1).

    TorchScript modules are shared as a whole: they accept no hooks, and cannot be copied without
    their parameters.
    """
    # New parameters over the same memory and version counter: two threads that write and read one
    # `.grad` can crash torch.
    memo: dict[int, Tensor | nn.Module] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in module.parameters()
    }
    for part in module.modules():
        if isinstance(part, ScriptModule):
            memo[id(part)] = part
            continue
        # A weight that a hook recomputes in each forward pass (`weight_norm`, pruning) is not a
        # leaf, and `deepcopy` rejects those.
        computed = [v for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf]
        memo |= {id(value): value.detach().clone() for value in computed}
    return copy.deepcopy(module, memo)
