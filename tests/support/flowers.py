"""Scenes of known flowers as files, and a service with the detector and the segmenter of flowers.

The photographs are held out: none of them was in a scene of the training (`tools/flower_scenes`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pictures
from numpy.typing import NDArray
from running import Server, running

FOLDER = Path(__file__).parent.parent.parent / "tools" / "flower_scenes"
sys.path.append(str(FOLDER))
import flower_networks  # noqa: E402
import scenes  # noqa: E402

LABELS = flower_networks.LABELS
SIDE = scenes.SIDE
Rect = tuple[float, float, float, float]


@dataclass(frozen=True)
class Flowers:
    """One scene and its truth.

    file: a PNG file of SIDE × SIDE pixels. boxes: x, y, w, h in pixels. labels: of the boxes.
    classes: the class of each pixel, 0 for the background, (SIDE, SIDE).
    """

    name: str
    file: bytes
    boxes: list[Rect]
    labels: list[str]
    classes: NDArray[np.int64]


def drawn(shared_data: Path, count: int) -> list[Flowers]:
    """The first scenes of the seed that `benchmarks/detectors.py` measures on."""
    found = []
    for number, scene in enumerate(scenes.validation(shared_data / "flowers128.tar", count)):
        corners = scene.boxes.tolist()
        flowers = Flowers(
            f"{number}.png",
            pictures.file(scene.pixels.permute(1, 2, 0).contiguous().numpy()),
            [(left, top, right - left, below - top) for left, top, right, below in corners],
            [LABELS[1 + label] for label in scene.labels.tolist()],
            scene.classes().numpy(),
        )
        found.append(flowers)
    return found


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """A server of `flower-boxes` and `flower-regions`, patient where the machine is busy."""
    models = {"models": (), "config": FOLDER / "models.toml", "app_dir": FOLDER}
    with running(**{"request_timeout": 300, **models, **settings}) as server:
        yield server
