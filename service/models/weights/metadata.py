"""The metadata of a safetensors file: preprocessing and output activation of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

from service.errors import ConfigurationError
from service.images.decode import Preprocessing
from service.models.catalog import Fit, Interpolation, Output

PREPROCESSING_KEYS = ("resize", "crop", "fit", "mean", "std", "interpolation")
"""Metadata keys for the input of a model."""


def output_in(metadata: Mapping[str, str]) -> Output:
    """`output`: the activation that turns logits into scores; softmax by default."""
    output = metadata.get("output", "softmax")
    for known in get_args(Output):
        if output == known:
            return known  # type: ignore[no-any-return]
    raise ConfigurationError(
        f"the metadata `output` of the weights file is {output!r}; it must be softmax, "
        "sigmoid or none."
    )


def preprocessing_in(metadata: Mapping[str, str], default: Preprocessing) -> Preprocessing:
    """The preprocessing of a file: PREPROCESSING_KEYS, otherwise the default's values.

    Raises ConfigurationError.
    """
    try:
        crop = _sides(metadata["crop"]) if "crop" in metadata else default.crop
        resize = _sides(metadata["resize"]) if "resize" in metadata else None
        shorter = resize[0] if resize and resize[0] == resize[1] else resize
        preprocessing = Preprocessing(
            resize=shorter or default.resize,
            crop=crop,
            mean=_floats(metadata["mean"]) if "mean" in metadata else default.mean,
            std=_floats(metadata["std"]) if "std" in metadata else default.std,
            interpolation=metadata.get("interpolation", default.interpolation),  # type: ignore[arg-type]
            fit=metadata.get("fit", default.fit),  # type: ignore[arg-type]
        )
        is_sound = (
            min(*(resize or crop), *crop) > 0
            and len(preprocessing.mean) == len(preprocessing.std) > 0
            and all(map(math.isfinite, (*preprocessing.mean, *preprocessing.std)))
            and 0 not in preprocessing.std  # a mean may be 0
            and preprocessing.interpolation in get_args(Interpolation)
            and preprocessing.fit in get_args(Fit)
        )
        check_unit(preprocessing.mean, preprocessing.std)
    except ValueError as error:
        raise ConfigurationError(
            f"the metadata of the weights file cannot be read: {error}"
        ) from error
    if not is_sound:
        raise ConfigurationError(
            "the metadata of the weights file must have `resize` and `crop` above 0, one number "
            "per channel in `mean` and in `std` (three for RGB), no 0 in `std`, "
            "`interpolation` bilinear, bicubic or nearest, and `fit` crop, squash or pad."
        )
    return preprocessing


MEAN_BOUNDS, LARGEST_STD = (-1.0, 2.0), 4.0
"""Bounds of `mean` and `std` for values in 0..1; for values in 0..255 a mean is far above."""


def check_unit(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError if mean or std cannot be for values in 0..1."""
    wrong = [x for x in mean if not MEAN_BOUNDS[0] <= x <= MEAN_BOUNDS[1]]
    wrong += [x for x in std if abs(x) > LARGEST_STD]
    if wrong:
        raise ValueError(
            "mean and std are for values in 0..1; divide numbers for 0–255 by 255: "
            f"write {wrong[0] / 255:.4g} for {wrong[0]:g}"
        )


def _sides(text: str) -> tuple[int, int]:
    sides = [int(side) for side in text.split(",")]
    return sides[0], sides[-1]


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))
