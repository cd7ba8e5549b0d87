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

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from api_schemas.adapters.objects import found_in
from api_schemas.answers import Rect
from api_schemas.client import URL, Client
from api_schemas.client.arguments import ExplainArguments
from api_schemas.client.calls import Progress
from api_schemas.client.results import Regions, Result
from api_schemas.options import Task


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

    field:         gets the top class (Classification), the boxes of a detector (Detections, with
                   the masks that it has) or the classes of a segmenter (Segmentation, whose
                   values are class ids; the dataset's mask targets name them). The evidence is in
                   the fields FIELD_heatmap (Heatmap of the first explanation), FIELD_peak
                   (Keypoints) and FIELD_regions (Detections with masks); FIELD_error has the error
                   of a failed sample.
    heatmap_side:  maximum of a stored heatmap's or segmentation's longer side, in pixels.
    options:       those of `Client.explain`, except `include` and `size`. With `verify`,
                   FIELD_verdict and FIELD_agreement are of the heatmap, and each region has the
                   `verdict` on its map.

    Earlier values of these fields are replaced, sample by sample. Raises the errors of
    `Client.explain_many`; samples that were saved before keep their values.
    """
    verified = options.get("verify") not in (None, False, "false")
    options["include"], options["size"] = ["heatmap", "regions"], "source"
    failed = []
    with Client(url, api_key=api_key) as client:
        model = client.model(options.get("model"))
        task = model.task or "classification"
        names = _declare(dataset, field, task, verified=verified)
        if task == "segmentation":
            _name_classes(dataset, field, model.labels or [])
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
            labels = _labels(result, field, task, heatmap_side)
            for name in names:
                sample[name] = labels.get(name)
            if result.error is not None:
                failed.append(sample.id)
    return failed


def _declare(dataset: Any, field: str, task: Task, *, verified: bool) -> list[str]:
    """Add the fields, so that they exist even if no sample has a value, and return their names.

    verified: whether there will be verdicts. Those of an earlier run are replaced in any case.
    """
    import fiftyone as fo  # noqa: PLC0415 - only in FiftyOne's environment

    dataset = _whole(dataset)
    kinds = {"detection": fo.Detections, "segmentation": fo.Segmentation}
    labels = {
        field: kinds.get(task, fo.Classification),
        f"{field}_heatmap": fo.Heatmap,
        f"{field}_peak": fo.Keypoints,
        f"{field}_regions": fo.Detections,
    }
    for name, kind in labels.items():
        dataset.add_sample_field(name, fo.EmbeddedDocumentField, embedded_doc_type=kind)
    values = {f"{field}_error": fo.StringField}
    if verified or dataset.has_sample_field(f"{field}_verdict"):
        values |= {f"{field}_verdict": fo.StringField, f"{field}_agreement": fo.FloatField}
        dataset.add_sample_field(f"{field}_regions.detections.verdict", fo.StringField)
    for name, kind in values.items():
        dataset.add_sample_field(name, kind)
    return [*labels, *values]


def _whole(dataset: Any) -> Any:
    """Return the dataset of a view."""
    import fiftyone as fo  # noqa: PLC0415 - as above

    if isinstance(dataset, fo.DatasetView):
        return fo.load_dataset(dataset.dataset_name)
    return dataset


def _name_classes(dataset: Any, field: str, labels: Sequence[str]) -> None:
    """Name the values of a segmentation's pixels."""
    dataset = _whole(dataset)
    dataset.mask_targets = {**dataset.mask_targets, field: dict(enumerate(labels))}
    dataset.save()


def _labels(result: Result, field: str, task: Task, heatmap_side: int) -> dict[str, Any]:
    """Return the value of each field that has one; a failed result has only the error."""
    import fiftyone as fo  # noqa: PLC0415 - as above

    if result.error is not None:
        return {f"{field}_error": result.error.detail}
    assert result.image is not None
    labels = {field: _answer(result, task, heatmap_side), **_evidence(result, field)}
    for first in result.explanations[:1]:
        assert first.heatmap is not None
        strengths = scaled_heatmap(first.heatmap, heatmap_side)
        labels[f"{field}_heatmap"] = fo.Heatmap(map=strengths, range=[0, 255])
        if first.verify is not None:
            labels[f"{field}_verdict"] = first.verify.verdict
            labels[f"{field}_agreement"] = first.verify.agreement
    return labels


def _answer(result: Result, task: Task, side: int) -> Any:
    """Return the top class, the boxes of a detector, or the classes of a segmenter's pixels."""
    import fiftyone as fo  # noqa: PLC0415 - as above

    if task == "segmentation":
        return fo.Segmentation(mask=class_ids(result, side))
    if task == "classification":
        best = result.predictions[0]
        return fo.Classification(label=best.label, confidence=best.score)
    return fo.Detections(
        detections=[
            fo.Detection(
                bounding_box=relative(found.box, result),
                mask=None if found.mask is None else cut_out(found.mask, found.box),
                label=found.prediction.label,
                confidence=found.prediction.score,
            )
            for found in found_in(result)
        ]
    )


def _evidence(result: Result, field: str) -> dict[str, Any]:
    """Return the peaks and the regions of all explanations."""
    import fiftyone as fo  # noqa: PLC0415 - as above

    peaks, detections = [], []
    for explanation in result.explanations:
        regions, score = explanation.regions, explanation.score
        assert regions is not None
        if regions.peak is not None:
            point = [relative((*regions.peak, 0, 0), result)[:2]]
            peaks.append(fo.Keypoint(points=point, label=explanation.label, confidence=[score]))
        for box, mask in parts(regions):
            more = {} if explanation.verify is None else {"verdict": explanation.verify.verdict}
            detections.append(
                fo.Detection(
                    bounding_box=relative(box, result),
                    mask=mask,
                    label=explanation.label,
                    confidence=score,
                    **more,
                )
            )
    return {
        f"{field}_peak": fo.Keypoints(keypoints=peaks),
        f"{field}_regions": fo.Detections(detections=detections),
    }


def relative(box: Rect, result: Result) -> list[float]:
    """Return x, y, w, h in shares of the image's sides."""
    assert result.image is not None
    width, height = result.image.width, result.image.height
    x, y, w, h = box
    return [x / width, y / height, w / width, h / height]


def cut_out(mask: NDArray[np.bool_], box: Rect) -> NDArray[np.bool_]:
    """Return the pixels of a mask that a box touches, one at least on each side."""
    x, y, w, h = box
    top, left = int(y), int(x)
    rows = slice(top, max(top + 1, int(np.ceil(y + h))))
    return mask[rows, slice(left, max(left + 1, int(np.ceil(x + w))))]


def class_ids(result: Result, side: int) -> NDArray[np.uint16]:
    """Return the class of each pixel of a segmenter's answer, 0 where no class is listed.

    (height, width) of the upright image, or smaller, with a longer side of at most `side`.
    """
    assert result.image is not None
    width, height = result.image.width, result.image.height
    ids = np.zeros((height, width), dtype=np.uint16)
    for found in found_in(result):
        assert found.mask is not None
        ids[found.mask] = found.prediction.class_id
    scale = min(1.0, side / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint16)


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
