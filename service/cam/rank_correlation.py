"""Spearman's rank correlation of two maps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rank_correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Spearman's rank correlation; equal values share a rank, equal maps have 1."""
    ranks = [_ranks(values.ravel()) for values in (one, other)]
    if any(float(values.std()) == 0 for values in ranks):
        return float(np.array_equal(ranks[0], ranks[1]))
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = last - (counts - 1) / 2
    return means[groups]
