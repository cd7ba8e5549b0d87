"""Multipart forms (RFC 7578), parsed as different HTTP libraries write them.

    form_parts(content_type, body, max_parts, check)    # [("image", b"..."), ...]

A part in base64 is decoded. Ambiguous input, such as lines that end with LF alone, is refused with
its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import (
    BodyTooLarge,
    EmptyBody,
    InvalidOption,
    MalformedRequest,
    UnsupportedMediaType,
)
from service.routes.bodies import from_base64

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_PART_HEADER = 4096
"""Bytes of one header of a part; all headers of a part have eight times as many at most."""

_QUICK_BYTES = 256 << 10
"""Of a form that `single_image` reads: it runs on the event loop."""

_QUICK_HEAD_BYTES = 1024
"""Of the headers of its part."""

_BOUNDARY = re.compile(r"multipart/form-data; ?boundary=([A-Za-z0-9'_.-]{1,70})")

_IMAGE_HEAD = re.compile(
    rb'content-disposition: form-data; name="image"(; filename="[^"\\\\\r\n]*")?'
    rb"(\r\ncontent-type: (image/[a-z0-9.+-]+|application/octet-stream))?",
    re.IGNORECASE,
)

_AS_IT_IS = ("", "7bit", "8bit", "binary")
"""Values of Content-Transfer-Encoding that need no decoding."""

_GOOD = "curl -F image=@cat.jpg writes a valid one."

_LF_ALONE = (
    "The lines of the multipart form end with LF alone; end them with CRLF (RFC 2046 §4.1.1), "
    "or let an HTTP library write the form."
)


def single_image(content_type: str, body: bytes) -> bytes | None:
    """The image of a short form with one part `image`, as HTTP libraries write it; None: unknown.

    In time proportional to the bytes, of which there are at most 256 KiB. A form in any other
    shape, valid or not, is for `multipart_images`.
    """
    named = _BOUNDARY.fullmatch(content_type) if len(body) <= _QUICK_BYTES else None
    if named is None:
        return None
    opening = b"--" + named[1].encode("ascii")
    start, end = len(opening) + 2, body.find(b"\r\n\r\n", 0, _QUICK_HEAD_BYTES)
    closing = b"\r\n" + opening + b"--"
    data_end = len(body) - len(closing) - 2 * body.endswith(b"\r\n")
    is_whole = body.startswith(opening + b"\r\n") and body.startswith(closing, max(0, data_end))
    # A line that begins with "--" may be a further boundary.
    if not is_whole or not start <= end < data_end - 4 or _dashed_lines(body) != 1:
        return None
    return body[end + 4 : data_end] if _IMAGE_HEAD.fullmatch(body, start, end) else None


def _dashed_lines(body: bytes) -> int:
    """How many lines after the first begin with "--". Unlike `body.count` it releases the GIL."""
    text = np.frombuffer(body, np.uint8)
    return int(np.count_nonzero((text[:-2] == 10) & (text[1:-1] == 45) & (text[2:] == 45)))


def multipart_images(content_type: str, body: bytes, max_images: int) -> list[bytes]:
    """The parts named `image` of a multipart form, in order.

    Raises MalformedRequest, UnsupportedMediaType, InvalidOption for a part of another name,
    BodyTooLarge for too many.
    """

    def check(name: str) -> None:
        if name != "image":
            raise InvalidOption(
                f"The form has a field {name!r}; images are sent as 'image', and options belong "
                "in the query: /explain?top_k=3."
            )

    images = [part for _, part in form_parts(content_type, body, max_images, check)]
    if not images:
        raise EmptyBody("The form has no part named 'image'; use curl -F image=@cat.jpg.")
    return images


def experiment_parts(content_type: str, body: bytes, max_images: int) -> tuple[list[bytes], bytes]:
    """The parts named `image` of a form, in order, and the one named `edits`.

    Raises as `multipart_images`, and InvalidOption for no part `edits` or several.
    """

    def check(name: str) -> None:
        if name not in ("image", "edits"):
            raise InvalidOption(
                f"The form has a field {name!r}; images are sent as 'image', edits as 'edits', and "
                "options belong in the query: /experiments?top_k=3."
            )

    parts = form_parts(content_type, body, max_images + 1, check)
    images = [part for name, part in parts if name == "image"]
    edits = [part for name, part in parts if name == "edits"]
    if not images:
        raise EmptyBody("The form has no part named 'image'; use curl -F image=@cat.jpg.")
    if len(edits) != 1:
        raise InvalidOption(
            f"The form has {len(edits)} parts named 'edits'; send one, a JSON list: "
            "curl -F 'edits=[…]'."
        )
    if len(images) > max_images:
        raise BodyTooLarge(
            f"The form has more than {max_images} images; send them in several requests."
        )
    return images, edits[0]


def form_parts(
    content_type: str, body: bytes, max_parts: int, check: Callable[[str], None]
) -> list[tuple[str, bytes]]:
    """The parts of a multipart form with their names, in order.

    check: called with each name, to refuse it. Raises MalformedRequest, UnsupportedMediaType for a
    part in an unsupported encoding, BodyTooLarge for too many, and what `check` raises.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise MalformedRequest(
            "The content type multipart/form-data names no boundary; let the client set it "
            "(curl -F does) instead of writing the header by hand."
        )
    body = _without_preamble(body, boundary)
    form = _Form(max_parts, check)
    try:
        parser = MultipartParser(boundary, form.callbacks(), max_size=len(body) + 1)
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise MalformedRequest(_reason(error, body)) from error
    except ValueError as error:
        raise MalformedRequest(f"The multipart form cannot be read: {error}. {_GOOD}") from error
    if not form.ended:
        raise MalformedRequest("The multipart form ends too early: its last boundary is missing.")
    return [(part.name, part.decoded()) for part in form.parts]


def _without_preamble(body: bytes, boundary: bytes) -> bytes:
    """The form from its first boundary on. Raises MalformedRequest if a boundary follows LF.

    The parser would treat such a boundary as data, and lose its part silently.
    """
    opening = b"--" + boundary
    with_crlf = body.count(b"\r\n" + opening)
    if body.count(b"\n" + opening) > with_crlf or body.startswith(opening + b"\n"):
        raise MalformedRequest(_LF_ALONE)
    if not with_crlf and not body.startswith(opening):
        sent = boundary[:100].decode("latin-1")
        raise MalformedRequest(
            f"The multipart form has no boundary {sent!r}, which its content type names; let the "
            "client set the header (curl -F does) instead of writing it by hand."
        )
    start = 0 if body.startswith(opening) else body.index(b"\r\n" + opening) + 2
    after = start + len(opening)
    padding, _, _ = body[after : after + _MAX_PART_HEADER].partition(b"\r\n")
    if padding and not padding.strip(
        b" \t"
    ):  # allowed, but the parser accepts it only at later boundaries
        return opening + body[after + len(padding) :]
    return body[start:]


def _reason(error: MultipartParseError, body: bytes) -> str:
    start = max(0, error.offset)
    line = body[start : start + _MAX_PART_HEADER].partition(b"\r\n")[0]
    if error.offset >= 0 and b"\n" in line:
        return _LF_ALONE
    if line.startswith((b" ", b"\t")) and "header" in str(error):
        return (
            "A header of a part is folded over several lines, which is obsolete; write it in one "
            "line."
        )
    return f"The multipart form cannot be read: {error}. {_GOOD}"


@dataclass(slots=True)
class _FormPart:
    """One part of a form.

    headers: its Content-* headers, by their names in lower case.
    """

    headers: dict[str, str] = field(default_factory=dict)
    name: str = ""
    data: bytearray = field(default_factory=bytearray)

    @property
    def _transfer_encoding(self) -> str:
        return self.headers.get("content-transfer-encoding", "").lower()

    def check(self) -> None:
        """Raise UnsupportedMediaType if its data is encoded in an unsupported way."""
        if self._transfer_encoding not in (*_AS_IT_IS, "base64"):
            raise UnsupportedMediaType(
                f"The part {self.name[:100]!r} has Content-Transfer-Encoding "
                f"{self._transfer_encoding[:40]!r}, which is not supported; send the file as it "
                "is (binary), or in base64."
            )
        coding = self.headers.get("content-encoding", "").lower()
        if coding not in ("", "identity"):
            raise UnsupportedMediaType(
                f"The part {self.name[:100]!r} has Content-Encoding {coding[:40]!r}; send the part "
                "as it is, or compress the whole body."
            )
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind.startswith("multipart/"):
            raise UnsupportedMediaType(
                f"The part {self.name[:100]!r} is {kind[:40]!r}; send each file as a separate "
                "part, all with the same name."
            )

    def decoded(self) -> bytes:
        """Its data without the transfer encoding. Raises MalformedRequest."""
        if self._transfer_encoding != "base64":
            return bytes(self.data)
        try:
            return from_base64(self.data)
        except ValueError as error:
            raise MalformedRequest(
                f"The part {self.name[:100]!r} has Content-Transfer-Encoding 'base64' and is not "
                "standard base64 (RFC 4648 §4); send the file as it is, without that header."
            ) from error


class _Form:
    """Collects the parts from the parser's callbacks."""

    def __init__(self, max_parts: int, check: Callable[[str], None]) -> None:
        self.parts: list[_FormPart] = []
        self.ended = False
        self._max_parts = max_parts
        self._check = check
        self._part = _FormPart()
        self._field = bytearray()
        self._value = bytearray()
        self._header_bytes = 0

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._part = _FormPart()
        self._header_bytes = 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]
        self._bound_header(end - start)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._bound_header(end - start)

    def _bound_header(self, more: int) -> None:
        if len(self._field) + len(self._value) > _MAX_PART_HEADER:
            raise MalformedRequest(f"A part's header is longer than {_MAX_PART_HEADER} bytes.")
        self._header_bytes += more
        if self._header_bytes > 8 * _MAX_PART_HEADER:
            raise MalformedRequest(
                f"The headers of a part are longer than {8 * _MAX_PART_HEADER} bytes."
            )

    def _end_header(self) -> None:
        self._header_bytes += 4  # the colon, a space and the line's end
        if b"\n" in self._value:
            raise MalformedRequest(_LF_ALONE)
        name = self._field.decode("latin-1").lower()
        if name.startswith("content-"):
            self._part.headers[name] = self._value.decode("latin-1").strip()
        self._field.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        part = self._part
        disposition = part.headers.get("content-disposition", "")
        name = parse_options_header(disposition)[1].get(b"name", b"")
        part.name = name.decode(errors="replace")
        self._check(part.name)
        part.check()
        if len(self.parts) == self._max_parts:
            raise BodyTooLarge(
                f"The form has more than {self._max_parts} images; send them in several requests."
            )
        self.parts.append(part)

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data.extend(data[start:end])

    def _end(self) -> None:
        self.ended = True
