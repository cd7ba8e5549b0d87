"""Methods that hide parts of the image or of a layer and compare the logits.

Each is a generator that yields where it needs a replica and is sent one. Between two chunks nothing
of the request is on any replica, so that other requests take their turn, and a request whose client
has disconnected ends. Random numbers come from the question's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from api_schemas.methods import STRIDE, WINDOW
from service.cam.formulas import fuse, over_input, upsample, weighted
from service.cam.hooks import replace_output
from service.inference.forward_pass import ImagePass, feature_layout
from service.models.compiled.cut import Uncuttable, split
from service.models.loaded import LoadedModel
from service.models.pool import Replica

Maps = list[Tensor]
Steps = Generator[None, Replica, Maps]
"""Sent a replica at each yield; returns the map (h, w) of each target, on the CPU."""

CHUNK = 8
"""Images in one forward pass of a chunk; more are slower on a CPU."""


def chunk_size(model: LoadedModel) -> int:
    """CHUNK, or one image where a model's answers depend on the others in a batch."""
    return CHUNK if model.behaviour.batchable else 1


GRID = 7
"""Cells a side of RISE's masks."""

TAIL_BYTES = 32 << 20
"""Bytes of ablated activations in one pass of a tail."""


def scorecam(image_pass: ImagePass) -> Steps:
    """Score-CAM: `ReLU(Σ_c w_c · A_c)`, `w = softmax_c(y(X ∘ U(A_c)))`.

    U scales a channel's map up to the input and to 0..1; a constant channel masks everything. The
    paper subtracts y of a baseline, which the softmax over channels cancels.

    Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
    CVPR workshops 2020, equations 3 and 4 and algorithm 1.
    """
    cams: list[Maps] = [[] for _ in image_pass.targets]
    for path, values in image_pass.target_activations.items():
        activation = feature_layout(image_pass.model, path).as_map(values).float()
        masked = partial(_masked, image_pass, activation[0].cpu())
        logits = yield from chunked_logits(image_pass.model, activation.shape[1], masked)
        for position, maps in enumerate(cams):
            weights = image_pass.target_value(logits, position).softmax(dim=0)
            maps.append(weighted(activation, weights[None].to(activation))[0].cpu())
    return [fuse(maps) for maps in cams]


def ablationcam(image_pass: ImagePass) -> Steps:
    """Ablation-CAM: `ReLU(Σ_c w_c · A_c)`, `w_c = (y − y without A_c) / |y|`.

    Only the part of the model behind the layer runs again, where its graph can be cut there.

    The paper divides by y, which it takes to be positive. With a negative y that would show what
    speaks against the class.

    Desai and Ramaswamy, "Ablation-CAM: Visual Explanations for Deep Convolutional Network via
    Gradient-free Localization", WACV 2020, equations 3 and 4.
    """
    cams: list[Maps] = [[] for _ in image_pass.targets]
    for path, values in image_pass.target_activations.items():
        layout = feature_layout(image_pass.model, path)
        axis = 1 + layout.channel_axis
        logits = yield from _ablated_logits(image_pass, path, values, axis)
        activation = layout.as_map(values).float()
        for position, maps in enumerate(cams):
            whole = image_pass.target_value(image_pass.logits, position)
            drop = whole - image_pass.target_value(logits, position)
            weights = drop / whole.abs() if whole != 0 else drop
            maps.append(weighted(activation, weights[None].to(activation))[0].cpu())
    return [fuse(maps) for maps in cams]


def occlusion(image_pass: ImagePass) -> Steps:
    """Occlusion: by how much the logit falls when a grey square lies there; signed.

    A square of 32 pixels moves in steps of 16; each pixel has the mean fall of the squares that
    cover it. Grey is the mean colour of the normalisation.

    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014.
    """
    height, width = image_pass.question.pixels.shape[1:]
    grey = mean_colour(image_pass.model)
    squares = [(rows, columns) for rows in windows(height) for columns in windows(width)]

    def occluded(chunk: slice) -> Tensor:
        images = image_pass.question.pixels.repeat(len(squares[chunk]), 1, 1, 1)
        squares_of_chunk = squares[chunk]
        for copy, ((top, bottom), (left, right)) in zip(images, squares_of_chunk, strict=True):
            copy[:, top:bottom, left:right] = grey
        return images

    logits = yield from chunked_logits(image_pass.model, len(squares), occluded)
    covered = torch.zeros(height, width)
    falls = [torch.zeros(height, width) for _ in image_pass.targets]
    for index, ((top, bottom), (left, right)) in enumerate(squares):
        covered[top:bottom, left:right] += 1
        for position, fall in enumerate(falls):
            lost = image_pass.target_value(image_pass.logits, position) - image_pass.target_value(
                logits[index], position
            )
            fall[top:bottom, left:right] += lost
    return [fall / covered for fall in falls]


def windows(length: int) -> list[tuple[int, int]]:
    """Where occlusion's squares begin and end along a side; the last may be cut short."""
    starts = range(0, max(length - WINDOW, 0) + STRIDE, STRIDE)
    return [(start, min(start + WINDOW, length)) for start in starts if start < length]


def rise(image_pass: ImagePass) -> Steps:
    """RISE: the mean score where a pixel is kept, minus the mean score of all masks; signed.

    Masks are 7 × 7 random grids (kept with probability ½), scaled up bilinearly and shifted. The
    paper's map is the first of the two terms alone: high everywhere, so that zero would not mean
    "no evidence".

    Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC
    2018, equation 6.
    """
    size = (image_pass.question.pixels.shape[1], image_pass.question.pixels.shape[2])
    grids, shifts = _random_grids(image_pass.question.samples, image_pass.question.seed)

    def masks(chunk: slice) -> Tensor:
        pairs = zip(grids[chunk], shifts[chunk], strict=True)
        return torch.stack([_shifted(grid, shift, size) for grid, shift in pairs])

    logits = yield from chunked_logits(
        image_pass.model, len(grids), lambda chunk: _dimmed(image_pass, masks(chunk))
    )
    scores = image_pass.model.scores(logits)
    values = torch.stack([_of_scores(image_pass, scores, target) for target in image_pass.targets])
    leads = values - values.mean(dim=1, keepdim=True)
    total, kept = torch.zeros(len(values), *size), torch.zeros(size)
    for start in range(0, len(grids), CHUNK):
        chunk = slice(start, start + CHUNK)
        drawn = masks(chunk)
        total += torch.einsum("tn,nhw->thw", leads[:, chunk], drawn)
        kept += drawn.sum(dim=0)
    # A pixel that no mask keeps, as with few samples, has no score.
    return list(torch.where(kept > 0, total / kept, 0))


def _of_scores(image_pass: ImagePass, scores: Tensor, target: int) -> Tensor:
    """What is explained, of scores (n, classes) in place of logits; the weights are the image's."""
    contrast = image_pass.contrast(target)
    if contrast is None:
        return scores[:, target]
    weights = contrast.as_mapping(image_pass.logits)
    return replace(contrast, weights=tuple(weights.values())).lead(scores, target)


def normalised_image(image_pass: ImagePass) -> Tensor:
    """The normalised image (1, C, H, W) on the model's device."""
    return image_pass.model.normalised(image_pass.question.pixels[None])


def chunked_logits(
    model: LoadedModel, count: int, images: Callable[[slice], Tensor]
) -> Generator[None, Replica, Tensor]:
    """The logits (count, classes), on the CPU, of images, uint8 (n, C, h, w), made chunk by chunk.

    They need no gradient, so they run in the compiled lane if the images have its size.
    """
    rows = []
    size = chunk_size(model)
    for start in range(0, count, size):
        replica = yield
        with torch.no_grad():
            rows.append(logits_of(model, replica, images(slice(start, min(start + size, count)))))
    return torch.cat(rows) if rows else torch.zeros(0, len(model.labels))


def logits_of(model: LoadedModel, replica: Replica, pixels: Tensor) -> Tensor:
    """The logits (n, classes), on the CPU, of images, uint8 (n, C, h, w), that need no gradient.

    In the compiled lane if they have its size, else on the replica.
    """
    lane = model.compiled
    if lane is not None and tuple(pixels.shape[2:]) == model.preprocessing.crop:
        return model.logits(lane.tail(*lane.front(pixels))).cpu()
    return model.logits(replica.module(model.normalised(pixels))).cpu()


def mean_colour(model: LoadedModel) -> Tensor:
    """The mean colour of the normalisation, uint8 (C, 1, 1)."""
    mean = torch.tensor(model.preprocessing.mean)[:, None, None]
    return (mean * 255).round().to(torch.uint8)


def _dimmed(image_pass: ImagePass, masks: Tensor) -> Tensor:
    """The image through masks (n, h, w), uint8 (n, C, h, w): 1 shows it, 0 the mean colour."""
    grey, image = mean_colour(image_pass.model).float(), image_pass.question.pixels.float()
    return torch.lerp(grey, image, masks[:, None]).round_().to(torch.uint8)


def _masked(image_pass: ImagePass, channels: Tensor, chunk: slice) -> Tensor:
    """The image through each channel (C, h, w) of a chunk, scaled up to what it covers, to 0..1."""
    size = (image_pass.question.pixels.shape[1], image_pass.question.pixels.shape[2])
    large = over_input(channels[chunk], size, image_pass.model.preprocessing.covers)
    low = large.amin(dim=(1, 2), keepdim=True)
    span = large.amax(dim=(1, 2), keepdim=True) - low
    masks = torch.where(span > 0, (large - low) / torch.where(span > 0, span, 1), 0)
    return _dimmed(image_pass, masks)


def _ablated_logits(
    image_pass: ImagePass, path: str, values: Tensor, axis: int
) -> Generator[None, Replica, Tensor]:
    """The logits (channels, classes), on the CPU, with one channel of a layer's output zeroed."""

    def outputs(channels: range) -> Tensor:
        ablated = values.repeat(len(channels), *[1] * (values.ndim - 1))
        for row, channel in enumerate(channels):
            ablated[row].select(axis - 1, channel).zero_()
        return ablated

    return (yield from replaced_logits(image_pass, path, values, values.shape[axis], outputs))


def replaced_logits(
    image_pass: ImagePass,
    path: str,
    values: Tensor,
    count: int,
    outputs: Callable[[range], Tensor],
) -> Generator[None, Replica, Tensor]:
    """The logits (count, classes), on the CPU, of the image with a layer's output replaced.

    values:  what the layer returns, (1, ...) by image. outputs: some replacements, (n, ...).
    """
    by_replica: dict[int, tuple[Replica, Callable[[Tensor], Tensor], int]] = {}
    rows: list[Tensor] = []
    start = 0
    while start < count:
        replica = yield
        if id(replica) not in by_replica:
            by_replica[id(replica)] = (
                replica,
                *_logits_from_layer(replica, image_pass, path, values),
            )
        _, logits_of, size = by_replica[id(replica)]
        chosen = range(start, min(start + size, count))
        start = chosen.stop
        with torch.no_grad():
            rows.append(logits_of(outputs(chosen)).cpu())
    return torch.cat(rows)


def _logits_from_layer(
    replica: Replica, image_pass: ImagePass, path: str, values: Tensor
) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function from a layer's outputs (n, ...) to logits (n, classes), and its largest n.

    The cheapest one that is correct: the model's graph cut at the layer, with what goes beside it
    repeated; else the whole model run on one image, its layer's output replaced by n others, which
    works where everything beside it is broadcast; else on n images.
    """
    layout = feature_layout(image_pass.model, path)

    def logits_with(outputs: Tensor, images: Tensor) -> Tensor:
        calls = image_pass.model.layer(path).calls
        with replace_output(replica.module, path, layout.as_given(outputs), call=calls - 1):
            return image_pass.model.logits(replica.module(images))

    def by_broadcast(outputs: Tensor) -> Tensor:
        return logits_with(outputs, normalised_image(image_pass))

    def in_full(outputs: Tensor) -> Tensor:
        return logits_with(outputs, normalised_image(image_pass).repeat(len(outputs), 1, 1, 1))

    def by_tail(outputs: Tensor) -> Tensor:
        others = (each.expand(len(outputs), *each.shape[1:]) for each in beside)
        return image_pass.model.logits(tail(layout.as_given(outputs), *others))

    if not image_pass.model.behaviour.batchable:
        return in_full, 1
    candidates = [by_broadcast]
    with suppress(Uncuttable, RuntimeError, TypeError):
        front, tail = split(replica.module, path)
        with torch.no_grad():
            beside = front(normalised_image(image_pass))[1:]
        candidates.insert(0, by_tail)
    twice = values.repeat(2, *[1] * (values.ndim - 1))
    for candidate in candidates:
        if _reproduces(candidate, twice, image_pass.logits):
            return candidate, max(1, TAIL_BYTES // (4 * values.numel()))
    return in_full, chunk_size(image_pass.model)


def _reproduces(function: Callable[[Tensor], Tensor], outputs: Tensor, logits: Tensor) -> bool:
    try:
        with torch.no_grad():
            computed = function(outputs).cpu()
    except (RuntimeError, TypeError):
        return False
    expected = logits.expand_as(computed) if computed.ndim == 2 else logits
    return computed.shape == (2, *logits.shape) and torch.allclose(
        computed, expected, rtol=1e-3, atol=1e-3 * float(logits.abs().max())
    )


def random_masks(count: int, seed: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """The masks of RISE, (height, width) of values 0..1, one after the other."""
    for grid, shift in zip(*_random_grids(count, seed), strict=True):
        yield _shifted(grid, shift, size)


def _random_grids(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coarse masks (count, GRID, GRID) of zeros and ones, and where each is shifted to, 0..1."""
    generator = torch.Generator().manual_seed(seed)
    grids = (torch.rand(count, GRID, GRID, generator=generator) < 0.5).float()
    return grids, torch.rand(count, 2, generator=generator)


def _shifted(grid: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
    """One mask (H, W): the grid scaled up to one cell more than the input, cut at the shift."""
    cell = [-(-side // GRID) for side in size]
    large = upsample(grid[None], (size[0] + cell[0], size[1] + cell[1]))[0]
    top, left = (int(share * step) for share, step in zip(shift.tolist(), cell, strict=True))
    return large[top : top + size[0], left : left + size[1]]
