"""The rows of the table as bytes: what a hostile request is made of."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

Pieces = Sequence[bytes]

JSON = "application/json"
OCTETS = "application/octet-stream"
LABEL_STUDIO = "/integrations/label-studio"
LABELING = "/integrations/x-anylabeling/v1/predict"


@dataclass(frozen=True, slots=True)
class Names:
    """What the served model calls its parts. early: a layer near its input."""

    model: str
    early: str


@dataclass(frozen=True, slots=True)
class Hostile:
    """One row: what is sent, over how many connections at once, and how the client behaves.

    item:     of the issue, such as A3.
    build:    the pieces that each connection sends; the client pauses between them.
    pause:    seconds between two pieces.
    answers:  how many answers a connection waits for. reads: whether it reads at once.
    hold:     seconds that it goes on without reading, before it looks what came.
    beside:   whether a good request is sent in the meantime.
    fresh:    whether the server is started for it, since what it costs is only paid once.
    patience: seconds until the client gives up.
    """

    item: str
    name: str
    build: Callable[[Names], Pieces]
    connections: int = 1
    pause: float = 0.0
    answers: int = 1
    reads: bool = True
    hold: float = 0.0
    beside: bool = False
    fresh: bool = False
    patience: float = 30.0


def head(method: str, target: str, **headers: str) -> bytes:
    """Request line and headers; `_` in a name is a hyphen."""
    lines = [f"{method} {target} HTTP/1.1"]
    fields = {"host": "127.0.0.1", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in fields.items()), "", ""]).encode()


def get(target: str, **headers: str) -> Pieces:
    """One request without a body."""
    return [head("GET", target, **headers)]


def post(target: str, body: bytes, kind: str = JSON, **headers: str) -> Pieces:
    """One request with a body."""
    fields = {"content_type": kind, "content_length": str(len(body)), **headers}
    return [head("POST", target, **fields) + body]


def posted_json(target: str, content: Any) -> Pieces:
    """One request with a JSON body."""
    return post(target, json.dumps(content, separators=(",", ":")).encode())


def asked(
    route: str,
    options: Mapping[str, Any],
    image: bytes,
    kind: str = OCTETS,
) -> Pieces:
    """An image as the body, its options in the query."""
    query = f"?{urlencode(options, doseq=True)}" if options else ""
    return post(f"{route}{query}", image, kind)


def form(route: str, images: Sequence[bytes], **options: Any) -> Pieces:
    """Images as the parts of a form."""
    start = b'--edge\r\ncontent-disposition: form-data; name="image"; filename="1"\r\n\r\n'
    body = b"".join(start + image + b"\r\n" for image in images) + b"--edge--\r\n"
    query = f"?{urlencode(options, doseq=True)}" if options else ""
    return post(f"{route}{query}", body, "multipart/form-data; boundary=edge")


def chunked(target: str, pieces: Sequence[bytes], kind: str = OCTETS) -> bytes:
    """A chunked request but for its last chunk."""
    fields = {"content_type": kind, "transfer_encoding": "chunked"}
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head("POST", target, **fields) + body


def text(data: bytes) -> str:
    """Base64."""
    return base64.b64encode(data).decode()
