"""The good requests of a soak: a few hundred that differ, and when two answers are the same."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pictures
from numpy.typing import NDArray
from PIL import Image

PATIENCE = 60.0
"""Seconds after which a client gives up."""

MODELS = ("small", "other", "fails_in_forward", "fails_in_hook", "fails_in_backward", "gives_nan")
"""The faulty ones answer these images, none of which is red."""

SOILED = ("leaves_training_mode", "leaves_a_hook", "changes_a_buffer", "leaves_a_gradient")
"""Models that soil their replica when an image is red."""

OPTIONS: tuple[dict[str, Any], ...] = (
    {"include": ["grid", "heatmap"]},
    {"include": ["overlay", "grid", "regions"], "format": "png", "size": "native"},
    {"include": "grid", "targets": ["0", "2"], "method": "layercam"},
    {"include": "grid", "layer": ["features.0", "features.3"], "method": "hirescam"},
    {"include": "grid", "explain_top": 3, "fit": "pad"},
    {"include": "none", "activations": "type:Conv2d", "activation_as": ["stats", "array"]},
    {"include": "grid", "activations": "features.1", "activation_as": ["stats", "image"]},
    {"include": ["overlay"], "method": "guided_backprop", "fit": "squash"},
    {"include": "grid", "method": "rise", "samples": 16, "targets": "1"},
    {"include": "grid", "method": "integrated_gradients", "steps": 4},
    {"include": "grid", "contrast": "1", "targets": "0"},
)
PREDICTIONS: tuple[dict[str, Any], ...] = ({"top_k": 3}, {"activations": "features.*"})


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, ready to be sent."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    def raw(self) -> bytes:
        """As bytes, for a plain socket."""
        headers = {"host": "localhost", "content-length": str(len(self.body)), **self.headers}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


def send(connection: http.client.HTTPConnection, ask: Ask) -> tuple[int, bytes]:
    """The status and body of the answer."""
    connection.request("POST", ask.path, ask.body, ask.headers)
    with connection.getresponse() as response:
        return response.status, response.read()


# ---- what is asked


def good_asks(count: int) -> list[Ask]:
    """That many; the cycles' lengths have few common factors, so that most combinations come."""
    files = _files()
    asked = itertools.cycle((*OPTIONS, *PREDICTIONS))
    models, bodies = itertools.cycle((*MODELS, *SOILED)), itertools.cycle((raw, form, as_json))
    found = []
    for number, options, model, body in zip(range(count), asked, models, bodies, strict=False):
        route = "/predict" if options in PREDICTIONS else "/explain"
        chosen = [files[(number + n) % len(files)] for n in range((1, 1, 3)[number % 3])]
        found.append(body(route, {**options, "model": model}, chosen))
    return found


def raw(route: str, options: dict[str, Any], files: list[tuple[str, bytes]]) -> Ask:
    """The first image as the body itself."""
    kind, data = files[0]
    return Ask(f"{route}?{urlencode(options, doseq=True)}", data, {"content-type": kind})


def form(route: str, options: dict[str, Any], files: list[tuple[str, bytes]]) -> Ask:
    """All images as parts of a form."""
    head = '--edge\r\ncontent-disposition: form-data; name="image"; filename="{}"\r\n\r\n'
    parts = b"".join(
        head.format(number).encode() + data + b"\r\n" for number, (_, data) in enumerate(files)
    )
    kind = {"content-type": "multipart/form-data; boundary=edge"}
    return Ask(f"{route}?{urlencode(options, doseq=True)}", parts + b"--edge--\r\n", kind)


def as_json(route: str, options: dict[str, Any], files: list[tuple[str, bytes]]) -> Ask:
    """All images in base64."""
    lists = {"include", "targets", "layer", "activations", "activation_as"}
    fields = {k: [v] if k in lists and not isinstance(v, list) else v for k, v in options.items()}
    images = [{"data": base64.b64encode(data).decode()} for _, data in files]
    body = json.dumps({**fields, "images": images}).encode()
    return Ask(route, body, {"content-type": "application/json"})


def _files() -> list[tuple[str, bytes]]:
    """Pictures of several sizes and formats, of blocks of colour under grain."""
    sizes = ((80, 60), (64, 96), (224, 224), (96, 96), (120, 90))
    kinds = itertools.cycle(("JPEG", "PNG", "WEBP"))
    found = []
    for seed, (size, kind) in enumerate(zip(sizes, kinds, strict=False)):
        blocks = Image.fromarray(pictures.noise(5, 4, seed)).resize(size, Image.Resampling.NEAREST)
        grain = np.random.default_rng(seed).integers(0, 20, (size[1], size[0], 3), dtype=np.uint8)
        data = pictures.file(np.asarray(blocks) + grain, kind, quality=90)
        found.append((f"image/{kind.lower()}", data))
    return found


# ---- whether it was answered right

RELATIVE, NEAR_ZERO = 2e-2, 1e-4
"""Two batch sizes give other last digits, which a method may enlarge; another request's answer is
far from this."""
OF_A_MAP = 5e-2
"""In maps, of their largest value: a ReLU may change its mind about a zero."""
LEVELS = 3.0
"""Mean difference of two images, of 255."""


def differences(answer: Any, twin: Any, place: str = "answer") -> Iterator[str]:
    """Where an answer is not its twin's: the request's id and the times are left out."""
    if isinstance(twin, dict) and isinstance(answer, dict):
        if answer.keys() != twin.keys():
            yield f"{place} has {sorted(answer.keys() ^ twin.keys())}"
        elif "data" in twin:
            yield from _of_data(answer, twin, place)
        else:
            for key in twin.keys() - {"id", "timing_ms", "regions", "flags"}:
                yield from differences(answer[key], twin[key], f"{place}.{key}")
    elif isinstance(twin, list) and isinstance(answer, list) and len(twin) == len(answer):
        for number, (one, other) in enumerate(zip(answer, twin, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    elif isinstance(twin, float) and isinstance(answer, float):
        if abs(answer - twin) > RELATIVE * abs(twin) + NEAR_ZERO:
            yield f"{place} is {answer} instead of {twin}"
    elif answer != twin:
        yield f"{place} is {str(answer)[:40]} instead of {str(twin)[:40]}"


def _of_data(answer: dict[str, Any], twin: dict[str, Any], place: str) -> Iterator[str]:
    if answer["data"] == twin["data"]:
        return
    one, other = (_values(each) for each in (answer, twin))
    if one.shape != other.shape:
        yield f"{place} has the shape {one.shape} instead of {other.shape}"
        return
    off = np.abs(one - other)
    if "media_type" in twin:
        if off.mean() > LEVELS:
            yield f"{place} is another image: {off.mean():.1f} levels off"
    elif off.max() > OF_A_MAP * max(1e-6, float(np.abs(other).max())):
        yield f"{place} is {off.max():.3g} off, of {np.abs(other).max():.3g}"


def _values(sent: dict[str, Any]) -> NDArray[np.float64]:
    data = base64.b64decode(sent["data"])
    if "media_type" in sent:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)
    return np.frombuffer(data, sent["dtype"]).astype(np.float64)
