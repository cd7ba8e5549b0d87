"""The calls of both clients, as steps that end in an answer; nothing here sends or waits."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import replace
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx
import PIL.Image

from api_schemas import models as wire
from api_schemas.client.errors import InvalidOption, NotFound, Unauthorized, UnexpectedAnswer
from api_schemas.client.requests import (
    Ask,
    Image,
    Images,
    Patience,
    Steps,
    classify,
    exchange,
    image_file,
)
from api_schemas.client.results import Answer, Result, read_answer
from api_schemas.options import CommonOptions

T = TypeVar("T")

Progress = Callable[[int, int | None], None]
"""Told how many images are done, and of how many, where that is known."""

OF_EVERY_IMAGE = (Unauthorized, NotFound, InvalidOption)
"""What one image of many is refused with, all will be."""

EVERY_CONNECTION_KEPT = httpx.Limits(max_connections=None, max_keepalive_connections=None)
"""Each thread or task that asks has a connection of its own; idle ones are closed after 5 seconds.

httpx's default is 100, of which 20 are kept. Where some are surplus, its pool can close one that it
has just given to another request, whose answer is then lost (encode/httpcore#1110).
"""


class Calls:
    """What both clients know: where, with which key, and how long to ask."""

    def __init__(
        self, url: str, api_key: str | None, timeout: float, attempts: int, http: dict[str, Any]
    ) -> None:
        if timeout <= 0 or attempts < 1:
            raise ValueError("`timeout` is above zero and `attempts` at least 1")
        headers = {"Accept": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        limits = EVERY_CONNECTION_KEPT
        self._http_arguments = {"base_url": url, "headers": headers, "limits": limits, **http}
        self._patience = Patience(timeout, attempts)

    def _classified(
        self, route: str, files: Sequence[bytes | str], options: CommonOptions
    ) -> Steps[Answer]:
        response = yield from exchange(classify(route, files, options), self._patience)
        return _read(response, read_answer)

    def _models(self) -> Steps[list[wire.Model]]:
        response = yield from exchange(Ask("GET", "/models"), self._patience)
        return _read(response, wire.Models.model_validate_json).models

    def _model(self, name: str | None) -> Steps[wire.ModelDetails]:
        path = yield from self._path(name)
        response = yield from exchange(Ask("GET", path), self._patience)
        return _read(response, wire.ModelDetails.model_validate_json)

    def _layers(self, model: str | None) -> Steps[list[wire.Layer]]:
        path = yield from self._path(model)
        response = yield from exchange(Ask("GET", f"{path}/layers"), self._patience)
        return _read(response, wire.Layers.model_validate_json).layers

    def _kernels(self, layer: str, model: str | None) -> Steps[PIL.Image.Image]:
        path = yield from self._path(model)
        ask = Ask("GET", f"{path}/kernels/{quote(layer, safe='')}")
        response = yield from exchange(ask, self._patience)
        return _read(response, lambda body: PIL.Image.open(io.BytesIO(body)))

    def _health(self) -> Steps[wire.Health]:
        once = replace(self._patience, attempts=1)
        response = yield from exchange(Ask("GET", "/health/ready"), once)
        return _read(response, wire.Health.model_validate_json)

    def _path(self, model: str | None) -> Steps[str]:
        """The path of a model; the default one's name has to be asked for."""
        if model is None:
            served = yield from self._models()
            model = next((each.name for each in served if each.default), "")
            if not model:
                raise NotFound("The service has no default model now; name one.")
        return f"/models/{quote(model, safe='')}"


def files_of(images: Images) -> list[bytes | str]:
    """The images of one request, read. Raises UnreadableImage, TypeError, ValueError."""
    several = images if isinstance(images, list | tuple) else [cast("Image", images)]
    if not several:
        raise ValueError("there is no image in the list")
    return [image_file(image) for image in several]


def at_least_one(concurrency: int) -> int:
    """How many at a time. Raises ValueError."""
    if concurrency < 1:
        raise ValueError("`concurrency` is at least 1")
    return concurrency


def reporter(images: Iterable[Image], on_progress: Progress | None) -> Callable[[Result], Result]:
    """Passes results on and counts them."""
    total = len(images) if isinstance(images, Sized) else None
    done = 0

    def report(result: Result) -> Result:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)
        return result

    return report


def _read(response: httpx.Response, read: Callable[[bytes], T]) -> T:
    try:
        return read(response.content)
    except (ValueError, TypeError, OSError) as error:
        raise UnexpectedAnswer(
            f"The answer of {response.request.url} cannot be read; is it another version's?",
            status=response.status_code,
            request_id=response.headers.get("x-request-id"),
        ) from error
