"""Answers as Labelbox import rows: https://docs.labelbox.com/reference/label-import.

    with Client() as client:
        results = zip(keys, client.explain_many(paths, include="regions"))
        with open("labels.ndjson", "w") as file:
            file.writelines(json.dumps(row) + chr(10) for row in rows(results))

The data rows must exist, each with its global key, and the project's ontology must have the
exported features; see `rows`.
"""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from api_schemas.client.results import Explanation, Regions, Result

Row = dict[str, Any]

KINDS = ("classification", "bbox", "polygon", "mask", "point")
FEATURES: Mapping[str, str] = MappingProxyType({"classification": "class", "mask": "evidence"})


def rows(
    results: Iterable[tuple[str, Result]], features: Mapping[str, str] = FEATURES
) -> Iterator[Row]:
    """Yield the rows of each image; a result with an error has none.

    results:  global keys of data rows with results that have `regions`.
    features: some of `KINDS`, each with its name in the ontology: a radio whose options are the
              classes, and tools.

    The class is the top prediction; everything else is the evidence for the explained classes, in
    pixels of the upright image. A repeated export has the same uuids.
    Raises ValueError for an unknown kind.
    """
    for kind in features:
        if kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}; use some of {', '.join(KINDS)}")
    for key, result in results:
        if result.error is not None:
            continue
        for kind, name in features.items():
            for index, row in enumerate(_answers(kind, result)):
                unique = uuid.uuid5(uuid.NAMESPACE_URL, f"camserve:{key}:{kind}:{name}:{index}")
                yield {"uuid": str(unique), "dataRow": {"globalKey": key}, "name": name, **row}


def _answers(kind: str, result: Result) -> Iterator[Row]:
    if kind == "classification":
        for best in result.predictions[:1]:
            yield {"answer": {"name": best.label, "confidence": best.score}}
        return
    for explanation in result.explanations:
        for shape in _shapes(kind, explanation):
            yield {kind: shape, "confidence": explanation.score}


def _shapes(kind: str, explanation: Explanation) -> list[Any]:
    regions = explanation.regions
    if regions is None:
        raise ValueError('the results have no regions; call explain with include=["regions"]')
    if kind == "bbox":
        return [{"left": x, "top": y, "width": w, "height": h} for x, y, w, h in regions.boxes]
    if kind == "polygon":
        return [[_point(*point) for point in polygon] for polygon in regions.polygons]
    if kind == "mask":
        return _masks(regions)
    return [] if regions.peak is None else [_point(*regions.peak)]


def _point(x: float, y: float) -> dict[str, float]:
    return {"x": x, "y": y}


def _masks(regions: Regions) -> list[dict[str, str]]:
    mask = regions.mask
    return [{"png": base64.b64encode(_png(mask)).decode("ascii")}] if mask.any() else []


def _png(mask: NDArray[np.bool_]) -> bytes:
    """Return a gray PNG of zeros and ones, as Labelbox's SDK writes it."""
    file = io.BytesIO()
    PIL.Image.fromarray(mask.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
