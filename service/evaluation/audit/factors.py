"""Non-negative factors of a matrix, by coordinate descent."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS, SWEEPS = 60, 5
"""Each step goes over the columns several times, which costs little beside its products: Gillis and
Glineur, "Accelerated multiplicative updates and hierarchical ALS algorithms for nonnegative matrix
factorization", Neural Computation 24 (2012), 1085-1105."""

TINY = 1e-9


def factorise(values: Tensor, count: int, seed: int, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Weights (n, count) and factors (count, m), both ≥ 0, whose product is near `values`.

    values: (n, m), float, ≥ 0. The squared difference falls in every step; the result is a local
            minimum and depends on the seed alone. Each factor has length 1, so that weights of
            different factors compare.

    Cichocki and Phan, "Fast local algorithms for large scale nonnegative matrix and tensor
    factorizations", IEICE Transactions E92-A (2009), 708-721 (HALS).
    """
    generator = torch.Generator().manual_seed(seed)
    scale = float((values.mean() / count).sqrt()) + TINY
    weights = torch.rand(values.shape[0], count, generator=generator).to(values) * scale
    factors = torch.rand(count, values.shape[1], generator=generator).to(values) * scale
    for _ in range(steps):
        _improve(weights, values @ factors.T, factors @ factors.T)
        _improve(factors.T, values.T @ weights, weights.T @ weights)
    length = factors.norm(dim=1).clamp_min(TINY)
    return weights * length, factors / length[:, None]


def _improve(columns: Tensor, product: Tensor, gram: Tensor) -> None:
    """Set each column (in place) to its best non-negative value while the others stay, in turn."""
    for _ in range(SWEEPS):
        for k in range(columns.shape[1]):
            step = (product[:, k] - columns @ gram[:, k]) / gram[k, k].clamp_min(TINY)
            columns[:, k] = (columns[:, k] + step).clamp_min_(0)
