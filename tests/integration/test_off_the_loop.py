"""What a client can lengthen runs in worker threads: the event loop answers others meanwhile."""

from __future__ import annotations

import base64
import gzip
import threading
from collections.abc import Callable
from typing import Any

import pictures
import pytest
from starlette.testclient import TestClient

from api_schemas.options import Mask
from service import errors
from service.integrations import protocol_requests
from service.integrations.label_studio import backend, label_config
from service.integrations.protocols import kserve, nested, open_inference, tensors
from service.models import loaded, patterns
from service.routes import bodies, encodings, forms

PNG = pictures.png()
B64 = base64.b64encode(PNG).decode()
LONG = "x" * 90

VIEW = """<View><Image name="i" value="$image"/>
<BrushLabels name="b" toName="i"><Label value="cam"/></BrushLabels></View>"""

STUDIO = {
    "tasks": [{"id": 1, "data": {"image": f"data:image/png;base64,{B64}"}}],
    "project": "7.1",
    "label_config": VIEW,
}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "/explain?activations=f**&activations=type:Conv2d",
        {"content": PNG, "headers": {"content-type": "image/png"}},
    ),
    "a class": (
        "/explain?targets=3&contrast=class 1&layer=features",
        {"content": PNG, "headers": {"content-type": "image/png"}},
    ),
    "an unknown layer": (
        f"/explain?layer={LONG}",
        {"content": PNG, "headers": {"content-type": "image/png"}},
    ),
    "an unknown class": (
        f"/explain?targets={LONG}",
        {"content": PNG, "headers": {"content-type": "image/png"}},
    ),
    "a mask": (
        "/explain",
        {
            "json": {
                "images": [{"data": B64}],
                "mask": {"boxes": [[0, 0, 9, 9]]},
                "activations": ["**"],
            }
        },
    ),
    "a form": ("/explain", {"files": [("image", PNG), ("image", PNG)]}),
    "a long form": ("/explain", {"files": {"image": PNG + bytes(256 << 10)}}),
    "JSON that is wrong": ("/predict", {"json": {"images": [1] * 1000}}),
    "a coding": (
        "/predict",
        {
            "content": gzip.compress(PNG),
            "headers": {"content-type": "image/png", "content-encoding": "gzip"},
        },
    ),
    "v1": ("/v1/models/small:explain", {"json": {"instances": [B64, [[[1, 2, 3]]]]}}),
    "v2 files": (
        "/v2/models/small/infer",
        {"json": {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": [B64]}]}},
    ),
    "v2 numbers": (
        "/v2/models/small/explain",
        {
            "json": {
                "inputs": [
                    {"name": "x", "shape": [1, 1, 2, 3], "datatype": "UINT8", "data": [0] * 6}
                ]
            }
        },
    ),
    "TorchServe": ("/explanations/small", {"json": {"data": B64}}),
    "X-AnyLabeling": (
        "/integrations/x-anylabeling/v1/predict",
        {"json": {"model": "small", "image": f"data:image/png;base64,{B64}"}},
    ),
    "a setup": (
        "/integrations/label-studio/setup",
        {"json": {"project": "7.1", "schema": VIEW, "extra_params": {"method": "layercam"}}},
    ),
    "tasks": ("/integrations/label-studio/predict", {"json": STUDIO}),
    "a click": (
        "/integrations/label-studio/predict",
        {
            "json": STUDIO
            | {
                "params": {
                    "context": {
                        "result": [
                            {"from_name": "b", "type": "brushlabels", "value": {"brushlabels": []}}
                        ]
                    }
                }
            }
        },
    ),
}

WATCHED: list[tuple[Any, str]] = [
    (loaded.LoadedModel, "_matching"),
    (loaded.LoadedModel, "class_id"),
    (patterns.PathMatcher, "matches"),
    (loaded, "nearest"),
    (errors.difflib, "get_close_matches"),
    (bodies, "json_request"),
    (forms, "form_parts"),
    (bodies, "image_file"),
    (bodies, "utf8_json"),
    (encodings, "decode"),
    (protocol_requests, "json_of"),
    (protocol_requests, "parsed"),
    (kserve, "options"),
    (open_inference, "options"),
    (label_config, "images_in"),
    (backend, "images_in"),
    (backend, "parameters_in"),
    (label_config.Control, "label_of"),
    (nested, "leaves"),
    (tensors, "files"),
    (tensors, "numbers"),
    (Mask, "model_validate"),
]


@pytest.mark.parametrize(("route", "sent"), REQUESTS.values(), ids=REQUESTS)
def test_what_a_client_can_lengthen_runs_in_a_worker_thread(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, route: str, sent: dict[str, Any]
) -> None:
    seen: dict[str, set[str]] = {}

    def watch(place: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(place, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).add(threading.current_thread().name)
            return function(*args, **kwargs)

        monkeypatch.setattr(place, name, watched)

    for place, name in WATCHED:
        watch(place, name)
    response = client.post(route, **sent)
    assert response.status_code < 500, response.text
    assert seen
    assert {name: threads for name, threads in seen.items() if threads != {"camserve-worker"}} == {}
