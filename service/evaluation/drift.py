"""Drift: how far the distributions of answers are from those on known images.

    baseline = Baseline.of("resnet50", version, "gradcam", layers, observations)
    watch = DriftWatch(baseline)
    watch.note(model, result, pixels)  # of each answered image, in any thread
    for found in watch.distances():
        print(found.feature, found.psi, found.noise)

The distance is the population stability index: PSI = Σ (q − p) ln(q / p) over bins, p of the
baseline and q of the last WINDOW images. Without drift it is about (1/n + 1/m) times a χ² with one
degree of freedom less than there are bins (Yurdakul, "Statistical Properties of Population
Stability Index", 2018), so that its noise level depends on the number of images alone.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import cv2
import numpy as np
import orjson
from numpy.typing import NDArray
from torch import Tensor

from service.errors import ConfigurationError
from service.inference.questions import InferenceResult
from service.models.loaded import LoadedModel

FORMAT = 1
"""Of the file; another number is refused."""

WINDOW = 500
"""Images that are compared with the baseline: the last ones."""

MIN_IMAGES = 100
"""Images that a distance needs, of the baseline and of the window."""

MAX_CLASSES = 20
"""Most classes with distances of their own: those with most images in the baseline."""

LEVEL = 0.9999
"""Share of χ² below the noise level. It is high because many distances are looked at, often."""

BINS = 8
"""Bins of a number, with equally many images of the baseline each where values differ."""

RARE = 0.02
"""A category with a smaller share of the baseline counts as `other`."""

BORDER = 0.15
"""Share of the map's side that is its border."""

PLACES = ("upper_left", "upper_right", "lower_left", "lower_right", "centre")
DETAILS = tuple(f"detail_{place}" for place in PLACES)
"""Of the model input: what a model that ignores a watermark shows in none of its answers."""

PLACE_SHARE = 4
"""A place is a square of this part of the input's shorter side."""

NUMBERS = ("score", "entropy", "border", "centre_x", "centre_y", *DETAILS)
CATEGORIES = ("label", "peak", "verdict")

_THIRDS = ("left", "middle", "right")


class Observation(NamedTuple):
    """What one answer is, for the baseline and for the window. A map of zeros has score and label.

    score:   of the best class, 0..1.
    entropy: of the map's shares of |evidence|, divided by its largest value: 0 one cell, 1 even.
    border:  share of |evidence| in the outer BORDER of each side, 0..1.
    centre_x, centre_y: mean place of the evidence, as fractions of the map's sides.
    peak:    the ninth of the map with the strongest cell, such as `upper left`.
    verdict: of `verify`. None: not measured, as for the numbers of a map NaN.
    detail_…: mean difference of neighbouring pixels in a corner or the centre of the model input,
             0..255.
    """

    label: str
    score: float
    entropy: float = math.nan
    border: float = math.nan
    centre_x: float = math.nan
    centre_y: float = math.nan
    peak: str | None = None
    verdict: str | None = None
    detail_upper_left: float = math.nan
    detail_upper_right: float = math.nan
    detail_lower_left: float = math.nan
    detail_lower_right: float = math.nan
    detail_centre: float = math.nan


def observe(
    label: str,
    score: float,
    grid: NDArray[np.float32] | None,
    verdict: str | None = None,
    pixels: NDArray[np.uint8] | None = None,
) -> Observation:
    """Return the observation of an answer.

    grid: the map of its best class, (h, w). pixels: the model input (C, h, w).
    """
    details: Mapping[str, Any] = {} if pixels is None else _details(pixels)
    if grid is None:
        return Observation(label, score, **details)
    strength = np.abs(grid)
    total = float(strength.sum())
    if not total > 0:
        return Observation(label, score, verdict=verdict, **details)
    rows, columns = strength.shape
    down, across = strength.sum(axis=1) / total, strength.sum(axis=0) / total
    held = strength[strength > 0]
    # The entropy of shares s / T is ln T − Σ s ln s / T.
    entropy = math.log(total) - float(held @ np.log(held)) / total
    top, left = divmod(int(strength.argmax()), columns)
    return Observation(
        label,
        score,
        entropy / math.log(max(2, strength.size)),
        _border(strength) / total,
        float(across @ _middles(columns)),
        float(down @ _middles(rows)),
        f"{('upper', 'centre', 'lower')[3 * top // rows]} {_THIRDS[3 * left // columns]}",
        verdict,
        **details,
    )


def _details(pixels: NDArray[np.uint8]) -> Mapping[str, float]:
    """The detail at each of PLACES, of one channel: the second one of RGB."""
    plane = pixels[min(1, len(pixels) - 1)]
    height, width = plane.shape
    side = max(2, min(height, width) // PLACE_SHARE)
    tops = (0, 0, height - side, height - side, (height - side) // 2)
    lefts = (0, width - side, 0, width - side, (width - side) // 2)
    found = {}
    for name, y, x in zip(DETAILS, tops, lefts, strict=True):
        square = plane[y : y + side, x : x + side]
        found[name] = cv2.norm(square[:, 1:], square[:, :-1], cv2.NORM_L1) / (side * (side - 1))
    return found


def _middles(count: int) -> NDArray[np.float64]:
    return (np.arange(count) + 0.5) / count


def _border(strength: NDArray[np.float32]) -> float:
    """The sum in the outer BORDER of each side, at least one cell wide."""
    rows, columns = strength.shape
    wide, high = max(1, round(columns * BORDER)), max(1, round(rows * BORDER))
    inner = strength[high : rows - high, wide : columns - wide]
    return float(strength.sum()) - float(inner.sum())


@dataclass(frozen=True, slots=True)
class Distribution:
    """Counts of the baseline by bin.

    edges: of numbers, inner ones, rising; values beyond them are in the outer bins.
    values: of categories, and behind them a bin for every other value.
    """

    counts: tuple[int, ...]
    edges: tuple[float, ...] = ()
    values: tuple[str, ...] | None = None

    @classmethod
    def of(cls, observed: Sequence[Any]) -> Self | None:
        """Return the distribution of numbers or texts; None without MIN_IMAGES values."""
        if len(observed) < MIN_IMAGES:
            return None
        if isinstance(observed[0], str):
            shares = Counter(observed)
            values = tuple(v for v, n in shares.most_common() if n >= RARE * len(observed))
            empty = cls((), values=values)
        else:
            inner = np.quantile(observed, np.arange(1, BINS) / BINS)
            empty = cls((), edges=tuple(np.unique(inner).tolist()))
        return cls(tuple(empty.binned(observed).tolist()), empty.edges, empty.values)

    def binned(self, observed: Sequence[Any]) -> NDArray[np.int64]:
        """Count values by bin."""
        if self.values is None:
            bins = np.searchsorted(self.edges, observed, side="right")
            return np.bincount(bins, minlength=len(self.edges) + 1)
        counts = Counter(observed)
        named = [counts[value] for value in self.values]
        return np.array([*named, len(observed) - sum(named)])

    def as_json(self) -> Mapping[str, Any]:
        """Return the distribution as JSON values."""
        bins = {"edges": self.edges} if self.values is None else {"values": self.values}
        return {**bins, "counts": self.counts}


def psi(baseline: Sequence[int], now: Sequence[int]) -> float:
    """The population stability index of two counts by bin; half a count is added to each bin."""
    p, q = (np.asarray(counts, dtype=np.float64) + 0.5 for counts in (baseline, now))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def noise_level(baseline: int, now: int, bins: int) -> float:
    """The PSI that LEVEL of samples of these sizes stay below without drift.

    χ² by Wilson and Hilferty (PNAS 1931).
    """
    degrees = max(1, bins - 1)
    spread = 2 / (9 * degrees)
    chi2 = degrees * (1 - spread + NormalDist().inv_cdf(LEVEL) * math.sqrt(spread)) ** 3
    return chi2 * (1 / baseline + 1 / now)


Distributions = Mapping[str, Distribution]
"""By feature; those that were not observed are missing."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Distributions of a model's answers on known images: of all, and by class.

    method, layers: of the maps; others are not compared with it.
    """

    model: str
    version: str
    method: str
    layers: tuple[str, ...]
    images: int
    overall: Distributions
    classes: Mapping[str, tuple[int, Distributions]]

    @classmethod
    def of(
        cls,
        model: str,
        version: str,
        method: str,
        layers: Sequence[str],
        observed: Sequence[Observation],
    ) -> Self:
        """Build the baseline. Raises ConfigurationError for fewer than MIN_IMAGES."""
        if len(observed) < MIN_IMAGES:
            raise ConfigurationError(
                f"{len(observed)} explained images are too few for a baseline; give at least "
                f"{MIN_IMAGES}, better 1,000, of the kind that the service receives."
            )
        common = Counter(each.label for each in observed).most_common(MAX_CLASSES)
        classes = {
            label: (count, _distributions([each for each in observed if each.label == label]))
            for label, count in common
            if count >= MIN_IMAGES
        }
        overall = _distributions(observed)
        return cls(model, version, method, tuple(layers), len(observed), overall, classes)

    def write(self) -> bytes:
        """Return the file's content."""
        return orjson.dumps(
            {
                "format": FORMAT,
                "model": self.model,
                "version": self.version,
                "method": self.method,
                "layers": self.layers,
                "images": self.images,
                "features": {name: each.as_json() for name, each in self.overall.items()},
                "classes": {
                    label: {
                        "images": count,
                        "features": {name: each.as_json() for name, each in found.items()},
                    }
                    for label, (count, found) in self.classes.items()
                },
            },
            option=orjson.OPT_INDENT_2,
        )


def read_baseline(file: Path) -> Baseline:
    """Read the file of `camserve baseline`. Raises ConfigurationError."""
    try:
        return _parsed(orjson.loads(file.read_bytes()))
    except OSError as error:
        raise ConfigurationError(f"--baseline {file}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"--baseline {file} is not a file of camserve baseline: {type(error).__name__} "
            f"{error}. Write it again: camserve baseline FOLDER --out {file}."
        ) from error


def _parsed(found: Any) -> Baseline:
    """The baseline of a file's JSON. Raises ValueError, KeyError, TypeError or AttributeError."""
    if found["format"] != FORMAT:
        raise ValueError(f"format {found['format']}, and this version reads {FORMAT}")
    return Baseline(
        str(found["model"]),
        str(found["version"]),
        str(found["method"]),
        tuple(map(str, found["layers"])),
        int(found["images"]),
        _read_distributions(found["features"]),
        {
            str(label): (int(each["images"]), _read_distributions(each["features"]))
            for label, each in found["classes"].items()
        },
    )


def _read_distributions(found: Mapping[str, Any]) -> Distributions:
    read = {}
    for name in (*NUMBERS, *CATEGORIES):
        if name not in found:
            continue
        each, is_number = found[name], name in NUMBERS
        counts = tuple(map(int, each["counts"]))
        edges = tuple(map(float, each["edges"])) if is_number else ()
        values = None if is_number else tuple(map(str, each["values"]))
        if len(counts) != len(edges if values is None else values) + 1 or min(counts) < 0:
            raise ValueError(f"{name}: {len(counts)} counts do not fit its bins")
        read[name] = Distribution(counts, edges, values)
    return read


def _distributions(observed: Sequence[Observation]) -> Distributions:
    found = ((name, Distribution.of(_values(observed, name))) for name in (*NUMBERS, *CATEGORIES))
    return {name: each for name, each in found if each is not None}


def _values(observed: Sequence[Observation], name: str) -> list[Any]:
    """What was observed of a feature, without images that have none."""
    values = (getattr(each, name) for each in observed)
    return [value for value in values if value is not None and value == value]  # noqa: PLR0124 - NaN


class Distance(NamedTuple):
    """How far a feature is from the baseline. label: the class; "" for all images."""

    label: str
    feature: str
    psi: float
    noise: float
    images: int


class DriftWatch:
    """The last WINDOW answers of one model, and their distances from its baseline.

    Threads may share it; it holds WINDOW observations, and computes only when it is read.
    """

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline
        self._window: list[Observation] = []
        self._next = 0
        self._lock = threading.Lock()

    def note(self, model: LoadedModel, result: InferenceResult, pixels: Tensor) -> None:
        """Observe an answer of the baseline's model and version; others are ignored.

        pixels: uint8 (C, h, w), the model input.
        Its map counts if it is of the best class, by the baseline's method at its layers.
        """
        wanted = self.baseline
        if (model.name, model.version) != (wanted.model, wanted.version):
            return
        best = result.predictions[0]
        grid = verdict = None
        for each in result.explanations:
            if each.class_id == best.class_id and not each.contrast:
                if (each.method, each.layers) == (wanted.method, wanted.layers):
                    grid = each.grid
                    verdict = None if each.verdict is None else each.verdict.verdict
                break
        label = model.labels[best.class_id]
        self.add(observe(label, best.score, grid, verdict, pixels.numpy()))

    def add(self, observation: Observation) -> None:
        """Put an observation into the window, in the place of the oldest one."""
        with self._lock:
            if len(self._window) < WINDOW:
                self._window.append(observation)
            else:
                self._window[self._next] = observation
                self._next = (self._next + 1) % WINDOW

    @property
    def images(self) -> int:
        """Images in the window."""
        return len(self._window)

    def distances(self) -> Iterator[Distance]:
        """Yield the distance of each feature with MIN_IMAGES values, of all images and by class."""
        with self._lock:
            window = list(self._window)
        yield from _distances("", self.baseline.overall, window)
        for label, (_, found) in self.baseline.classes.items():
            rows = [each for each in window if each.label == label]
            yield from _distances(label, found, rows)


def _distances(
    label: str, baseline: Distributions, window: Sequence[Observation]
) -> Iterator[Distance]:
    for name, expected in baseline.items():
        values = _values(window, name)
        if len(values) < MIN_IMAGES or len(expected.counts) < 2:
            continue
        distance = psi(expected.counts, expected.binned(values).tolist())
        noise = noise_level(sum(expected.counts), len(values), len(expected.counts))
        yield Distance(label, name, distance, noise, len(values))
