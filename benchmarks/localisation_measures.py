"""The measures of `localisation.py`, and the tables that they are printed in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from localisation_cases import Mask
from localisation_maps import Map
from numpy.typing import NDArray
from torch import Tensor

from service.images.decode import Rect
from service.models.pool import Replica

STEPS = 20
"""Of the insertion and deletion curves."""

BLUR = 0.05
"""Standard deviation of the image that insertion starts from, of its side."""

SAME = 1e-5
"""Maps that differ by less, as a share of their maximum, share one curve."""

ROUNDING = 1e-4
"""A difference within this is none: float32 sums in another order."""

COLUMNS = (
    *("method", "cases (clusters)", "camserve", "peer, raw", "camserve − peer"),
    *("peer, as distributed", "camserve − better trivial"),
)

FEWEST = 5
"""Clusters that a verdict needs."""

RESAMPLES = 2000
"""Of the bootstrap, which draws whole clusters."""


def energy(cam: Map, region: Mask) -> float:
    """The share of a map's sum that lies in a region; 0 for a map that is zero everywhere."""
    total = float(cam.sum(dtype=np.float64))
    return float(cam[region].sum(dtype=np.float64)) / total if total > 0 else 0.0


def pointed(cam: Map, boxes: Iterable[Rect]) -> float:
    """Whether the middle of the map's greatest pixel is in a box: 1 or 0."""
    row, column = divmod(int(cam.argmax()), cam.shape[1])
    x, y = column + 0.5, row + 0.5
    return float(any(left <= x <= right and top <= y <= low for left, top, right, low in boxes))


class Curves:
    """Insertion and deletion of one image: areas under the softmax score of its target.

    Insertion puts pixels of the image, the strongest first, into its blurred copy; deletion
    replaces them by the mean colour. Pixels of equal strength come in one random order, the same
    for every map.
    """

    def __init__(self, replica: Replica, pixels: Tensor, target: int, seed: int) -> None:
        self._replica, self._target = replica, target
        self._image = replica.model.normalised(pixels[None])[0]
        plain = pixels.permute(1, 2, 0).numpy()
        soft = cv2.GaussianBlur(plain, (0, 0), BLUR * max(plain.shape[:2]))
        blurred = torch.from_numpy(np.ascontiguousarray(soft)).permute(2, 0, 1)
        self._blurred = replica.model.normalised(blurred[None])[0]
        self._ties = np.random.default_rng(seed).permutation(plain.shape[0] * plain.shape[1])
        mean = torch.zeros_like(self._image)
        self._ends = self._scores([self._blurred, self._image, mean])
        self._known: list[tuple[Map, tuple[float, float]]] = []

    def areas(self, cam: Map) -> tuple[float, float]:
        """(insertion, deletion) of a map."""
        scaled = cam / max(float(cam.max()), 1e-30)
        for known, result in self._known:
            if np.abs(known - scaled).max() < SAME:
                return result
        order = np.lexsort((self._ties, -scaled.ravel()))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        ranks = torch.from_numpy(rank.reshape(cam.shape))
        cuts = [ranks < round(step * len(order) / STEPS) for step in range(1, STEPS)]
        mean = torch.zeros_like(self._image)
        inserted = self._scores([torch.where(cut, self._image, self._blurred) for cut in cuts])
        deleted = self._scores([torch.where(cut, mean, self._image) for cut in cuts])
        blurred, whole, empty = self._ends
        result = (
            float(np.trapezoid([blurred, *inserted, whole], dx=1 / STEPS)),
            float(np.trapezoid([whole, *deleted, empty], dx=1 / STEPS)),
        )
        self._known.append((scaled, result))
        return result

    def _scores(self, images: Sequence[Tensor]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(images), 10):
            with torch.no_grad():
                logits = self._replica.module(torch.stack(list(images[start : start + 10])))
            scores += logits.softmax(dim=1)[:, self._target].tolist()
        return scores


@dataclass
class Table:
    """One measure: values by (method, side) and case; each case belongs to a cluster."""

    title: str
    sign: int = 1
    values: dict[tuple[str, str], dict[tuple[str, int], float]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def add(self, method: str, side: str, case: tuple[str, int], value: float) -> None:
        """Note a value; `case` is its cluster and a number, `side` ours, peer, delivered."""
        self.values[method, side][case] = value

    def lines(self, methods: Sequence[str]) -> list[str]:
        """The table in Markdown; methods without a value are left out."""
        lines = [
            f"**{self.title}** ({'higher' if self.sign > 0 else 'lower'} is better)",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|" + "---|" * len(COLUMNS),
        ]
        for method in methods:
            mine = self.values.get((method, "ours"), {})
            if not mine:
                continue
            peer, handed = (
                _mean(self.values.get((method, side), {})) for side in ("peer", "delivered")
            )
            count = f"{len(mine)} ({len({cluster for cluster, _ in mine})})"
            versus = self._text(self.difference(method, (method, "peer")))
            over = "" if method in ("centre", "random") else self._text(self.over_trivial(method))
            lines.append(
                f"| {method} | {count} | {_mean(mine)} | {peer} | {versus} | {handed} | {over} |"
            )
        return lines

    def verdict(self, methods: Sequence[str]) -> tuple[bool, str]:
        """Whether ours is below the peer's anywhere, and the sentence that says so.

        Of fewer than FEWEST clusters nothing is said: the interval of one has no width.
        """
        both = [method for method in methods if self.values.get((method, "peer"))]
        few = [method for method in both if self._clusters(method) < FEWEST]
        below = [method for method in both if method not in few and self._is_below(method)]
        groups = {
            "BELOW the peer": below,
            "not below the peer": [name for name in both if name not in few + below],
            f"undecided, fewer than {FEWEST} clusters": few,
        }
        said = [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]
        return bool(below), f"{self.title}: {'; '.join(said) or 'no method of both'}"

    def difference(self, method: str, other: tuple[str, str]) -> tuple[float, float, float] | None:
        """The mean of ours minus another's over the cases of both, and its 95 % interval."""
        mine, theirs = self.values.get((method, "ours"), {}), self.values.get(other, {})
        clusters: dict[str, list[float]] = defaultdict(list)
        for case in mine.keys() & theirs.keys():
            clusters[case[0]].append(mine[case] - theirs[case])
        if not clusters:
            return None
        sums = np.array([sum(clusters[name]) for name in sorted(clusters)])
        counts = np.array([len(clusters[name]) for name in sorted(clusters)])
        drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
        means: NDArray[np.float64] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        return float(sums.sum() / counts.sum()), float(low), float(high)

    def over_trivial(self, method: str) -> tuple[float, float, float] | None:
        """Ours minus the better of the two maps that look at no image, on the same cases."""
        found = [self.difference(method, (name, "ours")) for name in ("centre", "random")]
        known = [each for each in found if each is not None]
        pick: Callable[..., tuple[float, float, float]] = min if self.sign > 0 else max
        return pick(known) if known else None

    def _clusters(self, method: str) -> int:
        return len({cluster for cluster, _ in self.values[method, "ours"]})

    def _is_below(self, method: str) -> bool:
        found = self.difference(method, (method, "peer"))
        if found is None:
            return False
        _, low, high = found
        return high < -ROUNDING if self.sign > 0 else low > ROUNDING

    def _text(self, found: tuple[float, float, float] | None) -> str:
        if found is None:
            return ""
        mean, low, high = (0.0 if abs(value) < ROUNDING else value for value in found)
        return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if (mean, low, high) != (0, 0, 0) else "0"


def _mean(values: dict[tuple[str, int], float]) -> str:
    return f"{np.mean(list(values.values())):.3f}" if values else ""
