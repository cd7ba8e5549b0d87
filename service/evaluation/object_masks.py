"""Masks of the objects in images, from a COCO file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import ConfigurationError, InvalidOption
from service.images.upload import area_mask

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ObjectMasks:
    """The annotations of a COCO file, by the file name of their image."""

    file: Path
    by_name: Mapping[str, Sequence[Mapping[str, Any]]]

    def mask(self, name: Path, size: Size) -> NDArray[np.bool_] | None:
        """Return what the objects of an image cover, bool (h, w); None if none is annotated.

        name: of the image in its folder; a COCO file that has its last part alone also fits.
        size: (w, h) of the upright image.

        Raises ConfigurationError for an annotation that does not fit the image.
        """
        found = self.by_name.get(name.as_posix(), self.by_name.get(name.name, ()))
        if not found:
            return None
        covered = np.zeros(size[::-1], dtype=np.bool_)
        for annotation in found:
            try:
                covered |= _covered(annotation, size)
            except (InvalidOption, ValueError, TypeError, KeyError) as error:
                raise ConfigurationError(
                    f"--masks {self.file}: annotation {annotation.get('id')} of {name} cannot be "
                    f"used: {error}"
                ) from error
        return covered


def read_masks(file: Path) -> ObjectMasks:
    """Read a COCO file: polygons, run lengths, or boxes where there is neither.

    Raises ConfigurationError if it cannot be read or is not such a file.
    """
    try:
        coco = orjson.loads(file.read_bytes())
        names = {image["id"]: str(image["file_name"]) for image in coco["images"]}
        by_name: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for annotation in coco["annotations"]:
            by_name[names[annotation["image_id"]]].append(dict(annotation))
    except OSError as error:
        raise ConfigurationError(f"--masks {file}: {error.strerror}.") from error
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"--masks {file} is not a COCO file with `images` (`id`, `file_name`) and "
            f"`annotations` (`image_id`, `segmentation` or `bbox`): {type(error).__name__} {error}."
        ) from error
    return ObjectMasks(file, dict(by_name))


def _covered(annotation: Mapping[str, Any], size: Size) -> NDArray[np.bool_]:
    """Bool (h, w) of one annotation. Raises ValueError, TypeError, KeyError or InvalidOption."""
    parts = annotation.get("segmentation")
    if isinstance(parts, Mapping):
        height, width = parts["size"]
        return area_mask(size, None, ((height, width), parts["counts"]), "segmentation")
    if not parts:
        x, y, w, h = map(float, annotation["bbox"])
        return area_mask(size, [(x, y, w, h)], None, "bbox")
    drawn = np.zeros(size[::-1], dtype=np.uint8)
    outlines = [np.asarray(part, dtype=np.float64).reshape(-1, 2) for part in parts]
    cv2.fillPoly(drawn, [np.floor(outline).astype(np.int32) for outline in outlines], (1,))
    return drawn.astype(np.bool_)
