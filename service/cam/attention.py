"""Attention rollout: how much the class token attends to each patch, through all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the attention (N, heads, L, L) of each `nn.MultiheadAttention`, in order of calls.

    The modules are called with `need_weights`, or they would skip the weights. No hook remains
    after the `with`.
    """
    attentions: list[Tensor] = []

    def request_weights(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"need_weights": True, "average_attn_weights": False}

    def keep(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        attentions.append(output[1].detach())

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                hook = module.register_forward_pre_hook(request_weights, with_kwargs=True)
                hooks.callback(hook.remove)
                hooks.callback(module.register_forward_hook(keep).remove)
        yield attentions


def rollout_grid(attentions: Sequence[Tensor], size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches behind a class token, of an input of `size` (height, width).

    attentions: each (1, heads, L, L). Raises ValueError with a clause that begins with "it" if
    there is no attention, or it cannot be rolled out to a grid.
    """
    if not attentions:
        raise ValueError("it has no torch.nn.MultiheadAttention, so no attention to roll out")
    shapes = {tuple(attention.shape) for attention in attentions}
    if len(shapes) > 1 or len(attentions[0]) != 1 or len({*attentions[0].shape[2:]}) > 1:
        raise ValueError("its attention is not among the same tokens, so it is not rolled out")
    patches = attentions[0].shape[-1] - 1
    rows = round((patches * size[0] / size[1]) ** 0.5)
    columns = patches // max(rows, 1)
    if rows * columns != patches:
        raise ValueError(f"its {patches} patches form no grid")
    return rows, columns


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Attention rollout: `Π_l (½ mean_heads(A_l) + ½ I)`, rows normalised; the class token's row.

    attentions: each (N, heads, L, L). Returns (N, L − 1): the share of each patch token; it does
    not depend on the class.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020.
    """
    length = attentions[0].shape[-1]
    identity = torch.eye(length, dtype=attentions[0].dtype, device=attentions[0].device)
    joint = identity.expand(attentions[0].shape[0], length, length)
    for attention in attentions:
        mixed = (attention.mean(dim=1) + identity) / 2
        joint = mixed / mixed.sum(dim=-1, keepdim=True) @ joint
    return joint[:, 0, 1:]
