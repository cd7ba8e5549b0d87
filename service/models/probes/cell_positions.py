"""Measure the positions of a layer's cells in the model input.

A noise pattern is added to an image with a weight that grows from left to right, from right to
left, from top to bottom and from bottom to top. The response of a cell to one of a pair, as a share
of its responses to both, is its position along that axis. Five images measure all layers together.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from service.cam.hooks import gradients
from service.cam.layouts import Layout, layouts_of, token_layout
from service.models.probes.behaviour import Finding
from service.models.probes.layers import Layer
from service.models.probes.torch_state import kept_torch_state

STRENGTH = 0.4
"""Strength of the noise, in standard deviations of the normalised input: small enough for a nearly
linear response."""

KEPT = 1 << 16
"""Values of a layer's output for one image that are measured; beyond it channels are skipped."""

CONFIRMED = 0.6
"""Correlation of measured and expected positions, along both axes, that confirms a layout."""

CORRECTED = 0.8
"""Correlation that another layout needs to replace the likely one."""

MARGIN = 0.05
"""Difference in correlation by which another layout must be better."""

FEWEST = 9
"""Minimum number of cells of another layout: four correlate with anything by chance."""

SCATTERED = 0.15
"""Standard deviation from which measured positions differ, so that a layout that does not fit is
wrong. Evenly distributed cells have 0.29."""

UNCOVERED = 0.03
"""Share of a side that a model may leave out at a border before its maps are moved."""

Rect = tuple[float, float, float, float]
"""x, y, width, height, as fractions of the model input."""

Verdict = Literal["confirmed", "corrected", "scattered", "unclear"]
"""`confirmed`: the cells have the positions of the likely layout. `corrected`: they have those of
another layout. `scattered`: their positions differ, but match no known layout. `unclear`: their
positions do not differ; a map is drawn if a grid fits."""


_RESULTS: dict[Verdict, str] = {
    "confirmed": "have the positions that their shape suggests",
    "corrected": "have other positions than their shape suggests",
    "scattered": "have positions in no known order",
    "unclear": "have no measurable positions",
}

_FOLLOWS: dict[Verdict, str] = {
    "corrected": "Its maps use the measured layout.",
    "scattered": "No map is drawn from it; set `target_layer` to another layer.",
    "unclear": "Explanations at it carry the flag places_unclear.",
}


@dataclass(frozen=True, slots=True)
class CellPositions:
    """The layers with their measured layouts, and the verdict on each layer with cells."""

    layers: tuple[Layer, ...]
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def of(self, verdict: Verdict) -> frozenset[str]:
        """The paths of the layers with a verdict."""
        return frozenset(path for path, given in self.verdicts.items() if given == verdict)

    def finding(self, target: str | None) -> Finding:
        """The finding; passed if the cells of the target layer have the expected positions.

        Other layers may be scattered, as those of attention are: they have no map.
        """
        counts = {verdict: len(self.of(verdict)) for verdict in _RESULTS}
        parts = [f"{count} {_RESULTS[verdict]}" for verdict, count in counts.items() if count]
        verdict = self.verdicts.get(target or "")
        return Finding(
            "places",
            verdict in ("confirmed", None),
            f"Of {len(self.verdicts)} layers with cells "
            + (", ".join(parts) or "none was measured")
            + (f"; those of the target layer {_RESULTS[verdict]}." if verdict else "."),
            _FOLLOWS.get(verdict) if verdict else None,
        )


def measure_cell_positions(
    module: nn.Module, layers: Sequence[Layer], image: Tensor, *, batchable: bool
) -> CellPositions:
    """Measure every layer of a replica. image: normalised (1, C, h, w); costs five forward passes.

    Raises the exceptions of the model.
    """
    size = (int(image.shape[2]), int(image.shape[3]))
    images = _patterns(image)
    outputs = _Outputs(layers)
    for batch in [images] if batchable else images[:, None]:
        outputs.collect(module, batch)
    positions = CellPositions(())
    measured = []
    for layer in layers:
        output = outputs.of(layer.path, len(images))
        if output is None:
            measured.append(replace(layer, layout=None) if layer.path in outputs.odd else layer)
            continue
        measured.append(
            _with_measured_layout(layer, output, outputs.axes[layer.path], size, positions)
        )
    return _with_siblings(replace(positions, layers=tuple(measured)))


def _with_siblings(positions: CellPositions) -> CellPositions:
    """Give unclear layers the most frequent layout of measured layers of the same shape.

    If those are scattered, as in windows, unclear ones are, too.
    """
    votes: defaultdict[tuple[int, ...] | None, Counter[Layout | None]] = defaultdict(Counter)
    for layer in positions.layers:
        if positions.verdicts.get(layer.path, "unclear") != "unclear":
            votes[layer.shape][layer.layout] += 1
    verdicts, layers = dict(positions.verdicts), []
    for layer in positions.layers:
        if verdicts.get(layer.path) != "unclear" or layer.shape not in votes:
            layers.append(layer)
            continue
        ((layout, _),) = votes[layer.shape].most_common(1)
        layers.append(replace(layer, layout=layout))
        if layout is None:
            verdicts[layer.path] = "scattered"
    return CellPositions(tuple(layers), verdicts)


def _patterns(image: Tensor) -> Tensor:
    """(5, C, h, w): the image, and with noise that grows to the right, to the left, down and up."""
    height, width = image.shape[2:]
    # Fine noise for the first layers, and coarse noise, which survives averages over many pixels.
    noise = STRENGTH / 2 * (_signs(image, 1) + _signs(image, max(1, min(height, width) // 16)))
    across = ((torch.arange(width) + 0.5) / width).to(image)
    down = ((torch.arange(height) + 0.5) / height).to(image)[:, None]
    weights = (across, 1 - across, down, 1 - down)
    base = image * 0.5
    return torch.cat([base, *(base + noise * weight for weight in weights)])


def _signs(image: Tensor, side: int) -> Tensor:
    """Random −1 and 1, shaped as the image, in squares of `side` pixels."""
    generator = torch.Generator().manual_seed(side)
    rows, columns = (-(-length // side) for length in image.shape[2:])
    signs = torch.randint(0, 2, (*image.shape[:2], rows, columns), generator=generator) * 2 - 1
    large = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return large[:, :, : image.shape[2], : image.shape[3]].to(image)


class _Outputs:
    """The output of each layer at its last call, images first; large outputs in part.

    odd: paths of layers whose output has no real numbers or no batch dimension.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.axes: dict[str, int] = {}
        self.odd: set[str] = set()
        self._alone = {
            layer.path: layer.given["", layer.calls - 1]
            for layer in layers
            if ("", layer.calls - 1) in layer.given
        }
        self._parts: dict[str, list[Tensor]] = {path: [] for path in self._alone}

    def collect(self, module: nn.Module, batch: Tensor) -> None:
        """Run a batch of images."""
        last: dict[str, Tensor] = {}
        with ExitStack() as hooks, torch.no_grad():
            for path in self._alone:
                each = module.get_submodule(path)
                if not isinstance(each, ScriptModule):
                    hook = self._keeping(path, last, len(batch))
                    hooks.callback(each.register_forward_hook(hook).remove)
            with kept_torch_state(random=False):
                module(batch.clone())
        for path, part in last.items():
            self._parts[path].append(part)

    def of(self, path: str, images: int) -> Tensor | None:
        """One layer's output (images, ...), float32; None if it is incomplete."""
        parts = self._parts.get(path, [])
        if path in self.odd or sum(map(len, parts)) != images:
            return None
        return torch.cat(parts).float().cpu()

    def _keeping(self, path: str, last: dict[str, Tensor], images: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            is_real = isinstance(output, Tensor) and output.is_floating_point()
            axis = _batch_axis(output, self._alone[path], images) if is_real else None
            if axis is None:
                self.odd.add(path)
                return
            self.axes[path] = axis
            last[path] = _part(output.detach().movedim(axis, 0))

        return hook


def _batch_axis(output: Tensor, alone: tuple[int, ...], images: int) -> int | None:
    """The batch dimension of an output; None if none or several are possible.

    alone: the shape for one image.
    """
    shape = tuple(output.shape)
    if images == 1:
        ones = [axis for axis, length in enumerate(shape) if length == 1]
        return 0 if 0 in ones else ones[0] if len(ones) == 1 else None
    grown = [
        axis
        for axis in range(len(alone))
        if alone[axis] == 1 and shape == (*alone[:axis], images, *alone[axis + 1 :])
    ]
    return grown[0] if grown else None


def _part(output: Tensor) -> Tensor:
    """A copy of an output (images, ...), with fewer channels if it is large."""
    if output.ndim < 3 or output[0].numel() <= KEPT:
        return output.clone()
    # Channels are the longer dimension in all but the first layers of a network.
    axis = 1 if output.ndim == 4 and output.shape[1] != output.shape[2] else output.ndim - 1
    cells = output[0].numel() // output.shape[axis]
    step = -(-output.shape[axis] // max(2, KEPT // cells))
    return output[(slice(None),) * axis + (slice(None, None, step),)].clone()


def _with_measured_layout(
    layer: Layer, output: Tensor, axis: int, size: tuple[int, int], positions: CellPositions
) -> Layer:
    """The layer with its measured layout; the verdict is added to `positions`."""
    shape = layer.given["", layer.calls - 1]
    alone = (*shape[:axis], *shape[axis + 1 :])
    likely = layer.layout if axis == 0 else next(layouts_of(alone, size), None)
    if likely is None and next(layouts_of(alone, size), None) is None:
        return layer
    measured = _MeasuredPositions(output, alone)
    score = measured.score(likely) if likely else -1.0
    chosen, best = likely, score
    if score < 1 - MARGIN:  # otherwise no other can be better by MARGIN
        others = _others(measured, alone, size)  # none where no grid fits the shape
        highest, other = max(others, key=itemgetter(0), default=(-1.0, None))
        if highest >= CORRECTED and highest - score > MARGIN:
            best, chosen = highest, other
    if chosen is not None and best >= CONFIRMED:
        is_new = likely is not None and chosen != likely
        positions.verdicts[layer.path] = "corrected" if is_new else "confirmed"
        return replace(layer, layout=replace(chosen, batch_axis=axis), shape=alone)
    if likely is not None and measured.are_scattered(likely):
        positions.verdicts[layer.path] = "scattered"
        return replace(layer, layout=None, shape=alone)
    if likely is not None:
        positions.verdicts[layer.path] = "unclear"
        # Neither shape nor measurement supports a map, as for unfolded patches.
        fits = any(likely.grid == candidate.grid for candidate in layouts_of(alone, size))
        layout = replace(likely, batch_axis=axis) if fits else None
        return replace(layer, layout=layout, shape=alone)
    return layer


def _others(
    measured: _MeasuredPositions, alone: tuple[int, ...], size: tuple[int, int]
) -> Iterator[tuple[float, Layout]]:
    """Each kind of layout with its score; for tokens, with the best index of the extra tokens."""
    for layout in layouts_of(alone, size):
        if not _is_large(layout, alone):
            continue
        if layout.kind != "tokens":
            yield measured.score(layout), layout
            continue
        for by_column in (False, True):
            scores = measured.by_start(layout, by_column=by_column)
            best = int(scores.argmax())
            tokens = token_layout(alone[0], layout.grid, best, by_column=by_column)
            yield float(scores[best]), tokens


def _is_large(layout: Layout, alone: tuple[int, ...]) -> bool:
    """Whether a layout has enough cells to exclude chance, and more cells than other tokens."""
    cells = math.prod(layout.grid)
    return cells >= FEWEST and (layout.kind != "tokens" or alone[0] - cells < cells)


class _MeasuredPositions:
    """The measured positions of the cells of one output (5, ...), for each kind of layout.

    alone: its shape for one image; the output may have fewer channels.
    """

    def __init__(self, output: Tensor, alone: tuple[int, ...]) -> None:
        self._output = output
        self._alone = alone
        self._known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def score(self, layout: Layout) -> float:
        """The lower of the correlations with the expected positions along both axes, −1..1."""
        positions, (rows, columns) = self._at(layout), layout.grid
        if positions is None:
            return -1.0
        x, y, weight = positions
        across = torch.arange(columns, dtype=torch.float64).repeat(rows)
        down = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
        scores = [_correlation(x, across, weight)] if columns > 1 else []
        return min([*scores, _correlation(y, down, weight)] if rows > 1 else scores)

    def by_start(self, layout: Layout, *, by_column: bool) -> Tensor:
        """The scores of a layout of tokens by the number of cells before the other tokens.

        Computed together from running sums: there may be a thousand, in hundreds of layers.
        """
        x, y, weight = self._positions(layout.channel_axis)
        rows, columns = layout.grid
        cell = torch.arange(rows * columns, dtype=torch.float64)
        across, down = cell % columns, cell.div(columns, rounding_mode="floor")
        if by_column:
            across, down = cell.div(rows, rounding_mode="floor"), cell % rows
        pairs = [(x, across)] if columns > 1 else []
        pairs += [(y, down)] if rows > 1 else []
        scores = [_by_start(measured, expected, weight) for measured, expected in pairs]
        return torch.stack(scores).amin(dim=0)

    def are_scattered(self, layout: Layout) -> bool:
        """Whether the positions of the cells differ along both axes."""
        positions = self._at(layout)
        if positions is None:
            return False
        x, y, weight = positions
        spread = [_deviation(coordinates, weight) for coordinates in (x, y)]
        return min(spread) > SCATTERED

    def _at(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor] | None:
        """x, y and the strength of the response of each cell, row by row of the layout's map."""
        kept = list(self._alone)
        kept[layout.channel_axis] = self._output.shape[1 + layout.channel_axis]
        if tuple(kept) != tuple(
            self._output.shape[1:]
        ):  # another dimension than channels was reduced
            return None
        maps = self._positions(layout.channel_axis)
        if layout.kind != "tokens":
            turned = [values.T if layout.transposed else values for values in maps]
            return turned[0].flatten(), turned[1].flatten(), turned[2].flatten()
        if layout.token_order is not None:
            chosen: Any = list(layout.token_order)
        else:
            chosen = slice(layout.prefix, layout.prefix + layout.grid[0] * layout.grid[1])
        return maps[0][chosen], maps[1][chosen], maps[2][chosen]

    def _positions(self, channel_axis: int) -> tuple[Tensor, Tensor, Tensor]:
        if channel_axis not in self._known:
            steps = (self._output[1:] - self._output[0]).double()
            x, across = _share(steps[0], steps[1], channel_axis)
            y, down = _share(steps[2], steps[3], channel_axis)
            weight = torch.minimum(across, down)
            # A few strong cells must not dominate all others.
            self._known[channel_axis] = x, y, weight.clamp(max=float(weight.median()))
        return self._known[channel_axis]


def _share(one: Tensor, other: Tensor, channel_axis: int) -> tuple[Tensor, Tensor]:
    """The share of a cell's response that is due to the first pattern, and its size."""
    noise = one + other
    first, second = (response.mul(noise).sum(dim=channel_axis) for response in (one, other))
    both = first + second
    answers = both > 1e-9 * both.max().clamp(min=1e-30)
    share = torch.where(answers, first / torch.where(answers, both, 1), 0.5)
    return share.clamp(-0.5, 1.5), torch.where(answers, both, 0)


def _correlation(measured: Tensor, expected: Tensor, weight: Tensor) -> float:
    total = float(weight.sum())
    if total <= 0:
        return 0.0
    measured = measured - (measured * weight).sum() / total
    expected = expected - (expected * weight).sum() / total
    norm = float((measured**2 * weight).sum().sqrt() * (expected**2 * weight).sum().sqrt())
    return float((measured * expected * weight).sum()) / norm if norm > 0 else 0.0


def _by_start(measured: Tensor, expected: Tensor, weight: Tensor) -> Tensor:
    """Correlations (cells + 1), where token i is cell i before a gap and cell i − extra behind it.

    Entry s: with the gap behind s cells. found, weight: (cells + extra,); expected: (cells,).
    """
    cells = len(expected)
    extra = len(measured) - cells
    measured = measured - measured.mean()  # small numbers: the sums of squares are subtracted
    expected = expected - expected.mean()
    sides = [(measured[at : at + cells], weight[at : at + cells]) for at in (0, extra)]

    def total_of(term: Callable[[Tensor], Tensor]) -> Tensor:
        before, behind = (_running(share * term(values)) for values, share in sides)
        return before + behind[-1] - behind

    total = total_of(torch.ones_like)
    f, e = total_of(lambda values: values) / total, total_of(lambda _: expected) / total
    both = total_of(lambda values: values * expected) / total - f * e
    spread = total_of(torch.square) / total - f**2
    wanted = total_of(lambda _: expected**2) / total - e**2
    return (both / (spread * wanted).clamp(min=0).sqrt()).nan_to_num(0, 0, 0)


def _running(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(dim=0)])


def _deviation(values: Tensor, weight: Tensor) -> float:
    total = float(weight.sum())
    if total <= 0:
        return 0.0
    mean = (values * weight).sum() / total
    return float((((values - mean) ** 2 * weight).sum() / total).sqrt())


def covered(module: nn.Module, layer: str, image: Tensor) -> Rect | None:
    """The part of the model input that a layer depends on; None if it is the whole input.

    Measured by the gradient of a random sum of the layer's output, which is exactly zero outside a
    crop in the model. Costs a forward and a backward pass. Raises the exceptions of the model.
    """
    taken = image.clone().requires_grad_()
    outputs: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_hook(
        lambda _module, _args, output: outputs.append(output), prepend=True
    )
    try:
        with kept_torch_state(random=False):
            module(taken.clone())
    finally:
        handle.remove()
    last = outputs[-1]
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(last.shape, generator=generator).to(last)
    (gradient,) = gradients(last, [taken], weights[None])
    seen = gradient[0, 0].abs().sum(dim=0) > 0
    height, width = seen.shape
    rows, columns = (seen.any(dim=axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    if not rows:
        return None
    left, right = columns[0] / width, (columns[-1] + 1) / width
    top, bottom = rows[0] / height, (rows[-1] + 1) / height
    if max(left, top, 1 - right, 1 - bottom) <= UNCOVERED:
        return None
    return left, top, right - left, bottom - top
