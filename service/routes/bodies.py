"""A request's body: read within its bounds, and taken apart into image bytes and options."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import TYPE_CHECKING, TypeVar

import pydantic
from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from api_schemas.options import CommonOptions, ExplainRequest, ImageSource
from service.admission import Permit
from service.errors import (
    BodyTooLarge,
    EmptyBody,
    InvalidImageData,
    InvalidOption,
    MalformedRequest,
    SlowUpload,
    UnsupportedMediaType,
)
from service.routes.problems import describe

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

Options = TypeVar("Options", bound=CommonOptions)

_MAX_PART_HEADER = 4096


async def read_body(request: Request, permit: Permit, max_bytes: int, seconds: float) -> bytes:
    """All bytes of the body; `permit` grows by those that were not declared.

    Raises BodyTooLarge, SlowUpload after `seconds`, EmptyBody, QueueFull.
    """
    too_large = BodyTooLarge(
        f"The body is larger than {max_bytes} bytes; send fewer or smaller images."
    )
    declared = declared_bytes(request)
    if declared > max_bytes:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                if size > declared:  # a chunked body declares nothing
                    permit.grow(0, len(chunk))
                chunks.append(chunk)
    except TimeoutError as error:
        raise SlowUpload(f"The body did not arrive within {seconds:g} seconds.") from error
    if not size:
        raise EmptyBody(
            "The body is empty; send an image, for instance with curl --data-binary @cat.jpg."
        )
    return b"".join(chunks)


def declared_bytes(request: Request) -> int:
    """`Content-Length`, or 0 where there is none or it is no number."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


def media_type(request: Request) -> str:
    """The declared content type without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(kind: str) -> bool:
    """Whether a media type says JSON."""
    return kind == "application/json" or kind.endswith("+json")


def raw_image(kind: str, body: bytes) -> list[bytes]:
    """The body itself as the one image, where its type allows that.

    Raises UnsupportedMediaType with the header to send instead.
    """
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [body]
    said = f"{kind!r} is not a content type we read" if kind else "No content type was sent"
    raise UnsupportedMediaType(
        f"{said}; add -H 'content-type: image/jpeg' to send an image with --data-binary, or use "
        "curl -F image=@cat.jpg for a form, or application/json."
    )


def multipart_images(content_type: str, body: bytes, max_images: int) -> list[bytes]:
    """The parts named `image` of a multipart form, in order.

    Raises MalformedRequest, InvalidOption for a part of another name, BodyTooLarge for too many.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise MalformedRequest(
            "The content type multipart/form-data names no boundary; let the client set it "
            "(curl -F does) instead of writing the header by hand."
        )
    form = _Form(max_images)
    try:
        parser = MultipartParser(boundary, form.callbacks(), max_size=len(body) + 1)
        parser.write(body)
        parser.finalize()
    except (MultipartParseError, ValueError) as error:
        raise MalformedRequest(
            f"The multipart form cannot be read: {error}. curl -F image=@cat.jpg makes a good one."
        ) from error
    if not form.ended:
        raise MalformedRequest("The multipart form ends too early: its last boundary is missing.")
    if not form.images:
        raise EmptyBody("The form has no part named 'image'; use curl -F image=@cat.jpg.")
    return [bytes(image) for image in form.images]


class _Form:
    """What the parser's callbacks collect."""

    def __init__(self, max_images: int) -> None:
        self.images: list[bytearray] = []
        self.ended = False
        self._max_images = max_images
        self._field = bytearray()
        self._value = bytearray()
        self._disposition = b""

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
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]
        self._bound_header()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._bound_header()

    def _bound_header(self) -> None:
        if len(self._field) + len(self._value) > _MAX_PART_HEADER:
            raise MalformedRequest(f"A part's header is longer than {_MAX_PART_HEADER} bytes.")

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"").decode(errors="replace")
        if name != "image":
            raise InvalidOption(
                f"The form has a field {name!r}; images are sent as 'image', and options belong "
                "in the query: /explain?top_k=3."
            )
        if len(self.images) == self._max_images:
            raise BodyTooLarge(
                f"The form has more than {self._max_images} images; send them in several requests."
            )
        self.images.append(bytearray())

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.images[-1] += data[start:end]

    def _end(self) -> None:
        self.ended = True


def json_request(
    body: bytes, form: type[Options], max_images: int
) -> tuple[list[bytes | InvalidImageData], Options]:
    """Images and options of a JSON request; an image that is no base64 is its own error.

    form: `ExplainRequest` or `PredictRequest`.
    Raises MalformedRequest, InvalidOption, BodyTooLarge.
    """
    try:
        request = form.model_validate_json(body)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)
        if any(issue["type"] == "json_invalid" for issue in found):
            raise MalformedRequest(f"The body is not JSON: {found[0]['msg']}.") from error
        if found[0]["type"] == "model_type" and not found[0]["loc"]:
            raise MalformedRequest(
                'The body is JSON but not an object; send {"images": [{"data": "<base64>"}]} and '
                "options beside `images`."
            ) from error
        raise InvalidOption(describe(found, list(ExplainRequest.model_fields))) from error
    sources: list[ImageSource] = request.images  # type: ignore[attr-defined]
    if len(sources) > max_images:
        raise BodyTooLarge(
            f"The request has more than {max_images} images; send them in several requests."
        )
    return [_image_bytes(source) for source in sources], request


def _image_bytes(source: ImageSource) -> bytes | InvalidImageData:
    if source.url is not None:
        return InvalidImageData("Image URLs are not allowed here; send the image in `data`.")
    if source.data is None:
        return InvalidImageData("The image has no `data`; send its file as base64.")
    text = source.data
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            return InvalidImageData("The data: URI is not of the form data:image/png;base64,….")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return InvalidImageData("`data` is not standard base64 (RFC 4648 §4) of an image file.")
