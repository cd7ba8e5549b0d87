"""Measure whether drift is seen, how often it is imagined, and what watching costs.

    .venv/bin/python benchmarks/drift.py --data ../shared/data

The baseline is of the built-in model on photographs. A watermark, a tag in the lower right corner,
is drawn on a share of other photographs: after how many images is a distance over its noise level?
False alarms: windows drawn with replacement from the baseline's own images, and windows of other
photographs without a watermark; each is looked at every 25 images. Cost: the time of observing an
answer, divided by that of explaining it, in one process and turn by turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measuring import ROOT, photograph, ratio
from torch import Tensor

sys.path += [str(ROOT / "tools" / folder) for folder in ("planted_cues", "builtin_model")]

from cues import tag
from photos import Photos, read_photos
from train import squares

from api_schemas.options import ExplainOptions
from service.evaluation.drift import Baseline, DriftWatch, Observation, observe
from service.evaluation.single_runs import replica_of, result_of
from service.images.upload import open_upload
from service.inference.questions import InferenceResult, Question
from service.models.catalog import parse_model
from service.models.loading import load_model
from service.models.pool import Replica
from service.pipeline.response import image_result
from service.pipeline.service import ProcessedImage

RESAMPLINGS = 20
IMAGES, EVERY = 500, 25
SHARE = 0.2
SIDE = 128
TAG = 0.2
"""Side of the watermark, as a share of the image's shorter one."""


def marked(image: Tensor) -> Tensor:
    """The image with the watermark."""
    side = round(TAG * min(image.shape[1:]))
    drawn = image.clone()
    drawn[:, -side:, -side:] = tag(1, side)
    return drawn


def explained(replica: Replica, image: Tensor) -> tuple[InferenceResult, Tensor]:
    """The answer to one image, uint8 (3, h, w), by default options; and the model input."""
    model = replica.model
    upload = open_upload(
        image.permute(1, 2, 0).contiguous().numpy(),
        model.preprocessing,
        None,
        max_pixels=10**7,
        preview_side=None,
    )
    assert model.target_layer is not None
    question = Question(upload.model_input.pixels, layers=(model.target_layer,))
    found = result_of(replica, question)
    assert isinstance(found, InferenceResult)
    return found, question.pixels


def observations(replica: Replica, images: Sequence[Tensor]) -> list[Observation]:
    """What is observed of each image's answer."""
    found = []
    for image in images:
        result, pixels = explained(replica, image)
        best = result.predictions[0]
        label = replica.model.labels[best.class_id]
        found.append(observe(label, best.score, result.explanations[0].grid, None, pixels.numpy()))
    return found


def first_alarm(baseline: Baseline, rows: Sequence[Observation]) -> tuple[int | None, list[str]]:
    """After how many images a distance is over its noise level, and of what; None: never."""
    watch = DriftWatch(baseline)
    for count, row in enumerate(rows, 1):
        watch.add(row)
        if count % EVERY == 0:
            over = [each for each in watch.distances() if each.psi > each.noise]
            if over:
                return count, [f"{each.feature} {each.label}".strip() for each in over]
    return None, []


def overhead(replica: Replica, baseline: Baseline, count: int) -> str:
    """The time of observing an answer, as a share of that of explaining the same image.

    Of JPEG files with default options: decoded, explained and rendered, without HTTP.
    """
    watch, model = DriftWatch(baseline), replica.model
    options = ExplainOptions()
    observing: list[float] = []
    explaining: list[float] = []
    for number in range(count):
        data = photograph(number % 8)
        began = time.perf_counter()
        upload = open_upload(data, model.preprocessing, None, max_pixels=10**8, preview_side=None)
        pixels = upload.model_input.pixels
        result = result_of(replica, Question(pixels, layers=(model.target_layer or "",)))
        assert isinstance(result, InferenceResult)
        image_result(model, options, 2048, ProcessedImage(upload, result, None))
        middle = time.perf_counter()
        watch.note(model, result, pixels)
        observing.append(time.perf_counter() - middle)
        explaining.append(middle - began)
    share = ratio(observing, explaining)
    return f"{share.median:.2%} ({share.low:.2%} to {share.high:.2%}) of an explanation"


def drawn(rows: Sequence[Observation], seed: int, count: int) -> list[Observation]:
    """Rows drawn with replacement."""
    chosen = np.random.default_rng(seed).integers(len(rows), size=count)
    return [rows[index] for index in chosen]


def report(replica: Replica, known: Photos, others: Photos) -> dict[str, object]:
    """All figures."""
    model = replica.model
    known_rows = observations(replica, known.images)
    layers = (model.target_layer,) if model.target_layer else ()
    baseline = Baseline.of(model.name, model.version, "gradcam", layers, known_rows)
    plain = observations(replica, others.images)
    with_mark = observations(replica, [marked(image) for image in others.images])
    alarms, seen = [], []
    for seed in range(RESAMPLINGS):
        alarms.append(first_alarm(baseline, drawn(known_rows, seed, 2 * IMAGES))[0])
        generator = np.random.default_rng(1000 + seed)
        chosen = generator.permutation(len(plain))[:IMAGES]
        mark = generator.random(IMAGES) < SHARE
        mixed = [
            (with_mark if is_marked else plain)[index]
            for index, is_marked in zip(chosen, mark, strict=True)
        ]
        seen.append(first_alarm(baseline, mixed))
    orders = (np.random.default_rng(seed).permutation(len(plain)) for seed in range(RESAMPLINGS))
    fresh = [first_alarm(baseline, [plain[i] for i in order[:IMAGES]])[0] for order in orders]
    return {
        "baseline images": len(known_rows),
        f"false alarms, {2 * IMAGES} of the baseline's own images": count(alarms),
        f"alarms, {IMAGES} other photographs without a watermark": count(fresh),
        f"alarms within {IMAGES}, watermark in {SHARE:.0%}": count([at for at, _ in seen]),
        "images until the alarm": sorted(at for at, _ in seen if at is not None),
        "features of the first alarm": sorted({name for _, names in seen for name in names}),
        "cost": overhead(replica, baseline, 200),
    }


def count(alarms: Sequence[int | None]) -> str:
    """How many of them are alarms."""
    return f"{sum(at is not None for at in alarms)} of {len(alarms)}"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--baseline", type=int, default=700, help="photographs of the baseline")
    parser.add_argument("--others", type=int, default=700, help="photographs to draw from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    photos = read_photos(options.data / "flowers128.tar", "train")
    order = torch.randperm(len(photos.labels), generator=torch.Generator().manual_seed(0))
    known = photos[order[: options.baseline]]
    others = photos[order[options.baseline :][: options.others]]
    known = Photos(list(squares(known, SIDE)), known.labels)  # so that no corner is cut off
    others = Photos(list(squares(others, SIDE)), others.labels)
    replica = replica_of(load_model(parse_model(options.model)))
    print(json.dumps(report(replica, known, others), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
