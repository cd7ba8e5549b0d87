"""What bf16 costs in agreement with float32, on images.

    .venv/bin/python benchmarks/precision.py torchvision/mobilenet_v2@WEIGHTS photographs/

Every image is explained by both fronts, the class that float32 puts first by both; the rank
correlation is of their maps. The processor must compute in bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from measuring import machine, markdown

from service.evaluation.calibration import agreement
from service.images.image_files import find_images
from service.images.upload import open_upload
from service.models.catalog import parse_model
from service.models.compiled.lane import Compiler
from service.models.loading import load_model

MAX_PIXELS = 64_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model twice and print a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", help="as for camserve serve --model")
    parser.add_argument("folders", type=Path, nargs="+", help="of images")
    parser.add_argument("--allow-random-weights", action="store_true")
    options = parser.parse_args(arguments)
    exact, rounded = (
        load_model(
            parse_model(options.model),
            allow_random_weights=options.allow_random_weights,
            compiler=Compiler(precision=precision),
        )
        for precision in ("float32", "bf16")
    )
    lane = rounded.compiled
    if lane is None or lane.precision != "bf16":
        print(f"No bf16: {rounded.not_compiled if lane is None else lane.instead}")
        return
    pictures = [
        open_upload(
            path.read_bytes(), exact.preprocessing, "crop", max_pixels=MAX_PIXELS, preview_side=None
        ).model_input.pixels
        for path, _ in find_images(options.folders)
    ]
    found = agreement(exact, rounded, pictures)
    header = ["model", "images", "same top-1 class", "same peak"]
    header += ["rank correlation, median", "worst tenth", "at load"]
    row = [exact.name, str(found.images), f"{found.same_class:.0%}", f"{found.same_peak:.0%}"]
    row += [f"{found.median:.4f}", f"{found.tenth:.4f}", f"{lane.parity}"]
    print(f"{machine()}\n\n{markdown(header, [row])}")


if __name__ == "__main__":
    main()
