"""What an answer takes in bytes at most: reckoned from its options before any work.

    sizes = Sizes(model, options, question, render_side)
    bill = Bill(permit, 64 << 20, partial(sizes.advice, images=1))
    bill.add(sizes.result((640, 480)))   # refuses what is too much

Images are the only part whose size is not in the options; it is taken from the first bytes of the
file, and again from the decoded image where that says more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import orjson

from api_schemas.options import CommonOptions, ExplainOptions
from service.cam.file_sizes import (
    base64_bytes,
    heatmap_bytes,
    image_bytes,
    region_bytes,
    tile_grid_bytes,
)
from service.cam.tiles import channel_tiles
from service.images.declared_size import Size, size_of
from service.images.decode import preview_size
from service.inference.questions import Question
from service.models.loaded import LoadedModel

Price = Callable[[Size], int]
"""Bytes that one image's place in the answer takes at most, by the size of its upright source."""

UNKNOWN: Size = (1, 1)
"""For an image whose size is known only when it is decoded: its price is settled then."""

NUMBER_BYTES = 16
"""Of a float32 in JSON, with its comma."""

_RESULT, _PREDICTION, _EXPLANATION, _ACTIVATION = 1024, 160, 1024, 512
"""Of the names and numbers round what is priced by its size."""

_SMALLEST_PATCH = 4
"""Pixels a side of a transformer's patch at least, by which attention rollout's map is reckoned."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the answer about one image takes at most; all bytes.

    question: any of those that are put to the model; its pixels are not looked at.
    """

    model: LoadedModel
    options: CommonOptions
    question: Question
    render_side: int

    def result(self, source: Size) -> int:
        """The image's place in the answer of `/explain` and `/predict`, JSON."""
        size = _RESULT + self.predictions() + self.activations()
        if not isinstance(self.options, ExplainOptions):
            return size
        size += self.maps * self.explanation(source)
        if self.options.mask is not None:
            size += self.predictions() + self.maps * (_PREDICTION + self._label)
        return size

    @property
    def maps(self) -> int:
        """How many explanations there are, with a part hidden and without."""
        masked = isinstance(self.options, ExplainOptions) and self.options.mask is not None
        return self.question.target_count * (2 if masked else 1)

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of a map."""
        height, width = self.model.preprocessing.crop
        record = self.question.method_record
        if record is None or record.grid == "input":
            return height, width
        if record.grid == "patches":
            return -(-height // _SMALLEST_PATCH), -(-width // _SMALLEST_PATCH)
        layouts = (self.model.layer(path).layout for path in self.question.layers)
        return max(
            (each.grid for each in layouts if each is not None), key=lambda grid: grid[0] * grid[1]
        )

    @property
    def grids(self) -> int:
        """The maps themselves, float32, where all are kept until the last image is answered."""
        rows, columns = self.cells
        return self.maps * 4 * rows * columns if self.question.explains else 0

    def predictions(self, count: int | None = None) -> int:
        """The best classes with labels and scores, JSON."""
        listed = min(count or self.options.top_k, len(self.model.labels))
        return listed * (_PREDICTION + self._label)

    def explanation(self, source: Size) -> int:
        """One explanation, JSON."""
        assert isinstance(self.options, ExplainOptions)
        include = self.options.include
        size = _EXPLANATION + self._label + sum(map(len, self.question.layers))
        if "heatmap" in include:
            size += base64_bytes(self.heatmap(source))
        if "overlay" in include:
            size += base64_bytes(self.overlay(source))
        if "grid" in include:
            size += base64_bytes(self.grids // self.maps)
        if "regions" in include:
            size += region_bytes(source, self.cells, self.render_side)
        return size

    def heatmap(self, source: Size) -> int:
        """A heatmap's file."""
        preprocessing = self.model.preprocessing
        covered = min(preprocessing.covers[2:]) if preprocessing.covers else 1.0
        # Of a crop only the middle of the image is under the map, whose cells are smaller by that.
        of_source = isinstance(self.options, ExplainOptions) and self.options.size == "source"
        part = covered * min(preprocessing.crop) / preprocessing.longest
        shown = min(1.0, part) if of_source else 1.0
        return heatmap_bytes(self._raster(source), self.cells, shown)

    def overlay(self, source: Size) -> int:
        """An overlay's file."""
        assert isinstance(self.options, ExplainOptions)
        return image_bytes(self._raster(source), self.options.format)

    def activations(self) -> int:
        """Captured tensors in the forms that are sent, JSON.

        Outputs are float16, but for those above its range: these take twice as much.
        """
        kind = self.question.kinds[0]
        size = 0
        for path in self.question.activations:
            layer = self.model.layer(path)
            shapes = (layer.taken if kind.endswith("input") else layer.given).values()
            for shape in shapes:
                size += _ACTIVATION + len(path) + self._activation(path, shape, kind)
        return size

    def _activation(self, path: str, shape: tuple[int, ...], kind: str) -> int:
        forms, size = self.options.activation_as, 0
        numbers = math.prod(shape)
        if "array" in forms:
            size += base64_bytes(numbers * (4 if kind.startswith("grad") else 2))
        if "image" in forms and numbers > 0:
            alone = shape[1:] if shape[:1] == (1,) else shape
            size += base64_bytes(tile_grid_bytes(channel_tiles(self._tiles(path, alone, kind))))
        return size

    def _tiles(self, path: str, shape: tuple[int, ...], kind: str) -> tuple[int, int, int]:
        """As `response.picture_of` lays a capture out: (tiles, rows, columns)."""
        layer = self.model.layer(path)
        if kind.endswith("output") and shape == layer.shape and layer.layout is not None:
            rows, columns = layer.layout.grid
            return math.prod(shape) // (rows * columns), rows, columns
        if len(shape) < 2:
            return max(1, math.prod(shape)), 1, 1
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def advice(self, images: int) -> str:
        """What may be left out of an answer about so many images, as a sentence."""
        options = self.options
        forms = set(options.activation_as) if self.question.activations else {"stats"}
        ways = {"activation_as=stats": forms != {"stats"}, "fewer layers": forms != {"stats"}}
        if isinstance(options, ExplainOptions):
            drawn = {"heatmap", "overlay"}.intersection(options.include)
            ways["format=jpeg"] = "overlay" in drawn and options.format != "jpeg"
            ways["size=model"] = bool(drawn) and options.size == "source"
            ways["fewer explanations"] = self.maps > 1
        ways["fewer images"] = images > 1
        *first, last = [way for way, helps in ways.items() if helps] or ["less"]
        return f"Ask for {', '.join(first)}{' or ' if first else ''}{last}."

    def _raster(self, source: Size) -> Size:
        """What is drawn, in pixels; the part that the model saw is at most its input."""
        assert isinstance(self.options, ExplainOptions)
        if self.options.size == "source":
            return preview_size(source, self.render_side)
        native = self.options.size == "native"
        height, width = self.cells if native else self.model.preprocessing.crop
        return width, height

    @property
    def _label(self) -> int:
        return longest_label(self.model.labels)


@lru_cache(maxsize=64)
def longest_label(labels: tuple[str, ...]) -> int:
    """Bytes of the longest label in JSON."""
    return max((len(orjson.dumps(label)) for label in labels), default=0)


class Quote(NamedTuple):
    """What an image's place in the answer takes at most, by its size as its first bytes say it."""

    size: Size
    price: int


def quoted(image: object, max_pixels: int, price: Price) -> Quote:
    """The price of an image, or of a tensor, before it is decoded.

    Of UNKNOWN where the size is not to be had, and for more than `max_pixels`: such an image is
    refused when it is opened.
    """
    size = _size_before(image, max_pixels)
    return Quote(size, price(size))


def _size_before(image: object, max_pixels: int) -> Size:
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    size = size_of(image) if isinstance(image, bytes) else None
    return UNKNOWN if size is None or math.prod(size) > max_pixels else size
