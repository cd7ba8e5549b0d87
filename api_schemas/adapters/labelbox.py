"""Answers as Labelbox's import rows: https://docs.labelbox.com/reference/label-import.

    with Client() as client:
        results = zip(keys, client.explain_many(paths, include="regions"))
        with open("labels.ndjson", "w") as file:
            file.writelines(json.dumps(row) + chr(10) for row in rows(results))

The data rows must be there already, each with its global key, and the project's ontology must have
the features that are named; `rows` says which.
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
    """The rows of each image; a result with an error has none.

    results:  global keys of data rows with answers that have `regions`.
    features: what is imported, some of `KINDS`, each with the name that the ontology has for it: a
              radio whose options are the classes, and tools.

    The class is the best one, everything else is the evidence for the explained classes, in pixels
    of the upright image. A row has the same uuid whenever the same is exported.
    Raises ValueError for a kind that is none.
    """
    for kind in features:
        if kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}: {', '.join(KINDS)}")
    for key, result in results:
        if result.error is not None:
            continue
        for kind, name in features.items():
            for place, row in enumerate(_answers(kind, result)):
                unique = uuid.uuid5(uuid.NAMESPACE_URL, f"camserve:{key}:{kind}:{name}:{place}")
                yield {"uuid": str(unique), "dataRow": {"globalKey": key}, "name": name, **row}


def _answers(kind: str, result: Result) -> Iterator[Row]:
    if kind == "classification":
        best = result.predictions[0]
        yield {"answer": {"name": best.label, "confidence": best.score}}
        return
    for explanation in result.explanations:
        for shape in _shapes(kind, explanation):
            yield {kind: shape, "confidence": explanation.score}


def _shapes(kind: str, explanation: Explanation) -> list[Any]:
    regions = explanation.regions
    if regions is None:
        raise ValueError('the results have no regions; ask with include=["regions"]')
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
    """A grey image of zeros and ones, as Labelbox's SDK writes it."""
    file = io.BytesIO()
    PIL.Image.fromarray(mask.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
