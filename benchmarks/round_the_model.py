"""What stands round the model: decoding, fitting and drawing, beside one forward pass.

    python benchmarks/round_the_model.py PHOTOGRAPH [--rounds 9] [--write PAGE]

One thread. Every figure is the median of ratios to an eager resnet50 forward pass (random weights)
that runs in turn with it, in CPU seconds of the thread, so that a busy neighbour counts little.
The image is cut to 4:3 and scaled to 640x480 and to 4000x3000, both JPEGs of quality 90; the
second also with a sensor's grain, which makes the file three times as large.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import platform
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from service.cam.encoding import encode, level_png
from service.cam.heatmap import COLORMAPS, Style, render_heatmap, render_overlay
from service.images.decode import Preprocessing, decode, fit_to_model
from service.images.upload import Upload, open_upload

TABLES, END = "<!-- round-the-model:tables -->", "<!-- round-the-model:end -->"
SIDE = 2048
LIMIT = 50_000_000

Pixels = NDArray[np.uint8]
Steps = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Photo:
    """A file, and its pixels before it was written."""

    name: str
    data: bytes
    pixels: Pixels


def photos(path: Path) -> list[Photo]:
    """The small one, the large one, and the large one with grain."""
    with Image.open(path) as image:
        whole = image.convert("RGB")
    width = min(whole.width, whole.height * 4 // 3)
    left = (whole.width - width) // 2
    cut = whole.crop((left, 0, left + width, width * 3 // 4))
    small, large = (
        np.asarray(cut.resize(size, Image.Resampling.LANCZOS))
        for size in ((640, 480), (4000, 3000))
    )
    grain = np.random.default_rng(0).normal(0, 5, (*large.shape[:2], 1))
    grainy = np.clip(large + grain, 0, 255).astype(np.uint8)
    named = (("640x480", small), ("12 MP", large), ("12 MP, grain", grainy))
    return [Photo(name, jpeg(pixels), pixels) for name, pixels in named]


def jpeg(pixels: Pixels, kind: str = "JPEG", **options: object) -> bytes:
    """A file by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 90} | options))
    return buffer.getvalue()


def by_pillow(data: bytes, scale: int = 1) -> Pixels:
    """As camserve decoded before."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (image.width // scale, image.height // scale))
        image.load()
        return np.array(image.convert("RGB"))


def opened(photo: Photo, side: int | None = None) -> Upload:
    """What the service does before the model."""
    return open_upload(photo.data, Preprocessing(), "crop", max_pixels=LIMIT, preview_side=side)


def map_of(seed: int = 0) -> NDArray[np.float32]:
    """A 7x7 map with a peak, as the last layer of a resnet50 has."""
    rows, columns = np.indices((7, 7)) - 3.0
    peak = np.exp(-((rows - 1) ** 2 + columns**2) / 4)
    noise = np.random.default_rng(seed).normal(0, 0.1, (7, 7))
    cam = np.maximum(peak + noise, 0).astype(np.float32)
    scaled: NDArray[np.float32] = cam / cam.max()
    return scaled


def rendered(upload: Upload, include: str) -> object:
    """What the service does after the model."""
    cam, geometry = map_of(), upload.model_input.geometry
    if include == "heatmap":
        return render_heatmap(cam, geometry, Style(), SIDE)
    assert upload.preview is not None
    pixels = upload.model_input.pixels.permute(1, 2, 0).numpy()
    return render_overlay(cam, geometry, Style(), upload.preview, pixels)


def steps(photo: Photo) -> Steps:
    """Each step alone; `A | B` are choices for the same."""
    data, large = photo.data, len(photo.data) > 500_000
    kept = (512, 512)
    source = decode(data, max_pixels=LIMIT, keep=kept)
    upload, with_photo = opened(photo), opened(photo, SIDE)
    found: dict[str, Callable[[], object]] = {
        "decode, Pillow": lambda: by_pillow(data),
        "decode, OpenCV": lambda: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR),
        "**decode, simplejpeg**": lambda: simplejpeg.decode_jpeg(data),
    }
    if large:
        quarter = {"min_height": 750, "min_width": 1000}
        found |= {
            "decode to a quarter, Pillow's draft": lambda: by_pillow(data, 4),
            "**decode to a quarter, simplejpeg**": lambda: simplejpeg.decode_jpeg(data, **quarter),
        }
    return found | {
        "SHA-256 of the file": lambda: hashlib.sha256(data).digest(),
        "**decode as the service does**": lambda: decode(data, max_pixels=LIMIT, keep=kept),
        "resize and crop for the model": lambda: fit_to_model(source, Preprocessing()),
        "heatmap": lambda: rendered(upload, "heatmap"),
        "all outside the model, heatmap": lambda: rendered(opened(photo), "heatmap"),
        "overlay": lambda: rendered(with_photo, "overlay"),
        "all outside the model, overlay": lambda: rendered(opened(photo, SIDE), "overlay"),
    }


def encoders(photo: Photo) -> Steps:
    """Choices of encoding, on an overlay and a heatmap of 640x480."""
    upload = opened(photo, SIDE)
    drawn = render_heatmap(map_of(), upload.model_input.geometry, Style(), SIDE)
    with Image.open(io.BytesIO(drawn.data)) as image:
        levels = np.array(image)
    indexed = Image.fromarray(levels).convert("P")
    colours = COLORMAPS["turbo"][levels]
    overlay = cv2.addWeighted(colours, 0.5, photo.pixels, 0.5, 0.0).astype(np.uint8)
    plain = cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR)

    def by_opencv(*options: int) -> bytes:
        return cv2.imencode(".png", plain, options)[1].tobytes()

    def in_colour() -> bytes:
        return cv2.imencode(".png", colours, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()

    def saved(picture: Image.Image, level: int) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=level)
        return buffer.getvalue()

    level = cv2.IMWRITE_PNG_COMPRESSION
    made: dict[str, Callable[[], bytes]] = {
        "overlay JPEG, simplejpeg": lambda: simplejpeg.encode_jpeg(
            overlay, 90, colorsubsampling="420"
        ),
        "**overlay JPEG, OpenCV**": lambda: encode(overlay, "jpeg"),
        "overlay PNG, Pillow level 6": lambda: saved(Image.fromarray(overlay), 6),
        "overlay PNG, OpenCV level 1": lambda: by_opencv(level, 1),
        "**overlay PNG, OpenCV level 1, one filter, no search**": lambda: encode(overlay, "png"),
        "**overlay WebP, Pillow method 0**": lambda: encode(overlay, "webp"),
        "heatmap PNG in color, OpenCV level 1": in_colour,
        "heatmap PNG, indexed, Pillow level 6": lambda: saved(indexed, 6),
        "heatmap PNG, indexed, Pillow level 1": lambda: saved(indexed, 1),
        "heatmap PNG, indexed, differences, zlib level 6": lambda: zlib.compress(
            np.diff(levels, axis=1, prepend=np.uint8(0)).tobytes(), 6
        ),
        "heatmap PNG, indexed, differences, zlib level 1": lambda: zlib.compress(
            np.diff(levels, axis=1, prepend=np.uint8(0)).tobytes(), 1
        ),
        "**heatmap PNG, indexed, differences, ISA-L**": lambda: level_png(
            levels, COLORMAPS["turbo"]
        ),
    }
    return {f"{name} | {len(work()) / 1000:.1f}": work for name, work in made.items()}


def others(photo: Photo) -> Steps:
    """Formats that cannot be scaled down while they are decoded."""
    cmyk = io.BytesIO()
    Image.fromarray(photo.pixels).convert("CMYK").save(cmyk, "JPEG", quality=90)
    files = {
        "PNG": jpeg(photo.pixels, "PNG", compress_level=1),
        "WebP": jpeg(photo.pixels, "WEBP", method=0),
        "TIFF": jpeg(photo.pixels, "TIFF"),
        "JPEG in CMYK": cmyk.getvalue(),
    }

    def round_heatmap(data: bytes) -> object:
        return rendered(opened(Photo("", data, photo.pixels)), "heatmap")

    return {name: partial(round_heatmap, data) for name, data in files.items()}


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def ratios(works: Steps, forward: Callable[[], object], rounds: int) -> dict[str, float]:
    """The median cost of each in forward passes, all in turn."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            plain = seconds(forward)
            found[name].append(seconds(work) / plain)
    return {name: statistics.median(each) for name, each in found.items()}


def table(head: str, rows: Mapping[str, Sequence[str]]) -> str:
    """Markdown."""
    line = "|" + "---|" * head.count("|")
    body = "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())
    return f"| {head}\n{line}\n{body}\n"


def report(path: Path, rounds: int) -> str:
    """Measure everything; the text of a section of the benchmarks page."""
    model = torchvision.models.resnet50(weights=None).eval()
    image = torch.zeros(1, 3, 224, 224)

    def forward() -> None:
        with torch.inference_mode():
            model(image)

    sent = photos(path)
    small, large, _ = sent
    by_photo = [ratios(steps(photo), forward, rounds) for photo in sent]
    names = by_photo[1]
    each = {
        name: [f"{found[name]:.3f}" if name in found else "" for found in by_photo]
        for name in names
    }
    encoded = {
        name: [f"{ratio:.3f}"] for name, ratio in ratios(encoders(small), forward, rounds).items()
    }
    whole = {photo.name: found for photo, found in zip(sent, by_photo, strict=True)}
    of_small, of_large = (ratios(others(photo), forward, 3) for photo in (small, large))
    formats = {
        name: [
            f"{of_small[name]:.3f}",
            f"{of_large[name]:.3f}",
            f"{of_large[name] / of_small[name]:.0f}",
        ]
        for name in of_small
    }
    heatmap = {name: found["all outside the model, heatmap"] for name, found in whole.items()}
    between = "; ".join(
        f"{passes:g}: {(passes + heatmap['12 MP']) / (passes + heatmap['640x480']):.2f}, grain "
        f"{(passes + heatmap['12 MP, grain']) / (passes + heatmap['640x480']):.2f}"
        for passes in (0.6, 1.0)
    )
    versions = (
        f"torch {torch.__version__}, Pillow {PIL.__version__}, simplejpeg "
        f"{simplejpeg.__version__}, OpenCV {cv2.__version__}, Python {platform.python_version()}"
    )
    sizes = ", ".join(f"{photo.name}: {len(photo.data) / 1e6:.2f} MB" for photo in sent)
    return "\n".join(
        [
            f"1 is an eager forward pass of resnet50. {versions}. Files: {sizes}.\n",
            table("step | 640x480 | 12 MP | 12 MP, grain |", each),
            f"12 MP ÷ 640x480, a heatmap, for a model of this many forward passes: {between}.\n",
            table("encoding 640x480 | kB | ratio |", encoded),
            table("all outside the model, other formats | 640x480 | 12 MP | ÷ |", formats),
        ]
    )


def main() -> None:
    """Print the tables, and with --write put them into a page between its two marks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photograph", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    text = report(options.photograph, options.rounds)
    print(text)
    if options.write:
        page = options.write.read_text()
        before, _, rest = page.partition(TABLES)
        after = rest.partition(END)[2]
        options.write.write_text(f"{before}{TABLES}\n\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
