"""Answers as a COCO data set: https://cocodataset.org/#format-data.

    with Client() as client:
        results = zip(names, client.explain_many(paths, include="regions"))
        data = dataset(results, client.model().labels)
    Path("evidence.json").write_text(json.dumps(data))

pycocotools reads it as ground truth (`COCO`), and its `annotations` as results (`COCO.loadRes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from api_schemas.answers import ImageInfo
from api_schemas.client.results import Explanation, Regions, Result


def dataset(
    results: Iterable[tuple[str, Result]], labels: Sequence[str], description: str = ""
) -> dict[str, Any]:
    """Return images, categories, and one annotation per explained class.

    results: file names with results that have `regions`; one with an error is left out.

    An image's id is its index among all results, from 1; a category's is the class id plus 1, since
    0 often means background. Sizes and positions are in pixels of the upright image. A map that is
    zero everywhere has no annotation. With the option `verify` each annotation has `verdict` and
    `agreement`.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, result) in enumerate(results, start=1):
        if result.image is None:
            continue
        images.append(_image(image_id, name, result.image))
        for explanation in result.explanations:
            mask = _regions(explanation).mask
            if mask.any():
                annotations.append(_annotation(len(annotations) + 1, image_id, explanation, mask))
    return {
        "info": {"description": description},
        "images": images,
        "categories": [
            {"id": index + 1, "name": label, "keypoints": ["peak"], "skeleton": []}
            for index, label in enumerate(labels)
        ],
        "annotations": annotations,
    }


def _image(image_id: int, name: str, image: ImageInfo) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "width": image.width, "height": image.height}


def _annotation(
    index: int, image: int, explanation: Explanation, mask: NDArray[np.bool_]
) -> dict[str, Any]:
    """Return the whole mask as run lengths, with its bounding box and peak."""
    regions = _regions(explanation)
    assert regions.peak is not None
    columns, rows = (np.flatnonzero(mask.any(axis=axis)).tolist() for axis in (0, 1))
    x, y = columns[0], rows[0]
    annotation = {
        "id": index,
        "image_id": image,
        "category_id": explanation.class_id + 1,
        "score": explanation.score,
        "bbox": [x, y, columns[-1] + 1 - x, rows[-1] + 1 - y],
        "area": int(mask.sum()),
        "segmentation": regions.rle.model_dump(),
        "iscrowd": 0,
        "keypoints": [*regions.peak, 2],
        "num_keypoints": 1,
    }
    if explanation.verify is not None:
        annotation["verdict"] = explanation.verify.verdict
        annotation["agreement"] = explanation.verify.agreement
    return annotation


def _regions(explanation: Explanation) -> Regions:
    if explanation.regions is None:
        raise ValueError('the results have no regions; call explain with include=["regions"]')
    return explanation.regions
