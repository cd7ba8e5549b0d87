"""Multipart forms and JSON bodies, apart from any route."""

from __future__ import annotations

import base64
import random
import tracemalloc

import pytest

from service.errors import MalformedRequest
from service.routes.bodies import utf8_json
from service.routes.forms import form_parts, multipart_images, single_image

KIND = "multipart/form-data; boundary=cut"
HEAD = b'content-disposition: form-data; name="%b"\r\n%b\r\n'


def form(*parts: tuple[bytes, bytes, bytes]) -> bytes:
    """Of name, further headers and data of each part."""
    pieces = [b"--cut\r\n" + HEAD % (name, more) + data for name, more, data in parts]
    return b"\r\n".join([*pieces, b"--cut--\r\n"])


def taken(body: bytes) -> list[tuple[str, bytes]]:
    return form_parts(KIND, body, 10, lambda _name: None)


def test_each_part_is_decoded_by_its_own_headers() -> None:
    """Also where one has none, behind one that has."""
    encoded = b"content-transfer-encoding: base64\r\n"
    text = base64.encodebytes(bytes(range(256)))
    body = form((b"a", encoded, text), (b"b", b"", text), (b"c", encoded, b""))
    assert taken(body) == [("a", bytes(range(256))), ("b", text), ("c", b"")]


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"\r\n", b"--cut", b"\r\n--cu", b"\r--cut", b"\n-cut"]
)
def test_data_that_is_nearly_a_boundary_is_kept(data: bytes) -> None:
    assert taken(form((b"a", b"", data), (b"b", b"", data))) == [("a", data), ("b", data)]


@pytest.mark.parametrize("place", range(4))
def test_no_part_is_lost_where_one_boundary_follows_lf_alone(place: int) -> None:
    """Its part would be taken for data of the part before."""
    pieces = (b"preamble\r\n" + form(*[(b"a", b"", b"x")] * 3)).split(b"\r\n--cut")
    body = pieces[0]
    for index, piece in enumerate(pieces[1:]):
        body += (b"\n--cut" if index == place else b"\r\n--cut") + piece
    with pytest.raises(MalformedRequest, match="LF alone"):
        taken(body)


def test_a_form_without_its_preamble_is_the_same_form() -> None:
    body = form((b"a", b"", b"x"))
    for preamble in (b"\r\n", b"\r\n\r\n", b"text\r\n", b"A --cut\r\n", b"\n\r\n"):
        assert taken(preamble + body) == [("a", b"x")]


@pytest.mark.parametrize("shift", range(4))
def test_a_letter_of_several_bytes_at_any_place_is_utf_8(shift: int) -> None:
    body = b'"' + b"a" * (65534 + shift) + "€😀".encode() * 10 + b'"'
    assert utf8_json(body) == body


def test_a_letter_that_is_cut_at_the_end_is_not_utf_8() -> None:
    with pytest.raises(MalformedRequest, match="not UTF-8"):
        utf8_json('"€'.encode()[:-1])


def test_json_is_checked_without_a_copy_as_text() -> None:
    body = b'"' + "€".encode() + b"a" * 4_000_000 + b'"'
    tracemalloc.start()
    try:
        utf8_json(body)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


JPEG = b"\xff\xd8" + bytes(range(256)) * 20 + b"\r\n-\n-"

WHOLE = (
    b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a b.jpg"\r\n'
    b"Content-Type: image/jpeg\r\n\r\n" + JPEG + b"\r\n--cut--\r\n"
)


@pytest.mark.parametrize(
    "body",
    [
        WHOLE,
        WHOLE.removesuffix(b"\r\n"),
        WHOLE.replace(b"Content-Type: image/jpeg\r\n", b""),
        WHOLE.replace(b'; filename="a b.jpg"', b""),
    ],
)
def test_a_form_with_one_image_is_read_at_once(body: bytes) -> None:
    assert single_image(KIND, body) == JPEG


@pytest.mark.parametrize(
    "body",
    [
        WHOLE.replace(b"image/jpeg", b"multipart/mixed"),
        WHOLE.replace(b"image/jpeg\r\n", b"image/jpeg\r\nContent-Transfer-Encoding: base64\r\n"),
        WHOLE.replace(b'name="image"', b'name="file"'),
        WHOLE.replace(b"\r\n--cut--", b"\r\n--cut\r\n\r\n--cut--"),
        WHOLE.replace(b"-\n-", b"\n--cut--\r\n"),
        WHOLE.replace(b"-\n-", b"\r\n--cut\r\n"),
        WHOLE.replace(b"\r\n", b"\n"),
        b"preamble\r\n" + WHOLE,
        WHOLE + b"epilogue",
        WHOLE.replace(JPEG, b""),
        WHOLE.replace(JPEG, b"\0" * (256 << 10)),
        WHOLE[:-6],
        WHOLE[:40],
        b"--cut--\r\n",
        b"",
    ],
)
def test_any_other_form_is_left_to_the_parser(body: bytes) -> None:
    assert single_image(KIND, body) is None


def test_a_form_that_is_read_at_once_is_what_the_parser_reads() -> None:
    """Bytes of a form are deleted, doubled or exchanged for pieces of its syntax."""
    draw = random.Random(0)
    pieces = [b"\r\n", b"\n", b"--", b"--cut", b"\r\n--cut--", b'"', b";", b":", b"", b"\0"]
    short, read = WHOLE.replace(JPEG, JPEG[:64]), 0
    for _ in range(2000):
        start = draw.randrange(len(short))
        end = start + draw.choice([0, 1, 1, 2, 7])
        body = short[:start] + draw.choice(pieces) + short[end:]
        quick = single_image(KIND, body)
        if quick is not None:
            read += 1
            assert multipart_images(KIND, body, 10) == [quick]
    assert read > 200


def test_a_content_type_with_more_than_a_plain_boundary_is_left_to_the_parser() -> None:
    for kind in ('multipart/form-data; boundary="cut"', KIND + "; charset=utf-8", "text/plain"):
        assert single_image(kind, WHOLE) is None
