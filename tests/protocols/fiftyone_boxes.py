"""How FiftyOne's own evaluation scores boxes and regions: run in .venv-fiftyone, prints JSON.

python fiftyone_boxes.py URL FOLDER TRUTH.json

TRUTH.json: for each file name `boxes` (label, and x, y, w, h in shares of the sides) and `classes`
(rows of class ids).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fiftyone as fo
import numpy as np

from api_schemas.adapters.fiftyone import apply_explanations

URL, FOLDER, TRUTH = sys.argv[1:]


def with_truth(dataset: fo.Dataset, truth: Any) -> None:
    for sample in dataset.iter_samples(autosave=True):
        there = truth[sample.filename]
        detections = [fo.Detection(label=label, bounding_box=box) for label, box in there["boxes"]]
        sample["true_boxes"] = fo.Detections(detections=detections)
        classes = np.array(there["classes"], dtype=np.uint8)
        sample["true_regions"] = fo.Segmentation(mask=classes)


def scored_boxes(dataset: fo.Dataset) -> dict[str, Any]:
    """Hits and misses at an IoU of .5, and each box with what FiftyOne matched it with."""
    apply_explanations(dataset, URL, field="boxes", model="flower-boxes", explain_top=2)
    results = dataset.evaluate_detections(
        "boxes", gt_field="true_boxes", eval_key="ev", iou=0.5, classwise=True, compute_mAP=True
    )
    dataset.reload()
    true = {each.id: each for sample in dataset for each in sample["true_boxes"].detections}
    return {
        "counts": {name: dataset.sum(f"ev_{name}") for name in ("tp", "fp", "fn")},
        "precision": results.mAP(),
        "found": {
            sample.filename: [
                {
                    "label": each.label,
                    "score": each.confidence,
                    "box": each.bounding_box,
                    "verdict": each["ev"],
                    "iou": getattr(each, "ev_iou", None),  # of a miss FiftyOne sets no field
                    "of": each["ev_id"] and true[each["ev_id"]].bounding_box,
                }
                for each in sample["boxes"].detections
            ]
            for sample in dataset
        },
        "peaks": {
            sample.filename: [
                [each.label, each.points[0]] for each in sample["boxes_peak"].keypoints
            ]
            for sample in dataset
        },
    }


def scored_regions(dataset: fo.Dataset) -> dict[str, Any]:
    """The confusion of all pixels, and the masks themselves."""
    apply_explanations(dataset, URL, field="regions", model="flower-regions", top_k=6)
    dataset.reload()
    names = {int(value): name for value, name in dataset.mask_targets["regions"].items()}
    results = dataset.evaluate_segmentations(
        "regions", gt_field="true_regions", eval_key="pixels", mask_targets=names
    )
    ordered = [names[value] for value in sorted(names)]
    return {
        "names": names,
        "confusion": np.asarray(results.confusion_matrix(ordered)).tolist(),
        "masks": {sample.filename: sample["regions"].get_mask().tolist() for sample in dataset},
    }


def main() -> None:
    dataset = fo.Dataset.from_images_dir(FOLDER)
    with_truth(dataset, json.loads(Path(TRUTH).read_text()))
    json.dump({"boxes": scored_boxes(dataset), "regions": scored_regions(dataset)}, sys.stdout)


main()
