"""Pictures for models that do not see in RGB: grey ones, and stacks of TIFF pages.

A model of one channel sees grey (ITU-R 601, as Pillow's mode "L"). A model of any other number than
1 and 3 takes a TIFF with that many pages, all of one size, each page one channel.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import CorruptImage, ImageError, ImageTooLarge, UnsupportedImage
from service.images import TOO_LARGE, Source, check_bounds, decode, upright_rgb

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def decode_channels(
    data: bytes, channels: int, *, max_pixels: int, keep: tuple[int, int] | None = None
) -> Source:
    """Decode an upload for a model of so many channels: RGB pixels, or the pages of a TIFF.

    keep: as in `decode`. Pages are bounded together: as many bytes as `decode` takes for a picture
    of `max_pixels`. Raises the ImageErrors of `decode`, and UnsupportedImage for another file than
    a TIFF or another number of pages where pages are wanted.
    """
    if channels in (1, 3) or not data:
        return decode(data, max_pixels=max_pixels, keep=keep)
    if not data.startswith(_TIFF):
        raise UnsupportedImage(
            f"This model takes {channels} channels: send a TIFF of {channels} pages, each page one "
            "channel."
        )
    try:
        pages = _pages(data, channels, max_pixels)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise ImageTooLarge(
            f"The pages have too many pixels. {TOO_LARGE.format(max_pixels)}"
        ) from error
    except Exception as error:  # as in `decode`
        raise CorruptImage(
            "The TIFF is cut short or broken; send the complete file again."
        ) from error
    return Source(np.stack(pages, axis=2), "TIFF", hashlib.sha256(data).hexdigest())


def for_model(source: Source, channels: int) -> Source:
    """The source as the model sees it: grey for one channel, else as it is."""
    if channels != 1 or source.pixels.shape[2] == 1:
        return source
    grey = np.array(Image.fromarray(source.pixels).convert("L"))
    return replace(source, pixels=grey[:, :, None])


def for_people(source: Source) -> Source:
    """The source in RGB: of a stack of pages the first one, in grey."""
    if source.pixels.shape[2] == 3:
        return source
    first = np.repeat(source.pixels[:, :, :1], 3, axis=2)
    return replace(source, pixels=first)


def _pages(data: bytes, channels: int, max_pixels: int) -> list[NDArray[np.uint8]]:
    pages: list[NDArray[np.uint8]] = []
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        for page in range(channels + 1):
            try:
                image.seek(page)
            except EOFError:
                break
            if page == channels:
                raise UnsupportedImage(
                    f"The TIFF has more than {channels} pages, and this model takes exactly "
                    f"{channels}, each page one channel."
                )
            check_bounds(image, "TIFF", data, 3 * max_pixels // channels)
            pages.append(np.asarray(upright_rgb(image).convert("L")))
            if pages[-1].shape != pages[0].shape:
                raise CorruptImage(
                    f"Page {page + 1} of the TIFF has another size than the first one; all must "
                    "have one size."
                )
    if len(pages) != channels:
        raise UnsupportedImage(
            f"The TIFF has {len(pages)} page{'s' if len(pages) > 1 else ''}, and this model takes "
            f"{channels}, each page one channel."
        )
    return pages
