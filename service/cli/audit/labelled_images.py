"""The images of an audit: read when they are used, with the right classes and objects' masks."""

from __future__ import annotations

import csv
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import CamserveError, ConfigurationError, InvalidOption, UnknownClass
from service.images.budget import DecodeBudget
from service.images.decode import Geometry
from service.images.image_files import find_images, text_of
from service.images.run_lengths import rle_decode
from service.images.upload import open_upload
from service.models.loaded import LoadedModel

KEPT_BYTES = 1 << 29
"""Images in memory, in bytes; the least recently used are read again."""

BY_FOLDER = "by-folder"


@dataclass(slots=True)
class ImageFiles(Sequence[Tensor]):
    """The images of paths at the model's input size, uint8 (C, h, w), decoded when used."""

    model: LoadedModel
    paths: Sequence[Path]
    max_pixels: int
    budget: DecodeBudget
    _kept: OrderedDict[int, Tensor] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        try:
            pixels, _ = self.opened(index)
        except (CamserveError, OSError) as error:
            raise ConfigurationError(
                f"{text_of(self.paths[index])} could be read before and cannot be read now: "
                f"{detail_of(error)}"
            ) from error
        self._kept[index] = pixels
        while len(self._kept) > 1 and len(self._kept) * pixels.numel() > KEPT_BYTES:
            self._kept.popitem(last=False)
        return pixels

    def some(self, chosen: Sequence[int]) -> ImageFiles:
        """Those of indices, with a memory of their own."""
        return ImageFiles(
            self.model, [self.paths[index] for index in chosen], self.max_pixels, self.budget
        )

    def opened(self, index: int) -> tuple[Tensor, Geometry]:
        """One image, and where it lies in its source. Raises CamserveError, OSError."""
        upload = open_upload(
            self.paths[index].read_bytes(),
            self.model.preprocessing,
            "crop",
            max_pixels=self.max_pixels,
            preview_side=None,
            budget=self.budget,
        )
        return upload.model_input.pixels, upload.model_input.geometry


def detail_of(error: CamserveError | OSError) -> str:
    """An error as a sentence."""
    return error.detail if isinstance(error, CamserveError) else f"{error.strerror or error}"


def listed(folder: Path) -> list[Path]:
    """The images of a folder, in order. Raises ConfigurationError if there is none."""
    if not folder.is_dir():
        raise ConfigurationError(f"FOLDER {text_of(folder)}: there is no folder of that name.")
    return [path for path, _ in find_images([folder])]


def read_labels(given: str | None, folder: Path, paths: Sequence[Path]) -> list[str | None]:
    """The label of each image; None where there is none. Raises ConfigurationError."""
    if given is None:
        return [None] * len(paths)
    names = [path.relative_to(folder) for path in paths]
    if given == BY_FOLDER:
        return [name.parts[0] if len(name.parts) > 1 else None for name in names]
    by_path = _labels_in(Path(given))
    found = [by_path.get(name.as_posix(), by_path.get(name.name)) for name in names]
    if not any(found):
        raise ConfigurationError(
            f"--labels {given} names none of the images in {text_of(folder)}: it has, for "
            f"example, {next(iter(by_path), 'nothing')!r}, and the folder "
            f"{names[0].as_posix()!r}. Paths are relative to the folder."
        )
    return found


def _labels_in(file: Path) -> dict[str, str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"--labels {file} cannot be read ({error}); give by-folder, a CSV file with the "
            "columns path and label, or a JSON object of label by path."
        ) from error
    if file.suffix.lower() == ".json":
        found = _json(file, text, "--labels")
        if isinstance(found, dict):
            return {str(key): str(value) for key, value in found.items()}
    else:
        rows = list(csv.DictReader(text.splitlines()))
        if rows and {"path", "label"} <= rows[0].keys():
            return {row["path"]: row["label"] or "" for row in rows if row["path"]}
    raise ConfigurationError(
        f"--labels {file} has no columns path and label (CSV), and is no JSON object of label by "
        "path."
    )


def class_ids(model: LoadedModel, labels: Sequence[str | None]) -> list[int | None]:
    """The class of each label; None for one that the model has no class for.

    Raises ConfigurationError if there are labels and none names a class.
    """
    known: dict[str, int | None] = {}
    problem = ""
    for label in {label for label in labels if label}:
        try:
            known[label] = model.class_id(label)
        except (UnknownClass, InvalidOption) as error:
            known[label], problem = None, error.detail
    if known and set(known.values()) == {None}:
        raise ConfigurationError(f"no label of --labels is a class of the model. {problem}")
    return [known.get(label) if label else None for label in labels]


@dataclass(frozen=True, slots=True)
class Masks:
    """The objects of a COCO file by image.

    file: its name, for errors. segments: of each file name, its size (w, h) and its annotations.
    """

    file: Path
    segments: Mapping[str, tuple[tuple[int, int], list[Any]]]

    @classmethod
    def read(cls, file: Path) -> Masks:
        """Read a COCO file. Raises ConfigurationError."""
        try:
            found = _json(file, file.read_text(encoding="utf-8-sig"), "--masks")
            by_id = {
                image["id"]: (str(image["file_name"]), (int(image["width"]), int(image["height"])))
                for image in found["images"]
            }
            segments: dict[str, tuple[tuple[int, int], list[Any]]] = {
                name: (size, []) for name, size in by_id.values()
            }
            for annotation in found["annotations"]:
                if annotation.get("segmentation"):
                    segments[by_id[annotation["image_id"]][0]][1].append(annotation["segmentation"])
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"--masks {file} cannot be read: {error}.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"--masks {file} is no COCO file with masks: it needs `images` (id, file_name, "
                f"width, height) and `annotations` (image_id, segmentation); {error!r} is missing "
                "or wrong."
            ) from error
        return cls(file, {name: one for name, one in segments.items() if one[1]})

    def check(self, folder: Path, paths: Sequence[Path]) -> int:
        """How many images have a mask. Raises ConfigurationError if there is none."""
        count = sum(self._of(folder, path) is not None for path in paths)
        if not count:
            raise ConfigurationError(
                f"--masks {self.file} has a mask for none of the images in {text_of(folder)}: it "
                f"names, for example, {next(iter(self.segments), 'no file')!r}, and the folder has "
                f"{paths[0].relative_to(folder).as_posix()!r}."
            )
        return count

    def mask(self, folder: Path, path: Path, geometry: Geometry) -> Tensor | None:
        """The objects of an image in the model input, bool (h, w); None without a mask.

        Raises ConfigurationError for a mask of another size than the image.
        """
        found = self._of(folder, path)
        if found is None:
            return None
        size, segments = found
        if size != geometry.source_size:
            raise ConfigurationError(
                f"--masks {self.file}: {path.name} has {size[0]} × {size[1]} pixels there, and the "
                f"image has {geometry.source_size[0]} × {geometry.source_size[1]}."
            )
        whole = np.zeros((size[1], size[0]), dtype=bool)
        for segment in segments:
            try:
                whole |= _drawn(segment, size)
            except (ValueError, TypeError, KeyError, cv2.error) as error:
                raise ConfigurationError(
                    f"--masks {self.file}: a segmentation of {path.name} is neither polygons nor "
                    f"run lengths: {error}"
                ) from error
        return _in_input(whole, geometry)

    def _of(self, folder: Path, path: Path) -> tuple[tuple[int, int], list[Any]] | None:
        name = path.relative_to(folder)
        return self.segments.get(name.as_posix()) or self.segments.get(name.name)


def _drawn(segment: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    if isinstance(segment, dict):
        height, width = segment["size"]
        if (width, height) != size:
            raise ValueError(f"its size is {width} × {height}")
        return rle_decode((height, width), segment["counts"])
    canvas = np.zeros((size[1], size[0]), dtype=np.uint8)
    polygons = [np.array(points, dtype=np.float64).reshape(-1, 2) for points in segment]
    cv2.fillPoly(canvas, [np.rint(points).astype(np.int32) for points in polygons], 1)
    return canvas.view(np.bool_)


def _in_input(mask: NDArray[np.bool_], geometry: Geometry) -> Tensor:
    """A mask of the source as one of the model input, by the nearest pixel; outside is False."""
    (width, height), (x, y, w, h) = geometry.input_size, geometry.window
    columns = np.floor(x + (np.arange(width) + 0.5) / width * w).astype(int)
    rows = np.floor(y + (np.arange(height) + 0.5) / height * h).astype(int)
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & (
        (columns >= 0) & (columns < mask.shape[1])
    )
    rows, columns = rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)
    return torch.from_numpy(mask[rows[:, None], columns] & inside)


def _json(file: Path, text: str, flag: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{flag} {file} is not valid JSON: {error}.") from error
