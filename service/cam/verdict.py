"""Whether a class depends on what a map marks: a test of its place by 40 half-hidden images.

Each of 40 images has about half of its cells hidden, by an orthogonal design; half of the images
are filled with the mean colour and half with a blur. The drop of the logit should follow the part
of the map that is hidden. The same number for the map's own mirrored, turned and shifted copies is
the null distribution: it needs no further forward pass, and is exact for a map that lies anywhere
by chance. A second null weighs the copies by where photographers put objects.

Plackett and Burman, "The Design of Optimum Multifactorial Experiments", Biometrika 33(4), 1946, for
the design.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from service.images.decode import Rect
from service.images.masks import Fill, filling

RUNS = 40
"""Images with a part hidden, each a forward pass."""

DESIGN = "pb40/0"
"""The design's name and seed."""

CELLS = 36
"""Cells that can be hidden; the design has columns for 38."""

SIDE = 14
"""Cells a side of the map as it is compared, where the image is square."""

FILLS: tuple[Fill, Fill] = ("mean", "blur")
"""What each half of the runs fills with."""

EDGE = 0.02
"""Standard deviation of the masks' edges, as a share of the side."""

WHOLE: Rect = (0.0, 0.0, 1.0, 1.0)

EQUAL = 1e-9
"""Agreements that differ by less are equal."""

FLAT = 1e-6
"""A map or a score that varies by less than this share of its largest value is flat."""

LEVEL = 0.05
"""A map is `supported` where at most this share of its copies does as well."""

CENTRED = 0.18
"""Standard deviation, as a share of the side, of where photographers put objects."""

CENTRES = (0.12, 0.16, 0.20, 0.26, 0.33, 0.40)
"""Standard deviations, as shares of the side, of the centred blobs that a map has to beat."""

REFUTED_BEST = 0.6
"""A map is `refuted` only where some copy of it agrees this well with the drops."""

FEWEST_CLASSES = 20
"""Models with fewer classes get no `p_class`."""

_GENERATOR = "++--++++-+-+----++-"
"""The first row of the 20-run design."""

Name = Literal["supported", "inconclusive", "refuted"]
Reason = Literal["flat_map", "flat_score", "elsewhere_as_good", "centre_as_good", "fills_disagree"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What 40 forward passes say of one map; agreements −1..1, p-values 0..1.

    reason:    why it is `inconclusive`.
    agreement: the correlation of the logit's drop with what is hidden of the map; by fill, too.
    elsewhere: the median and the best agreement of the map's copies in other places.
    p_place:   the share of copies that agree at least as well; p_centred: weighted by the prior of
               where photographers put objects.
    centre:    the best agreement of a centred blob; contrast: of a map of the image alone.
    p_class:   the share of classes whose drops follow the map at least as well; None where the
               model has fewer than FEWEST_CLASSES.
    """

    verdict: Name
    reason: Reason | None
    agreement: float
    agreement_by_fill: tuple[float, float]
    elsewhere: tuple[float, float]
    p_place: float
    p_centred: float
    centre: float
    contrast: float
    p_class: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """Which cells each run hides, over the area of a model input where the image is seen.

    hidden:  float32 (RUNS, rows, columns), 1 where a cell is hidden. The first half of the runs is
             filled with the mean colour, the second with the blur.
    area:    left, top, width and height, in pixels of the input.
    size:    height and width of the input.
    edges:   which pixels of the area belong to which row, (height, rows), and to which column,
             (width, columns), with soft edges.
    """

    hidden: Tensor
    area: tuple[int, int, int, int]
    size: tuple[int, int]
    edges: tuple[Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the maps that are compared: about SIDE² cells, about square."""
        _, _, width, height = self.area
        aspect = math.sqrt(width / height)
        return max(2, round(SIDE / aspect)), max(2, round(SIDE * aspect))

    def masks(self, runs: slice) -> Tensor:
        """The masks of some runs, float32 (n, height, width) of the input, 0..1."""
        left, top, width, height = self.area
        across = self.hidden[runs] @ self.edges[1].T
        masks = torch.zeros(len(across), *self.size)
        masks[:, top : top + height, left : left + width] = self.edges[0] @ across
        return masks

    def hides(self) -> Tensor:
        """How much each run hides of each cell of a compared map, float64 (RUNS, cells)."""
        by_row, by_column = (
            average(cells, len(edge)) @ edge.double()
            for cells, edge in zip(self.shape, self.edges, strict=True)
        )
        return torch.einsum("hr,nrc,wc->nhw", by_row, self.hidden.double(), by_column).flatten(1)

    def compared(self, grid: Tensor, covers: Rect) -> Tensor:
        """A map (h, w) averaged over the cells that are compared: float64 (rows, columns).

        covers: the part of the input, x, y, w, h as fractions, that the map's cells lie over;
                outside it the map is 0.
        """
        left, top, width, height = self.area
        down = average(
            self.shape[0],
            grid.shape[0],
            (top / self.size[0] - covers[1]) / covers[3],
            height / self.size[0] / covers[3],
        )
        across = average(
            self.shape[1],
            grid.shape[1],
            (left / self.size[1] - covers[0]) / covers[2],
            width / self.size[1] / covers[2],
        )
        return down @ grid.double() @ across.T


def design(size: tuple[int, int], seen: Rect = WHOLE) -> Design:
    """The design for a model input (height, width).

    seen: the part of the input, x, y, w, h as fractions, that shows the image.
    """
    (height, width), (x, y, w, h) = size, seen
    left, top = round(x * width), round(y * height)
    area = (
        left,
        top,
        max(1, round((x + w) * width) - left),
        max(1, round((y + h) * height) - top),
    )
    rows, columns = _cells(area[3] / area[2])
    edges = (_soft_edges(area[3], rows), _soft_edges(area[2], columns))
    return Design(_columns(rows * columns).reshape(RUNS, rows, columns), area, size, edges)


def filled(image: Tensor, plan: Design) -> Tensor:
    """An image, uint8 (C, height, width), wholly filled in each way: (len(FILLS), C, h, w)."""
    left, top, width, height = plan.area
    inside = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous().numpy()
    fills = image.repeat(len(FILLS), 1, 1, 1)
    for fill, name in zip(fills, FILLS, strict=True):
        pixels = torch.from_numpy(filling(inside, name)).permute(2, 0, 1)
        fill[:, top : top + height, left : left + width] = pixels
    return fills


def hidden(image: Tensor, plan: Design, runs: slice, fills: Tensor | None = None) -> Tensor:
    """An image, uint8 (C, height, width), as some runs hide it: uint8 (n, C, height, width).

    fills: what `filled` gives for it, where somebody has it.
    """
    fills = filled(image, plan) if fills is None else fills
    shown = image.float()
    changes = fills.float() - shown
    shown += 0.5  # as bytes they are cut off
    made = torch.empty(len(range(RUNS)[runs]), *image.shape, dtype=torch.uint8)
    blended = torch.empty_like(shown)
    for run, mask, one in zip(range(RUNS)[runs], plan.masks(runs), made.numpy(), strict=True):
        torch.addcmul(shown, changes[run * len(FILLS) // RUNS], mask, out=blended)
        np.copyto(one, blended.numpy(), casting="unsafe")  # four times as fast as torch's
    return made


def contrasts(image: Tensor, plan: Design) -> Tensor:
    """Three maps of an image, uint8 (C, height, width), alone: float64 (3, cells), as compared.

    The magnitude of its gradient, the distance from its mean colour, and its local deviation.
    """
    left, top, width, height = plan.area
    inside = image[:, top : top + height, left : left + width].double()
    grey = inside.mean(dim=0)
    padded = np.pad(grey.numpy(), 1, mode="edge")  # an area may be one pixel high
    across, down = (torch.from_numpy(step)[1:-1, 1:-1] for step in np.gradient(padded))
    distance = (inside - inside.mean(dim=(1, 2), keepdim=True)).square().sum(dim=0).sqrt()
    by_row, by_column = (average(*pair) for pair in zip(plan.shape, (height, width), strict=True))
    mean, square = (by_row @ values @ by_column.T for values in (grey, grey.square()))
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    others = [by_row @ values @ by_column.T for values in (torch.hypot(across, down), distance)]
    return torch.stack([*others, deviation]).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What the runs of a design gave for one image; it judges any map of that image.

    falls:     (RUNS, classes), by how much each logit falls in each run.
    contrasts: `contrasts` of the image.
    covers:    the part of the model input that a layer's cells lie over.
    looks:     how many maps are tried until one is supported; each further look finds more by
               chance, so that p-values are compared with LEVEL / looks.
    rounding:  falls that vary by no more say nothing: what the model computes is that exact.
    """

    plan: Design
    falls: Tensor
    contrasts: Tensor
    covers: Rect = WHOLE
    looks: int = 1
    rounding: float = 0.0


def judge(
    evidence: Evidence, grid: Tensor, class_id: int, contrast: Mapping[int, float] | None = None
) -> Verdict:
    """The verdict on a map (h, w) of a class, or of its lead over the classes of `contrast`.

    contrast: the weight of each of these classes.
    grid: signed where its method is; of the model input's size, or over the part that layers cover.
    """
    plan = evidence.plan
    is_of_input = tuple(grid.shape) == plan.size
    compared = plan.compared(grid, WHOLE if is_of_input else evidence.covers)
    hides, falls = plan.hides(), evidence.falls.double()
    if contrast:
        weights_of = torch.tensor(list(contrast.values()), dtype=falls.dtype)
        falls = falls - (falls[:, list(contrast)] * weights_of).sum(dim=1, keepdim=True)
    own = _Falls(hides, falls[:, class_id, None])
    if float(compared.max() - compared.min()) <= FLAT * float(compared.abs().max()):
        return _undecided("flat_map")
    if own.spread <= max(FLAT * float(falls[:, class_id].abs().max()), evidence.rounding):
        return _undecided("flat_score")
    copies, middles = _copies(compared)
    whole, fills = own.agreement(copies)
    p_fills = (fills >= fills[:, :1] - EQUAL).double().mean(dim=1)
    as_good = (whole >= whole[0] - EQUAL).double()
    weights = torch.exp(-middles.square().sum(dim=1) / (2 * CENTRED**2))
    p_place, p_centred = float(as_good.mean()), float((weights * as_good).sum() / weights.sum())
    centre = float(own.agreement(_blobs(plan.shape))[0].max())
    others = whole[(copies != copies[0]).any(dim=1)]
    by_class = _Falls(hides, falls).agreement(copies[:1])[0]
    level = LEVEL / evidence.looks
    reason: Reason | None = None
    if p_place > level:
        reason = "elsewhere_as_good"
    elif bool((fills[:, 0] <= 0).any()):
        reason = "fills_disagree"
    elif p_centred > level or centre >= float(whole[0]):
        reason = "centre_as_good"
    refuted = (
        p_place >= 0.5
        and float(p_fills.max()) >= 0.5
        and float(p_fills.min()) >= 0.25
        and float(others.max()) >= REFUTED_BEST
    )
    return Verdict(
        verdict="refuted" if refuted else "inconclusive" if reason else "supported",
        reason=None if refuted else reason,
        agreement=float(whole[0]),
        agreement_by_fill=(float(fills[0, 0]), float(fills[1, 0])),
        elsewhere=(float(others.median()), float(others.max())),
        p_place=p_place,
        p_centred=p_centred,
        centre=centre,
        contrast=float(own.agreement(evidence.contrasts)[0].max()),
        p_class=(
            float((by_class >= whole[0] - EQUAL).double().mean())
            if falls.shape[1] >= FEWEST_CLASSES
            else None
        ),
    )


class _Falls:
    """How the falls of a score, or of several (RUNS, scores), agree with what is hidden of maps.

    Within each fill the mean and the effect of the hidden area are removed from both, and the falls
    are scaled to one spread: each fill counts alike, though one may change the score more.

    spread: the largest standard deviation of what is left of a score's falls.
    """

    def __init__(self, hides: Tensor, falls: Tensor) -> None:
        halves = slice(0, RUNS // 2), slice(RUNS // 2, RUNS)
        keeps = [_without_area(hides[half]) for half in halves]
        self._hides = [keep @ hides[half] for keep, half in zip(keeps, halves, strict=True)]
        rest = [keep @ falls[half] for keep, half in zip(keeps, halves, strict=True)]
        norms = [values.norm(dim=0) for values in rest]
        self._falls = [_ratio(values, norm) for values, norm in zip(rest, norms, strict=True)]
        self.spread = float(torch.hypot(*norms).max()) / math.sqrt(RUNS)

    def agreement(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Pearson's correlations of one score with maps (n, cells), or of several with one map.

        Over all runs, (n or scores,), and by fill, (2, n or scores).
        """
        hidden = [maps @ hides.T for hides in self._hides]
        along = [part @ falls for part, falls in zip(hidden, self._falls, strict=True)]
        norms = [part.norm(dim=1, keepdim=True) for part in hidden]
        spread = math.sqrt(sum(float(falls[:, 0].norm()) ** 2 for falls in self._falls))
        whole = _ratio(along[0] + along[1], torch.hypot(*norms) * spread)
        by_fill = [_ratio(*pair).flatten() for pair in zip(along, norms, strict=True)]
        return whole.flatten(), torch.stack(by_fill)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), 0)


def _without_area(hides: Tensor) -> Tensor:
    """What removes the mean and the hidden area from values of some runs: (runs, runs)."""
    known = torch.stack([torch.ones(len(hides), dtype=torch.float64), hides.mean(dim=1)], dim=1)
    fitted: Tensor = known @ torch.linalg.pinv(known)
    return torch.eye(len(hides), dtype=torch.float64) - fitted


def _undecided(reason: Reason) -> Verdict:
    return Verdict("inconclusive", reason, 0.0, (0.0, 0.0), (0.0, 0.0), 1.0, 1.0, 0.0, 0.0, None)


def _copies(compared: Tensor) -> tuple[Tensor, Tensor]:
    """All mirrored, turned and shifted copies (n, cells), the map first; and their middles (n, 2).

    A middle is the circular mean of what is above zero, from the area's middle, in sides.
    """
    turned = [compared, compared.flip(0), compared.flip(1), compared.flip((0, 1))]
    if compared.shape[0] == compared.shape[1]:
        turned += [one.T for one in turned]
    stacked = torch.stack(turned)
    copies = stacked.flatten(1)[:, _shifts(*compared.shape)].flatten(0, 1)
    mass = stacked.clamp_min(0)
    down, across = (
        _middles(mass.sum(dim=3 - axis), length)
        for axis, length in enumerate(compared.shape, start=1)
    )
    middles = torch.broadcast_tensors(down[:, :, None], across[:, None, :])
    return copies, torch.stack(middles, dim=-1).flatten(0, 2)


def _middles(mass: Tensor, length: int) -> Tensor:
    """The circular means of rows (n, length) in each toroidal shift, −½ to ½: (n, length)."""
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    angles = 2 * math.pi * place
    own = torch.atan2(mass @ angles.sin(), mass @ angles.cos()) / (2 * math.pi)
    shifts = torch.arange(length, dtype=torch.float64) / length
    return (own[:, None] - shifts) % 1 - 0.5


def _shifts(rows: int, columns: int) -> Tensor:
    """Which cell comes where in each toroidal shift, (shifts, cells); the first shifts nothing."""
    cells = torch.arange(rows * columns).reshape(rows, columns)
    down = (torch.arange(rows)[:, None] + torch.arange(rows)[None]) % rows
    across = (torch.arange(columns)[:, None] + torch.arange(columns)[None]) % columns
    return cells[down[:, None, :, None], across[None, :, None, :]].reshape(-1, rows * columns)


def _blobs(shape: tuple[int, int]) -> Tensor:
    """Gaussians in the middle, (len(CENTRES), cells)."""
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5 for n in shape)
    distance = rows.square()[:, None] + columns.square()[None]
    return torch.stack([torch.exp(-distance / (2 * s**2)).flatten() for s in CENTRES])


def average(bins: int, cells: int, start: float = 0.0, extent: float = 1.0) -> Tensor:
    """What averages a row of cells over bins: float64 (bins, cells).

    The bins divide [start, start + extent] of the row, whose own extent is 1; beyond its ends it is
    taken to be 0.
    """
    edges = (start + extent * torch.arange(bins + 1, dtype=torch.float64) / bins) * cells
    begins = torch.arange(cells, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], begins[None])
    high = torch.minimum(edges[1:, None], begins[None] + 1)
    return (high - low).clamp_min(0) / (edges[1:] - edges[:-1])[:, None]


def _cells(aspect: float) -> tuple[int, int]:
    """Rows and columns of cells, CELLS at most, as near to square ones as these allow.

    aspect: height ÷ width.
    """
    shapes = [(rows, CELLS // rows) for rows in range(1, CELLS + 1)]
    return min(shapes, key=lambda shape: abs(math.log(aspect * shape[1] / shape[0])))


def _columns(count: int) -> Tensor:
    """Columns of the two-level design, orthogonal to each other and to the fill: (RUNS, count)."""
    row = [symbol == "+" for symbol in _GENERATOR]
    base = torch.tensor([row[-shift:] + row[:-shift] for shift in range(19)] + [[False] * 19])
    folded = torch.cat([torch.cat([base, base]), torch.cat([base, ~base])], dim=1)
    # Python's generator is the same in every version, so that a request repeats exactly.
    drawn = random.Random(0)  # noqa: S311 - no secret
    order = drawn.sample(range(folded.shape[1]), count)
    flipped = torch.tensor([drawn.random() < 0.5 for _ in order])
    return (folded[:, order] ^ flipped).float()


def _soft_edges(length: int, cells: int) -> Tensor:
    """Which pixels along a side belong to which cell, with soft edges: float32 (length, cells)."""
    middles = (torch.arange(length) + 0.5) / length
    belongs = functional.one_hot((middles * cells).long().clamp_max(cells - 1), cells).float()
    distance = (middles[:, None] - middles[None]) / EDGE
    weights = torch.exp(-distance.square() / 2)
    return (weights / weights.sum(dim=1, keepdim=True)) @ belongs
