"""`Content-Encoding` of a request: a compressed body is decoded within the bounds of a plain one.

    codings_of(request)                     # or UnsupportedMediaType, before a byte is read
    body = await decoded(request, body, permit, max_bytes)

Decoding stops at the bound, so a decompression bomb costs no more than the bound itself.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

from fastapi import Request

from service.errors import BodyTooLarge, EmptyBody, MalformedRequest, UnsupportedMediaType
from service.routes.state import service_of
from service.scheduling.admission import Permit

ACCEPTED = ("gzip", "deflate", "identity")

MAX_CODINGS = 2
"""Codings of one body, one inside the other."""

MAX_MEMBERS = 1000
"""Members of one gzip body, one after the other."""

_PIECE = 64 << 10


def codings_of(request: Request) -> tuple[str, ...]:
    """The codings of a request's body in the order they were applied; `identity` is left out.

    Raises UnsupportedMediaType for an unsupported one, with those that are supported.
    """
    listed = ",".join(request.headers.getlist("content-encoding")).split(",")
    names = [name for text in listed if (name := text.strip().lower())]
    codings = tuple(name.removeprefix("x-") for name in names if name != "identity")
    unknown = [name for name in codings if name not in ACCEPTED]
    if unknown or len(codings) > MAX_CODINGS:
        received = f"{unknown[0][:40]!r}" if unknown else f"{len(codings)} nested codings"
        raise UnsupportedMediaType(
            f"Content-Encoding {received} is not supported; send the body without it, or as one of "
            f"{', '.join(ACCEPTED[:-1])}."
        )
    return codings


async def decoded(request: Request, body: bytes, permit: Permit, max_bytes: int) -> bytes:
    """The body without its codings, decoded in a worker thread; `permit` grows by the difference.

    Raises UnsupportedMediaType, BodyTooLarge, MalformedRequest, EmptyBody, QueueFull.
    """
    codings = codings_of(request)
    if not codings:
        return body
    call = service_of(request).scheduler.call(decode, body, codings, max_bytes)
    plain = await asyncio.wrap_future(call)
    permit.grow(0, max(0, len(plain) - len(body)))
    return plain


def decode(body: bytes, codings: Sequence[str], max_bytes: int) -> bytes:
    """Remove the codings of a body, the last one first.

    Raises BodyTooLarge as soon as more than `max_bytes` are decoded, MalformedRequest, EmptyBody.
    """
    for coding in reversed(codings):
        try:
            body = _gunzip(body, max_bytes) if coding == "gzip" else _inflate(body, max_bytes)
        except zlib.error as error:
            raise MalformedRequest(
                f"The body is not {coding}, although its Content-Encoding is: {error}."
            ) from error
    if not body:
        raise EmptyBody("The decoded body is empty; send an image.")
    return body


def _gunzip(body: bytes, max_bytes: int) -> bytes:
    plain = bytearray()
    start = members = 0
    while start < len(body) or not members:
        members += 1
        if members > MAX_MEMBERS:
            raise MalformedRequest(f"The gzip body has more than {MAX_MEMBERS} members.")
        start += _read(body, start, zlib.MAX_WBITS | 16, plain, max_bytes)
    return bytes(plain)


def _inflate(body: bytes, max_bytes: int) -> bytes:
    """`deflate` is zlib's format (RFC 9110 §8.4.1.2); some clients omit its header and checksum."""
    plain = bytearray()
    has_head = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    end = _read(body, 0, zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS, plain, max_bytes)
    if end < len(body):
        raise MalformedRequest(f"{len(body) - end} bytes follow the end of the deflate body.")
    return bytes(plain)


def _read(body: bytes, start: int, window: int, plain: bytearray, max_bytes: int) -> int:
    """Decode one stream into `plain`; how many bytes of the body it took."""
    reader = zlib.decompressobj(window)
    at, rest = start, b""
    while not reader.eof:
        if not rest:
            rest = body[at : at + _PIECE]
            at += len(rest)
        more = reader.decompress(rest, _PIECE)  # also if empty: the rest of the last piece
        if not (rest or more or reader.eof):
            raise MalformedRequest("The compressed body ends too early; send all of it.")
        plain += more
        if len(plain) > max_bytes:
            raise BodyTooLarge(
                f"The decoded body is larger than {max_bytes} bytes; send fewer or smaller images."
            )
        rest = reader.unconsumed_tail
    return at - start - len(reader.unused_data)
