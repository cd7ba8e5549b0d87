"""What the shapes in a weights file say about its model: the number of classes, the image size."""

from __future__ import annotations

import math
from typing import Any, cast

import torchvision
from torch import nn

from service.errors import ConfigurationError
from service.models.weights.weights_file import SHOWN, Weights, selected_from

_POSITIONS = ("encoder.pos_embedding", "pos_embed")
"""Position embeddings of torchvision and of timm: one vector for each token."""


SKETCHED = (1013, 1019)
"""Numbers of classes of two sketches: sizes that no other dimension has."""


def classes_in(sketches: tuple[nn.Module, nn.Module], weights: Weights, source: str) -> int | None:
    """The number of classes of a weights file, or None where its keys do not say it.

    sketches: the model for the numbers of classes in SKETCHED; what differs between them is the
              head. Its sizes may be multiples, such as a detector's four coordinates for a class.
    Raises ConfigurationError where several heads of the file have several numbers.
    """
    one, other = (sketch.state_dict() for sketch in sketches)
    tensors = selected_from(weights, one, source).tensors
    counts = {
        key: _count(int(tensors[key].shape[axis]), size, other[key].shape[axis])
        for key, tensor in one.items()
        if key in tensors and tensors[key].ndim == tensor.ndim
        for axis, size in enumerate(tensor.shape)
        if key in other and size != other[key].shape[axis]
    }
    numbers = sorted(set(counts.values()))
    if len(numbers) > 1:
        heads = ", ".join(f"{key}: {count}" for key, count in sorted(counts.items())[:SHOWN])
        raise ConfigurationError(
            f"{source} has heads of {' and '.join(map(str, numbers))} classes ({heads}); set "
            "arguments = { num_classes = … } in models.toml."
        )
    return numbers[0] if numbers else None


def _count(size: int, first: int, second: int) -> int:
    """The number of classes for which a dimension is `size`, by its sizes in the two sketches.

    Where there is none, as for another architecture, the size itself.
    """
    by_class = (second - first) // (SKETCHED[1] - SKETCHED[0])
    count, rest = divmod(size - first, by_class or 1)
    return size if rest else SKETCHED[0] + count


def has_positions(weights: Weights) -> bool:
    """Whether a weights file has a position embedding, as vision transformers do."""
    return any(entry.name.endswith(_POSITIONS) for entry in weights.entries)


def image_size_in(sketch: nn.Module, weights: Weights, source: str) -> int | None:
    """The side of the square images that a vision transformer was trained on, in pixels.

    None where the position embedding has the sketch's own length, or is of another form.
    Raises ConfigurationError where the patches of the file are no square grid.
    """
    patches = _patches(sketch)
    wanted = sketch.state_dict()
    key = next((key for key in _POSITIONS if key in wanted), None)
    if patches is None or key is None:
        return None
    side, pixels = patches
    in_model = tuple(wanted[key].shape)
    in_file = tuple(selected_from(weights, wanted, source).tensors.get(key, wanted[key]).shape)
    if len(in_model) != 3 or len(in_file) != 3 or in_file[1] == in_model[1]:
        return None
    count = in_file[1] - (in_model[1] - side * side)  # class tokens have positions, too
    trained = math.isqrt(max(count, 0))
    if trained == 0 or trained * trained != count:
        raise ConfigurationError(
            f"{source} does not fit the model. {key} has the shape {in_file} in the file and "
            f"{in_model} in the model, and {max(count, 0)} patches are no square grid, so that "
            "they do not tell the image size. Is it the weights of another architecture?"
        )
    return trained * pixels


def _patches(sketch: nn.Module) -> tuple[int, int] | None:
    """The patches along a side of the model input, and the pixels along a side of a patch."""
    if isinstance(sketch, torchvision.models.VisionTransformer):
        return sketch.image_size // sketch.patch_size, sketch.patch_size
    embedding = cast("Any", getattr(sketch, "patch_embed", None))
    grid, size = getattr(embedding, "grid_size", None), getattr(embedding, "img_size", None)
    if grid is None or size is None or grid[0] != grid[1] or size[0] != size[1]:
        return None
    return grid[0], size[0] // grid[0]  # a convolutional stem makes a patch larger than its own
