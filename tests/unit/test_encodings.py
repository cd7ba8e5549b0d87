"""Compressed bodies: what they decode to, and where one that stands for a large body ends."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib

import pytest
from starlette.requests import Request

from service.errors import BodyTooLarge, EmptyBody, MalformedRequest, UnsupportedMediaType
from service.routes.encodings import MAX_MEMBERS, codings_of, decode

MOST = 1 << 20


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACK = {"gzip": gzip.compress, "zlib": zlib.compress, "deflate": raw_deflate}


def request_with(*values: str) -> Request:
    headers = [(b"content-encoding", value.encode()) for value in values]
    return Request({"type": "http", "headers": headers})


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", ["noise", "zeros", "text"])
@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 300_000, MOST])
def test_a_body_is_what_was_compressed(pack: str, kind: str, size: int) -> None:
    data = {
        "noise": random.Random(0).randbytes,
        "zeros": bytes,
        "text": lambda n: (b"all the same " * (n // 13 + 1))[:n],
    }[kind](size)
    assert decode(PACK[pack](data), ["gzip" if pack == "gzip" else "deflate"], MOST) == data


def test_codings_are_taken_off_from_the_last_to_the_first() -> None:
    data = b"an image"
    assert decode(gzip.compress(zlib.compress(data)), ["deflate", "gzip"], MOST) == data
    members = gzip.compress(b"one ") + gzip.compress(b"") + gzip.compress(b"two")
    assert decode(members, ["gzip"], MOST) == b"one two"


@pytest.mark.parametrize(
    ("values", "codings"),
    [
        ([], ()),
        (["identity"], ()),
        ([" GZIP "], ("gzip",)),
        (["x-gzip"], ("gzip",)),
        (["deflate, identity, gzip"], ("deflate", "gzip")),
        (["gzip", "deflate"], ("gzip", "deflate")),
        ([""], ()),
    ],
)
def test_codings_are_read_from_the_header(values: list[str], codings: tuple[str, ...]) -> None:
    assert codings_of(request_with(*values)) == codings


@pytest.mark.parametrize("value", ["br", "zstd", "gzip, br", "gzip;q=1", "gzip, gzip, gzip"])
def test_another_coding_is_refused_with_those_that_are_read(value: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="gzip, deflate"):
        codings_of(request_with(value))


@pytest.mark.parametrize("pack", PACK)
def test_a_bomb_is_refused_at_the_bound(pack: str) -> None:
    """Half a gigabyte in half a megabyte: no more than the bound is ever held."""
    bomb = PACK[pack](bytes(200 << 20))
    codings = ["gzip" if pack == "gzip" else "deflate"]
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge, match="The decoded body is larger"):
            decode(bomb, codings, MOST)
        with pytest.raises(BodyTooLarge):
            decode(gzip.compress(bomb), [*codings, "gzip"], MOST)
        assert tracemalloc.get_traced_memory()[1] < 6 * MOST
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pack", PACK)
def test_what_is_not_what_it_says_is_refused(pack: str) -> None:
    coding = "gzip" if pack == "gzip" else "deflate"
    data = random.Random(1).randbytes(100_000)
    packed = PACK[pack](data)
    for body in (packed[:-1], packed[: len(packed) // 2], packed[:1]):
        with pytest.raises(MalformedRequest):
            decode(body, [coding], MOST)
    for body in (packed + b"more", b"\x89PNG\r\n\x1a\n", b"\xff" * 100):
        with pytest.raises(MalformedRequest):
            decode(body, [coding], MOST)
    with pytest.raises(EmptyBody):
        decode(PACK[pack](b""), [coding], MOST)


def test_a_body_of_a_million_members_is_refused() -> None:
    with pytest.raises(MalformedRequest, match=str(MAX_MEMBERS)):
        decode(gzip.compress(b"") * 100_000, ["gzip"], MOST)
