"""Decode bytes to a bounded, upright RGB image, and map the model input back to source pixels.

    source = decode(data, max_pixels=50_000_000)          # or one of the four image errors
    model_input = fit_to_model(source, Preprocessing())   # uint8 (3, 224, 224)
    model_input.geometry.seen                             # x, y, w, h of what the model sees

Coordinates are continuous, in pixels of the upright source: (0, 0) is its upper left corner and
(width, height) its lower right one, so the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from service.errors import CorruptImage, EmptyImage, ImageError, ImageTooLarge, UnsupportedImage
from service.images.decoders.avif_decoder import decode_avif
from service.images.decoders.bmp_decoder import decode_bmp
from service.images.decoders.jpeg_decoder import (
    MAX_ASPECT,
    MAX_JPEG_SCANS,
    decode_jpeg,
    scale_of,
    scans,
    upright,
)
from service.images.decoders.png_decoder import decode_png16
from service.images.decoders.samples import bands, load
from service.images.decoders.tiff_decoder import decode_tiff
from service.images.decoders.webp_decoder import decode_webp
from service.images.formats import format_of, unsupported_format
from service.images.headers import (
    avif_header,
    bmp_header,
    gif_header,
    jpeg_header,
    png_header,
    tiff_header,
    webp_header,
)
from service.images.headers.avif_header import AvifHeader
from service.images.headers.bmp_header import BmpHeader
from service.images.headers.header import SPARE_BYTES, Header, corrupt
from service.images.headers.jpeg_header import JpegHeader
from service.images.headers.png_header import PngHeader
from service.images.headers.tiff_header import JPEG, TiffHeader
from service.images.headers.webp_header import WebpHeader

Fit = Literal["crop", "squash", "pad"]
Rounding = Literal["even", "down"]
Rect = tuple[float, float, float, float]
"""x, y, width, height, in source pixels."""

MAX_SIDE = 65_535
"""Maximum pixels of a side, as in JPEG. Decoders convert bands of whole rows: a row of millions of
pixels would need as much memory as the whole image, and hold the GIL as long."""

_READERS: Mapping[str, Callable[[bytes], Header]] = MappingProxyType(
    {
        "JPEG": jpeg_header.read,
        "PNG": png_header.read,
        "WEBP": webp_header.read,
        "GIF": gif_header.read,
        "BMP": bmp_header.read,
        "TIFF": tiff_header.read,
        "AVIF": avif_header.read,
    }
)

_DECODERS: Mapping[type[Header], Callable[..., NDArray[np.uint8]]] = MappingProxyType(
    {WebpHeader: decode_webp, BmpHeader: decode_bmp, AvifHeader: decode_avif}
)
"""Decoders that take every file of a kind."""

MAX_WHOLE_ASPECT = 4
"""The longest side of a whole image that is resized, in multiples of the shorter one."""

CANVAS = (224, 224)
"""Cells (height, width) of maps over a whole image, whatever its size."""

TOO_LARGE = "Scale it down to at most {} pixels (width x height) and send it again."


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The preprocessing of a model: the evaluation transform of torchvision, timm or Hugging Face.

    crop:    (height, width) of the model input, in pixels.
    resize:  the length of the shorter side before the crop, in pixels; or a (height, width) that
             the image covers (`fit` "crop"), is stretched to ("squash") or lies within ("pad"),
             before the center crop.
    mean, std: one number per channel, for values in 0..1.
    fit:     how the model was trained to see whole images; a request may override it.
    rounding: of a crop that begins between two pixels: `even` as torchvision and timm do, `down` as
             Hugging Face does.
    covers:  the part of the model input (x, y, w, h as fractions of it) that a model with a crop
             of its own sees; None: all of it.
    whole:   whether the model takes the whole image in its own shape: with the shorter side
             `resize`, or at its own size where that is 0. `crop` is the size of images of a trial.
    longest_edge: of a whole image, in pixels: where its longer side would exceed it, that side is
             `longest_edge` instead, as in Hugging Face's DETR. None: no bound.
    multiple: sides of a whole image are cut down to multiples of it, as in Hugging Face's YOLOS.
    """

    resize: int | tuple[int, int] = 256
    crop: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    fit: Fit = "crop"
    rounding: Rounding = "even"
    covers: Rect | None = None
    whole: bool = False
    longest_edge: int | None = None
    multiple: int = 1

    def __str__(self) -> str:
        """The transform in one line."""
        if self.resize == 0:
            return "the upright image, which the model resizes and normalizes"
        (height, width), resize = self.crop, self.resize
        sides = f"{resize[1]}×{resize[0]}" if isinstance(resize, tuple) else str(resize)
        how = {
            "crop": f"resize {sides}, center crop {width}×{height}",
            "squash": f"stretch to {'×'.join(map(str, self.room('squash')[::-1]))}, center crop "
            f"{width}×{height}",
            "pad": f"fit into {'×'.join(map(str, self.room('pad')[::-1]))} on the mean color, "
            f"{width}×{height}",
        }[self.fit]
        if self.whole:
            bound = f" and longer side at most {self.longest_edge}" if self.longest_edge else ""
            how = f"shorter side {resize}{bound}, not cropped"
        mean, std = (", ".join(f"{x:.3g}" for x in values) for values in (self.mean, self.std))
        return f"{how}, {self.interpolation}, mean {mean}, std {std}"

    @property
    def canvas(self) -> tuple[int, int]:
        """The (height, width) of maps that are drawn over the image and not at a layer."""
        return CANVAS if self.whole else self.crop

    @property
    def longest(self) -> int:
        """The longest side of the resized image, in pixels."""
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize,)
        return max(*sides, *self.crop)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) that an image of `size` is resized to before the crop.

        Rounded as torchvision does for a number, as timm does for a (height, width).
        """
        width, height = size
        if isinstance(self.resize, tuple):
            scale = max(self.resize[1] / width, self.resize[0] / height)
            return round(width * scale), round(height * scale)
        if self.longest_edge is not None:
            return self._bounded(size, self.resize, self.longest_edge)
        longer = int(self.resize * max(size) / min(size))
        return (longer, self.resize) if width > height else (self.resize, longer)

    def _bounded(self, size: tuple[int, int], shorter: int, bound: int) -> tuple[int, int]:
        """The (width, height) with the shorter side `shorter`, or the longer one `bound`.

        Rounded as Hugging Face's `get_size_with_aspect_ratio`, but never to 0.
        """
        exact: float = shorter
        if max(size) / min(size) * shorter > bound:
            exact = bound * min(size) / max(size)
        shorter, longer = round(exact), int(exact * max(size) / min(size))
        is_wide = size[0] >= size[1]
        if shorter == min(size) and (is_wide or self.multiple == 1):  # YOLOS resizes tall ones
            longer = max(size)
        longer, shorter = (
            max(self.multiple, side - side % self.multiple) for side in (longer, shorter)
        )
        return (longer, shorter) if is_wide else (shorter, longer)

    def room(self, fit: Fit) -> tuple[int, int]:
        """The (height, width) that an image is stretched to, or lies within, before the crop.

        The `fit` of a request shows the whole image; that of a model may include a margin.
        """
        if fit != self.fit:
            return self.crop
        if isinstance(self.resize, tuple):
            return self.resize
        height, width = self.crop
        longer = max(self.crop)
        return self.resize * height // longer, self.resize * width // longer

    def crop_start(self, size: tuple[int, int]) -> tuple[int, int]:
        """The first (row, column) of the center crop of a resized (height, width) image.

        Negative where the image is smaller than the crop, which is padded.
        """
        top, left = (
            _crop_start(length, crop, self.rounding)
            for length, crop in zip(size, self.crop, strict=True)
        )
        return top, left

    @property
    def channels(self) -> int:
        """3: RGB; 1: greyscale; other numbers: the pages of a TIFF (`service.images.upload`)."""
        return len(self.mean)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One decoded upload.

    `pixels` is uint8 (height, width, 3), RGB, upright (other numbers of channels:
    `service.images.upload`); `format` is that of the bytes ("JPEG", "PNG", ...); `sha256` is the
    hexadecimal digest of the uploaded bytes. `full_size` is the (width, height) of the upright
    image if it was scaled down while it was decoded.
    """

    pixels: NDArray[np.uint8]
    format: str
    sha256: str
    full_size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole image, after the EXIF orientation."""
        return self.full_size or (int(self.pixels.shape[1]), int(self.pixels.shape[0]))

    @property
    def width(self) -> int:
        """Width in pixels, after the EXIF orientation."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Height in pixels, after the EXIF orientation."""
        return self.size[1]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the model input lies in the source.

    `source_size` and `input_size` are (width, height). `window` is the part that the whole model
    input covers, in source pixels, and may extend beyond the image. The point (u, v) of the model
    input, as fractions of its width and height, is (x + u * w, y + v * h) of the source.
    """

    source_size: tuple[int, int]
    input_size: tuple[int, int]
    window: Rect
    covers: Rect | None = None

    @property
    def covered(self) -> Rect:
        """The part of `window` that the model sees: all of it if `covers` is None."""
        x, y, w, h = self.window
        if self.covers is None:
            return self.window
        left, top, width, height = self.covers
        return x + left * w, y + top * h, width * w, height * h

    def of_map(self, shape: tuple[int, ...]) -> Geometry:
        """The geometry of a map (h, w): that of the model input, or that of a layer.

        A layer of a model that crops its input has cells only for the covered part.
        """
        if self.covers is None or shape == self.input_size[::-1]:
            return self
        width, height = (
            max(1, round(side * share))
            for side, share in zip(self.input_size, self.covers[2:], strict=True)
        )
        return Geometry(self.source_size, (width, height), self.covered)

    @property
    def seen(self) -> Rect:
        """The part of the image that the model sees: the covered part within the image."""
        x, y, w, h = self.covered
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + w, self.source_size[0]), min(y + h, self.source_size[1])
        return left, top, right - left, bottom - top

    @property
    def content(self) -> Rect:
        """The part of the model input, x, y, w, h as fractions, that shows what the model sees."""
        (x, y, w, h), (left, top, width, height) = self.window, self.seen
        return (left - x) / w, (top - y) / h, width / w, height / h


class PlacedPixels(TypedDict):
    """The fields of a question that come from its image; `Question` defines them."""

    pixels: Tensor
    seen: Rect
    source: tuple[int, int]
    shown: Rect


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """`pixels`: uint8 (channels, height, width), before normalisation; and its geometry."""

    pixels: Tensor
    geometry: Geometry

    @property
    def placed(self) -> PlacedPixels:
        """The pixels with their place in the source, as a question has them."""
        geometry = self.geometry
        return PlacedPixels(
            pixels=self.pixels,
            seen=geometry.content,
            source=geometry.source_size,
            shown=geometry.seen,
        )


def decode(
    data: bytes,
    *,
    max_pixels: int,
    keep: tuple[int, int] | None = None,
    header: Header | None = None,
) -> Source:
    """Decode an uploaded JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF; only the first of several frames.

    The EXIF orientation is applied, transparency is composited over white, samples of other depths
    are scaled to 8 bits, floats are read as 0..1 if none is above 1, otherwise as 0..255. Colour
    profiles are ignored, as in training. Kind, size and memory are known from the header
    (`open_header`), before any pixel is decoded.

    keep:   the required pixels of the (shorter, longer) side of a large JPEG, which may be scaled
            down while it is decoded (`jpeg_decoder.scale_of`); None: all pixels.
    header: the header of the file, if it was read before.

    Raises only EmptyImage, UnsupportedImage, CorruptImage or ImageTooLarge, for any bytes; with
    `header` also NotPlain.
    """
    if header is None:
        header = open_header(data, max_pixels)
        with contextlib.suppress(NotPlain):
            return decode(data, max_pixels=max_pixels, keep=keep, header=header)
        header = for_pillow(header)
    with image_errors(max_pixels):
        pixels = decode_stored(header, data, keep)
        scaled = pixels.shape[:2] != (header.height, header.width)
        pixels = upright(pixels, header.orientation)
    digest = hashlib.sha256(data).hexdigest()
    return Source(pixels, header.format, digest, header.upright if scaled else None)


def open_header(data: bytes, max_pixels: int) -> Header:
    """The header of a supported file with at most `max_pixels`.

    Raises EmptyImage, UnsupportedImage, CorruptImage or ImageTooLarge.
    """
    if not data:
        raise EmptyImage("The image has no bytes; send the content of the image file.")
    with image_errors(max_pixels):
        header = read_header(data)
        check_bounds(header, data, max_pixels)
    return header


def read_header(data: bytes) -> Header:
    """The header of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.

    Raises UnsupportedImage for other bytes and unsupported kinds, CorruptImage for a truncated
    header, ImageTooLarge beyond the limits of `headers.header`.
    """
    name = format_of(data)
    if name is None or (name == "BMP" and data[15:18] != b"\0\0\0"):
        raise UnsupportedImage(
            f"{unsupported_format(data)}; send JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF."
        )
    return _READERS[name](data)


@contextlib.contextmanager
def image_errors(max_pixels: int) -> Iterator[None]:
    """Convert exceptions of decoders to the four image errors."""
    try:
        yield
    except (ImageError, NotPlain):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise ImageTooLarge(
            f"The image has too many pixels. {TOO_LARGE.format(max_pixels)}"
        ) from error
    except Exception as error:  # Pillow's decoders raise many unrelated types for corrupt files.
        raise corrupt() from error


def check_bounds(header: Header, data: bytes, max_pixels: int) -> None:
    """Refuse an image that would need too much time or memory, before it is decoded."""
    width, height = header.extent
    if header.width < 1 or header.height < 1:
        raise CorruptImage("The image has no pixels; save it again and send the new file.")
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"The image has {width} x {height} pixels. {TOO_LARGE.format(max_pixels)}"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageTooLarge(
            f"The image has {width} x {height} pixels, and the limit of a side is {MAX_SIDE:,}; "
            "cut it into several images and send those."
        )
    if _passes(header, data) > MAX_JPEG_SCANS:
        raise UnsupportedImage(
            f"The {header.format} has more than {MAX_JPEG_SCANS} scans; save it again as a "
            "baseline JPEG."
        )


def _passes(header: Header, data: bytes) -> float:
    """The number of passes of a JPEG decoder over all pixels."""
    if isinstance(header, TiffHeader) and header.compression == JPEG:
        width, height = header.segment
        return scans(data) * width * height / header.pixels
    return scans(data) if header.format == "JPEG" else 0


class NotPlain(Exception):
    """A JPEG that only Pillow can decode; `for_pillow` has its memory requirements."""


def for_pillow(header: Header) -> Header:
    """The header of a NotPlain file."""
    return header.for_pillow() if isinstance(header, JpegHeader) else header


def decode_stored(
    header: Header, data: bytes, keep: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """The pixels before the orientation is applied. Needs `decoding_bytes`.

    Raises NotPlain, and the exceptions of the decoders.
    """
    if isinstance(header, JpegHeader) and not header.by_pillow:
        pixels = decode_jpeg(header, data, keep)
        if pixels is None:
            raise NotPlain
        return pixels
    if isinstance(header, PngHeader) and header.depth == 16:
        return decode_png16(header, data)
    decoder = _DECODERS.get(type(header))
    if decoder is not None:
        return decoder(header, data)
    if isinstance(header, TiffHeader) and header.packed:
        return decode_tiff(header, data)
    return _by_pillow(header, data)


def _by_pillow(header: Header, data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(header.pillow_bytes(data)), formats=(header.format,)) as image:
        if image.size != (header.width, header.height):
            raise corrupt()
        load(image)
        transparent = image.info.get("transparency")
        if isinstance(header, PngHeader) and image.mode == "L" and isinstance(transparent, int):
            # Pillow scales the pixels to 8 bits, but not the transparent value.
            image.info["transparency"] = transparent * 255 // ((1 << header.depth) - 1)
        return _rgb_pixels(image)


def _rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """A loaded image as uint8 (height, width, 3), with transparency over white.

    Converted in bands, to need little memory besides the result.
    """
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows in bands(image.width, image.height):
        band = image.crop((0, rows.start, image.width, rows.stop))
        pixels[rows] = np.asarray(_as_rgb(band))
    return pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


def decoded_pixels(header: Header, keep: tuple[int, int] | None = None) -> int:
    """The number of pixels that `decode` returns."""
    size = header.upright
    scalable = isinstance(header, JpegHeader) and not header.by_pillow
    scale = scale_of(size, keep) if scalable else 1
    return math.prod(-(-side // scale) for side in size)


def decoding_bytes(header: Header, keep: tuple[int, int] | None = None) -> int:
    """Maximum memory for decoding to upright RGB, in bytes, without the file itself."""
    width, height = header.extent
    result = 3 * decoded_pixels(header, keep)
    stored = int(header.pixel_bytes * width * height) + header.fixed_bytes
    turned = result if header.orientation > 1 else 0
    return result + max(stored, turned) + SPARE_BYTES


def fit_to_model(
    source: Source, preprocessing: Preprocessing, fit: Fit | None = None
) -> ModelInput:
    """The model input, uint8, with its geometry in the source.

    `crop`: resize and center crop; bit-equal to torchvision's evaluation transform up to the
    conversion to float (of images over 20 times longer than wide, only the middle is resized).
    `squash`: the whole image, stretched. `pad`: the whole image with its aspect ratio, centered on
    the mean colour. None: the fit of the model.
    """
    image = torch.from_numpy(source.pixels).permute(2, 0, 1)
    mode = InterpolationMode(preprocessing.interpolation)
    if preprocessing.whole and fit is None:
        return _whole(image, source.size, preprocessing, mode)
    fit = fit or preprocessing.fit
    if fit == "crop":
        pixels, window = _crop(image, source.size, preprocessing, mode)
    elif fit == "squash":
        resized = _squash(image, preprocessing.room(fit), mode)
        pixels, window = _centred(resized, source.size, preprocessing)
    elif fit == "pad":
        resized = _within(image, source.size, preprocessing.room(fit), mode)
        pixels, window = _centred(resized, source.size, preprocessing)
    else:
        raise ValueError(f"fit is 'crop', 'squash' or 'pad', not {fit!r}")
    height, width = preprocessing.crop
    geometry = Geometry(source.size, (width, height), window, preprocessing.covers)
    # A copy: without resizing, `pixels` may be a view of the source.
    return ModelInput(pixels.clone(memory_format=torch.contiguous_format), geometry)


def _whole(
    image: Tensor, size: tuple[int, int], preprocessing: Preprocessing, mode: InterpolationMode
) -> ModelInput:
    """The whole image in its own shape; one over MAX_WHOLE_ASPECT times longer is compressed."""
    pixels, shorter = image, preprocessing.resize
    if isinstance(shorter, tuple):
        pixels = _squash(image, shorter, mode)
    elif shorter > 0:
        width, height = preprocessing.resized(size)
        unbounded = preprocessing.longest_edge is None
        longest = MAX_WHOLE_ASPECT * shorter if unbounded else max(width, height)
        pixels = _squash(image, (min(height, longest), min(width, longest)), mode)
    height, width = pixels.shape[-2:]
    geometry = Geometry(size, (width, height), (0.0, 0.0, float(size[0]), float(size[1])))
    return ModelInput(pixels.clone(memory_format=torch.contiguous_format), geometry)


def _crop(
    image: Tensor, size: tuple[int, int], preprocessing: Preprocessing, mode: InterpolationMode
) -> tuple[Tensor, Rect]:
    """size: (w, h) of the whole image, which all coordinates refer to."""
    height, width = preprocessing.crop
    cut, (cut_x, cut_y) = _cut_extreme(image, preprocessing)
    old_width, old_height = size if cut is image else (cut.shape[-1], cut.shape[-2])
    new_width, new_height = preprocessing.resized((old_width, old_height))
    resized = transforms.resize_image(cut, [new_height, new_width], interpolation=mode)
    scale_x, scale_y = old_width / new_width, old_height / new_height
    top, left = preprocessing.crop_start((new_height, new_width))
    window = (
        cut_x + left * scale_x,
        cut_y + top * scale_y,
        *(width * scale_x, height * scale_y),
    )
    # Beyond its border the image is black.
    return transforms.crop_image(resized, top, left, height, width), window


def _within(
    image: Tensor, size: tuple[int, int], room: tuple[int, int], mode: InterpolationMode
) -> Tensor:
    """The image with its aspect ratio, as large as fits into `room` (height, width)."""
    (height, width), (old_width, old_height) = room, size
    scale = min(width / old_width, height / old_height)
    new_width = min(width, max(1, round(old_width * scale)))
    new_height = min(height, max(1, round(old_height * scale)))
    resized: Tensor = transforms.resize_image(image, [new_height, new_width], interpolation=mode)
    return resized


def _centred(
    image: Tensor, size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[Tensor, Rect]:
    """The center of a resized image at the model's size, padded with the mean colour.

    size: (w, h) of the whole image before it was resized.
    """
    (height, width), (new_height, new_width) = preprocessing.crop, image.shape[-2:]
    top, left = preprocessing.crop_start((new_height, new_width))
    scale_x, scale_y = size[0] / new_width, size[1] / new_height
    window = (left * scale_x, top * scale_y, width * scale_x, height * scale_y)
    kept = image[..., max(top, 0) : top + height, max(left, 0) : left + width]
    if kept.shape[-2:] == preprocessing.crop:
        return kept, window
    fill = torch.tensor([round(255 * mean) for mean in preprocessing.mean], dtype=torch.uint8)
    pixels = fill[:, None, None].repeat(1, height, width)
    down, right = max(-top, 0), max(-left, 0)
    pixels[:, down : down + kept.shape[-2], right : right + kept.shape[-1]] = kept
    return pixels, window


def _crop_start(length: int, crop: int, rounding: Rounding) -> int:
    """The start of a center crop along one side; negative if it pads."""
    if crop > length:
        return -((crop - length) // 2)
    return round((length - crop) / 2.0) if rounding == "even" else (length - crop) // 2


def _cut_extreme(image: Tensor, preprocessing: Preprocessing) -> tuple[Tensor, tuple[int, int]]:
    """The part of an extremely long image that the crop needs, and its upper left corner."""
    height, width = image.shape[-2:]
    short, long = sorted((height, width))
    if long <= MAX_ASPECT * short:
        return image, (0, 0)
    scale = short / min(preprocessing.resized((width, height)))
    crop = preprocessing.crop[1] if width > height else preprocessing.crop[0]
    margin = math.ceil(2 * max(1.0, scale)) + 1  # the reach of the bicubic filter
    keep = min(long, max(short, math.ceil(crop * scale)) + 2 * margin)
    start = (long - keep) // 2
    if width > height:
        return image.narrow(2, start, keep), (start, 0)
    return image.narrow(1, start, keep), (0, start)


def _squash(image: Tensor, room: tuple[int, int], mode: InterpolationMode) -> Tensor:
    """Stretched to `room` (height, width).

    torch scales the width first, which would make 8 x 8,000,000 pixels a hundred times as many. So
    the long side of such an image is scaled before the short one.
    """
    height, width = image.shape[-2:]
    if max(height, width) > MAX_ASPECT * min(height, width):
        rows, columns = room
        first = [rows, width] if height > width else [height, columns]
        image = transforms.resize_image(image, first, interpolation=mode)
    scaled: Tensor = transforms.resize_image(image, list(room), interpolation=mode)
    return scaled


def preview_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(width, height) scaled down so that the longer side is at most `max_side`."""
    width, height = size
    scale = min(1.0, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def preview(source: Source, max_side: int) -> NDArray[np.uint8]:
    """Scale the image, antialiased, to `preview_size`; the same array if that is its size."""
    width, height = preview_size(source.size, max_side)
    if source.pixels.shape[:2] == (height, width):
        return source.pixels
    image = torch.from_numpy(source.pixels).permute(2, 0, 1)
    scaled = transforms.resize_image(image, [height, width])
    return np.ascontiguousarray(scaled.permute(1, 2, 0).numpy())
