"""The most bytes that an answer may take, computed from its options before any work.

    sizes = Sizes(model, options, question, render_side)
    bill = Bill(permit, 64 << 20, partial(sizes.advice, images=1))
    bill.add(sizes.result((640, 480)))   # refuses an answer that is too large

The image's size is not in the options; it is read from the first bytes of the file, and again from
the decoded image if it is larger.
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
    mask_bytes,
    region_bytes,
    tile_grid_bytes,
)
from service.cam.tiles import channel_tiles
from service.images.declared_size import Size, size_of
from service.images.decode import preview_size
from service.inference.questions import Question
from service.inference.segmentation import CLASS_SIDE
from service.models.loaded import LoadedModel

Price = Callable[[Size], int]
"""The most bytes of one image's result in the answer, by the size of its upright source."""

UNKNOWN: Size = (1, 1)
"""For an image whose size is known only when it is decoded: its price is computed then."""

NUMBER_BYTES = 16
"""A float32 in JSON, with its comma."""

_RESULT, _PREDICTION, _EXPLANATION, _ACTIVATION, _VERDICT, _TRIED = 1024, 160, 1024, 512, 1024, 128
"""The names and numbers beside the parts that are priced by their size."""

_ROWS_OF_BOX = 56
"""Rows of the mask of a box, which is drawn into the image; torchvision's has 28."""


@dataclass(frozen=True, slots=True)
class AnswerSizes:
    """The most bytes that the parts of one image's result may take.

    question: of any image of the request; its pixels are not used.
    """

    model: LoadedModel
    options: CommonOptions
    question: Question
    render_side: int

    def result(self, source: Size) -> int:
        """The image's result in the answer of `/explain` and `/predict`, JSON."""
        size = _RESULT + self.predictions() + self.activations() + self.masks(source)
        if not isinstance(self.options, ExplainOptions):
            return size
        size += self.maps * self.explanation(source)
        if self.options.mask is not None:
            size += self.predictions() + self.maps * (_PREDICTION + self._label)
        return size

    @property
    def maps(self) -> int:
        """The number of explanations, with a part hidden and without."""
        masked = isinstance(self.options, ExplainOptions) and self.options.mask is not None
        return self.question.target_count * (2 if masked else 1)

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of a map."""
        height, width = self.model.preprocessing.canvas
        record = self.question.method_record
        if record is None or record.grid == "input":
            return height, width
        if record.grid == "patches" and not isinstance(self.model.attention, str):
            return self.model.attention.layout.grid
        layouts = (self.model.layer(path).layout for path in self._layers)
        return max(
            (layout.grid for layout in layouts if layout is not None),
            key=lambda grid: grid[0] * grid[1],
        )

    @property
    def _layers(self) -> tuple[str, ...]:
        """The layers that a map may be of: `verify=search` tries earlier ones, too."""
        layers, options = self.question.layers, self.options
        is_search = isinstance(options, ExplainOptions) and options.verify == "search"
        return (*layers, *self.model.finer_layers(layers)) if is_search else layers

    @property
    def grids(self) -> int:
        """The maps, float32, where all are kept until the last image is done."""
        rows, columns = self.cells
        return self.maps * 4 * rows * columns if self.question.explains else 0

    def predictions(self, count: int | None = None) -> int:
        """The best classes with labels and scores, or the best boxes, JSON."""
        listed = count or self.question.top_k
        if self.model.task != "detection":
            listed = min(listed, len(self.model.labels))
        return listed * (_PREDICTION + self._label)

    def masks(self, source: Size) -> int:
        """The masks of predictions and of explained regions, JSON; 0 for a classifier."""
        if self.model.task == "segmentation":
            classes = min(self.question.top_k, len(self.model.labels))
            rows = self.model.preprocessing.crop[0]
            one = mask_bytes(source, rows if self.model.preprocessing.whole else CLASS_SIDE)
            # Each pixel is of one class, so all masks together have twice the runs of one.
            return one * (2 + self.maps) + _PREDICTION * classes
        of_box = mask_bytes(source, _ROWS_OF_BOX)
        return of_box * self.question.top_k if self.model.gives_masks else 0

    def explanation(self, source: Size) -> int:
        """One explanation, JSON."""
        assert isinstance(self.options, ExplainOptions)
        include = self.options.include
        size = _EXPLANATION + self._label + sum(map(len, self._layers))
        if self.question.verify:
            finer = self.model.finer_layers(self.question.layers)
            size += _VERDICT + sum(_TRIED + len(path) for path in finer)
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
        # Of a crop only the centre of the image is under the map, whose cells are smaller by that.
        of_source = isinstance(self.options, ExplainOptions) and self.options.size == "source"
        part = covered * min(preprocessing.crop) / preprocessing.longest
        of_source = of_source and not preprocessing.whole
        shown = min(1.0, part) if of_source else 1.0
        return heatmap_bytes(self._raster(source), self.cells, shown)

    def overlay(self, source: Size) -> int:
        """An overlay's file."""
        assert isinstance(self.options, ExplainOptions)
        return image_bytes(self._raster(source), self.options.format)

    def activations(self) -> int:
        """Activations in the requested forms, JSON.

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
        if forms != ["stats"] and numbers > 0:
            single = shape[1:] if shape[:1] == (1,) else shape
            tiles = self._tiles(path, single, kind)
            size += 4 * NUMBER_BYTES * tiles[0] if "channels" in forms else 0
            size += base64_bytes(tile_grid_bytes(channel_tiles(tiles))) if "image" in forms else 0
        return size

    def _tiles(self, path: str, shape: tuple[int, ...], kind: str) -> tuple[int, int, int]:
        """As `response.activation_image` lays it out: (tiles, rows, columns)."""
        layer = self.model.layer(path)
        if kind.endswith("output") and shape == layer.shape and layer.layout is not None:
            rows, columns = layer.layout.grid
            return math.prod(shape) // (rows * columns), rows, columns
        if len(shape) < 2:
            return max(1, math.prod(shape)), 1, 1
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def advice(self, images: int) -> str:
        """A sentence on what a smaller request would leave out, for this many images."""
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
        return f"Request {', '.join(first)}{' or ' if first else ''}{last}."

    def _raster(self, source: Size) -> Size:
        """The size of what is drawn; the part that the model sees is at most its input."""
        assert isinstance(self.options, ExplainOptions)
        if self.options.size == "source" or self.model.preprocessing.whole:
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
    """The most bytes of an image's result, by the size that its first bytes declare."""

    size: Size
    price: int


def quote_image(image: object, max_pixels: int, price: Price) -> Quote:
    """The price of an image, or of a tensor, before it is decoded.

    UNKNOWN if the size cannot be read, or is more than `max_pixels`: such an image is refused when
    it is opened.
    """
    size = _declared_size(image, max_pixels)
    return Quote(size, price(size))


def _declared_size(image: object, max_pixels: int) -> Size:
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    size = size_of(image) if isinstance(image, bytes) else None
    return UNKNOWN if size is None or math.prod(size) > max_pixels else size
