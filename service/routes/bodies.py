"""A request's body: read within its bounds, and parsed into images and options."""

from __future__ import annotations

import asyncio
import binascii
import codecs
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import pydantic
from fastapi import Request

from api_schemas.options import ImageSource
from service.errors import (
    BodyTooLarge,
    EmptyBody,
    InvalidImageData,
    InvalidOption,
    MalformedRequest,
    SlowUpload,
    UnsupportedMediaType,
)
from service.images.formats import format_of, reference_in
from service.routes.problems import describe
from service.routes.state import service_of
from service.scheduling.admission import Permit
from service.security.fetcher import Fetcher

Options = TypeVar("Options", bound=pydantic.BaseModel)

Image = bytes | str | InvalidImageData
"""An image of a request: its file, its URL, or the error that it is neither."""

_MAX_URI_HEAD = 1000
"""Characters of a data: URI before its data."""

_BINARY = ("application/octet-stream", "binary/octet-stream")
"""Types of a file of any kind; object stores have the second."""

_PIECE = 64 << 10

MAX_JSON_NAMES = 20_000
MAX_JSON_VALUES = 300_000
"""Names, and values of lists and objects, in a JSON request: a mask of a million characters, with
runs of three digits, stays below. Counted in the bytes, before anything is built of them, which
holds the GIL."""


async def read_body(request: Request, permit: Permit, max_bytes: int, seconds: float) -> bytes:
    """All bytes of the body, once; `permit` grows by them as they arrive.

    Raises BodyTooLarge, EmptyBody, QueueFull; SlowUpload after `seconds`, below the minimum rate,
    and if it is slow and another request needs what it holds.
    """
    too_large = BodyTooLarge(
        f"The body is larger than {max_bytes} bytes; send fewer or smaller images."
    )
    if declared_bytes(request) > max_bytes:
        raise too_large
    size = 0
    chunks: list[bytes] = []
    async with _Upload(request, permit, seconds) as upload:
        async for chunk in request.stream():
            size += len(chunk)
            upload.transfer.moved = size
            if size > max_bytes:
                raise too_large
            permit.grow(0, len(chunk))
            upload.keep_waiting()
            chunks.append(chunk)
    if not size:
        raise EmptyBody(
            "The body is empty; send an image, for instance with curl --data-binary @cat.jpg."
        )
    return b"".join(chunks)


class _Upload:
    """The timeout of one body, an `async with` that raises SlowUpload."""

    def __init__(self, request: Request, permit: Permit, seconds: float) -> None:
        self._client = request.client.host if request.client else ""
        self._transfers = service_of(request).transfers
        self._permit = permit
        self._seconds = seconds
        self._last = time.monotonic() + seconds
        self._timeout = asyncio.timeout(seconds)

    def keep_waiting(self) -> None:
        """Extend the timeout by what the received bytes allow."""
        left = min(self._last, self.transfer.deadline) - time.monotonic()
        self._timeout.reschedule(asyncio.get_running_loop().time() + left)

    def _give_up(self) -> None:
        self._permit.release()
        if not self._timeout.expired():
            self._timeout.reschedule(0)

    async def __aenter__(self) -> Self:
        self.transfer = self._transfers.receive(
            self._client, end=self._give_up, holds=self._permit.holds
        )
        await self._timeout.__aenter__()
        self.keep_waiting()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.transfer.close()
        try:
            await self._timeout.__aexit__(exc_type, exc, traceback)
        except TimeoutError as error:
            if time.monotonic() >= self._last:
                reason = f"The body did not arrive within {self._seconds:g} seconds."
            else:
                reason = (
                    f"The body came at less than {self._transfers.rate:g} bytes a second; send it "
                    "faster, or fewer and smaller images."
                )
            raise SlowUpload(reason) from error


def declared_bytes(request: Request) -> int:
    """`Content-Length`, or 0 if it is missing or not a number."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


def media_type(request: Request) -> str:
    """The declared content type without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(kind: str) -> bool:
    """Whether a media type is JSON."""
    return kind in ("application/json", "text/json") or kind.endswith("+json")


def raw_image(kind: str, body: bytes) -> list[bytes]:
    """The body itself as the one image, if its content type allows that.

    Raises UnsupportedMediaType with the header to send instead.
    """
    if kind.startswith("image/") or kind in _BINARY:
        return [body]
    reason = f"Content type {kind!r} is not supported" if kind else "No content type was sent"
    raise UnsupportedMediaType(
        f"{reason}; add -H 'content-type: image/jpeg' to send an image with --data-binary, or use "
        "curl -F image=@cat.jpg for a form, or application/json."
    )


def refuse_query(options: pydantic.BaseModel) -> None:
    """Refuse options in the query of a JSON request. Raises InvalidOption.

    Defaults pass, because generated clients send them.
    """
    named = ", ".join(options.model_dump(exclude_defaults=True))
    if named:
        raise InvalidOption(
            f"The query of this JSON request names {named}; a JSON request carries its options as "
            "fields beside `images`, so move them there and leave the query empty."
        )


def check_json(body: bytes, max_values: int, max_lists: int, advice: str) -> None:
    """Bound the values of a JSON body before parsing. Raises MalformedRequest with the advice."""
    names = max(body.count(b":"), body.count(b"{"))
    lists, values = body.count(b"["), body.count(b",")
    if names > MAX_JSON_NAMES or lists > max_lists or values > max_values:
        raise MalformedRequest(
            f"The JSON has more than {MAX_JSON_NAMES} names, {max_lists} lists or {max_values} "
            f"values; {advice}"
        )


def utf8_json(body: bytes) -> bytes:
    """A JSON body without a byte order mark. Raises MalformedRequest if it is not UTF-8."""
    if image_format := format_of(body):
        raise MalformedRequest(
            f"The body is not JSON: it is a {image_format} file; send it with the content type "
            f"image/{image_format.lower()}."
        )
    if body.startswith(b"--"):
        raise MalformedRequest(
            "The body is not JSON: it looks like a multipart form; send it with the content type "
            "multipart/form-data and its boundary (let the client set it)."
        )
    head = body[:4]
    coding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if coding is None and b"\0" in head:  # JSON text has none, and both encodings start with ASCII
        coding = "UTF-32" if head.count(b"\0") > 2 else "UTF-16"
    if coding is not None:
        raise MalformedRequest(
            f"The JSON is encoded as {coding}; send it as UTF-8 (RFC 8259 §8.1)."
        )
    if not body.isascii():
        _check_utf8(body)
    return body.removeprefix(codecs.BOM_UTF8)


def _check_utf8(body: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(
            0, len(body), _PIECE
        ):  # decoded as a whole, it takes four times the memory
            decoder.decode(body[start : start + _PIECE], final=start + _PIECE >= len(body))
    except UnicodeDecodeError as error:
        raise MalformedRequest(
            "The body is not JSON: it is not UTF-8, whatever its charset is; send it as UTF-8 "
            "(RFC 8259 §8.1)."
        ) from error


_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16's mark, which is its beginning
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def json_request(body: bytes, form: type[Options], max_images: int) -> tuple[list[Image], Options]:
    """Images and options of a JSON request; an image that is not base64 becomes its own error.

    form: `ExplainRequest`, `PredictRequest` or `ExperimentRequest`.
    Raises MalformedRequest, InvalidOption, BodyTooLarge.
    """
    advice = "images are sent as base64, not as lists of numbers."
    body = utf8_json(body)
    check_json(body, MAX_JSON_VALUES, MAX_JSON_NAMES, advice)
    try:
        request = form.model_validate_json(body)
    except pydantic.ValidationError as error:
        issues = error.errors(include_url=False)
        if any(issue["type"] == "json_invalid" for issue in issues):
            raise MalformedRequest(f"The body is not JSON: {issues[0]['msg']}.") from error
        if issues[0]["type"] == "model_type" and not issues[0]["loc"]:
            raise MalformedRequest(
                'The body is JSON but not an object; send {"images": [{"data": "<base64>"}]} and '
                "options beside `images`."
            ) from error
        raise InvalidOption(
            f"{describe(issues, form.model_fields)}{_shape(form, issues)}"
        ) from error
    sources: list[ImageSource] = request.images  # type: ignore[attr-defined]
    if len(sources) > max_images:
        raise BodyTooLarge(
            f"The request has more than {max_images} images; send them in several requests."
        )
    return [_image(source) for source in sources], request


def _shape(form: type[pydantic.BaseModel], issues: Sequence[Any]) -> str:
    """The form of a request as a further sentence, if its images or nesting are wrong."""
    nested = (issue["type"] == "extra_forbidden" for issue in issues if len(issue["loc"]) == 1)
    if not any(issue["loc"][:1] == ("images",) for issue in issues) and not any(nested):
        return ""
    more = '"edits": […]' if "edits" in form.model_fields else '"top_k": 3'
    return f' The form is {{"images": [{{"data": "<base64 of the file>"}}], {more}}}.'


async def image_bytes(image: Image, fetcher: Fetcher | None, take: Callable[[int], None]) -> bytes:
    """The file of an image; a URL is fetched, if that is allowed.

    take: called with the size of each fetched chunk; see `bounded`. Raises ImageError, and
    whatever `take` raises.
    """
    if isinstance(image, InvalidImageData):
        raise image
    if isinstance(image, bytes):
        return image
    if fetcher is None:
        raise InvalidImageData("Image URLs are not allowed here; send the image in `data`.")
    return await fetcher.fetch(image, take)


def bounded(permit: Permit, max_bytes: int) -> Callable[[int], None]:
    """Count the bytes fetched for one request: its permit grows, up to the bound of a body.

    The returned function raises BodyTooLarge and QueueFull.
    """
    left = max_bytes

    def take(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            raise BodyTooLarge(
                f"The images behind the URLs are larger than {max_bytes} bytes together; send "
                "them in several requests."
            )
        permit.grow(0, size)

    return take


def _image(source: ImageSource) -> Image:
    if source.url is not None:
        if source.data is not None:
            return InvalidImageData("The image has `data` and a `url`; give one of them.")
        return source.url
    if source.data is None:
        return InvalidImageData("The image has no `data`; send its file as base64.")
    return image_file(source.data)


def image_file(text: str) -> bytes | InvalidImageData:
    """The file in base64 or in a data: URI, or the error; ASCII whitespace is ignored."""
    if text[:5].lower() == "data:":
        end = text.find(",", 0, _MAX_URI_HEAD)
        if end < 0 or not text[:end].lower().endswith(";base64"):
            return InvalidImageData("The data: URI is not of the form data:image/png;base64,….")
        text = text[end + 1 :]
    try:
        return from_base64(text.encode("ascii"))
    except ValueError:  # includes UnicodeEncodeError
        sent = reference_in(text[:1000].encode())
        what = f"`data` is {sent!r}, which" if sent else "`data`"
        return InvalidImageData(
            f"{what} is not standard base64 (RFC 4648 §4) of an image file; send the content of "
            "the file, as `base64 -w0 cat.jpg` prints it."
        )


def from_base64(text: bytes | bytearray) -> bytes:
    """Decode standard base64; whitespace is ignored. Raises ValueError."""
    # Not by `split`: base64 with a space every two characters would become millions of strings.
    return binascii.a2b_base64(text.translate(None, b" \t\n\r\v\f"), strict_mode=True)
