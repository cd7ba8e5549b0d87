"""Predictions and their evidence as fields of a FiftyOne dataset.

    import fiftyone as fo
    from api_schemas.adapters.fiftyone import apply_explanations

    dataset = fo.Dataset.from_images_dir("images")
    apply_explanations(dataset, "http://127.0.0.1:8000")
    fo.launch_app(dataset)

It needs fiftyone and what `api_schemas.client` needs. The folder `fiftyone_plugin` has the same
as an operator of the App.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from api_schemas.answers import Rect
from api_schemas.client import URL, Client
from api_schemas.client.arguments import ExplainArguments
from api_schemas.client.calls import Progress
from api_schemas.client.results import Regions, Result


def apply_explanations(
    dataset: Any,
    url: str = URL,
    *,
    field: str = "camserve",
    heatmap_side: int = 512,
    api_key: str | None = None,
    concurrency: int = 8,
    on_progress: Progress | None = None,
    **options: Unpack[ExplainArguments],
) -> list[str]:
    """Explain every image of a dataset or a view, and return the ids of those that failed.

    field:         gets the top class (Classification); its evidence is in the fields FIELD_heatmap
                   (Heatmap of the first explanation), FIELD_peak (Keypoints) and FIELD_regions
                   (Detections with masks); FIELD_error has the error of a failed sample.
    heatmap_side:  maximum of a stored heatmap's longer side, in pixels.
    options:       those of `Client.explain`, except `include` and `size`.

    Earlier values of these fields are replaced, sample by sample. Raises the errors of
    `Client.explain_many`; samples that were saved before keep their values.
    """
    _declare(dataset, field)
    options["include"], options["size"] = ["heatmap", "regions"], "source"
    failed = []
    with Client(url, api_key=api_key) as client:
        results = client.explain_many(
            dataset.values("filepath"),
            concurrency=concurrency,
            on_progress=on_progress,
            **options,
        )
        progress = False if on_progress else None
        for sample, result in zip(
            dataset.iter_samples(autosave=True, progress=progress), results, strict=True
        ):
            for name, label in _labels(result, field, heatmap_side).items():
                sample[name] = label
            if result.error is not None:
                failed.append(sample.id)
    return failed


def _declare(dataset: Any, field: str) -> None:
    """Add the fields, so that they exist even if no sample has a value."""
    import fiftyone as fo  # noqa: PLC0415 - only in FiftyOne's environment

    if isinstance(dataset, fo.DatasetView):
        dataset = fo.load_dataset(dataset.dataset_name)
    for name, kind in (
        (field, fo.Classification),
        (f"{field}_heatmap", fo.Heatmap),
        (f"{field}_peak", fo.Keypoints),
        (f"{field}_regions", fo.Detections),
    ):
        dataset.add_sample_field(name, fo.EmbeddedDocumentField, embedded_doc_type=kind)
    dataset.add_sample_field(f"{field}_error", fo.StringField)


def _labels(result: Result, field: str, heatmap_side: int) -> dict[str, Any]:
    """Return the value of each field; a failed result has only the error."""
    import fiftyone as fo  # noqa: PLC0415 - as above

    names = (field, f"{field}_heatmap", f"{field}_peak", f"{field}_regions", f"{field}_error")
    if result.error is not None:
        return dict(zip(names, (None, None, None, None, result.error.detail), strict=True))
    assert result.image is not None
    width, height = result.image.width, result.image.height
    peaks, detections = [], []
    for explanation in result.explanations:
        regions, score = explanation.regions, explanation.score
        assert regions is not None
        if regions.peak is not None:
            x, y = regions.peak
            point = [(x / width, y / height)]
            peaks.append(fo.Keypoint(points=point, label=explanation.label, confidence=[score]))
        for (x, y, w, h), mask in parts(regions):
            box = [x / width, y / height, w / width, h / height]
            detections.append(
                fo.Detection(bounding_box=box, mask=mask, label=explanation.label, confidence=score)
            )
    best, (first, *_) = result.predictions[0], result.explanations
    assert first.heatmap is not None
    strengths = scaled_heatmap(first.heatmap, heatmap_side)
    labels = (
        fo.Classification(label=best.label, confidence=best.score),
        fo.Heatmap(map=strengths, range=[0, 255]),
        fo.Keypoints(keypoints=peaks),
        fo.Detections(detections=detections),
        None,
    )
    return dict(zip(names, labels, strict=True))


def parts(regions: Regions) -> Iterator[tuple[Rect, NDArray[np.bool_]]]:
    """Yield each box with the mask (h, w) of its region, the largest region first."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(
        regions.mask.astype(np.uint8), connectivity=8
    )
    # No two regions have the same tight box: they would have to cross.
    of_box = {tuple(row[:4]): index for index, row in enumerate(stats.tolist()) if index}
    for box in regions.boxes:
        x, y, w, h = map(int, box)
        yield box, labels[y : y + h, x : x + w] == of_box[x, y, w, h]


def scaled_heatmap(heatmap: PIL.Image.Image, side: int) -> NDArray[np.uint8]:
    """Return 255·|map| over the whole upright image, with a longer side of at most `side`."""
    gray = PIL.Image.fromarray(np.asarray(heatmap))
    gray.thumbnail((side, side))
    return np.asarray(gray)
