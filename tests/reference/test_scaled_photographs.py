"""What scaling a 12-megapixel photograph down while it is decoded does to scores and maps."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from oracles import real
from PIL import Image

from service.images.upload import open_upload
from service.inference.batch import run
from service.inference.questions import InferenceResult, Question
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool

pytestmark = pytest.mark.reference

LIMIT = 20_000_000


def photographs(folder: Path) -> Iterator[bytes]:
    """Every photograph enlarged to 12 megapixels, as a JPEG of quality 90."""
    for path in sorted((folder / "demo_images").glob("*.jpg")):
        with Image.open(path) as image:
            factor = (12_000_000 / (image.width * image.height)) ** 0.5
            size = (round(image.width * factor / 8) * 8, round(image.height * factor / 8) * 8)
            buffer = io.BytesIO()
            enlarged = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            enlarged.save(buffer, "JPEG", quality=90)
            yield buffer.getvalue()


def answered(model: LoadedModel, pool: ModelPool, data: bytes, side: int | None) -> InferenceResult:
    """A photo to draw on, as large as the source, needs the whole picture; None does not."""
    upload = open_upload(data, model.preprocessing, "crop", max_pixels=LIMIT, preview_side=side)
    target = str(model.target_layer)
    with pool.lease(model.name) as replica:
        (answer,) = run(replica, [Question(upload.model_input.pixels, layers=(target,))])
    assert isinstance(answer, InferenceResult)
    return answer


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_scores_and_maps_hardly_move(name: str, shared_data: Path) -> None:
    """The same class first; scores within .05, maps within .1 of their maximum."""
    model = real(name)
    scores, maps = [], []
    pool = ModelPool([model], replicas=1)
    for data in photographs(shared_data):
        full, scaled = (answered(model, pool, data, side) for side in (10_000, None))
        best = full.predictions[0]
        assert scaled.predictions[0].class_id == best.class_id
        scores.append(abs(scaled.predictions[0].score - best.score))
        grids = [each.explanations[0].grid for each in (full, scaled)]
        maps.append(float(np.abs(grids[0] - grids[1]).max()))
    assert len(scores) > 5
    assert np.median(scores) < 0.01
    assert max(scores) < 0.05
    assert np.median(maps) < 0.02
    assert max(maps) < 0.1
