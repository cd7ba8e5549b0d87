"""How good are the boxes of maps as pre-labels? IoU with the boxes that people drew.

    .venv/bin/python benchmarks/prelabels.py --data ../shared/data

Each photograph of COCO with a kind of object that ImageNet has a class for, if the top-1 prediction
is such a class: the largest box of the map of that class, as Label Studio gets it, beside the drawn
box that it overlaps most. The baselines look at no map: the whole image, and a central box of
half its sides. Prints a table in Markdown, with bootstrap intervals over photographs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from localisation_cases import Photo, photos

from service.cam.regions import find_regions
from service.images.decode import Fit, Rect, fit_to_model
from service.inference.batch import Unfinished, run
from service.inference.questions import Question
from service.models.catalog import parse_model
from service.models.loading import load_model
from service.models.pool import ModelPool, Replica

MODELS = ("mobilenet_v2", "squeezenet1_1")
METHODS = ("gradcam", "layercam")
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)
GOOD = 0.5
"""The IoU from which a box counts as found, as in PASCAL VOC."""


@dataclass(frozen=True, slots=True)
class Case:
    """IoU of the boxes of one photograph by their name. single: whether it has one object."""

    photo: str
    single: bool
    found: dict[str, float]


def iou(one: Rect, other: Rect) -> float:
    """Intersection over union of two boxes x, y, w, h."""
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right = min(one[0] + one[2], other[0] + other[2])
    bottom = min(one[1] + one[3], other[1] + other[3])
    shared = max(0.0, right - left) * max(0.0, bottom - top)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def case(photo: Photo, replica: Replica, fit: Fit) -> Case | None:
    """All boxes of one photograph; None if the model names another class."""
    fitted = fit_to_model(photo.source, replica.model.preprocessing, fit)
    width, height = photo.source.size
    boxes: dict[str, Rect | None] = {
        "whole image": (0.0, 0.0, width, height),
        "central box": (width / 4, height / 4, width / 2, height / 2),
    }
    layer = replica.model.target_layer
    assert layer is not None
    for method in METHODS:
        (answer,) = run(replica, [Question(fitted.pixels, method=method, layers=(layer,))])
        assert not isinstance(answer, Unfinished | Exception)
        (explanation,) = answer.explanations
        if explanation.class_id not in photo.classes:
            return None
        for threshold in THRESHOLDS:
            regions = find_regions(explanation.grid, fitted.geometry, threshold)
            first = next(iter(regions.boxes), None)
            boxes[f"{method} {threshold}"] = first
    best = {
        name: max(iou(box, drawn) for drawn in photo.boxes) if box else 0.0
        for name, box in boxes.items()
    }
    return Case(photo.name, len(photo.boxes) == 1, best)


def rows(cases: Sequence[Case]) -> Iterator[str]:
    """A row for each kind of box."""
    chance = np.random.default_rng(0)
    draws = chance.integers(0, len(cases), (2000, len(cases)))
    for name in cases[0].found:
        values = np.array([each.found[name] for each in cases])
        low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
        single = np.array([each.found[name] for each in cases if each.single])
        yield (
            f"| {name} | {values.mean():.2f} ({low:.2f}–{high:.2f}) | {np.median(values):.2f} "
            f"| {(values >= GOOD).mean():.0%} | {single.mean():.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each model and fit, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--fit", choices=get_args(Fit), action="append")
    options = parser.parse_args(arguments)
    drawn = [photo for photo in photos(options.data) if photo.boxes]
    for name in options.model or MODELS:
        weights = options.data / "weights" / f"{name}.fp16.safetensors"
        model = load_model(parse_model(f"torchvision/{name}@{weights}"))
        with ModelPool([model], replicas=1).lease(model.name) as replica:
            for fit in options.fit or ("crop", "pad"):
                tried = [case(photo, replica, fit) for photo in drawn]
                cases = [each for each in tried if each is not None]
                print(f"\n{name}, `fit={fit}`: {len(cases)} of {len(drawn)} named right\n")
                print("| box | mean IoU (95 %) | median | IoU ≥ 0.5 | mean, one object |")
                print("|---|---|---|---|---|")
                print("\n".join(rows(cases)), flush=True)


if __name__ == "__main__":
    main()
