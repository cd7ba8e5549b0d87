"""What FiftyOne's own SDK holds afterwards: run in .venv-fiftyone, prints JSON in its last line.

python fiftyone_client.py URL FOLDER
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
import fiftyone.plugins as fop
from fiftyone import ViewField as F
from fiftyone.operators.executor import resolve_type

from api_schemas.adapters.fiftyone import apply_explanations
from api_schemas.client.errors import ClientError

URL, FOLDER = sys.argv[1:]


def told(sample: fo.Sample, field: str) -> dict[str, Any]:
    """The fields of a sample as plain values; masks as lists of rows."""
    best, heatmap = sample[field], sample[f"{field}_heatmap"]
    if best is None:
        return {"error": sample[f"{field}_error"], "heatmap": heatmap is None}
    more = {}
    if sample.has_field(f"{field}_verdict"):
        more = {
            "verdict": sample[f"{field}_verdict"],
            "agreement": sample[f"{field}_agreement"],
            "verdicts": [each["verdict"] for each in sample[f"{field}_regions"].detections],
        }
    return more | {
        "error": sample[f"{field}_error"],
        "best": [best.label, best.confidence],
        "heatmap": {"range": heatmap.range, "map": heatmap.map.tolist()},
        "peaks": [
            [each.label, each.points, list(each.confidence)]
            for each in sample[f"{field}_peak"].keypoints
        ],
        "regions": [
            [each.label, each.confidence, each.bounding_box, each.mask.tolist()]
            for each in sample[f"{field}_regions"].detections
        ],
    }


def in_place(dataset: fo.Dataset) -> dict[str, Any]:
    """All of it, then a view with other options; then read from the database again."""
    failed = apply_explanations(dataset, URL)
    one = dataset.match(F("filepath").ends_with("0.png"))
    apply_explanations(
        one, URL, field="two", targets=[3, "class 5"], threshold=0.2, heatmap_side=16
    )
    dataset.reload()
    schema = dataset.get_field_schema(ftype=fo.EmbeddedDocumentField)
    return {
        "failed": [dataset[each].filename for each in failed],
        "all": {each.filename: told(each, "camserve") for each in dataset},
        "one": told(one.first(), "two"),
        "others": dataset.exists("two", bool=False).count(),
        "schema": {name: field.document_type.__name__ for name, field in schema.items()},
        "counts": dataset.count_values("camserve.label"),
        "errors": dataset.count("camserve_error"),
    }


def verified(dataset: fo.Dataset) -> dict[str, Any]:
    """Verdicts in fields of their own, counted; then the same without: they are gone."""
    apply_explanations(dataset, URL, field="ver", verify=True, targets=[3, 5])
    dataset.reload()
    filled = {each.filename: told(each, "ver") for each in dataset.exists("ver")}
    counts = dataset.count_values("ver_verdict")
    of_regions = dataset.count_values("ver_regions.detections.verdict")
    apply_explanations(dataset, URL, field="ver")
    dataset.reload()
    left = dataset.count("ver_verdict") + dataset.count("ver_agreement")
    return {
        "filled": filled,
        "counts": [[name, count] for name, count in counts.items()],
        "of_regions": sum(count for name, count in of_regions.items() if name),
        "left": left,
    }


def by_operator(dataset: fo.Dataset) -> dict[str, Any]:
    """The same by the plugin's operator, as the App asks: its form, then itself on a view."""
    (plugin,) = [each for each in fop.list_plugins() if not each.builtin]
    (uri,) = [f"{plugin.name}/{each}" for each in plugin.operators]
    asked = {"dataset_name": dataset.name, "params": {}}
    form = asyncio.run(resolve_type(foo.OperatorRegistry(), uri, asked)).to_json()
    view = dataset.match(F("filepath").ends_with(".png")).limit(2)
    params = {"url": URL, "field": "op", "method": "layercam", "layer": "features.0"}
    result = foo.execute_operator(uri, {"view": view}, params=params)
    dataset.reload()
    return {
        "uri": uri,
        "form": sorted(form["type"]["properties"]),
        "result": result.result,
        "filled": {each.filename: told(each, "op") for each in dataset.exists("op")},
    }


def main() -> None:
    dataset = fo.Dataset.from_images_dir(FOLDER)
    seen = {"in_place": in_place(dataset), "operator": by_operator(dataset)}
    seen["verified"] = verified(dataset)
    for name, options in (("layer", {"layer": "absent"}), ("model", {"model": "absent"})):
        try:
            apply_explanations(dataset, URL, field=f"no_{name}", **options)
        except ClientError as error:
            seen[name] = [type(error).__name__, error.detail]
    json.dump(seen, sys.stdout)


main()
