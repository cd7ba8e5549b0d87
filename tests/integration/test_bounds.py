"""Bounds that hold before any work: on a request's head, its options, its JSON and its pictures."""

from __future__ import annotations

import io
import json
import socket
import struct
import tracemalloc
import urllib.parse
import zlib
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import httpx
import numpy as np
import pictures
import pytest
from PIL import Image, ImageFile
from starlette import requests
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from api_schemas.options import ExplainRequest
from service.errors import InvalidOption
from service.images.formats import format_of
from service.integrations import protocol_requests
from service.integrations.protocols import kserve, nested
from service.routes import bodies, classify
from service.routes.server import bounded_connection

PNG = {"content-type": "image/png"}
JSON = {"content-type": "application/json"}


def refused(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


# ---- the head of a request


def read_to_the_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("part", ["a line", "one header", "many headers"])
def test_a_head_without_end_is_refused_and_cut_off(
    run_server, http, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Uvicorn alone would keep it all in memory."""
    monkeypatch.setattr(bounded_connection, "LINGER_SECONDS", 0)
    more = {"a line": b"x" * 999, "one header": b"x" * 999, "many headers": b"x: y\r\n" * 200}[part]
    start = b"GET /" if part == "a line" else b"GET / HTTP/1.1\r\nhost: x\r\na: "
    with run_server() as server, socket.create_connection(server.address, timeout=5) as connection:
        connection.sendall(start)
        with pytest.raises(OSError, match=r"reset|pipe|abort"):
            connection.sendall(more * (200_000_000 // len(more)))
        assert http.get(f"{server.url}/health/live").status_code == 200


@pytest.mark.parametrize("earlier", [0, 1])
def test_who_sends_too_long_a_head_reads_what_to_do(run_server, earlier: int) -> None:
    """Also on a connection that answered before, and with less than twice the limit."""
    with run_server() as server, httpx.Client(trust_env=False) as client:
        for _ in range(earlier):
            assert client.get(f"{server.url}/models").status_code == 200
        with capture_logs() as logs:
            response = client.get(f"{server.url}/models", headers={"x": "y" * 300_000})
        assert {"event": "head_too_large", "client": "127.0.0.1", "log_level": "info"} in logs
        assert refused(response) == (431, "head_too_large")
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["connection"] == "close"
        assert response.headers["x-content-type-options"] == "nosniff"
        headers = {f"x{number}": "y" * 2_600 for number in range(90)}
        assert client.get(f"{server.url}/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"accept": "," * 17_000},
        {"content-type": "multipart/form-data; boundary=" + '";' * 9_000},
        {"if-none-match": "," * 17_000},
        {"anything": "x" * 17_000},
        {f"x-{number}": "" for number in range(101)},
    ],
)
@pytest.mark.parametrize("route", ["/", "/models", "/predict", "/nothing"])
def test_header_fields_without_end_are_refused_before_one_is_parsed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], route: str
) -> None:
    monkeypatch.setattr(classify, "as_image", lambda *_: pytest.fail("it was parsed"))
    response = client.post(route, headers=headers)
    assert refused(response) == (431, "head_too_large")
    assert "100 header fields" in response.json()["detail"]


@pytest.mark.parametrize("cookie", ['a="' + "\\1" * 20_000 + '"', ";" * 60_000, "a=b"])
def test_cookies_are_never_parsed(run_server, monkeypatch: pytest.MonkeyPatch, cookie: str) -> None:
    """60 kB of them stopped the event loop for 4 seconds."""
    monkeypatch.setattr(requests, "cookie_parser", lambda _: pytest.fail("it was parsed"))
    with run_server() as server, httpx.Client(trust_env=False) as client:
        sent = {"cookie": cookie, "content-type": "image/png"}
        response = client.post(f"{server.url}/predict", content=pictures.png(), headers=sent)
        assert response.status_code == (200 if len(cookie) < 1000 else 431)


@pytest.mark.parametrize("first", [10, -2])
def test_a_body_that_comes_with_the_end_of_its_head_is_none_of_it(run_server, first: int) -> None:
    """Also where the end itself comes in two pieces."""
    body = pictures.png() + bytes(600_000)
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\nconnection: close\r\n"
    head += f"content-length: {len(body)}\r\n\r\n".encode()
    with run_server() as server, socket.create_connection(server.address, timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head[:first])
        connection.sendall(head[first:] + body)
        assert read_to_the_end(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("begun", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(
    run_server, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(bounded_connection, "HEAD_SECONDS", 0.2)
    with run_server() as server, socket.create_connection(server.address, timeout=5) as connection:
        connection.sendall(begun)
        assert read_to_the_end(connection) == b""


def test_a_body_may_take_longer_than_a_head(run_server, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second request on the connection has a clock of its own."""
    monkeypatch.setattr(bounded_connection, "HEAD_SECONDS", 0.3)
    with run_server() as server:
        connection = HTTPConnection(*server.address, timeout=5)
        try:
            for _ in range(3):
                connection.putrequest("POST", "/predict")
                connection.putheader("content-type", "image/png")
                data = pictures.png()
                connection.putheader("content-length", str(len(data)))
                connection.endheaders()
                connection.send(data[:1000])
                connection.sock.settimeout(0.4)
                with pytest.raises(TimeoutError):
                    connection.sock.recv(1)  # nothing comes, and nothing is closed
                connection.sock.settimeout(5)
                connection.send(data[1000:])
                response = connection.getresponse()
                response.read()
                assert response.status == 200
        finally:
            connection.close()


# ---- options


@pytest.mark.parametrize(
    "name", ["targets", "layer", "activations", "include", "activation_as", "top_k", "nothing"]
)
def test_an_option_three_thousand_times_is_refused(run_server, name: str) -> None:
    """More do not fit into a request line."""
    with run_server() as server:
        connection = HTTPConnection(*server.address, timeout=5)
        query = "&".join([f"{name}=1"] * 3_000)
        connection.request("POST", f"/explain?{query}", pictures.png(), PNG)
        response = connection.getresponse()
        body = json.loads(response.read())
        connection.close()
        assert (response.status, body["code"]) == (422, "invalid_option")
        assert "1000 options" in body["detail"]


@pytest.mark.parametrize(
    ("name", "count"),
    [("targets", 101), ("layer", 17), ("activations", 101), ("include", 17), ("activation_as", 17)],
)
def test_each_list_of_options_has_a_longest(client: TestClient, name: str, count: int) -> None:
    value = {"include": "grid", "activation_as": "stats"}.get(name, "features")
    response = client.post(
        "/explain", params={name: [value] * count}, content=pictures.png(), headers=PNG
    )
    assert refused(response) == (422, "invalid_option")
    assert name in response.json()["detail"]


@pytest.mark.parametrize("mask", ["[" * 10_000, '{"a":' * 3_000, '{"boxes":' + "[" * 10_000])
def test_a_mask_nested_without_end_is_no_mask(client: TestClient, mask: str) -> None:
    """Python's own parser gives up on it with a RecursionError."""
    response = client.post("/explain", params={"mask": mask}, content=pictures.png(), headers=PNG)
    assert refused(response) == (422, "invalid_option")


# ---- JSON

HEAVY = {
    "a million names": b'{"images":[],'
    + b",".join(b'"k%d":1' % i for i in range(1_000_000))
    + b"}",
    "nested objects": b'{"images":' + b'{"a":' * 1_000_000,
    "nested lists": b'{"images":' + b"[" * 10_000_000,
    "ten million numbers": b'{"images":[],"targets":[' + b"1," * 10_000_000 + b"1]}",
    "a million images": b'{"images":[' + b"{}," * 1_000_000 + b"{}]}",
}


@pytest.mark.parametrize("body", HEAVY.values(), ids=HEAVY)
def test_heavy_json_is_refused_before_it_is_parsed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(bodies, "describe", lambda *_: pytest.fail("it was parsed"))
    assert refused(client.post("/explain", content=body, headers=JSON)) == (
        400,
        "malformed_request",
    )


PEERS = (
    "/v1/models/small:predict",
    "/v1/models/small:explain",
    "/v2/models/small/infer",
    "/predictions/small",
    "/integrations/x-anylabeling/v1/predict",
)


@pytest.mark.parametrize("route", PEERS)
@pytest.mark.parametrize("body", HEAVY.values(), ids=HEAVY)
def test_heavy_json_of_other_protocols_is_refused_before_it_is_parsed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, route: str, body: bytes
) -> None:
    monkeypatch.setattr(protocol_requests.orjson, "loads", lambda _: pytest.fail("it was parsed"))
    response = client.post(route, content=body, headers=JSON)
    assert response.status_code == 400
    assert "send images as base64, or tensors as bytes" in response.text


def test_numbers_that_would_hold_the_interpreter_for_long_are_refused_before_they_are_parsed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parser of JSON lets no other thread run until it is done."""
    monkeypatch.setattr(bodies, "describe", lambda *_: pytest.fail("it was parsed"))
    monkeypatch.setattr(protocol_requests.orjson, "loads", lambda _: pytest.fail("it was parsed"))
    ours = b'{"images":[],"targets":[' + b"1," * 300_001 + b"1]}"
    assert client.post("/explain", content=ours, headers=JSON).status_code == 400
    theirs = b'{"instances":[' + b"1," * 2_500_001 + b"1]}"
    for route in PEERS:
        assert client.post(route, content=theirs, headers=JSON).status_code == 400


@pytest.mark.parametrize("depth", [10, 150, 5_000])
def test_nested_json_is_a_client_s_mistake_at_any_depth(client: TestClient, depth: int) -> None:
    body = b'{"images":' + b"[" * depth + b"]" * depth + b"}"
    assert client.post("/explain", content=body, headers=JSON).status_code in (400, 422)


MANY = {
    "v1 explain": ("/v1/models/small:explain", {"instances": [""] * 60_000}),
    "v1 predict": ("/v1/models/small:predict", {"inputs": [[[0]]] * 60_000}),
    "v2 files": (
        "/v2/models/small/infer",
        {"inputs": [{"name": "x", "shape": [60_000], "datatype": "BYTES", "data": [""] * 60_000}]},
    ),
    "v2 numbers": (
        "/v2/models/small/explain",
        {
            "inputs": [
                {
                    "name": "x",
                    "shape": [60_000, 1, 1, 3],
                    "datatype": "UINT8",
                    "data": [0] * 180_000,
                }
            ]
        },
    ),
}


@pytest.mark.parametrize(("route", "body"), MANY.values(), ids=MANY)
def test_too_many_images_are_refused_before_one_is_read(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, route: str, body: Any
) -> None:
    """Sixty thousand empty strings cost a second and 71 MB before their 413."""
    for module, name in ((kserve, "options"), (bodies, "image_file"), (nested, "leaves")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("an image was read"))
    response = client.post(route, json=body)
    assert response.status_code == 413, response.text
    assert "more than 32 images" in response.json()["error"]


def test_an_output_is_given_once_however_often_it_is_named(client: TestClient) -> None:
    """A name of twenty bytes would be answered with a drawing of megabytes each time."""
    tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "data": [""]}
    body = {"inputs": [tensor], "outputs": [{"name": "overlay"}] * 5_000}
    response = client.post("/v2/models/small/explain", json=body)
    assert response.status_code == 400
    assert "'overlay' is named twice" in response.json()["error"]


WRONG: dict[str, dict[str, Any]] = {
    "commas": {"include": ["grid," * 250_000]},
    "a long name": {"x" * 5_000_000: 1},
    "a long value": {"method": "x" * 5_000_000},
    "long names": {f"{'x' * 100_000}{number}": 1 for number in range(20)},
    "a number of 4,000 digits": {"method": 10**4_000},
    "many wrong values": {"targets": [None] * 100_000},
    "many wrong images": {"images": [1] * 100_000},
    "a mask of names": {"mask": {f"name {number}": 1 for number in range(15_000)}},
}


@pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_described_shortly_however_long_it_is(
    client: TestClient, fields: dict[str, Any]
) -> None:
    """A value with commas was split at each of them to look for names in it."""
    body = json.dumps({"images": [{"data": ""}], **fields}).encode()
    with pytest.raises(InvalidOption) as refusal:
        bodies.json_request(body, ExplainRequest, 32)
    assert len(refusal.value.detail) < 1_500
    tracemalloc.start()
    try:
        client.post("/explain", content=body, headers=JSON)
        # The body itself, and the values that are read of it.
        assert tracemalloc.get_traced_memory()[1] < 6 * len(body) + 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("route", ["/nothing/", "/models/", "/v1/models/", "/page/"])
def test_paths_without_end_are_refused_and_not_kept(client: TestClient, route: str) -> None:
    """Every route looked at them, and `urllib.parse` keeps the last 128 that it has split."""
    for length in (4_000, 60_000):
        urllib.parse.clear_cache()
        response = client.get(route + "x/" * (length // 2))
        assert response.status_code == (404 if length < 4_096 else 431)
        assert len(response.text) < 3_000
        # Those of the test client itself.
        assert urllib.parse.urlsplit.cache_info().currsize <= 2


# ---- formats


@pytest.fixture(scope="module")
def picky(serve) -> Iterator[TestClient]:
    with serve(image_formats="jpeg, png") as client:
        yield client


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_only_allowed_formats_are_read(picky: TestClient, client: TestClient, kind: str) -> None:
    data = pictures.file(pictures.noise(), kind)
    assert format_of(data) == kind
    assert client.post("/predict", content=data, headers=PNG).status_code == 200
    answer = picky.post("/predict", content=data, headers=PNG)
    if kind in ("JPEG", "PNG"):
        assert answer.status_code == 200
    else:
        assert refused(answer) == (415, "unsupported_image")
        assert (
            f"{kind} is not accepted by this service; send one of JPEG, PNG."
            in answer.json()["detail"]
        )


# ---- pictures that are larger than they look


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes, width: int = 8, height: int = 8, rows: bytes | None = None) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    image = chunk(b"IDAT", zlib.compress(b"\0" * (height * (width + 1)) if rows is None else rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + image + chunk(b"IEND", b"")


def gif(frames: int, width: int = 8, height: int = 8, frame: tuple[int, int] = (8, 8)) -> bytes:
    """A GIF by hand; each frame has one pixel of image data."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    with io.BytesIO() as buffer:
        Image.new("P", (8, 8)).save(buffer, "GIF")
        written = buffer.getvalue()
    image = written[written.index(b",") : -1]
    image = image[:5] + struct.pack("<HH", *frame) + image[9:]
    return head + image * frames + b";"


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(pictures.jpeg())
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def tiff(entries: list[tuple[int, int, int, int]], after: int = 0, tail: bytes = b"") -> bytes:
    """A TIFF of one directory: (tag, type, count, value); `after` is the offset of the next one."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    return head + directory + struct.pack("<I", after) + tail


def grey_tiff(strip_bytes: int, after: int = 0) -> bytes:
    names = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 8, 279: strip_bytes}
    plain = [(tag, 4, 1, value) for tag, value in names.items()]
    return tiff(plain, after).ljust(200, b"\0") + bytes(64)


def webp_animation(width: int, height: int) -> bytes:
    """Two frames, and then a canvas of another size in the header."""
    frames = [Image.fromarray(pictures.noise(16, 16, seed)) for seed in range(2)]
    with io.BytesIO() as buffer:
        frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
        data = bytearray(buffer.getvalue())
    start = data.index(b"VP8X") + 12
    data[start : start + 3] = (width - 1).to_bytes(3, "little")
    data[start + 3 : start + 6] = (height - 1).to_bytes(3, "little")
    return bytes(data)


def png_of(side: int) -> bytes:
    """A PNG whose pixels really are there, a thousand times smaller than they."""
    row = b"\0" * (side + 1)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


BOMBS = {
    "a PNG": (png_of(9_000), 413),
    "a GIF's canvas": (gif(1, 60_000, 60_000), 413),
    "a GIF's frame": (gif(1, 8, 8, (60_000, 60_000)), 413),
    "a JPEG": (jpeg_claiming(65_000, 65_000), 413),
    "a WebP animation": (webp_animation(16_000, 16_000), (400, 413)),
    "a TIFF": (tiff([(256, 4, 1, 60_000), (257, 4, 1, 60_000)] + [
        (tag, 4, 1, value)
        for tag, value in {258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 8}.items()
    ]), 413),
    "a BMP": (b"BM" + struct.pack("<IHHIIiiHHIIIIII", 100, 0, 0, 54, 40, 60_000, 60_000, 1, 24,
                                  0, 0, 0, 0, 0, 0), 413),
}  # fmt: skip


@pytest.mark.parametrize(("data", "status"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_and_no_pixel_of_it_decoded(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, data: bytes, status: Any
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    response = client.post("/predict", content=data, headers=PNG)
    assert response.status_code in (status if isinstance(status, tuple) else (status,))
    assert response.json()["code"] in ("image_too_large", "corrupt_image")


HUGE = b"\0" * 50_000_000

BURDENED = {
    "a GIF of ten thousand frames": (gif(10_000), {200}),
    "a GIF that ends in its second frame": (gif(2)[:-20], {200}),
    "a PNG with a text of 50 MB": (png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(HUGE))), {200}),
    "a PNG with a profile of 50 MB": (
        png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(HUGE))),
        {200},
    ),
    "a PNG with ten thousand texts": (png_with(*[chunk(b"tEXt", b"a\0b")] * 10_000), {200}),
    "a PNG with more rows than it says": (png_with(rows=HUGE), {200}),
    "a PNG with ten thousand empty chunks": (png_with(*[chunk(b"IDAT", b"")] * 10_000), {200, 400}),
    "a PNG with EXIF of 20 MB": (png_with(chunk(b"eXIf", HUGE[:20_000_000])), {200}),
    "a TIFF with a strip of 4 GB": (grey_tiff(0xFFFFFFF0), {200, 400}),
    "a TIFF whose directories are a ring": (grey_tiff(64, after=8), {200}),
    "a TIFF with a tag of 4 billion values": (
        tiff([(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 0xFFFFFFFF, 8)]),
        {400},
    ),
    "a TIFF whose directory claims 65,535 entries": (
        b"II*\0" + struct.pack("<IH", 8, 65_535) + b"\0" * 100,
        {400},
    ),
    "a JPEG with 10 MB of EXIF and profile": (
        pictures.jpeg()[:2]
        + (b"\xff\xe1\xff\xffExif\0\0" + b"\0" * 65_527) * 80
        + (b"\xff\xe2\xff\xffICC_PROFILE\0\x01\xff" + b"\0" * 65_519) * 80
        + pictures.jpeg()[2:],
        {200},
    ),
    "a JPEG with 100,000 segments of EXIF": (
        pictures.jpeg()[:2] + b"\xff\xe1\0\x08Exif\0\0" * 100_000 + pictures.jpeg()[2:],
        {413},
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("data", "statuses"), BURDENED.values(), ids=BURDENED)
def test_what_a_file_carries_beside_its_pixels_is_bounded_or_not_looked_at(
    client: TestClient, data: bytes, statuses: set[int]
) -> None:
    response = client.post("/predict", content=data, headers=PNG)
    assert response.status_code in statuses, response.text[:300]
    if response.status_code == 200:
        image = response.json()["results"][0]["image"]
        assert image["width"] * image["height"] <= 80 * 60


def test_of_many_pages_the_first_is_read_alone(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)) for value in range(50)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    loads: list[int] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: (loads.append(self.tell()), load(self))[1]
    )
    assert client.post("/predict", content=buffer.getvalue(), headers=PNG).status_code == 200
    assert set(loads) <= {0}
