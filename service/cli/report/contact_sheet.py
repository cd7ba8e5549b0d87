"""The contact sheet: overlay, class and score of all images in one image file."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from api_schemas.options import ExplainOptions
from service.cam.encoding import EncodedImage
from service.cam.heatmap import Style
from service.cli.explain_files import Explained, Failed, Outcome
from service.durable import whole
from service.errors import ConfigurationError
from service.images.image_files import text_of
from service.images.upload import Upload
from service.models.loaded import LoadedModel
from service.pipeline import response

SIDE = 320
"""Longer side of an overlay in a tile, in pixels; smaller if there are very many."""

MOST_PIXELS = 48_000_000
MARGIN, GAP, CAPTION, HEADING = 40, 24, 62, 96
VERDICT = 20
"""Further height of a caption with a verdict, in pixels."""

PAPER, INK, SOFT, MAT, FAULT = "#f7f6f3", "#1a1b1d", "#5b5d62", "#eceae4", "#b0380b"
GOOD = "#1f6f4a"


@dataclass(frozen=True, slots=True)
class Tile:
    """An overlay as a JPEG file (None: the image failed), and the text below it.

    verdict: supported, inconclusive or refuted; None: the map was not tested.
    """

    overlay: bytes | None
    title: str
    detail: str
    path: str
    verdict: str | None = None


class ContactSheet:
    """Tiles in the order of their names; written when the `with` ends without an error.

    Text is in Pillow's built-in font, which has Latin letters.
    """

    def __init__(self, path: Path, model: LoadedModel, options: ExplainOptions) -> None:
        self._path = path
        self._model = model
        self._options = options
        self._tiles: dict[Path, Tile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                with whole(self._path) as draft:
                    self._draw().save(draft, quality=90)
            except OSError as failed:
                raise ConfigurationError(
                    f"{text_of(self._path)} cannot be written: {failed.strerror}."
                ) from failed

    def add(self, outcome: Outcome) -> None:
        """Add a tile for an image or its failure."""
        path = text_of(outcome.path)
        if isinstance(outcome, Failed):
            tile = Tile(None, outcome.code.replace("_", " "), "failed", path)
        else:
            first = outcome.answer.explanations[0]
            label = outcome.model.labels[first.class_id]
            verdict = None if first.verdict is None else first.verdict.verdict
            tile = Tile(_small_overlay(outcome).data, label, f"{first.score:.1%}", path, verdict)
        with self._lock:
            self._tiles[outcome.name] = tile

    def _draw(self) -> Image.Image:
        tiles = [tile for _, tile in sorted(self._tiles.items())]
        columns = max(1, min(len(tiles), math.ceil(math.sqrt(len(tiles) * 1.4))))
        rows = math.ceil(len(tiles) / columns)
        caption = CAPTION + (VERDICT if self._options.verify != "false" else 0)
        side = min(SIDE, max(48, math.isqrt(MOST_PIXELS // max(1, columns * rows)) - GAP - caption))
        step = side + GAP, side + caption + GAP
        size = (
            max(2 * MARGIN + columns * step[0] - GAP, 2 * MARGIN + 2 * SIDE),
            MARGIN + HEADING + rows * step[1] - GAP + MARGIN,
        )
        sheet = Image.new("RGB", size, PAPER)
        self._head(ImageDraw.Draw(sheet), len(tiles))
        for index, tile in enumerate(tiles):
            row, column = divmod(index, columns)
            corner = MARGIN + column * step[0], MARGIN + HEADING + row * step[1]
            _draw_tile(sheet, corner, side, tile)
        return sheet

    def _head(self, pen: ImageDraw.ImageDraw, count: int) -> None:
        layers = ", ".join(self._options.layer) or self._model.target_layer or ""
        images = "1 image" if count == 1 else f"{count} images"
        facts = (f"{self._model.name} {self._model.version}", self._options.method, layers, images)
        pen.text((MARGIN, MARGIN - 6), "Explanations", INK, _font(34))
        pen.text((MARGIN, MARGIN + 42), "  ·  ".join(filter(None, facts)), SOFT, _font(17))


def _small_overlay(outcome: Explained) -> EncodedImage:
    """Return the overlay of the first map, as a JPEG."""
    upload, options = scaled_down(outcome.upload, SIDE), outcome.options
    style = Style("source", options.colormap, "jpeg", options.opacity)
    return response.overlay(upload, outcome.answer.explanations[0], style)


def scaled_down(upload: Upload, side: int) -> Upload:
    """Return the upload with its image scaled down to at most `side` pixels."""
    assert upload.preview is not None
    height, width = upload.preview.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels: NDArray[np.uint8] = np.asarray(
        cv2.resize(upload.preview, size, interpolation=cv2.INTER_AREA), dtype=np.uint8
    )
    return replace(upload, preview=pixels)


def _draw_tile(sheet: Image.Image, corner: tuple[int, int], side: int, tile: Tile) -> None:
    pen, (left, top) = ImageDraw.Draw(sheet), corner
    pen.rounded_rectangle((left, top, left + side, top + side), 8, MAT)
    if tile.overlay is not None:
        drawn = _decode(tile.overlay)
        drawn = ImageOps.contain(drawn, (side, side))
        offset = left + (side - drawn.width) // 2, top + (side - drawn.height) // 2
        sheet.paste(drawn, offset)
    large, fine = max(9, round(side / 17)), max(8, round(side / 23))
    right, line = left + side, top + side + 8
    pen.text((left, line), _shortened(tile.title, side * 0.72, large), INK, _font(large))
    pen.text((right, line), tile.detail, INK if tile.overlay else FAULT, _font(large), "ra")
    below = line + large + 6
    pen.text((left, below), _shortened(tile.path, side, fine, end=True), SOFT, _font(fine))
    if tile.verdict is not None:
        draw_verdict(pen, (left, below + fine + 6), fine, tile.verdict)


def draw_verdict(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], size: int, verdict: str
) -> None:
    """Draw a mark and the word: a disc (supported), a ring (inconclusive) or a cross (refuted)."""
    left, top = corner
    color = {"supported": GOOD, "refuted": FAULT}.get(verdict, SOFT)
    box = left, top + 2, left + size - 2, top + size
    line = max(2, size // 6)
    if verdict == "refuted":
        pen.line((box[0], box[1], box[2], box[3]), color, line)
        pen.line((box[0], box[3], box[2], box[1]), color, line)
    else:
        pen.ellipse(box, color if verdict == "supported" else None, color, line)
    pen.text((left + size + 5, top), verdict, color, _font(size))


def _decode(data: bytes) -> Image.Image:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    return Image.fromarray(pixels)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shortened(text: str, width: float, size: int, *, end: bool = False) -> str:
    """Return the beginning or end of a text that fits in `width` pixels."""
    font, shown = _font(size), text
    while font.getlength(shown) > width and len(text) > 1:
        text = text[1:] if end else text[:-1]
        shown = f"…{text}" if end else f"{text}…"
    return shown
