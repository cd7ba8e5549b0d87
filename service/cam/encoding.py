"""Pixels to files: indexed PNG for heatmaps, JPEG, PNG or WebP for images.

Other threads run meanwhile: ISA-L, OpenCV and Pillow release the interpreter's lock.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image

from service.errors import RenderFailed

# One filter for all rows and no search for repetitions, of which a photograph has none: half the
# time of OpenCV's default at this level, for about as many bytes.
_PNG = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY),
)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as a file; `width` and `height` in pixels."""

    media_type: str
    width: int
    height: int
    data: bytes


def encode(pixels: NDArray[np.uint8], kind: Literal["jpeg", "png", "webp"]) -> bytes:
    """Write uint8 (h, w, 3), RGB, as a file. Raises RenderFailed for a size the format cannot hold.

    The JPEG is OpenCV's: simplejpeg takes as long, for more bytes and lower fidelity.
    """
    failure = f"A {kind} of this size cannot be written; ask for png."
    try:
        if kind == "webp":
            # Pillow has the option `method`: 0 takes a third of the time for 4 % more bytes.
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "WEBP", quality=90, method=0)
            return buffer.getvalue()
        options = list(_PNG)
        if kind == "jpeg":
            options = [cv2.IMWRITE_JPEG_QUALITY, 90]
            if max(pixels.shape) < 256:  # a colour for every pixel where pixels are few
                options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]
        encoded, data = cv2.imencode(f".{kind}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    except (cv2.error, ValueError, OSError) as error:
        raise RenderFailed(failure) from error
    if not encoded:
        raise RenderFailed(failure)
    return data.tobytes()


def level_png(levels: NDArray[np.uint8], palette: NDArray[np.uint8] | None) -> bytes:
    """Write uint8 (h, w) as an indexed PNG, or as a grey one without a palette, uint8 (256, 3).

    Written here because no library filters indexed PNGs. A heatmap is smooth, so the difference
    from the pixel at the left compresses far better than the pixel. ISA-L takes a third of the time
    of zlib's level 1, for as many bytes (benchmarks/round_the_model.py).
    """
    height, width = levels.shape
    filtered = np.empty((height, width + 1), dtype=np.uint8)
    filtered[:, 0] = 1  # the filter "Sub"
    filtered[:, 1] = levels[:, 0]
    np.subtract(levels[:, 1:], levels[:, :-1], out=filtered[:, 2:])
    kind = 0 if palette is None else 3
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", isal_zlib.compress(filtered.data)), (b"IEND", b"")]
    if palette is not None:
        chunks.insert(1, (b"PLTE", palette.tobytes()))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in chunks:
        check = isal_zlib.crc32(body, isal_zlib.crc32(name))
        parts += [struct.pack(">I", len(body)), name, body, struct.pack(">I", check)]
    return b"".join(parts)
