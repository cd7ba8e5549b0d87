"""Methods that hide parts of the image or of a layer and watch the answer.

Each is a generator that yields where it wants a replica and is sent one. Between two chunks nothing
of the request is on any replica, so that other requests take their turn, and a request whose client
has gone simply ends. What random numbers there are come from the question's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from api_schemas.methods import STRIDE, WINDOW
from service.cam.hooks import replacing
from service.cam.methods import fuse, over_input, upsample, weighted
from service.images.decode import Rect
from service.inference.captures import Part, layout_of_layer
from service.models.compiled.cut import Uncuttable, tail
from service.models.loaded import LoadedModel
from service.models.pool import Replica

Maps = list[Tensor]
Steps = Generator[None, Replica, Maps]
"""Sent a replica at each yield; returns the map (h, w) of each target, on the CPU."""

CHUNK = 8
"""Images in one forward pass of a chunk; more are slower on a CPU."""


def chunk_of(model: LoadedModel) -> int:
    """CHUNK, or one image where a model's answers depend on the others in a batch."""
    return CHUNK if model.behaviour.batchable else 1


GRID = 7
"""Cells a side of RISE's masks."""

TAIL_BYTES = 32 << 20
"""Bytes of ablated activations in one pass of a tail."""


def scorecam(part: Part) -> Steps:
    """Score-CAM: `ReLU(Σ_c w_c · A_c)`, `w = softmax_c(y(X ∘ U(A_c)))`.

    U scales a channel's map up to the input and to 0..1; a constant channel masks everything. The
    paper subtracts y of a baseline, which the softmax over channels cancels.

    Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
    CVPR workshops 2020, equations 3 and 4 and algorithm 1.
    """
    image = input_of(part)
    cams: list[Maps] = [[] for _ in part.targets]
    for path, values in part.activations.items():
        activation = layout_of_layer(part.model, path).as_map(values).float()
        masked = partial(_masked, image, activation[0], part.model.preprocessing.covers)
        logits = yield from _in_chunks(part, activation.shape[1], masked)
        for place, maps in enumerate(cams):
            weights = part.value(logits, place).softmax(dim=0)
            maps.append(weighted(activation, weights[None].to(activation))[0].cpu())
    return [fuse(maps) for maps in cams]


def ablationcam(part: Part) -> Steps:
    """Ablation-CAM: `ReLU(Σ_c w_c · A_c)`, `w_c = (y − y without A_c) / |y|`.

    Only the part of the model behind the layer runs again, where its graph can be cut there.

    The paper divides by y, which it takes to be positive. Of a logit or a lead below zero that
    would show what speaks against the class.

    Desai and Ramaswamy, "Ablation-CAM: Visual Explanations for Deep Convolutional Network via
    Gradient-free Localization", WACV 2020, equations 3 and 4.
    """
    cams: list[Maps] = [[] for _ in part.targets]
    for path, values in part.activations.items():
        layout = layout_of_layer(part.model, path)
        axis = 1 + layout.channel_axis
        logits = yield from _ablated(part, path, values, axis)
        activation = layout.as_map(values).float()
        for place, maps in enumerate(cams):
            whole = part.value(part.logits, place)
            drop = whole - part.value(logits, place)
            weights = drop / whole.abs() if whole != 0 else drop
            maps.append(weighted(activation, weights[None].to(activation))[0].cpu())
    return [fuse(maps) for maps in cams]


def occlusion(part: Part) -> Steps:
    """Occlusion: by how much the logit falls when a grey square lies there; signed.

    A square of 32 pixels moves in steps of 16; each pixel has the mean fall of the squares that
    cover it. Grey is the mean colour of the normalisation.

    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014.
    """
    image = input_of(part)
    height, width = image.shape[2:]
    squares = [(rows, columns) for rows in windows(height) for columns in windows(width)]

    def occluded(some: slice) -> Tensor:
        images = image.repeat(len(squares[some]), 1, 1, 1)
        for each, ((top, bottom), (left, right)) in zip(images, squares[some], strict=True):
            each[:, top:bottom, left:right] = 0
        return images

    logits = yield from _in_chunks(part, len(squares), occluded)
    covered = torch.zeros(height, width)
    falls = [torch.zeros(height, width) for _ in part.targets]
    for index, ((top, bottom), (left, right)) in enumerate(squares):
        covered[top:bottom, left:right] += 1
        for place, fall in enumerate(falls):
            lost = part.value(part.logits, place) - part.value(logits[index], place)
            fall[top:bottom, left:right] += lost
    return [fall / covered for fall in falls]


def windows(length: int) -> list[tuple[int, int]]:
    """Where occlusion's squares begin and end along a side; the last may be cut short."""
    starts = range(0, max(length - WINDOW, 0) + STRIDE, STRIDE)
    return [(start, min(start + WINDOW, length)) for start in starts if start < length]


def rise(part: Part) -> Steps:
    """RISE: the mean score where a pixel is kept, minus the mean score of all masks; signed.

    Masks are 7 × 7 random grids (kept with probability ½), scaled up bilinearly and shifted. The
    paper's map is the first of the two terms alone: high everywhere, so that zero would not mean
    "no evidence".

    Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC
    2018, equation 6.
    """
    image = input_of(part)
    size = (int(image.shape[2]), int(image.shape[3]))
    grids, shifts = _random_grids(part.question.samples, part.question.seed)

    def masks(some: slice) -> Tensor:
        pairs = zip(grids[some], shifts[some], strict=True)
        return torch.stack([_shifted(grid, shift, size) for grid, shift in pairs]).to(image.device)

    logits = yield from _in_chunks(part, len(grids), lambda some: image * masks(some)[:, None])
    scores = part.model.scores(logits)
    values = torch.stack([part.value(scores, place) for place in range(len(part.targets))])
    leads = values - values.mean(dim=1, keepdim=True)
    total, kept = torch.zeros(len(values), *size), torch.zeros(size)
    for start in range(0, len(grids), CHUNK):
        some = slice(start, start + CHUNK)
        drawn = masks(some).cpu()
        total += torch.einsum("tn,nhw->thw", leads[:, some], drawn)
        kept += drawn.sum(dim=0)
    # A pixel that no mask keeps, as with few samples, was not looked at.
    return list(torch.where(kept > 0, total / kept, 0))


def input_of(part: Part) -> Tensor:
    """The normalised image (1, C, H, W) on the model's device."""
    return part.model.normalised(part.question.pixels[None])


def _in_chunks(
    part: Part, count: int, images: Callable[[slice], Tensor]
) -> Generator[None, Replica, Tensor]:
    """The logits (count, classes), on the CPU, of images made chunk by chunk."""
    rows = []
    size = chunk_of(part.model)
    for start in range(0, count, size):
        replica = yield
        with torch.no_grad():
            chunk = images(slice(start, start + size)).to(part.model.dtype)
            rows.append(part.model.logits(replica.module(chunk)).cpu())
    return torch.cat(rows) if rows else torch.zeros(0, len(part.logits))


def _masked(image: Tensor, channels: Tensor, covers: Rect | None, some: slice) -> Tensor:
    """The image times each of some channels (C, h, w), scaled up to what they cover and to 0..1."""
    large = over_input(channels[some], (int(image.shape[2]), int(image.shape[3])), covers)
    low = large.amin(dim=(1, 2), keepdim=True)
    span = large.amax(dim=(1, 2), keepdim=True) - low
    masks = torch.where(span > 0, (large - low) / torch.where(span > 0, span, 1), 0)
    return image * masks[:, None]


def _ablated(part: Part, path: str, values: Tensor, axis: int) -> Generator[None, Replica, Tensor]:
    """The logits (channels, classes), on the CPU, with one channel of a layer's output zeroed."""
    channels = values.shape[axis]
    behind: dict[int, tuple[Replica, Callable[[Tensor], Tensor], int]] = {}
    rows: list[Tensor] = []
    start = 0
    while start < channels:
        replica = yield
        if id(replica) not in behind:
            behind[id(replica)] = replica, *_behind(replica, part, path, values)
        _, logits_of, size = behind[id(replica)]
        chosen = range(start, min(start + size, channels))
        start = chosen.stop
        ablated = values.repeat(len(chosen), *[1] * (values.ndim - 1))
        for row, channel in enumerate(chosen):
            ablated[row].select(axis - 1, channel).zero_()
        with torch.no_grad():
            rows.append(logits_of(ablated).cpu())
    return torch.cat(rows)


def _behind(
    replica: Replica, part: Part, path: str, values: Tensor
) -> tuple[Callable[[Tensor], Tensor], int]:
    """From a layer's outputs (n, ...) to logits (n, classes), and how many to give it at once.

    The cheapest way that is right: the model's graph cut at the layer; else the whole model run on
    one image, its layer's output replaced by n others, which works where everything beside it is
    broadcast; else on n images.
    """
    layout = layout_of_layer(part.model, path)

    def replaced(outputs: Tensor, images: Tensor) -> Tensor:
        calls = part.model.layer(path).calls
        with replacing(replica.module, path, layout.as_given(outputs), call=calls - 1):
            return part.model.logits(replica.module(images))

    def by_broadcast(outputs: Tensor) -> Tensor:
        return replaced(outputs, input_of(part))

    def in_full(outputs: Tensor) -> Tensor:
        return replaced(outputs, input_of(part).repeat(len(outputs), 1, 1, 1))

    def by_tail(outputs: Tensor) -> Tensor:
        return part.model.logits(cut(layout.as_given(outputs)))

    if not part.model.behaviour.batchable:
        return in_full, 1
    candidates = [by_broadcast]
    with suppress(Uncuttable):
        cut = tail(replica.module, path)
        candidates.insert(0, by_tail)
    twice = values.repeat(2, *[1] * (values.ndim - 1))
    for candidate in candidates:
        if _gives(candidate, twice, part.logits):
            return candidate, max(1, TAIL_BYTES // (4 * values.numel()))
    return in_full, chunk_of(part.model)


def _gives(function: Callable[[Tensor], Tensor], outputs: Tensor, logits: Tensor) -> bool:
    try:
        with torch.no_grad():
            made = function(outputs).cpu()
    except (RuntimeError, TypeError):
        return False
    expected = logits.expand_as(made) if made.ndim == 2 else logits
    return made.shape == (2, *logits.shape) and torch.allclose(
        made, expected, rtol=1e-3, atol=1e-3 * float(logits.abs().max())
    )


def _random_grids(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coarse masks (count, GRID, GRID) of zeros and ones, and where each is shifted to, 0..1."""
    generator = torch.Generator().manual_seed(seed)
    grids = (torch.rand(count, GRID, GRID, generator=generator) < 0.5).float()
    return grids, torch.rand(count, 2, generator=generator)


def _shifted(grid: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
    """One mask (H, W): the grid scaled up to one cell more than the input, cut at the shift."""
    cell = [-(-side // GRID) for side in size]
    large = upsample(grid[None], (size[0] + cell[0], size[1] + cell[1]))[0]
    top, left = (int(part * step) for part, step in zip(shift.tolist(), cell, strict=True))
    return large[top : top + size[0], left : left + size[1]]
