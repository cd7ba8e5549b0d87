"""A service that finds the same boxes or regions in every image of 120 x 90, for real tools.

What detectors answer is tested elsewhere; here it is known without one, so that what a tool holds
afterwards can be compared with numbers that are written down.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pictures
from numpy.typing import NDArray

from api_schemas.options import Task
from service.images.run_lengths import rle_encode

WIDTH, HEIGHT = 120, 90
LABELS = ["background", "cat", "dog"]
BOX = (10.5, 20.0, 40.0, 30.25)
MASKED_BOX = (60.0, 30.0, 24.0, 30.0)


def mask() -> NDArray[np.bool_]:
    """An L in the second box; also the region of class 2."""
    made = np.zeros((HEIGHT, WIDTH), dtype=bool)
    made[30:60, 60:70] = True
    made[50:60, 60:84] = True
    return made


def region() -> NDArray[np.bool_]:
    """The region of class 1."""
    made = np.zeros((HEIGHT, WIDTH), dtype=bool)
    made[20:40, 8:50] = True
    return made


def _rle(of: NDArray[np.bool_]) -> dict[str, Any]:
    return {"size": of.shape, "counts": rle_encode(of).counts}


def _prediction(class_id: int, score: float, **more: Any) -> dict[str, Any]:
    logit = float(np.log(score / (1 - score)))
    return {"class_id": class_id, "label": LABELS[class_id], "score": score, "logit": logit} | more


def predictions(task: Task) -> list[dict[str, Any]]:
    """What is found, as the wire has it."""
    if task == "segmentation":
        return [
            _prediction(1, 0.875, mask=_rle(region()), area=float(region().sum())),
            _prediction(2, 0.75, mask=_rle(mask()), area=float(mask().sum())),
        ]
    return [
        _prediction(1, 0.875, detection=0, box=BOX),
        _prediction(2, 0.75, detection=1, box=MASKED_BOX, mask=_rle(mask())),
    ]


def _explanation(task: Task) -> dict[str, Any]:
    """The map of the first: a square."""
    cut = np.zeros((HEIGHT, WIDTH), dtype=bool)
    cut[25:35, 15:25] = True
    square: list[tuple[float, float]] = [(15, 25), (25, 25), (25, 35), (15, 35)]
    of = {"detection": 0, "box": BOX, "of": "class"}
    heatmap = pictures.file(cut.astype(np.uint8) * 255)
    return {
        **_prediction(1, 0.875),
        **({"region": _rle(region())} if task == "segmentation" else of),
        "method": "hirescam",
        "layer": "backbone[0]",
        "range": (0.0, 1.0),
        "flags": [],
        "cost": {"forwards": 1.0},
        "heatmap": {
            "media_type": "image/png",
            "width": WIDTH,
            "height": HEIGHT,
            "data": base64.b64encode(heatmap).decode(),
        },
        "regions": {
            "threshold": 0.5,
            "peak": (20.0, 30.0),
            "boxes": [(15.0, 25.0, 10.0, 10.0)],
            "polygons": [square],
            "rle": _rle(cut),
        },
    }


def answer(task: Task) -> dict[str, Any]:
    """The answer of `/explain` for one image."""
    image = {"width": WIDTH, "height": HEIGHT, "format": "PNG", "sha256": "0" * 64}
    result = {"image": image, "seen": (0, 0, WIDTH, HEIGHT), "predictions": predictions(task)}
    return {
        "id": "1",
        "model": {"name": "boxes", "version": "0" * 12},
        "results": [result | {"explanations": [_explanation(task)]}],
        "timing_ms": {"decode": 0, "queue": 0, "inference": 0, "render": 0, "total": 0},
    }


@contextmanager
def serving_boxes(task: Task) -> Iterator[str]:
    """The address of the service."""
    model = {"name": "boxes", "builder": "boxes:net", "state": "ready", "default": True}
    model |= {"version": "0" * 12, "task": task}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = self.path == "/models"
            self._send({"models": [model]} if listed else model | {"labels": LABELS})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._send(answer(task))

        def _send(self, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
