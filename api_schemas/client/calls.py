"""The calls of both clients, as generators of steps; nothing here sends or waits."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx
import PIL.Image

from api_schemas import models as wire
from api_schemas.answers import ExperimentAnswer
from api_schemas.client.errors import InvalidOption, NotFound, Unauthorized, UnexpectedAnswer
from api_schemas.client.requests import (
    ApiCall,
    Image,
    Images,
    RetryPolicy,
    Steps,
    classify,
    exchange,
    experiment,
    image_file,
    read_options,
)
from api_schemas.client.results import Answer, Result, read_answer
from api_schemas.options import EDITS, CommonOptions, Edit, ExperimentOptions

T = TypeVar("T")

Edits = Sequence[Edit | Mapping[str, Any]]
"""Edits of `experiments`: models of `api_schemas.options`, or dicts such as JSON has."""

Progress = Callable[[int, int | None], None]
"""Receives the number of finished images, and their total or None if that is unknown."""

FATAL_ERRORS = (Unauthorized, NotFound, InvalidOption)
"""Errors that every image of a call would get."""

CONNECTION_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)
"""No limits: a connection per thread or task; idle ones are closed after 5 seconds.

httpx's default is 100, of which 20 are kept. If there are more, its pool can close a connection
that it has just given to another request, whose answer is then lost (encode/httpcore#1110).
"""


class Calls:
    """The base of both clients: URL, key, timeout and retries."""

    def __init__(
        self, url: str, api_key: str | None, timeout: float, attempts: int, http: dict[str, Any]
    ) -> None:
        if timeout <= 0 or attempts < 1:
            raise ValueError(
                f"`timeout` is {timeout} and `attempts` {attempts}; give a timeout above 0 and at "
                "least 1 attempt"
            )
        headers = {"Accept": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        limits = CONNECTION_LIMITS
        self._http_arguments = {"base_url": url, "headers": headers, "limits": limits, **http}
        self._policy = RetryPolicy(timeout, attempts)

    def _classified(
        self, route: str, files: Sequence[bytes | str], options: CommonOptions
    ) -> Steps[Answer]:
        response = yield from exchange(classify(route, files, options), self._policy)
        return _read(response, read_answer)

    def _experiments(
        self, files: Sequence[bytes | str], fields: dict[str, Any]
    ) -> Steps[ExperimentAnswer]:
        response = yield from exchange(experiment(files, fields), self._policy)
        return _read(response, ExperimentAnswer.model_validate_json)

    def _models(self) -> Steps[list[wire.Model]]:
        response = yield from exchange(ApiCall("GET", "/models"), self._policy)
        return _read(response, wire.Models.model_validate_json).models

    def _model(self, name: str | None) -> Steps[wire.ModelDetails]:
        path = yield from self._path(name)
        response = yield from exchange(ApiCall("GET", path), self._policy)
        return _read(response, wire.ModelDetails.model_validate_json)

    def _layers(self, model: str | None) -> Steps[list[wire.Layer]]:
        path = yield from self._path(model)
        response = yield from exchange(ApiCall("GET", f"{path}/layers"), self._policy)
        return _read(response, wire.Layers.model_validate_json).layers

    def _kernels(self, layer: str, model: str | None) -> Steps[PIL.Image.Image]:
        path = yield from self._path(model)
        call = ApiCall("GET", f"{path}/kernels/{quote(layer, safe='')}")
        response = yield from exchange(call, self._policy)
        return _read(response, lambda body: PIL.Image.open(io.BytesIO(body)))

    def _health(self) -> Steps[wire.Health]:
        once = replace(self._policy, attempts=1)
        response = yield from exchange(ApiCall("GET", "/health/ready"), once)
        return _read(response, wire.Health.model_validate_json)

    def _path(self, model: str | None) -> Steps[str]:
        """Return the path of a model; the name of the default one comes from the service."""
        if model is None:
            served = yield from self._models()
            model = next((entry.name for entry in served if entry.default), "")
            if not model:
                raise NotFound("The service has no default model; give `model`.")
        return f"/models/{quote(model, safe='')}"


def experiment_fields(edits: Edits, options: Mapping[str, object]) -> dict[str, Any]:
    """Return the validated edits and options as JSON fields. Raises TypeError, ValueError."""
    read = EDITS.validate_python(list(edits))
    said = EDITS.dump_python(read, mode="json", exclude_unset=True)
    given = read_options(ExperimentOptions, options)
    return {**given.model_dump(exclude_unset=True), "edits": said}


def files_of(images: Images) -> list[bytes | str]:
    """Read the images of one request. Raises UnreadableImage, TypeError, ValueError."""
    several = images if isinstance(images, list | tuple) else [cast("Image", images)]
    if not several:
        raise ValueError("the list of images is empty; give at least one image")
    return [image_file(image) for image in several]


def checked_concurrency(concurrency: int) -> int:
    """Return `concurrency`. Raises ValueError if it is below 1."""
    if concurrency < 1:
        raise ValueError(f"`concurrency` is {concurrency}; give at least 1")
    return concurrency


def reporter(images: Iterable[Image], on_progress: Progress | None) -> Callable[[Result], Result]:
    """Return a function that counts results, reports progress, and returns each result."""
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
            f"The answer of {response.request.url} cannot be read; check that client and service "
            "have the same version.",
            status=response.status_code,
            request_id=response.headers.get("x-request-id"),
        ) from error
