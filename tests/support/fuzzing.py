"""How much is fuzzed, and real images to begin with."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pictures
import psutil
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

CASES = int(os.environ.get("CAMSERVE_FUZZ_CASES", "500"))
"""Of all fuzz tests together; 20,000 in a night."""

GROWTH_BYTES = 512 << 20
"""What the service may hold more after any number of cases; one image of the largest size that
the tests allow takes 12 MB."""


@contextmanager
def memory_bounded() -> Iterator[None]:
    """The process, which serves and asks, does not grow with the cases."""
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    grown = process.memory_info().rss - before
    assert grown < GROWTH_BYTES, f"grew by {grown >> 20} MiB"


def fuzzed(share: float) -> settings:
    """Hypothesis' settings for a test that runs this share of all cases."""
    return settings(
        max_examples=max(1, round(CASES * share)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@functools.cache
def real_pictures() -> tuple[bytes, ...]:
    """Files of every format that is read, in many of the ways in which they are written."""
    photo = Image.fromarray(pictures.noise(40, 30))
    deep = Image.fromarray(pictures.noise(40, 30)[..., 0].astype(np.uint16) * 300)
    frames = [Image.fromarray(pictures.noise(40, 30, seed)) for seed in range(3)]
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    written: list[tuple[Image.Image, str, dict[str, object]]] = [
        (photo, "JPEG", {"exif": exif}),
        (photo, "JPEG", {"progressive": True, "subsampling": 0}),
        (photo.convert("L"), "JPEG", {"restart_marker_blocks": 2}),
        (photo.convert("CMYK"), "JPEG", {}),
        (frames[0], "MPO", {"save_all": True}),
        (photo, "PNG", {"exif": exif}),
        (photo.convert("P"), "PNG", {"transparency": 3}),
        (photo.convert("1"), "PNG", {}),
        (deep, "PNG", {}),
        (photo.convert("LA"), "PNG", {}),
        (frames[0], "PNG", {"save_all": True}),
        (photo, "WEBP", {"exif": exif}),
        (photo.convert("RGBA"), "WEBP", {"lossless": True}),
        (frames[0], "WEBP", {"save_all": True}),
        (photo.convert("P"), "GIF", {"interlace": True}),
        (frames[0], "GIF", {"save_all": True}),
        (photo, "BMP", {}),
        (photo.convert("P"), "BMP", {}),
        (photo.convert("1"), "BMP", {}),
        (photo, "TIFF", {}),
        (photo.convert("F"), "TIFF", {}),
        (deep, "TIFF", {}),
        (frames[0], "TIFF", {"save_all": True}),
        *((photo, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg")),
        (photo.convert("1"), "TIFF", {"compression": "group4"}),
        (photo.convert("1"), "TIFF", {"compression": "packbits"}),
    ]
    files = []
    for picture, kind, options in written:
        if "save_all" in options:
            options["append_images"] = [frame.copy() for frame in frames[1:]]
        with io.BytesIO() as buffer:
            picture.copy().save(buffer, kind, **options)  # type: ignore[arg-type]
            files.append(buffer.getvalue())
    return tuple(files)


@st.composite
def broken_pictures(draw: st.DrawFn) -> bytes:
    """A real image after one to six accidents."""
    data = bytearray(draw(st.sampled_from(real_pictures())))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.one_of(st.integers(0, min(200, len(data))), st.integers(0, len(data))))
        what = draw(st.sampled_from(["bit", "byte", "number", "cut", "drop", "repeat", "join"]))
        if what == "bit" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "byte":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif what == "number":  # a width, a length, an offset, in either byte order
            size = draw(st.sampled_from([2, 4]))
            number = draw(st.sampled_from([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
            order = draw(st.sampled_from(["little", "big"]))
            data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, order)
        elif what == "cut":
            del data[at:]
        elif what == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif what == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 256))] * draw(st.integers(1, 20))
        elif what == "join":
            data[at:at] = draw(st.sampled_from(real_pictures()))[: draw(st.integers(1, 2000))]
    return bytes(data)
