"""What the benchmarks share: timing in turn, ratios with an interval, results kept as they come.

Machines differ and are never quite quiet, so nothing here is judged by its milliseconds: variants
take turns in one process, and what counts is the median of the ratios of neighbours in time.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT.parent / "shared" / "data" / "demo_images"
"""Where real images lie beside the checkout; drawn ones take their place."""

LIBRARIES = (
    *("torch", "torchvision", "openvino", "grad-cam", "torchcam", "captum"),
    *("fastapi", "uvicorn", "litserve"),
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of ratios, with an interval that covers the true median 19 times out of 20."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """The ratio of two series that were measured in turn, round by round.

    The interval is between two of the sorted ratios, chosen by the binomial distribution: it
    assumes nothing of how the noise is distributed. Under six rounds it is the whole range.
    """
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    count = len(ratios)
    skipped = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    return Ratio(statistics.median(ratios), ratios[skipped], ratios[count - 1 - skipped])


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds a round: on the clock, and of CPU in this process."""

    wall: list[float]
    cpu: list[float]


def in_turn(
    variants: Mapping[str, Callable[[], object]], seconds: float, least: int = 5
) -> dict[str, Times]:
    """Time variants round by round, each once a round, in a new (seeded) order every time.

    It ends after `seconds`, and not before `least` rounds. Each was run twice before.
    """
    for run in variants.values():
        run()
        run()
    times = {name: Times([], []) for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle  # noqa: S311 - not for secrets
    rounds, until = 0, time.perf_counter() + seconds
    while rounds < least or time.perf_counter() < until:
        shuffle(order)
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            times[name].cpu.append(time.process_time() - cpu)
            times[name].wall.append(time.perf_counter() - wall)
        rounds += 1
    return times


class Results:
    """The finished parts of a run, in a JSON file that is whole after each of them.

    A part is kept with the settings it was measured with. The next run with the same settings takes
    it from here; `again` measures all anew.
    """

    def __init__(self, path: Path, *, again: bool = False) -> None:
        self.path = path
        self.parts: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.parts = json.loads(path.read_text(encoding="utf-8"))
        self._again = again
        self.parts["machine"] = {"settings": {}, "found": machine()}

    def has(self, key: str, settings: Mapping[str, Any]) -> bool:
        """Whether that part need not be measured again."""
        kept = self.parts.get(key)
        return not self._again and kept is not None and kept["settings"] == dict(settings)

    def keep(self, key: str, settings: Mapping[str, Any], found: Any) -> None:
        """Write a part down."""
        self.parts[key] = {"settings": dict(settings), "found": found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.parts), encoding="utf-8")
        beside.replace(self.path)

    def found(self, key: str) -> Any:
        """What a part found; None where it has not been measured."""
        part = self.parts.get(key)
        return None if part is None else part["found"]


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Cores, processor and versions, in one line."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"model name\s*: (.+)", text)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES if _installed(name)
    )
    return (
        f"{cores()} cores, {found[1] if found else platform.machine()}; "
        f"Python {platform.python_version()}, {versions}"
    )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def photograph(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG with the size and the detail of an image: soft shapes, edges and grain."""
    noise = np.random.default_rng(seed)
    coarse = Image.fromarray(noise.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    edges = Image.fromarray(noise.integers(0, 256, (24, 32), dtype=np.uint8))
    edged = edges.resize((width, height), Image.Resampling.NEAREST)
    detail = np.asarray(edged.filter(ImageFilter.GaussianBlur(2)), np.float32)[..., None] - 128
    grain = noise.normal(0, 8, (height, width, 1))
    return _jpeg(soft + 0.3 * detail + grain)


def photographs(width: int, height: int, count: int, folder: Path = PHOTOS) -> list[bytes]:
    """JPEGs of that size: of the images in a folder where there are any, else drawn ones.

    What has to be enlarged is given grain, or it would be smoother, and its file smaller, than
    what a camera makes.
    """
    files = sorted(folder.glob("*.jpg"))[:count] if folder.is_dir() else []
    made = []
    for file in files:
        with Image.open(file) as image:
            enlarged = image.width < width or image.height < height
            pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (width, height)), np.float32)
        if enlarged:
            pixels = pixels + np.random.default_rng(0).normal(0, 6, (height, width, 1))
        made.append(_jpeg(pixels))
    return made + [photograph(seed, width, height) for seed in range(len(made), count)]


def _jpeg(pixels: np.typing.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def put_between(page: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- MARK:begin -->` and `<!-- MARK:end -->` in a page."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
