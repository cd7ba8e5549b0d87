"""From images and options to a request, and from one request to its answer, without a socket.

`exchange` says what to send and how long to wait; who asks it does both, in threads or in tasks.
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
import numpy as np
import PIL.Image
import pydantic
from numpy.typing import NDArray
from PIL import ImageOps
from pydantic.fields import FieldInfo

from api_schemas.client.errors import (
    Busy,
    ClientError,
    ConnectionFailed,
    UnreadableImage,
    failure,
)
from api_schemas.options import CommonOptions

T = TypeVar("T")
Options = TypeVar("Options", bound=CommonOptions)

Image = str | os.PathLike[str] | bytes | PIL.Image.Image | NDArray[np.uint8] | BinaryIO
"""An image: path, URL (http or https), file's bytes, open file, PIL image, or RGB pixels HWC."""

Images = Image | Sequence[Image]

LONG_QUERY = 4000
"""Characters of a query beyond which options travel in the body: servers bound their heads."""

CONNECT_SECONDS = 10.0
GRACE = 1.0
"""Seconds that an answer may come late: the service's own words about a deadline are worth more
than a closed connection."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, as the keyword arguments of `httpx.Client.build_request`."""

    method: str
    path: str
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Send:
    """A step: send this, and say what was heard, within `seconds`."""

    ask: Ask
    seconds: float

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        limit = self.seconds + GRACE
        timeout = httpx.Timeout(limit, connect=min(limit, CONNECT_SECONDS))
        headers = {"X-Request-Timeout": f"{max(self.seconds, 0.001):.3f}"}
        return http.build_request(
            self.ask.method, self.ask.path, headers=headers, timeout=timeout, **self.ask.content
        )


@dataclass(frozen=True, slots=True)
class Wait:
    """A step: do nothing for so many seconds."""

    seconds: float


Heard = httpx.Response | httpx.RequestError | None
Steps = Generator[Send | Wait, Heard, T]
"""What to do until there is a T: each step is answered with what was heard (of a Wait: None)."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long and how often one question is asked.

    seconds:  for all of it, waits and retries included.
    attempts: at most; 1 never asks again.
    """

    seconds: float = 60.0
    attempts: int = 5
    now: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random


def exchange(ask: Ask, patience: Patience) -> Steps[httpx.Response]:
    """Ask until there is an answer. Every question of this client may be asked again safely.

    Asked again: 429 and 503, not before their `Retry-After`, and lost connections.
    Raises ClientError: at once where asking again is of no use or would be too late.
    """
    deadline = patience.now() + patience.seconds
    for attempt in count(1):
        heard = yield Send(ask, deadline - patience.now())
        assert heard is not None
        if isinstance(heard, httpx.Response) and heard.is_success:
            return heard
        error = failure(heard)
        pause = _pause(error, attempt, patience.chance())
        late = pause is None or patience.now() + pause >= deadline
        if late or attempt >= patience.attempts:
            raise error from (heard if isinstance(heard, Exception) else None)
        assert pause is not None
        yield Wait(pause)
    raise AssertionError("unreachable")


def _pause(error: ClientError, attempt: int, chance: float) -> float | None:
    """Seconds until it is worth asking again, or None where it never is.

    Doubled with each attempt, between half and all of it by `chance` (0–1), so that clients
    who were refused together do not come back together.
    """
    backoff = min(0.25 * 2.0**attempt, 8.0) * (0.5 + chance / 2)
    if isinstance(error, Busy):
        return backoff if error.retry_after is None else error.retry_after + backoff * 0.5
    return backoff if isinstance(error, ConnectionFailed) else None


def read_options(form: type[Options], given: Mapping[str, object]) -> Options:
    """The options of a call, checked as the service does it.

    A single value stands for a list of one: `layer="layer4"`, `targets=281`.
    Raises TypeError for an unknown option, ValueError for one out of range.
    """
    known = form.model_fields
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(known)}"
            raise TypeError(f"there is no option {name!r}{hint}")
    whole = {name: _whole(value, known[name]) for name, value in given.items()}
    try:
        return form.model_validate(whole)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(map(_sentence, error.errors(include_url=False)))) from error


def _whole(value: Any, option: FieldInfo) -> Any:
    if isinstance(value, pydantic.BaseModel):  # a `Mask`
        return value.model_dump(exclude_unset=True, mode="json")
    is_one = isinstance(value, str | int) and typing.get_origin(option.annotation) is list
    return [value] if is_one else value


def _sentence(issue: Any) -> str:
    place = ".".join(map(str, issue["loc"]))
    message = str(issue["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def classify(route: str, images: Sequence[bytes | str], options: CommonOptions) -> Ask:
    """The request for some images, as `image_file` made them.

    A form of files with the options in the query; JSON where an image is a URL or the query would
    be long.
    """
    said = {k: v for k, v in options.model_dump(exclude_unset=True).items() if v is not None}
    has_urls = any(isinstance(image, str) for image in images)
    if has_urls or len(urlencode(said, doseq=True)) > LONG_QUERY:
        sources = [
            {"url": image}
            if isinstance(image, str)
            else {"data": base64.b64encode(image).decode("ascii")}
            for image in images
        ]
        return Ask("POST", route, {"json": {**said, "images": sources}})
    files = [("image", ("image", image, "application/octet-stream")) for image in images]
    return Ask("POST", route, {"params": said, "files": files})


def image_file(image: Image) -> bytes | str:
    """The file of an image, or its URL.

    Pixels and PIL images become PNG, upright as their EXIF orientation says. Raises
    UnreadableImage, and TypeError for what is no image at all.
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
    if isinstance(image, np.ndarray):
        return _png(_from_pixels(image))
    if isinstance(image, PIL.Image.Image):
        return _png(image)
    return _read(image)


def _read(file: Any) -> bytes:
    if not hasattr(file, "read"):
        raise TypeError(f"{type(file).__name__} is no image; see api_schemas.client.Image")
    try:
        data = file.read()
    except (OSError, ValueError) as error:  # a closed file says ValueError
        raise UnreadableImage(f"The file cannot be read: {error}.") from error
    if not isinstance(data, bytes):
        raise TypeError("the file was opened as text; open it with 'rb'")
    return data


def _from_pixels(pixels: NDArray[Any]) -> PIL.Image.Image:
    is_picture = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not is_picture or not pixels.size:
        raise UnreadableImage(
            f"An array of {pixels.dtype} {pixels.shape} is no image; give uint8 (height, width, "
            "3), RGB, and a list of arrays for several."
        )
    return PIL.Image.fromarray(
        pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    )


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
