"""The two clients: `Client` for threads, `AsyncClient` for tasks."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx
import PIL.Image

from api_schemas import models as wire
from api_schemas.answers import ExperimentAnswer
from api_schemas.client.arguments import ExperimentArguments, ExplainArguments, PredictArguments
from api_schemas.client.calls import (
    FATAL_ERRORS,
    Calls,
    Edits,
    Progress,
    checked_concurrency,
    experiment_fields,
    files_of,
    reporter,
)
from api_schemas.client.errors import ClientError
from api_schemas.client.requests import Image, Images, Received, Send, Steps, read_options
from api_schemas.client.results import Answer, Result
from api_schemas.options import CommonOptions, ExplainOptions, PredictOptions

T = TypeVar("T")

URL = "http://127.0.0.1:8000"


class Client(Calls):
    """A client that blocks the calling thread; threads may share it. Close it, or use `with`.

    url:      of the service, with the path prefix of a proxy.
    api_key:  sent as `Authorization: Bearer`.
    timeout:  seconds for one call with all its retries; also sent to the service, which drops
              late work.
    attempts: how often a call is sent at most, if the service is busy or a connection is lost.
    http:     further arguments of `httpx.Client`: `verify`, `proxy`, `transport`, …
    """

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        attempts: int = 5,
        **http: Any,
    ) -> None:
        super().__init__(url, api_key, timeout, attempts, http)
        self._http = httpx.Client(**self._http_arguments)

    def explain(self, images: Images, **options: Unpack[ExplainArguments]) -> Answer:
        """Explain one image or a list of images in one request.

        Raises TypeError or ValueError for an invalid option, and ClientError. If only some images
        fail, their results have `error` instead.
        """
        return self._send_images("/explain", images, read_options(ExplainOptions, options))

    def predict(self, images: Images, **options: Unpack[PredictArguments]) -> Answer:
        """As `explain`, with predictions only and fewer options."""
        return self._send_images("/predict", images, read_options(PredictOptions, options))

    def experiments(
        self, images: Images, *, edits: Edits, **options: Unpack[ExperimentArguments]
    ) -> ExperimentAnswer:
        """Measure how each edit of each image changes its predictions, with controls.

        Raises as `explain`, and ValueError for an invalid edit.
        """
        fields = experiment_fields(edits, options)
        return self._run(self._experiments(files_of(images), fields))

    def explain_many(
        self,
        images: Iterable[Image],
        *,
        concurrency: int = 8,
        on_progress: Progress | None = None,
        **options: Unpack[ExplainArguments],
    ) -> Generator[Result, None, None]:
        """Yield one result per image, in the order of `images`; each image is one request.

        The result of an image that fails has `error`. Raises errors that every image would get:
        Unauthorized, NotFound, InvalidOption. `images` may be a generator of any length: at most
        `concurrency` images are read at a time, and twice as many results are in memory.
        on_progress: called before each result, in the thread that iterates.
        """
        read = read_options(ExplainOptions, options)
        return self._many(images, read, checked_concurrency(concurrency), on_progress)

    def models(self) -> list[wire.Model]:
        """Return all served models."""
        return self._run(self._models())

    def model(self, name: str | None = None) -> wire.ModelDetails:
        """Return a model with its labels; None is the default model, here and below."""
        return self._run(self._model(name))

    def layers(self, model: str | None = None) -> list[wire.Layer]:
        """Return the layers of a model, and whether each can be a target layer."""
        return self._run(self._layers(model))

    def kernels(self, layer: str, model: str | None = None) -> PIL.Image.Image:
        """Return the weights of a layer as an image."""
        return self._run(self._kernels(layer, model))

    def health(self) -> wire.Health:
        """Return the readiness of the service, without retries. Raises Busy if it is not ready."""
        return self._run(self._health())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _send_images(self, route: str, images: Images, options: CommonOptions) -> Answer:
        return self._run(self._classified(route, files_of(images), options))

    def _many(
        self,
        images: Iterable[Image],
        options: ExplainOptions,
        concurrency: int,
        on_progress: Progress | None,
    ) -> Generator[Result, None, None]:
        waiting: deque[Future[Result]] = deque()
        report = reporter(images, on_progress)
        threads = ThreadPoolExecutor(concurrency, thread_name_prefix="camserve-client")
        try:
            for image in images:
                waiting.append(threads.submit(self._one, image, options))
                if len(waiting) == 2 * concurrency:
                    yield report(waiting.popleft().result())
            threads.shutdown(wait=False)  # a caller's zip() may stop at the last result
            while waiting:
                yield report(waiting.popleft().result())
        finally:
            threads.shutdown(cancel_futures=True)

    def _one(self, image: Image, options: ExplainOptions) -> Result:
        try:
            return self._send_images("/explain", [image], options)[0]
        except FATAL_ERRORS:
            raise
        except ClientError as error:
            return Result(error=error)

    def _run(self, steps: Steps[T]) -> T:
        received: Received = None
        try:
            while True:
                step = steps.send(received)
                if isinstance(step, Send):
                    try:
                        received = self._http.send(step.request(self._http))
                    except httpx.RequestError as error:
                        received = error
                else:
                    time.sleep(step.seconds)
                    received = None
        except StopIteration as end:
            answer: T = end.value
            return answer


class AsyncClient(Calls):
    """As `Client`, for tasks. If one is cancelled, the service drops its work."""

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        attempts: int = 5,
        **http: Any,
    ) -> None:
        super().__init__(url, api_key, timeout, attempts, http)
        self._http = httpx.AsyncClient(**self._http_arguments)

    async def explain(self, images: Images, **options: Unpack[ExplainArguments]) -> Answer:
        return await self._send_images("/explain", images, read_options(ExplainOptions, options))

    async def predict(self, images: Images, **options: Unpack[PredictArguments]) -> Answer:
        return await self._send_images("/predict", images, read_options(PredictOptions, options))

    async def experiments(
        self, images: Images, *, edits: Edits, **options: Unpack[ExperimentArguments]
    ) -> ExperimentAnswer:
        fields = experiment_fields(edits, options)
        files = await asyncio.to_thread(files_of, images)
        return await self._run(self._experiments(files, fields))

    def explain_many(
        self,
        images: Iterable[Image],
        *,
        concurrency: int = 8,
        on_progress: Progress | None = None,
        **options: Unpack[ExplainArguments],
    ) -> AsyncGenerator[Result, None]:
        """As `Client.explain_many`. Close it (`contextlib.aclosing`) if you stop early."""
        read = read_options(ExplainOptions, options)
        return self._many(images, read, checked_concurrency(concurrency), on_progress)

    async def models(self) -> list[wire.Model]:
        return await self._run(self._models())

    async def model(self, name: str | None = None) -> wire.ModelDetails:
        return await self._run(self._model(name))

    async def layers(self, model: str | None = None) -> list[wire.Layer]:
        return await self._run(self._layers(model))

    async def kernels(self, layer: str, model: str | None = None) -> PIL.Image.Image:
        return await self._run(self._kernels(layer, model))

    async def health(self) -> wire.Health:
        return await self._run(self._health())

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _send_images(self, route: str, images: Images, options: CommonOptions) -> Answer:
        files = await asyncio.to_thread(files_of, images)
        return await self._run(self._classified(route, files, options))

    async def _many(
        self,
        images: Iterable[Image],
        options: ExplainOptions,
        concurrency: int,
        on_progress: Progress | None,
    ) -> AsyncGenerator[Result, None]:
        waiting: deque[asyncio.Task[Result]] = deque()
        report = reporter(images, on_progress)
        free = asyncio.Semaphore(concurrency)
        try:
            for image in images:
                waiting.append(asyncio.create_task(self._one(image, options, free)))
                if len(waiting) == 2 * concurrency:
                    yield report(await waiting.popleft())
            while waiting:
                yield report(await waiting.popleft())
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _one(self, image: Image, options: ExplainOptions, free: asyncio.Semaphore) -> Result:
        async with free:
            try:
                return (await self._send_images("/explain", [image], options))[0]
            except FATAL_ERRORS:
                raise
            except ClientError as error:
                return Result(error=error)

    async def _run(self, steps: Steps[T]) -> T:
        received: Received = None
        try:
            while True:
                step = steps.send(received)
                if isinstance(step, Send):
                    try:
                        received = await self._http.send(step.request(self._http))
                    except httpx.RequestError as error:
                        received = error
                else:
                    await asyncio.sleep(step.seconds)
                    received = None
        except StopIteration as end:
            answer: T = end.value
            return answer
