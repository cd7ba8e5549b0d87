"""Examples of the OpenAPI document: a request and an answer of every route that has JSON ones.

Base64 is shortened to its first characters. A test holds each against the schema of its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service import __version__

PNG, JPEG = "iVBORw0KGgo=", "/9j/4AAQSkZJRg=="
"""The first bytes of a file."""

_SUNFLOWER = {"class_id": 53, "label": "sunflower", "score": 0.9968, "logit": 14.21}
_DANDELION = {"class_id": 16, "label": "dandelion", "score": 0.0011, "logit": 7.4}
_PREDICTED = {
    "image": {"width": 640, "height": 480, "format": "JPEG", "sha256": "9f2c" * 16},
    "seen": [110.0, 30.0, 420.0, 420.0],
    "predictions": [_SUNFLOWER, _DANDELION],
}
_REGIONS = {
    "threshold": 0.5,
    "peak": [230.0, 210.0],
    "boxes": [[140.0, 120.0, 180.0, 165.0]],
    "polygons": [[[140.0, 120.0], [320.0, 120.0], [320.0, 285.0], [140.0, 285.0]]],
    "rle": {"size": [480, 640], "counts": "Pmk1U1k=00000000o^h4"},
}
_LABEL_CONFIG = (
    '<View><Image name="image" value="$image"/><BrushLabels name="cam" toName="image">'
    '<Label value="cam"/></BrushLabels></View>'
)
_VERSION = "builtin-24bec9d19b86-gradcam-layer3"
_BRUSH = {
    "id": "c027ad3599",
    "from_name": "cam",
    "to_name": "image",
    "type": "brushlabels",
    "score": 0.9968,
    "original_width": 640,
    "original_height": 480,
    "image_rotation": 0,
    "value": {"format": "rle", "rle": [0, 18, 192, 0, 57, 27, 252], "brushlabels": ["cam"]},
}
_EXPLANATION = {
    "class_id": 53,
    "label": "sunflower",
    "score": 0.9968,
    "contrast": None,
    "method": "gradcam",
    "layer": "features.7",
    "range": [0.0, 3.2],
    "flags": ["saturated"],
    "cost": {"forwards": 1.0},
    "heatmap": {"media_type": "image/png", "width": 640, "height": 480, "data": PNG},
}
_EXPLAINED = _PREDICTED | {"explanations": [_EXPLANATION | {"regions": _REGIONS}]}
_FAILED = {
    "error": {
        "code": "unsupported_image",
        "detail": "The bytes are no image of a format that is read here.",
        "status": 415,
    }
}
_MODEL = {
    "name": "builtin",
    "builder": "builtin",
    "state": "ready",
    "default": True,
    "version": "5d1f4a3b2c60",
    "classes": 102,
    "input": {
        "width": 224,
        "height": 224,
        "resize": 256,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "channels": 3,
    },
    "target_layer": "features.7",
    "lanes": [{"name": "hooked", "ready": True}, {"name": "compiled", "ready": True}],
    "random_weights": False,
    "replicas": 2,
}
_LAYER = {
    "path": "features.7",
    "type": "Sequential",
    "shape": [96, 14, 14],
    "parameters": 31392,
    "target": True,
}
_TENSORS = [
    {"name": "class_ids", "datatype": "INT64", "shape": [1, 2], "data": [53, 16]},
    {"name": "labels", "datatype": "BYTES", "shape": [1, 2], "data": ["sunflower", "dandelion"]},
]
_MAP = {"name": "grid", "datatype": "FP32", "shape": [1, 1, 2, 2], "data": [0.0, 0.4, 1.0, 0.2]}
_SHAPE = {
    "label": "sunflower",
    "shape_type": "polygon",
    "points": [[140.0, 120.0], [320.0, 120.0], [320.0, 285.0]],
    "score": 0.9968,
    "description": "gradcam",
    "attributes": {},
    "flags": {},
    "group_id": 1,
}
_REPOSITORY_LINE = {"name": "builtin", "version": "5d1f4a3b2c60", "state": "READY", "reason": ""}


def _answer(*results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": "4bf59e975b3c466190679cd8b4c403f5",
        "model": {"name": "builtin", "version": "5d1f4a3b2c60"},
        "results": list(results),
        "timing_ms": {"decode": 3.1, "queue": 0.1, "inference": 9.8, "render": 4.2, "total": 17.9},
    }


def _v2(*outputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_name": "builtin",
        "model_version": "5d1f4a3b2c60",
        "outputs": list(outputs),
    }


def _picture(**parameters: Any) -> dict[str, Any]:
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [JPEG]}
    return {"inputs": [tensor], "parameters": parameters}


REQUESTS: Mapping[str, Any] = {
    "POST /explain": {
        "images": [{"data": JPEG}],
        "targets": ["sunflower"],
        "include": ["heatmap", "regions"],
    },
    "POST /predict": {"images": [{"data": JPEG}, {"data": JPEG}], "top_k": 2},
    "POST /v2/repository/index": {"ready": True},
    "POST /v2/models/{name}/infer": _picture(top_k=2),
    "POST /v2/models/{name}/explain": _picture(targets=["sunflower"]),
    "POST /v1/models/{name}:predict": {"instances": [{"b64": JPEG}], "parameters": {"top_k": 2}},
    "POST /v1/models/{name}:explain": {
        "instances": [{"image": {"b64": JPEG}, "target": "sunflower"}]
    },
    "POST /integrations/x-anylabeling/v1/predict": {
        "model": "builtin",
        "image": f"data:image/jpeg;base64,{JPEG}",
        "params": {"conf_threshold": 0.5, "current_task": "cam_polygon"},
    },
    "POST /integrations/label-studio/setup": {
        "project": "1.1795168170",
        "schema": _LABEL_CONFIG,
        "extra_params": {"method": "layercam", "labels": {"sunflower": "yellow flower"}},
    },
    "POST /integrations/label-studio/predict": {
        "tasks": [{"id": 7, "data": {"image": "/data/upload/1/ab12-cat.jpg"}}],
        "project": "1.1795168170",
        "label_config": _LABEL_CONFIG,
        "params": {"context": None},
    },
}
"""By method and path, JSON."""

ANSWERS: Mapping[str, Any] = {
    "POST /explain": _answer(_EXPLAINED),
    "POST /predict": _answer(_PREDICTED, _FAILED),
    "GET /models": {"models": [_MODEL]},
    "GET /models/{name}": _MODEL | {"labels": ["alpine sea holly", "anthurium"]},
    "GET /models/{name}/layers": {"layers": [_LAYER]},
    "GET /health/live": {"status": "live"},
    "GET /health/ready": {"status": "ready"},
    "POST /v2/repository/index": [_REPOSITORY_LINE],
    "POST /v2/repository/models/{name}/load": {"name": "builtin", "load": True},
    "POST /v2/repository/models/{name}/unload": {"name": "builtin", "unload": True},
    "GET /v2": {
        "name": "camserve",
        "version": __version__,
        "extensions": ["binary_tensor_data", "classification", "model_repository"],
    },
    "GET /v2/health/live": {"live": True, "ready": True},
    "GET /v2/health/ready": {"live": True, "ready": True},
    "GET /v2/models": {"models": ["builtin"]},
    "GET /v2/models/{name}": {
        "name": "builtin",
        "versions": ["5d1f4a3b2c60"],
        "platform": "pytorch",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 102]}],
    },
    "GET /v2/models/{name}/ready": {"name": "builtin", "ready": True},
    "POST /v2/models/{name}/infer": _v2(*_TENSORS),
    "POST /v2/models/{name}/explain": _v2(_MAP, *_TENSORS),
    "GET /v1/models": {"models": ["builtin"]},
    "GET /v1/models/{name}": {"name": "builtin", "ready": True},
    "POST /v1/models/{name}:predict": {"predictions": [[_SUNFLOWER, _DANDELION]]},
    "POST /v1/models/{name}:explain": {
        "predictions": [[_SUNFLOWER, _DANDELION]],
        "explanations": [[_EXPLANATION]],
    },
    "GET /ping": {"status": "Healthy"},
    "POST /predictions/{name}": {"sunflower": 0.9968, "dandelion": 0.0011},
    "POST /explanations/{name}": [[[0.0, 0.4], [1.0, 0.2]]],
    "GET /integrations/x-anylabeling/v1/models": {
        "success": True,
        "data": {"builtin": {"display_name": "builtin: class and evidence"}},
    },
    "POST /integrations/x-anylabeling/v1/predict": {
        "success": True,
        "data": {"shapes": [_SHAPE], "description": "sunflower 1.00"},
    },
    "GET /integrations/label-studio/health": {"status": "UP"},
    "POST /integrations/label-studio/setup": {"model_version": _VERSION},
    "GET /integrations/label-studio/versions": {"versions": [_VERSION]},
    "POST /integrations/label-studio/webhook": {"status": "ok"},
    "POST /integrations/label-studio/predict": {
        "results": [{"result": [_BRUSH], "score": 0.9968, "model_version": _VERSION}]
    },
}
"""By method and path, of status 200, JSON."""


def of(table: Mapping[str, Any], method: str, path: str) -> Any:
    """The example of a route, or None; a route of one version has that of the route without."""
    for version in ("/versions/{version}", "/{version}"):
        path = path.replace(version, "")
    return table.get(f"{method.upper()} {path}")
