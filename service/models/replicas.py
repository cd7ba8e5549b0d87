"""Copies of a module that share its parameters."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.jit import ScriptModule


def replicate(module: nn.Module) -> nn.Module:
    """Copy a module tree: parameters shared by storage, hooks and buffers its own (ADR 1).

    TorchScript modules are shared whole: nothing can be hooked into them, and they cannot be copied
    without their parameters.
    """
    # Parameters of its own over the same memory and version counter: to write and read one `.grad`
    # in two threads can crash torch.
    memo: dict[int, Tensor | nn.Module] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in module.parameters()
    }
    for each in module.modules():
        if isinstance(each, ScriptModule):
            memo[id(each)] = each
            continue
        # A weight that a hook computes anew in each forward pass (`weight_norm`, pruning) is no
        # leaf, and `deepcopy` refuses those.
        computed = [v for v in vars(each).values() if isinstance(v, Tensor) and not v.is_leaf]
        memo |= {id(value): value.detach().clone() for value in computed}
    return copy.deepcopy(module, memo)
