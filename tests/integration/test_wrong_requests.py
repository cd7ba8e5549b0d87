"""Wrong inputs of users: the error names what was received, what is accepted, and the next step."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pictures
import pytest
from PIL import Image
from starlette.testclient import TestClient

PNG = pictures.png()
B64 = base64.b64encode(PNG).decode()


class Wrong(NamedTuple):
    """A request, and words of the error: what was received, what is accepted, what to do.

    body: the file or JSON of the request, or its form.
    """

    body: Any
    received: str
    accepted: str
    step: str
    path: str = "/explain"
    kind: str = "image/jpeg"
    accept: str = "application/json"


def ftyp(*brands: bytes) -> bytes:
    """The first box of an ISO base media file."""
    rest = brands[0] + b"\0\0\0\0" + b"".join(brands[1:])
    return (8 + len(rest)).to_bytes(4, "big") + b"ftyp" + rest + bytes(64)


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, kind)
    return file.getvalue()


def part(value: bytes) -> dict[str, tuple[None, bytes]]:
    """A form whose part has no file name, as curl writes `-F image=value`."""
    return {"image": (None, value)}


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'
FORMATS = "JPEG, PNG, WEBP"
SHAPE = '{"images": [{"data": "<base64 of the file>"}], "top_k": 3}'

WRONG = {
    "a PDF": Wrong(saved("PDF"), "a PDF document", FORMATS, "export the page as PNG"),
    "an SVG": Wrong(SVG, "an SVG drawing", FORMATS, "export it as PNG"),
    "DICOM": Wrong(bytes(128) + b"DICM" + bytes(64), "a DICOM file", FORMATS, "export the frame"),
    "an iPhone's HEIC": Wrong(ftyp(b"heic", b"mif1", b"heic"), "HEIC", FORMATS, "save it as JPEG"),
    "a video": Wrong(ftyp(b"isom", b"isom", b"mp41"), "a video", FORMATS, "send one frame"),
    "WebM": Wrong(b"\x1aE\xdf\xa3" + bytes(64), "a video", FORMATS, "send one frame"),
    "AVI": Wrong(b"RIFF\0\0\0\0AVI LIST" + bytes(64), "a video", FORMATS, "send one frame"),
    "JPEG 2000": Wrong(saved("JPEG2000"), "JPEG 2000", FORMATS, "save it as JPEG or PNG"),
    "a ZIP archive": Wrong(b"PK\3\4" + bytes(64), "a ZIP archive", FORMATS, "one by one"),
    "a file name": Wrong(part(b"photo.jpg"), "'photo.jpg'", FORMATS, "@ is before its name"),
    "a path": Wrong(part(b"/home/me/My cat.PNG"), "My cat.PNG", FORMATS, "@ is before its name"),
    "a URL": Wrong(part(b"https://a.example/b.jpg"), "https://a.example", FORMATS, "curl sends"),
    "base64 as a file": Wrong(B64.encode(), "base64 text of a PNG", FORMATS, "send the file"),
    "a file name in JSON": Wrong(
        {"images": [{"data": "photo.jpg"}]}, "'photo.jpg'", "standard base64", "base64 -w0"
    ),
    "text for images": Wrong({"images": B64}, "images", "array", SHAPE),
    "a list of texts": Wrong({"images": [B64]}, "images.0", "object", SHAPE),
    "one image, not a list": Wrong({"images": {"data": B64}}, "images", "array", SHAPE),
    "another name": Wrong({"instances": [{"data": B64}]}, "'instances'", "images", SHAPE),
    "the image at the top": Wrong({"image": B64}, "'image'", "images", SHAPE),
    "nested options": Wrong(
        {"images": [{"data": B64}], "options": {"top_k": 3}}, "'options'", '"top_k": 3', SHAPE
    ),
    "one layer, not a list": Wrong(
        {"images": [{"data": B64}], "layer": "features"}, "layer", "array", 'send ["features"]'
    ),
    "a method's title": Wrong(
        PNG, "method", "'gradcam', 'gradcampp'", "mean 'gradcam'?", "/explain?method=GradCAM"
    ),
    "a paper's spelling": Wrong(
        PNG, "method", "'gradcam', ", "mean 'gradcampp'?", "/explain?method=Grad-CAM%2B%2B"
    ),
    "two images in one": Wrong(
        [("image", PNG), ("image", PNG)], "2 images", "application/json", "one image per request",
        accept="image/png",
    ),
    "a heatmap as JPEG": Wrong(
        PNG, "'image/jpeg'", "image/png or application/json", "leave out the option",
        "/explain?include=heatmap", accept="image/jpeg",
    ),
    "numbers as one image": Wrong(
        PNG, "include=grid", "include=overlay or include=heatmap", "accept application/json",
        "/explain?include=grid", accept="image/webp",
    ),
    "options beside JSON": Wrong(
        {"images": [{"data": B64}]}, "names top_k", "fields beside `images`", "move them there",
        "/explain?top_k=3",
    ),
    "an option of the other route": Wrong(
        PNG, "'method'", "/explain", "does not accept", "/predict?method=cam"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def service(serve) -> Iterator[TestClient]:
    with serve() as client:
        yield client


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_error_names_what_was_received_what_is_accepted_and_the_next_step(
    service: TestClient, wrong: Wrong
) -> None:
    headers, sent = {"accept": wrong.accept}, {"content": wrong.body}
    if isinstance(wrong.body, bytes):
        headers["content-type"] = wrong.kind
    elif isinstance(wrong.body, list) or isinstance(wrong.body.get("image"), tuple):
        sent = {"files": wrong.body}
    else:
        headers["content-type"], sent = "application/json", {"content": json.dumps(wrong.body)}
    response = service.post(wrong.path, headers=headers, **sent)
    assert 400 <= response.status_code < 500
    detail = response.json()["detail"]
    for words in (wrong.received, wrong.accepted, wrong.step):
        assert words in detail, (words, detail)
