"""Requests byte by byte as the HTTP stacks of other languages and tools write them.

Each gets the answer that the same image gets from a plain client, or an error that says what was
received and what to send instead.
"""

from __future__ import annotations

import base64
import codecs
import gzip
import json
from typing import Any

import pictures
import pytest
from raw import ask, chunked, connected, head, read_one, read_to_the_end, statuses

JPEG = pictures.jpeg()
B64 = base64.b64encode(JPEG).decode()
LINES = base64.encodebytes(JPEG)
CLOSE = "connection: close"
PLAIN = 'Content-Disposition: form-data; name="image"'


@pytest.fixture(scope="module")
def server(run_server) -> Any:
    with run_server() as running:
        yield running


@pytest.fixture(scope="module")
def expected(server, http) -> list[Any]:
    """The predictions of a plain client."""
    answer = http.post(
        f"{server.url}/predict", content=JPEG, headers={"content-type": "image/jpeg"}
    )
    return answer.raise_for_status().json()["results"][0]["predictions"]


def request(
    body: bytes,
    kind: str | None = "image/jpeg",
    *more: str,
    target: str = "POST /predict",
    version: str = "1.1",
) -> bytes:
    """A request with a Content-Length that closes its connection."""
    kinds = [] if kind is None else [f"Content-Type: {kind}"]
    lines = ["Host: localhost", *kinds, f"Content-Length: {len(body)}", *more, CLOSE]
    return head(target, *lines, version=version) + body


def part(  # a whole form of one part
    *lines: str,
    data: bytes = JPEG,
    boundary: str = "XyZ",
    eol: str = "\r\n",
    before: str = "",
    padding: str = "",
    after: str = "\r\n",
) -> bytes:
    start = f"{before}--{boundary}{padding}{eol}{''.join(line + eol for line in lines)}{eol}"
    return start.encode() + data + f"{eol}--{boundary}--{after}".encode()


def form(body: bytes, boundary: str = "XyZ") -> bytes:
    return request(body, f"multipart/form-data; boundary={boundary}")


def document(text: str | bytes, kind: str = "application/json", *more: str) -> bytes:
    return request(text.encode() if isinstance(text, str) else text, kind, *more)


JSON = json.dumps({"images": [{"data": B64}]})
TWO = part(PLAIN, after="").removesuffix(b"--") + b"\r\n"  # the first of two parts

ANSWERED = {
    # forms
    "a name without quotes and a name in two encodings": form(
        part(
            "Content-Type: image/jpeg",
            "Content-Disposition: form-data; name=image; filename=a.jpg; "
            "filename*=utf-8''%C3%A4.jpg",
            boundary="5a1d6c2e-0f37-4a53-8a40-3c1d1e6c9d77",
        ),
        '"5a1d6c2e-0f37-4a53-8a40-3c1d1e6c9d77"',
    ),
    "a charset beside the boundary, a binary part": request(
        part(
            'Content-Disposition: form-data; name="image"; filename="a.jpg"',
            "Content-Type: application/octet-stream",
            "Content-Transfer-Encoding: binary",
        ),
        "multipart/form-data; boundary=XyZ; charset=UTF-8",
    ),
    "other letter case": request(
        part('content-disposition: Form-Data; NAME="image"; FileName="a.jpg"'),
        "Multipart/Form-Data; BOUNDARY=XyZ",
    ),
    "a semicolon and quotes in a file's name": form(
        part('Content-Disposition: form-data; filename="a;name=\\"x\\".jpg"; name="image"')
    ),
    "a length of the part": form(part(PLAIN, f"Content-Length: {len(JPEG)}")),
    "a preamble and an epilogue": form(
        part(PLAIN, before="This is a form.\r\n", after="\r\nIt ended.")
    ),
    "spaces after the boundary": form(part(PLAIN, padding=" \t ")),
    "a preamble and spaces": form(part(PLAIN, before="text\r\n", padding=" ")),
    "an empty preamble": form(part(PLAIN, before="\r\n")),
    "a preamble with dashes": form(part(PLAIN, before="--- --XyZ\r\n--X\r\n\r\n")),
    "nothing after the last boundary": form(part(PLAIN, after="")),
    "a boundary of punctuation": form(part(PLAIN, boundary="=_x:y/z?+'(,)."), '"=_x:y/z?+\'(,)."'),
    "a boundary of 70 characters": form(part(PLAIN, boundary="b" * 70), "b" * 70),
    "a boundary of dashes": form(part(PLAIN, boundary="-----7"), "-----7"),
    "a part in 8bit": form(part(PLAIN, "Content-Transfer-Encoding: 8BIT")),
    "a part in base64": form(part(PLAIN, "Content-Transfer-Encoding: base64", data=LINES)),
    "a part in base64 with CRLF": form(
        part(PLAIN, "CONTENT-TRANSFER-ENCODING:  Base64 ", data=LINES.replace(b"\n", b"\r\n"))
    ),
    "a gzip form": request(
        gzip.compress(part(PLAIN)), "multipart/form-data; boundary=XyZ", "Content-Encoding: gzip"
    ),
    # heads and framing
    "HTTP/1.0": request(JPEG, version="1.0"),
    "HTTP/1.0 without Host": head(
        "POST /predict",
        "Content-type: image/jpeg",
        f"Content-length: {len(JPEG)}",
        version="1.0",
    )
    + JPEG,
    "an absolute target": request(JPEG, target="POST http://localhost/predict"),
    "Connection with several values": request(JPEG, "image/jpeg", "TE: trailers", "Keep-Alive: 5"),
    "chunks": head(
        "POST /predict",
        "Host: localhost",
        "Content-Type: image/jpeg",
        "Transfer-Encoding: Chunked",
        CLOSE,
    )
    + chunked(JPEG, 500),
    "gzip": request(gzip.compress(JPEG), "image/jpeg", "Content-Encoding: gzip"),
    "identity": request(JPEG, "image/jpeg", "Content-Encoding: identity"),
    # content types
    "image/jpg": request(JPEG, "image/jpg"),
    "image/*": request(JPEG, "image/*"),
    "another image type": request(JPEG, "image/png"),
    "a type with a parameter": request(JPEG, 'Image/JPEG; name="a.jpg"'),
    "octet-stream": request(JPEG, "application/octet-stream"),
    "the octet-stream of object stores": request(JPEG, "binary/octet-stream"),
    # JSON
    "JSON with a charset": document(JSON, "application/json; charset=utf-8"),
    "JSON with quotes round the charset": document(JSON, 'application/json;charset="UTF-8"'),
    "JSON with a byte order mark": document(codecs.BOM_UTF8 + JSON.encode()),
    "JSON that says another charset and is ASCII": document(JSON, "text/json; charset=utf-16"),
    "text/json": document(JSON, "text/json"),
    "vnd.api+json": document(JSON, "application/vnd.api+json"),
    "problem+json": document(JSON, "application/problem+JSON"),
    "gzip JSON": document(
        gzip.compress(JSON.encode()), "application/json", "Content-Encoding: gzip"
    ),
    "base64 in lines": document(json.dumps({"images": [{"data": LINES.decode()}]})),
    "a data: URI": document(json.dumps({"images": [{"data": f"data:image/jpeg;base64,{B64}"}]})),
    "escaped slashes": document(JSON.replace("/", "\\/")),
}


@pytest.mark.parametrize("sent", ANSWERED.values(), ids=ANSWERED)
def test_what_another_stack_sends_is_answered_as_a_plain_client_is(server, expected, sent) -> None:
    answer = ask(server.address, sent)
    assert statuses(answer) == [200], answer
    (result,) = json.loads(answer.partition(b"\r\n\r\n")[2])["results"]
    assert result["predictions"] == expected


REFUSED: dict[str, tuple[bytes, int, str, list[str]]] = {
    "lines that end in LF": (
        form(part(PLAIN, eol="\n")),
        400,
        "malformed_request",
        ["LF alone", "CRLF"],
    ),
    "headers that end in LF": (
        form(part(PLAIN + "\nContent-Type: image/jpeg\n")),
        400,
        "malformed_request",
        ["LF alone", "CRLF"],
    ),
    "a last boundary behind LF": (
        form(part(PLAIN).replace(b"\r\n--XyZ--", b"\n--XyZ--")),
        400,
        "malformed_request",
        ["LF alone", "CRLF"],
    ),
    "a second part behind LF": (
        form(
            TWO.replace(b"\r\n--XyZ\r\n", b"\n--XyZ\r\n") + part(PLAIN).removeprefix(b"--XyZ\r\n")
        ),
        400,
        "malformed_request",
        ["LF alone", "CRLF"],
    ),
    "a preamble and lines that end in LF": (
        form(part(PLAIN, eol="\n", before="This is a form.\n")),
        400,
        "malformed_request",
        ["LF alone", "CRLF"],
    ),
    "a folded header": (
        form(part('Content-Disposition: form-data; name="image";', ' filename="a.jpg"')),
        400,
        "malformed_request",
        ["several lines", "one line"],
    ),
    "another boundary than the type says": (
        form(part(PLAIN, boundary="other")),
        400,
        "malformed_request",
        ["'XyZ'", "boundary", "by hand"],
    ),
    "no last boundary": (
        form(part(PLAIN).partition(b"\r\n--XyZ--")[0]),
        400,
        "malformed_request",
        ["last boundary is missing"],
    ),
    "no parts": (form(b"--XyZ--\r\n"), 400, "empty_body", ["'image'", "curl -F"]),
    "a part in broken base64": (
        form(part(PLAIN, "Content-Transfer-Encoding: base64", data=b"%PDF")),
        400,
        "malformed_request",
        ["'image'", "Content-Transfer-Encoding", "not standard base64"],
    ),
    "a part that is not base64": (
        form(part(PLAIN, "Content-Transfer-Encoding: base64")),
        400,
        "malformed_request",
        ["'image'", "Content-Transfer-Encoding", "not standard base64"],
    ),
    "quoted-printable": (
        form(part(PLAIN, "Content-Transfer-Encoding: quoted-printable")),
        415,
        "unsupported_media_type",
        ["Content-Transfer-Encoding 'quoted-printable'", "base64"],
    ),
    "a gzip part": (
        form(part(PLAIN, "Content-Encoding: gzip", data=gzip.compress(JPEG))),
        415,
        "unsupported_media_type",
        ["Content-Encoding 'gzip'", "whole body"],
    ),
    "a form in a form": (
        form(part(PLAIN, "Content-Type: multipart/mixed; boundary=in", data=b"--in--")),
        415,
        "unsupported_media_type",
        ["'multipart/mixed'", "a separate part"],
    ),
    "base64 without a header": (
        form(part(PLAIN, data=LINES)),
        415,
        "unsupported_image",
        ["base64 text of a JPEG file", "the file itself", "JSON"],
    ),
    "base64 as an image": (
        request(B64.encode()),
        415,
        "unsupported_image",
        ["base64 text of a JPEG file", "the file itself", "JSON"],
    ),
    "a data: URI as an image": (
        request(f"data:image/jpeg;base64,{B64}".encode()),
        415,
        "unsupported_image",
        ["base64 text of a JPEG file", "the file itself", "JSON"],
    ),
    "base64 twice": (
        document(json.dumps({"images": [{"data": base64.b64encode(B64.encode()).decode()}]})),
        415,
        "unsupported_image",
        ["base64 text of a JPEG file", "the file itself"],
    ),
    "gzip without a word": (
        request(gzip.compress(JPEG)),
        415,
        "unsupported_image",
        ["gzip data", "Content-Encoding: gzip"],
    ),
    "a form that says it is an image": (
        request(part(PLAIN)),
        415,
        "unsupported_image",
        ["a multipart form", "multipart/form-data"],
    ),
    "JSON that says it is an image": (
        document(JSON, "image/jpeg"),
        415,
        "unsupported_image",
        ["JSON", "application/json"],
    ),
    "a form that says it is JSON": (
        document(part(PLAIN)),
        400,
        "malformed_request",
        ["not JSON", "a multipart form", "multipart/form-data"],
    ),
    "an image of a phone": (
        request(b"\0\0\0\x18ftypheic" + bytes(40), "image/heic"),
        415,
        "unsupported_image",
        ["HEIC", "JPEG, PNG"],
    ),
    "a video": (
        request(b"\0\0\0\x18ftypisom" + bytes(40), "image/*"),
        415,
        "unsupported_image",
        ["a video", "JPEG, PNG"],
    ),
    "no content type": (request(JPEG, None), 415, "unsupported_media_type", ["image/jpeg"]),
    "a form of a page": (
        request(JPEG, "application/x-www-form-urlencoded"),
        415,
        "unsupported_media_type",
        ["'application/x-www-form-urlencoded'", "image/jpeg"],
    ),
    "text": (request(JPEG, "text/plain"), 415, "unsupported_media_type", ["'text/plain'"]),
    "mixed parts": (
        request(part(PLAIN), "multipart/mixed; boundary=XyZ"),
        415,
        "unsupported_media_type",
        ["'multipart/mixed'"],
    ),
    "brotli": (
        request(JPEG, "image/jpeg", "Content-Encoding: br"),
        415,
        "unsupported_media_type",
        ["'br'", "gzip"],
    ),
    "JSON in UTF-16": (
        document(JSON.encode("utf-16"), "application/json; charset=utf-16"),
        400,
        "malformed_request",
        ["UTF-16", "UTF-8"],
    ),
    "JSON in UTF-16 without a mark": (
        document(JSON.encode("utf-16-be"), "application/json; charset=utf-16be"),
        400,
        "malformed_request",
        ["UTF-16", "UTF-8"],
    ),
    "JSON in Latin-1": (
        document(
            json.dumps({"images": [{"data": B64}], "model": "Käfer"}, ensure_ascii=False).encode(
                "latin-1"
            ),
            "application/json; charset=iso-8859-1",
        ),
        400,
        "malformed_request",
        ["not UTF-8", "send it as UTF-8"],
    ),
    "an image as JSON": (
        document(JPEG),
        400,
        "malformed_request",
        ["not JSON", "a JPEG file", "image/jpeg"],
    ),
    "a TIFF as JSON": (
        document(pictures.file(pictures.noise(8, 8), "TIFF")),
        400,
        "malformed_request",
        ["not JSON", "a TIFF file", "image/tiff"],
    ),
    "PUT": (
        request(JPEG, target="PUT /predict"),
        405,
        "method_not_allowed",
        ["PUT", "accepts POST"],
    ),
    "a preflight where no origin is allowed": (
        request(
            b"",
            None,
            "Origin: https://app.example",
            "Access-Control-Request-Method: POST",
            target="OPTIONS /explain",
        ),
        405,
        "method_not_allowed",
        ["OPTIONS", "accepts POST", "CAMSERVE_CORS_ORIGINS"],
    ),
}


@pytest.mark.parametrize(("sent", "status", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_with_what_to_send(
    server, sent: bytes, status: int, code: str, words: list[str]
) -> None:
    answer = ask(server.address, sent)
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert (statuses(answer), body["code"]) == ([status], code), body
    for word in words:
        assert word in body["detail"], body["detail"]


def test_head_of_a_route_of_post_is_answered_without_a_body(server) -> None:
    answer = ask(server.address, request(b"", None, target="HEAD /predict"))
    assert statuses(answer) == [405]
    assert b"\r\nallow: POST\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_a_client_that_waits_for_100_continue_gets_it_and_then_the_answer(server, expected) -> None:
    sent = request(JPEG, "image/jpeg", "Expect: 100-Continue")
    with connected(server.address) as connection:
        connection.sendall(sent.removesuffix(JPEG))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(JPEG)
        answer = read_to_the_end(connection)
    assert statuses(answer) == [200]
    result = json.loads(answer.partition(b"\r\n\r\n")[2])["results"][0]
    assert result["predictions"] == expected


@pytest.mark.parametrize(
    ("target", "kind", "length", "status"),
    [
        ("POST /nowhere", "image/jpeg", len(JPEG), 404),
        ("PUT /predict", "image/jpeg", len(JPEG), 405),
        ("POST /predict?topk=1", "image/jpeg", len(JPEG), 422),
        ("POST /predict", "image/jpeg", 1 << 40, 413),
    ],
)
def test_a_refused_client_that_waits_for_100_continue_keeps_its_body(
    server, target: str, kind: str, length: int, status: int
) -> None:
    """The connection ends: the client may send the body all the same, or its next request."""
    lines = ["Host: localhost", f"Content-Type: {kind}", f"Content-Length: {length}"]
    answer = ask(server.address, head(target, *lines, "Expect: 100-continue"))
    assert statuses(answer) == [status]
    assert b"\r\nconnection: close\r\n" in answer.lower()


def test_several_requests_of_http_1_1_use_one_connection(server, expected) -> None:
    kept = head(
        "POST /predict",
        "Host: localhost",
        "Content-Type: image/jpeg",
        f"Content-Length: {len(JPEG)}",
        "Connection: Keep-Alive",
    )
    with connected(server.address) as connection:
        for _ in range(3):
            connection.sendall(kept + JPEG)
            answer = read_one(connection)
            result = json.loads(answer.partition(b"\r\n\r\n")[2])["results"][0]
            assert result["predictions"] == expected
