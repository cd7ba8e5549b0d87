"""A CVAT server small enough to read: one task of images, its annotations, one queue of a function.

It answers what `cvat-cli` asks in `task auto-annotate`, `function create-native` and `function
run-agent --burst`, in the shapes of CVAT's OpenAPI document, and keeps what is sent to it.
"""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from PIL import Image

NOW = "2026-11-20T00:00:00Z"
TASK = 7


class FakeCVAT:
    """One task: frames are names and image files, labels names and types; ids of labels from 101.

    attributes: names of text attributes of some labels; their ids are from 201.

    annotations: the last body of labels that was uploaded, and `method` how (PATCH adds, PUT
    replaces). function: what `create-native` registered. finished: what an agent made of the
    request `waiting`, under `complete` or `fail`.
    """

    def __init__(
        self,
        frames: Mapping[str, bytes],
        labels: Mapping[str, str],
        attributes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.frames = frames
        self.labels = [
            {"id": 101 + place, "name": name, "type": kind, "color": "#ff0000"}
            | {"attributes": _attributes((attributes or {}).get(name, ()))}
            | {"sublabels": [], "has_parent": False, "task_id": TASK}
            for place, (name, kind) in enumerate(labels.items())
        ]
        self.annotations: Any = None
        self.method = ""
        self.function: Any = None
        self.waiting: dict[str, Any] | None = None
        self.finished: dict[str, Any] = {}
        self.unknown: list[str] = []

    def label(self, name: str) -> int:
        return next(each["id"] for each in self.labels if each["name"] == name)

    def answer(self, method: str, path: str, body: Any) -> Any:
        """What to send: JSON, or the bytes of a file. Raises KeyError for an unknown route."""
        for verbs, pattern, route in ROUTES:
            if method in verbs and (found := re.fullmatch(pattern, path.rstrip("/"))):
                return route(self, method, body, *found.groups())
        self.unknown.append(f"{method} {path}")
        raise KeyError(path)

    def store(self, method: str, body: Any) -> Any:
        self.annotations, self.method = body, method
        return {"version": 1, "tags": [], "shapes": [], "tracks": []}

    def register(self, _method: str, body: Any) -> Any:
        labels = [{"type": "any", **each} for each in body["labels_v2"]]
        self.function = body | {"id": 1, "labels_v2": labels}
        return self.function

    def acquire(self, _method: str, _body: Any) -> Any:
        given, self.waiting = self.waiting, None
        return {"ar_assignment": given}

    def finish(self, _method: str, body: Any, how: str) -> Any:
        self.finished[how] = body
        return {}

    def task(self) -> dict[str, Any]:
        return {
            "id": TASK,
            "name": "a task",
            "jobs": {"count": 1, "completed": 0, "validation": 0, "url": ""},
            "labels": {"url": ""},
            "size": len(self.frames),
            "data_chunk_size": len(self.frames),
            "data_original_chunk_type": "imageset",
            "data_compressed_chunk_type": "imageset",
            "data_cloud_storage_id": None,
            "media_type": "image",
            "organization": None,
            "organization_id": None,
            "mode": "annotation",
            "dimension": "2d",
            "status": "annotation",
            "created_date": NOW,
            "updated_date": NOW,
        }

    def meta(self) -> dict[str, Any]:
        frames = []
        for name, file in self.frames.items():
            with Image.open(io.BytesIO(file)) as image:
                width, height = image.size
            frames.append({"name": name, "width": width, "height": height, "related_files": 0})
        return {
            "chunks_updated_date": NOW,
            "chunk_size": len(frames),
            "size": len(frames),
            "image_quality": 70,
            "start_frame": 0,
            "stop_frame": len(frames) - 1,
            "frame_filter": "",
            "frames": frames,
            "deleted_frames": [],
        }

    def media(self, _method: str, asked: Mapping[str, str]) -> bytes:
        """One frame, or the only chunk."""
        if asked["type"] == "frame":
            return [*self.frames.values()][int(asked["number"])]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as chunk:
            for place, data in enumerate(self.frames.values()):
                chunk.writestr(f"{place:06d}.png", data)
        return file.getvalue()


def _attributes(names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"id": 201 + place, "name": name, "mutable": False, "input_type": "text"}
        | {"default_value": "", "values": []}
        for place, name in enumerate(names)
    ]


ABOUT = {"name": "CVAT", "description": "", "version": "2.80.0", "logo_url": "", "subtitle": ""}
QUEUE = "/api/functions/queues/function:1/requests"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Any]]] = [
    (("GET",), "/api/server/about", lambda *_: ABOUT),
    (("POST",), "/api/auth/login", lambda *_: {"key": "key"}),
    (("GET",), "/api/labels", lambda cvat, *_: _page(cvat.labels)),
    (("GET",), f"/api/tasks/{TASK}", lambda cvat, *_: cvat.task()),
    (("GET",), f"/api/tasks/{TASK}/data/meta", lambda cvat, *_: cvat.meta()),
    (("GET",), f"/api/tasks/{TASK}/data", FakeCVAT.media),
    (("PATCH", "PUT"), f"/api/tasks/{TASK}/annotations", FakeCVAT.store),
    (("POST",), "/api/functions", FakeCVAT.register),
    (("GET",), "/api/functions/1", lambda cvat, *_: cvat.function),
    (("POST",), f"{QUEUE}/acquire", FakeCVAT.acquire),
    (("POST",), f"{QUEUE}/ar-1/(complete|fail)", FakeCVAT.finish),
]


def _page(results: Sequence[Any]) -> dict[str, Any]:
    return {"count": len(results), "next": None, "previous": None, "results": results}


@contextmanager
def serving(cvat: FakeCVAT) -> Iterator[int]:
    """The port of this machine where it answers."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            sent = self.rfile.read(int(self.headers.get("content-length", 0)))
            url = urlsplit(self.path)
            asked = json.loads(sent) if sent else dict(parse_qsl(url.query))
            try:
                answer = cvat.answer(self.command, unquote(url.path), asked)
            except KeyError:
                self.send_error(404, f"no route {self.command} {self.path}")
                return
            is_file = isinstance(answer, bytes)
            data = answer if is_file else json.dumps(answer).encode()
            self.send_response(200)
            self.send_header(
                "content-type", "application/octet-stream" if is_file else "application/json"
            )
            self.send_header("content-length", str(len(data)))
            if self.path.endswith("/login"):
                self.send_header("set-cookie", "sessionid=s; Path=/")
                self.send_header("set-cookie", "csrftoken=c; Path=/")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_PUT = handle_any  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
