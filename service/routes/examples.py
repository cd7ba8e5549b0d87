"""Examples of the OpenAPI document that several routes share, and those of `/explain`, `/predict`.

Each other route has its own beside it. Base64 is shortened to its first characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PNG, JPEG = "iVBORw0KGgo=", "/9j/4AAQSkZJRg=="
"""The first bytes of a file."""

NULL = "<null>"
"""Stands for null in an example: FastAPI leaves out members that are None."""

VERSION = "5d1f4a3b2c60"
SUNFLOWER = {"class_id": 53, "label": "sunflower", "score": 0.9968, "logit": 14.21}
DANDELION = {"class_id": 16, "label": "dandelion", "score": 0.0011, "logit": 7.4}
EXPLANATION = {
    "class_id": 53,
    "label": "sunflower",
    "score": 0.9968,
    "contrast": NULL,
    "method": "gradcam",
    "layer": "features.7",
    "range": [0.0, 3.2],
    "flags": ["saturated"],
    "cost": {"forwards": 1.0},
    "heatmap": {"media_type": "image/png", "width": 640, "height": 480, "data": PNG},
}
_REGIONS = {
    "threshold": 0.5,
    "peak": [230.0, 210.0],
    "boxes": [[140.0, 120.0, 180.0, 165.0]],
    "polygons": [[[140.0, 120.0], [320.0, 120.0], [320.0, 285.0], [140.0, 285.0]]],
    "rle": {"size": [480, 640], "counts": "Pmk1U1k=00000000o^h4"},
}
_CLASSIFIED = {
    "image": {"width": 640, "height": 480, "format": "JPEG", "sha256": "9f2c" * 16},
    "seen": [110.0, 30.0, 420.0, 420.0],
    "predictions": [SUNFLOWER, DANDELION],
}
_FAILED = {
    "error": {
        "code": "unsupported_image",
        "detail": "The bytes are no image of a format that is read here.",
        "status": 415,
    }
}


def _answer(*results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": "4bf59e975b3c466190679cd8b4c403f5",
        "model": {"name": "builtin", "version": VERSION},
        "results": list(results),
        "timing_ms": {"decode": 3.1, "queue": 0.1, "inference": 9.8, "render": 4.2, "total": 17.9},
    }


EXPLAIN = {
    "images": [{"data": JPEG}],
    "targets": ["sunflower"],
    "include": ["heatmap", "regions"],
}
EXPLAINED = _answer(_CLASSIFIED | {"explanations": [EXPLANATION | {"regions": _REGIONS}]})
PREDICT = {"images": [{"data": JPEG}, {"data": JPEG}], "top_k": 2}
PREDICTED = _answer(_CLASSIFIED, _FAILED)

_CONTROL = {"n": 8, "mean": -0.06, "low": -0.31, "high": 0.12, "smaller": 8}
_CHANGE = {
    "class_id": 53,
    "label": "sunflower",
    "score": 0.0214,
    "logit": 4.37,
    "score_change": -0.9754,
    "logit_change": -9.84,
    "control": _CONTROL,
}
_EDITED = {
    "name": "without the flower",
    "edit": "hide",
    "predictions": [DANDELION],
    "changes": [_CHANGE],
    "control": _CONTROL,
}
EXPERIMENT = {
    "images": [{"data": JPEG}],
    "targets": ["sunflower"],
    "controls": 8,
    "edits": [
        {
            "name": "without the flower",
            "edit": "hide",
            "region": {"of": "sunflower", "threshold": 0.5},
            "fill": "blur",
        }
    ],
}
EXPERIMENTED = _answer(_CLASSIFIED | {"forwards": 11.0, "edits": [_EDITED]})
