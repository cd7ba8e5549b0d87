"""The part of a detector between the feature pyramid and one row of its head.

A row has the class logits and the box offsets of one candidate. Only what makes the row runs again:
RoI pooling and the head on a few proposals, or the head on a part of one level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from service.cam.hooks import tensors_in
from service.models.tasks import BoxHead

RADII = (1, 6)
"""Cells around a row's own of which the head is tried: one convolution of 3 × 3 reaches 1, heads of
four and a last one reach 5."""

EMPTY = 2
"""Cells a side of the levels that a row does not depend on: norms need more than one."""


@dataclass(frozen=True, slots=True, eq=False)
class LevelRow:
    """One row of the head, computed from one level.

    level:   its path. values: of the whole level for the image, (1, C, h, w).
    logits, offsets: the row, with a graph to `leaf`.
    leaf, corner: the part (1, C, r, s) of the level that the row is computed from, and its first
             (row, column).
    """

    level: str
    values: Tensor
    leaf: Tensor
    corner: tuple[int, int]
    logits: Tensor
    offsets: Tensor

    def gradient(self, scalar: Tensor) -> Tensor:
        """The gradient (1, C, h, w) of a scalar of the row at the whole level."""
        (part,) = torch.autograd.grad(scalar, self.leaf, retain_graph=True)
        if part.shape == self.values.shape:
            return part
        whole = torch.zeros_like(self.values)
        (top, left), (rows, columns) = self.corner, part.shape[2:]
        whole[:, :, top : top + rows, left : left + columns] = part
        return whole


def row_of(box: Tensor, score: Tensor, logits: Tensor, offsets: Tensor) -> int | None:
    """The row of the head that made a box: the only one with a gradient; None if there is no such.

    box: (4,), score: (), with a graph to the head's outputs logits (..., C) and offsets (..., 4 or
    4 C). The offsets come first: they have a gradient where the score is saturated, too.
    """
    for value, at in ((box.sum(), offsets), (score, logits)):
        if not value.requires_grad:
            continue
        slopes: Sequence[Tensor | None] = torch.autograd.grad(
            value, [at], retain_graph=True, allow_unused=True
        )
        slope = slopes[0]
        if slope is None:
            continue
        rows = slope.flatten(0, -2).abs().sum(dim=-1).nonzero()
        if len(rows) == 1:
            return int(rows[0])
    return None


def level_rows(
    module: nn.Module,
    head: BoxHead,
    arguments: Sequence[Any],
    rows: Mapping[int, Tensor],
) -> dict[int, LevelRow]:
    """Compute rows of the head again, with a graph to one level of each.

    arguments: those of RoI pooling or of the head, in the pass that gave the rows.
    rows:      the class logits of each row in that pass, by its number.
    """
    compute = _pooled_rows if head.pooled else _anchor_rows
    with torch.enable_grad():
        return compute(module, head, arguments, rows)


def _pooled_rows(
    module: Any, head: BoxHead, arguments: Sequence[Any], rows: Mapping[int, Tensor]
) -> dict[int, LevelRow]:
    features, proposals, shapes = arguments
    pool, heads = module.roi_heads.box_roi_pool, module.roi_heads
    names = [name for name in pool.featmap_names if name in features]
    ends = list(accumulate(len(each) for each in proposals))
    by_image: dict[int, list[int]] = {}
    for row in rows:
        by_image.setdefault(next(i for i, end in enumerate(ends) if row < end), []).append(row)
    found = {}
    for image, chosen in by_image.items():
        first = ends[image] - len(proposals[image])
        boxes = proposals[image][[row - first for row in chosen]].detach()
        leaves = {name: _leaf(features[name][image : image + 1]) for name in names}
        pooled = heads.box_head(pool(leaves, [boxes], [shapes[image]]))
        logits, offsets = heads.box_predictor(pooled)
        levels = pool.map_levels([boxes]).tolist() if len(names) > 1 else [0] * len(chosen)
        for position, (row, level) in enumerate(zip(chosen, levels, strict=True)):
            leaf = leaves[names[level]]
            path = f"backbone[{names[level]}]"
            found[row] = LevelRow(
                path if path in head.levels else head.levels[level],
                leaf.detach(),
                leaf,
                (0, 0),
                logits[position],
                offsets[position],
            )
    return found


def _anchor_rows(
    module: Any, head: BoxHead, arguments: Sequence[Any], rows: Mapping[int, Tensor]
) -> dict[int, LevelRow]:
    levels = list(arguments[0])
    anchors = module.anchor_generator.num_anchors_per_location()
    counts = [
        count * each.shape[2] * each.shape[3] for count, each in zip(anchors, levels, strict=True)
    ]
    ends = list(accumulate(counts))
    heads: dict[int, _LevelHead] = {}
    found = {}
    for row, expected in rows.items():
        image, position = divmod(row, ends[-1])
        level = next(i for i, end in enumerate(ends) if position < end)
        cell, anchor = divmod(position - ends[level] + counts[level], anchors[level])
        key = image * len(levels) + level
        if key not in heads:
            values = levels[level][image : image + 1].detach()
            heads[key] = _LevelHead(module.head, head, levels, anchors, level, values)
        found[row] = heads[key].row(cell, anchor, expected)
    return found


class _LevelHead:
    """The head on one level of one image, or on a part of it.

    values: the level, (1, C, h, w). The head has seen the whole level once `_whole` is set, which
    the rows then share.
    """

    def __init__(  # noqa: PLR0917 - one call
        self,
        part: nn.Module,
        head: BoxHead,
        levels: Sequence[Tensor],
        anchors: Sequence[int],
        level: int,
        values: Tensor,
    ) -> None:
        self._part, self._head, self._levels = part, head, levels
        self._anchors, self._level, self._values = anchors, level, values
        self._whole: tuple[Tensor, Tensor, Tensor] | None = None

    def row(self, cell: int, anchor: int, expected: Tensor) -> LevelRow:
        """The row of an anchor at a cell. expected: its class logits (C,) in the first pass."""
        y, x = divmod(cell, self._values.shape[3])
        for radius in RADII if self._whole is None else ():
            top, left = max(0, y - radius), max(0, x - radius)
            leaf = _leaf(self._values[:, :, top : y + radius + 1, left : x + radius + 1])
            logits, offsets = _of_level(self._part, self._head, self._levels, self._level, leaf)
            number = self._number(leaf, y - top, x - left, anchor)
            if _same(logits[number], expected):
                return self._found(leaf, (top, left), logits[number], offsets[number])
        if self._whole is None:  # a head that sees the whole level
            leaf = _leaf(self._values)
            rows = _of_level(self._part, self._head, self._levels, self._level, leaf)
            self._whole = (leaf, *rows)
        leaf, logits, offsets = self._whole
        number = self._number(leaf, y, x, anchor)
        return self._found(leaf, (0, 0), logits[number], offsets[number])

    def _number(self, leaf: Tensor, y: int, x: int, anchor: int) -> int:
        """The row of an anchor at a cell of the leaf, behind those of the levels before."""
        before = EMPTY**2 * sum(self._anchors[: self._level])
        return before + (y * leaf.shape[3] + x) * self._anchors[self._level] + anchor

    def _found(
        self, leaf: Tensor, corner: tuple[int, int], logits: Tensor, offsets: Tensor
    ) -> LevelRow:
        path = self._head.levels[self._level]
        return LevelRow(path, self._values, leaf, corner, logits, offsets)


def _of_level(
    part: nn.Module, head: BoxHead, levels: Sequence[Tensor], level: int, leaf: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows (n, C) and (n, 4) of a head on one level; the other levels are empty."""
    empty = [leaf.new_zeros(1, each.shape[1], EMPTY, EMPTY) for each in levels]
    empty[level] = leaf
    outputs = dict(tensors_in(part(empty)))
    return outputs[head.logits][0], outputs[head.offsets][0]


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def _same(logits: Tensor, expected: Tensor) -> bool:
    largest = float(expected.abs().max())
    return bool(torch.allclose(logits.detach(), expected, rtol=0, atol=1e-5 * max(1.0, largest)))
