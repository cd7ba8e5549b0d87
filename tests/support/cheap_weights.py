"""Weights for whole registries of models: seeded noise, much faster than real initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

_INITS = (
    *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
    *("normal_", "trunc_normal_", "uniform_", "orthogonal_"),
)


@contextmanager
def no_initialisation() -> Iterator[None]:
    """Inside, the random initialisers of torch leave a parameter as it is."""

    def leave(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        for name in _INITS:
            patch.setattr(nn.init, name, leave)
        yield


def cheaply(make: Callable[[], nn.Module]) -> nn.Module:
    """Build without initialisation; every weight of two or more dimensions becomes noise.

    One block of noise, in float32, is laid over all of them, scaled by the fan-in so that neither
    the features nor the gradients die out; heads that start at zero get their share.
    """
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with no_initialisation():
        module = make()
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            if parameter.ndim < 2:
                if path.endswith("weight"):
                    parameter.fill_(1)  # of a norm; some start at zero
                elif not (parameter == 1).all():
                    parameter.zero_()  # its initialiser may have been left out
                continue
            flat, scale = parameter.view(-1), 1 / math.sqrt(math.prod(parameter.shape[1:]))
            for start in range(0, flat.numel(), noise.numel()):
                part = flat[start : start + noise.numel()]
                torch.mul(noise[: part.numel()], scale, out=part)
    return module
