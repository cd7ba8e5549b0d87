"""What a safetensors file says beside its tensors: how to feed the model and read its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from service.errors import ConfigurationError
from service.images import Preprocessing
from service.models.catalog import Interpolation, Output


def output_in(metadata: Mapping[str, str]) -> Output:
    """`output`: how scores come from logits; softmax where it is not said."""
    said = metadata.get("output", "softmax")
    for known in get_args(Output):
        if said == known:
            return known  # type: ignore[no-any-return]
    raise ConfigurationError(
        f"the metadata `output` of the weights file is {said!r}; it takes softmax, sigmoid or none."
    )


def preprocessing_in(metadata: Mapping[str, str], default: Preprocessing) -> Preprocessing:
    """`resize`, `crop`, `mean`, `std`, `interpolation` of a safetensors file, or the default's."""
    try:
        crop = [int(side) for side in metadata["crop"].split(",")] if "crop" in metadata else None
        found = Preprocessing(
            resize=int(metadata.get("resize", default.resize)),
            crop=(crop[0], crop[-1]) if crop else default.crop,
            mean=_floats(metadata["mean"]) if "mean" in metadata else default.mean,
            std=_floats(metadata["std"]) if "std" in metadata else default.std,
            interpolation=metadata.get("interpolation", default.interpolation),  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise ConfigurationError(
            f"the metadata of the weights file cannot be read: {error}"
        ) from error
    is_sound = (
        min(found.resize, *found.crop) > 0
        and len(found.mean) == len(found.std) > 0
        and all(map(math.isfinite, (*found.mean, *found.std)))
        and 0 not in found.std  # the mean of a channel may be 0
        and found.interpolation in get_args(Interpolation)
    )
    if not is_sound:
        raise ConfigurationError(
            "the metadata of the weights file must have `resize` and `crop` over 0, one number a "
            "channel in `mean` and in `std` (for RGB three numbers), none of these 0, and "
            "`interpolation` bilinear, bicubic or nearest."
        )
    return found


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))
