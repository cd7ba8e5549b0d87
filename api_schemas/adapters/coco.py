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

from api_schemas.adapters.objects import Found, box_of, found_in
from api_schemas.answers import ImageInfo
from api_schemas.client.results import Explanation, Regions, Result

BACKGROUND = frozenset({"__background__", "background"})
"""Labels of class 0 that are not a category."""


def dataset(
    results: Iterable[tuple[str, Result]], labels: Sequence[str], description: str = ""
) -> dict[str, Any]:
    """Return images, categories, and one annotation per explained class, or per detection.

    results: file names with results; one with an error is left out. Explanations need `regions`.

    An image's id is its index among all results, from 1; a category's is the class id plus 1, since
    0 often means background: where class 0 is the background, it is the class id, as in COCO's own
    numbers, and the background is no category. Sizes and positions are in pixels of the upright
    image.

    Of a classifier an annotation is the evidence for a class; a map that is zero everywhere has
    none. Of a detector it is a detection with its box and, if there is one, its mask; of a
    segmenter a class's region. An explained one has `evidence`, the map's mask as run lengths, and
    its peak. With the option `verify` explained annotations have `verdict` and `agreement`.
    """
    shift = 0 if labels and labels[0] in BACKGROUND else 1
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, result) in enumerate(results, start=1):
        if result.image is None:
            continue
        images.append(_image(image_id, name, result.image))
        objects = list(found_in(result))
        for made in map(_object, objects) if objects else map(_evidence, result.explanations):
            if made is not None and made["category_id"] + shift:
                made["category_id"] += shift
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **made})
    return {
        "info": {"description": description},
        "images": images,
        "categories": [
            {"id": index + shift, "name": label, "keypoints": ["peak"], "skeleton": []}
            for index, label in enumerate(labels)
            if index + shift
        ],
        "annotations": annotations,
    }


def _image(image_id: int, name: str, image: ImageInfo) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "width": image.width, "height": image.height}


def _object(found: Found) -> dict[str, Any]:
    """Return a detection or a region; without a mask its segmentation is the box, as a polygon."""
    x, y, w, h = found.box
    mask = found.prediction.mask
    annotation = {
        "category_id": found.prediction.class_id,
        "score": found.prediction.score,
        "bbox": [x, y, w, h],
        "area": w * h if found.mask is None else int(found.mask.sum()),
        "segmentation": (
            [[x, y, x + w, y, x + w, y + h, x, y + h]] if mask is None else mask.model_dump()
        ),
        "iscrowd": 0,
        **_peak(found.evidence),
    }
    if found.evidence is not None:
        annotation["evidence"] = _regions(found.evidence).rle.model_dump()
        annotation |= _verdict(found.evidence)
    return annotation


def _evidence(explanation: Explanation) -> dict[str, Any] | None:
    """Return the whole mask of a map as run lengths, with its bounding box and peak."""
    mask = _regions(explanation).mask
    if not mask.any():
        return None
    return {
        "category_id": explanation.class_id,
        "score": explanation.score,
        "bbox": list(box_of(mask)),
        "area": int(mask.sum()),
        "segmentation": _regions(explanation).rle.model_dump(),
        "iscrowd": 0,
        **_peak(explanation),
        **_verdict(explanation),
    }


def _peak(explanation: Explanation | None) -> dict[str, Any]:
    """Return the highest point of a map as the only keypoint; none without a map or evidence."""
    peak = None if explanation is None else _regions(explanation).peak
    found = [0, 0, 0] if peak is None else [*peak, 2]
    return {"keypoints": found, "num_keypoints": int(peak is not None)}


def _verdict(explanation: Explanation) -> dict[str, Any]:
    if explanation.verify is None:
        return {}
    return {"verdict": explanation.verify.verdict, "agreement": explanation.verify.agreement}


def _regions(explanation: Explanation) -> Regions:
    if explanation.regions is None:
        raise ValueError('the results have no regions; call explain with include=["regions"]')
    return explanation.regions
