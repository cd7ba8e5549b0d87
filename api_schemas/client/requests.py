"""Build requests from images and options, and decide on retries, without a socket.

`exchange` yields what to send and how long to wait; a client does both, in threads or in tasks.
"""

from __future__ import annotations

import base64
import difflib
import io
import os
import random
import time
import typing
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlencode

import httpx
import PIL.Image
import pydantic
from PIL import ImageOps
from pydantic.fields import FieldInfo

from api_schemas.client.errors import (
    Busy,
    ClientError,
    ConnectionFailed,
    UnreadableImage,
    failure,
)
from api_schemas.client.pixel_arrays import Pixels, to_uint8
from api_schemas.options import CommonOptions

T = TypeVar("T")
Options = TypeVar("Options", bound=pydantic.BaseModel)

Image = str | os.PathLike[str] | bytes | PIL.Image.Image | BinaryIO | Pixels
"""An image: path, URL (http or https), bytes of a file, open file, PIL image, or pixels."""

Images = Image | Sequence[Image]

LONG_QUERY = 4000
"""Characters of a query above which options go into the body: servers limit headers."""

CONNECT_SECONDS = 10.0
GRACE = 1.0
"""Seconds to wait after the deadline, so that the service can answer with `deadline_exceeded`."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One request, as the keyword arguments of `httpx.Client.build_request`."""

    method: str
    path: str
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Send:
    """A step: send this call within `seconds`, and send back what was received."""

    call: ApiCall
    seconds: float

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        limit = self.seconds + GRACE
        timeout = httpx.Timeout(limit, connect=min(limit, CONNECT_SECONDS))
        headers = {"X-Request-Timeout": f"{max(self.seconds, 0.001):.3f}"}
        return http.build_request(
            self.call.method, self.call.path, headers=headers, timeout=timeout, **self.call.content
        )


@dataclass(frozen=True, slots=True)
class Wait:
    """A step: wait for so many seconds."""

    seconds: float


Received = httpx.Response | httpx.RequestError | None
Steps = Generator[Send | Wait, Received, T]
"""Steps that end with a T; each gets what was received sent back, or None for a Wait."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often one call is sent.

    seconds:  for the whole call with waits and retries.
    attempts: at most; 1: no retries.
    jitter:   returns 0–1, which spreads the waits of clients.
    """

    seconds: float = 60.0
    attempts: int = 5
    now: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random


def exchange(call: ApiCall, policy: RetryPolicy) -> Steps[httpx.Response]:
    """Send a call, and retry it; every call of this client is safe to retry.

    Retried: 429 and 503, not before their `Retry-After`, and lost connections.
    Raises ClientError at once if a retry is useless or too late.
    """
    deadline = policy.now() + policy.seconds
    for attempt in count(1):
        received = yield Send(call, deadline - policy.now())
        assert received is not None
        if isinstance(received, httpx.Response) and received.is_success:
            return received
        error = failure(received)
        pause = _pause(error, attempt, policy.jitter())
        late = pause is None or policy.now() + pause >= deadline
        if late or attempt >= policy.attempts:
            raise error from (received if isinstance(received, Exception) else None)
        assert pause is not None
        yield Wait(pause)
    raise AssertionError("unreachable")


def _pause(error: ClientError, attempt: int, jitter: float) -> float | None:
    """Return the seconds until the next attempt, or None if a retry is useless.

    They double with each attempt; `jitter` (0–1) takes half to all of them, so that clients that
    were refused at the same time do not retry at the same time.
    """
    backoff = min(0.25 * 2.0**attempt, 8.0) * (0.5 + jitter / 2)
    if isinstance(error, Busy):
        return backoff if error.retry_after is None else error.retry_after + backoff * 0.5
    return backoff if isinstance(error, ConnectionFailed) else None


def read_options(form: type[Options], arguments: Mapping[str, object]) -> Options:
    """Return the options of a call, validated as the service validates them.

    A single value stands for a list of one: `layer="layer4"`, `targets=281`.
    Raises TypeError for an unknown option, ValueError for one out of range.
    """
    known = form.model_fields
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(known)}"
            raise TypeError(f"there is no option {name!r}{hint}")
    values = {name: _as_list(value, known[name]) for name, value in arguments.items()}
    try:
        return form.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(map(_sentence, error.errors(include_url=False)))) from error


def _as_list(value: Any, option: FieldInfo) -> Any:
    if isinstance(value, pydantic.BaseModel):  # a `Mask`
        return value.model_dump(exclude_unset=True, mode="json")
    is_single = isinstance(value, str | int) and typing.get_origin(option.annotation) is list
    return [value] if is_single else value


def _sentence(issue: Any) -> str:
    field = ".".join(map(str, issue["loc"]))
    message = str(issue["msg"]).removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def classify(route: str, images: Sequence[bytes | str], options: CommonOptions) -> ApiCall:
    """Return the call for images that `image_file` returned.

    A form of files with the options in the query; JSON if an image is a URL or the query is long.
    """
    values = {k: v for k, v in options.model_dump(exclude_unset=True).items() if v is not None}
    has_urls = any(isinstance(image, str) for image in images)
    if has_urls or len(urlencode(values, doseq=True)) > LONG_QUERY:
        return ApiCall("POST", route, {"json": {**values, "images": _sources(images)}})
    files = [("image", ("image", image, "application/octet-stream")) for image in images]
    return ApiCall("POST", route, {"params": values, "files": files})


def experiment(images: Sequence[bytes | str], fields: Mapping[str, Any]) -> ApiCall:
    """Return the call for experiments: options and edits, with the images in base64."""
    return ApiCall("POST", "/experiments", {"json": {**fields, "images": _sources(images)}})


def _sources(images: Sequence[bytes | str]) -> list[dict[str, str]]:
    return [
        {"url": image}
        if isinstance(image, str)
        else {"data": base64.b64encode(image).decode("ascii")}
        for image in images
    ]


def image_file(image: Image) -> bytes | str:
    """Return the bytes of an image file, or its URL.

    Pixels (`to_uint8` says which) and PIL images become PNG; EXIF orientation is applied. Raises
    UnreadableImage, and TypeError for another type.
    """
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        return image
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise UnreadableImage(
                f"{os.fspath(image)} cannot be read: {error.strerror}."
            ) from error
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, PIL.Image.Image):
        return _png(image)
    if hasattr(image, "__array__"):
        return _png(PIL.Image.fromarray(to_uint8(image)))
    return _read(image)


def _read(file: Any) -> bytes:
    if not hasattr(file, "read"):
        raise TypeError(
            f"{type(file).__name__} is not an image; see api_schemas.client.requests.Image"
        )
    try:
        data = file.read()
    except (OSError, ValueError) as error:  # a closed file says ValueError
        raise UnreadableImage(f"The file cannot be read: {error}.") from error
    if not isinstance(data, bytes):
        raise TypeError("the file is open in text mode; open it with 'rb'")
    return data


def _png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("RGB")
        upright.save(file, "PNG", compress_level=1)
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"The image cannot be read: {error}.") from error
    return file.getvalue()
