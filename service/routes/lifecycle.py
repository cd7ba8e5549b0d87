"""The lifecycle of a request with images: permit, deadline, disconnect, and the steps of an image.

`in_time` runs a route's work; the work takes a model with `model_in_use`, resolves the options with
`prepare`, and then for each image calls `infer` and `pipeline.process.render`.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ParamSpec, Self, TypeVar

import structlog
from fastapi import Request, Response

from api_schemas.answers import ImageFailure
from api_schemas.options import CommonOptions, ExplainOptions
from service.errors import CamserveError, DeadlineExceeded, MalformedRequest, QueueFull
from service.images.upload import Sent, Upload
from service.models.loaded import LoadedModel
from service.pipeline import process
from service.pipeline.answer_size import AnswerSizes, Price, Quote
from service.pipeline.process import result_of
from service.pipeline.resolve import resolve_options
from service.pipeline.service import Clock, ProcessedImage, Recipe
from service.routes import access, bodies, encodings
from service.routes.middleware import CLIENT_CLOSED_REQUEST
from service.routes.problems import status_of
from service.routes.state import service_of
from service.scheduling.admission import Bill, Permit, RequestPermits

_log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PAUSE = 0.05
"""Seconds between two attempts to get a place among the images held."""

LOADS = 3
"""How often a request loads its model at most: it may be evicted before the request runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestWork(Recipe):
    """How the images of a request are answered, and how large their entries in the response are.

    sizes, price: bytes of each part of an image's entry at most, and of the whole entry.
    bill:         of the request, which adds them up.
    """

    sizes: AnswerSizes
    price: Price
    bill: Bill


@dataclass(frozen=True, slots=True, eq=False)
class Billed(ProcessedImage):
    """An answered image. priced: bytes that are held for its entry in the response."""

    priced: int


async def in_time(
    request: Request,
    work: Callable[[bytes, Permit], Coroutine[Any, Any, Response]],
    *,
    waits: float | None = None,
) -> Response:
    """Read the body, take a place, and work until the response, the deadline or the disconnect.

    The permit is held until the response is sent.

    waits: until when to wait for a place (`time.monotonic`); None: a full service refuses at once,
    before the body is read.
    Raises QueueFull, ShuttingDown, DeadlineExceeded, what `bodies.read_body` raises, and what
    `work` does.
    """
    service = service_of(request)
    limits, seconds = service.limits, timeout_of(request)
    encodings.codings_of(request)  # refuse an unsupported coding before the body is read
    if waits is None:
        service.admission.check()
    permit = held(request).keep(service.admission.expect())
    body = await bodies.read_body(request, permit, limits.body_bytes, seconds)

    async def decoded_and_placed() -> Response:
        whole = await encodings.decoded(request, body, permit, limits.body_bytes)
        return await _with_place(work, whole, permit, waits)

    return await watched(request, decoded_and_placed)


async def _with_place(
    work: Callable[[bytes, Permit], Coroutine[Any, Any, Response]],
    body: bytes,
    permit: Permit,
    waits: float | None,
) -> Response:
    async def take() -> None:
        permit.grow(1)

    await (take() if waits is None else patiently(take, waits))
    return await work(body, permit)


async def patiently(attempt: Callable[[], Awaitable[T]], until: float) -> T:
    """Retry while the service is full, until a time (`time.monotonic`). Raises QueueFull.

    attempt: called again after QueueFull, so it must not read the body.
    """
    while True:
        try:
            return await attempt()
        except QueueFull:
            if time.monotonic() + PAUSE > until:
                raise
            await asyncio.sleep(PAUSE)


def held(request: Request) -> RequestPermits:
    """The permits that this request holds until its response is sent."""
    kept = request.scope["held"]
    assert isinstance(kept, RequestPermits)
    return kept


def timeout_of(request: Request) -> float:
    """Seconds that the request may take: `X-Request-Timeout`, at most the server's own.

    Raises MalformedRequest if the header is not a positive number.
    """
    most = service_of(request).limits.timeout
    sent = request.headers.get("x-request-timeout")
    if sent is None:
        return most
    # `float` also accepts "1e3", "inf" and "nan", which are not plain numbers of seconds.
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", sent) or not float(sent):
        raise MalformedRequest(
            f"X-Request-Timeout is a positive number of seconds, such as 2.5, not {sent[:40]!r}."
        )
    return min(most, float(sent))


@asynccontextmanager
async def model_in_use(request: Request, name: str | None) -> AsyncIterator[LoadedModel]:
    """A model (None: the default one), reloaded if it was evicted, and held while it is used.

    Raises UnknownModel, ModelNotReady, ConfigurationError.
    """
    service = service_of(request)
    for _ in range(LOADS):
        loading = service.library.demand(name)
        if loading is None:
            break
        # Others may wait for the same model: a disconnect must not stop its loading. If loading
        # failed, `use` raises the error with the time to retry.
        with suppress(CamserveError):
            await asyncio.shield(asyncio.wrap_future(loading))
    with service.pool.use(name or service.library.default) as model:
        yield model


async def prepare(
    request: Request,
    model: LoadedModel,
    options: CommonOptions,
    images: int,
    permit: Permit,
    *,
    charge: Callable[[float], None] | None = None,
) -> RequestWork:
    """Resolve the options of a request, and refuse what can be refused before an image is read.

    Names, patterns and masks, which may be long, are resolved in a worker thread; the cost of the
    request is charged to its key here, on the event loop.

    permit: holds the bytes of the answer, once the images' sizes are known.
    charge: receives the cost of these images if the caller reserves the sum of a request; None
            reserves it here.
    """
    service = service_of(request)
    resolve = functools.partial(resolve_options, model, options, service.limits, images)
    if _names_nothing(options):
        resolution = resolve()
    else:
        resolution = await result_of(service.scheduler.call(resolve))
    (charge or functools.partial(access.reserve, request))(resolution.price)
    request.scope["log"] = {"model": model.name}
    if isinstance(options, ExplainOptions):
        request.scope["log"]["explained_by"] = options.method
    sizes = AnswerSizes(model, options, resolution.template, service.limits.render_side)
    return RequestWork(
        service=service,
        model=model,
        options=options,
        question=resolution.question,
        hiding=resolution.hiding,
        deadline=request.scope["started"] + timeout_of(request),
        clock=Clock(request.scope["started"]),
        sizes=sizes,
        price=sizes.result,
        bill=Bill(permit, service.limits.answer_bytes, functools.partial(sizes.advice, images)),
    )


def _names_nothing(options: CommonOptions) -> bool:
    """Whether no names are to be resolved: then resolving is faster than a hand-off to a thread."""
    if not isinstance(options, ExplainOptions):
        return not options.activations
    named = (options.activations, options.targets, options.layer, options.contrast, options.mask)
    return not any(named)


async def infer(work: RequestWork, data: Sent, quote: Quote) -> Billed:
    """Open one image and answer it, as `process_image` does, within its bill.

    quote: of the image; the caller added its price to the bill. If the image needs more, it is
           added here; after an error nothing of it stays held.
    """
    with _ImageBill(work, quote) as bill:
        answered = await process.process_image(work, data, bill.add)
    return Billed(answered.upload, answered.inference, answered.masked, bill.priced)


async def answer(
    work: RequestWork, data: Sent, quote: Quote, make: Callable[[ProcessedImage, float], T]
) -> T:
    """`infer`, and what is made of the image, as `answer_image` does."""
    with _ImageBill(work, quote) as bill:
        return await process.answer_image(work, data, make, fits=bill.fits, opened=bill.add)


class _ImageBill:
    """The part of one image in the bill of its request; after an error nothing of it stays held.

    priced: bytes that are held for its entry in the response.
    """

    def __init__(self, work: RequestWork, quote: Quote) -> None:
        self._work = work
        self._quote = quote
        self.priced = quote.price

    def fits(self, upload: Upload) -> bool:
        """Whether an opened image has the size that its quote is for."""
        return (upload.width, upload.height) == self._quote.size

    def add(self, upload: Upload) -> None:
        """Add what an opened image needs more than its quote. Raises as `Bill.add`."""
        if not self.fits(upload):
            whole = max(self.priced, self._work.price((upload.width, upload.height)))
            self._work.bill.add(whole - self.priced)
            self.priced = whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._work.bill.reduce(self.priced)


def report(request: Request, work: Recipe, images: int) -> dict[str, str]:
    """Record the times of the stages in metrics and log; return the header `Server-Timing`."""
    work.clock.stop()
    work.service.metrics.observe_stages(work.clock.seconds)
    timing = work.clock.milliseconds()
    request.scope["log"] |= {"images": images, **timing}
    return {"Server-Timing": ", ".join(f"{stage};dur={ms}" for stage, ms in timing.items())}


def failure(error: BaseException) -> ImageFailure:
    """The entry of an image, or of a part of it, that failed while others succeeded."""
    known = process.as_error(error)
    status = status_of(known)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error(known.code, exc_info=error)
    return ImageFailure(code=known.code, detail=known.detail, status=status)


async def _end_on_disconnect(request: Request, limit: asyncio.Timeout) -> None:
    """End the time limit of a request when its client disconnects; the body must be read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    if not limit.expired():  # the deadline may have come first
        limit.reschedule(0)


async def in_time_without_body(
    request: Request, work: Callable[[Permit], Coroutine[Any, Any, Response]]
) -> Response:
    """Like `in_time` for a route without a body: permit, deadline and disconnect.

    Raises QueueFull, ShuttingDown, DeadlineExceeded, MalformedRequest, and what `work` does.
    """
    permit = held(request).keep(service_of(request).admission.admit())
    return await watched(request, lambda: work(permit))


async def watched(request: Request, work: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
    """Work until the response, the deadline or the disconnect, without a place; the body is read.

    Deadline and disconnect cancel the work, and with it what it waits for: jobs without a client
    are dropped unrun. Raises DeadlineExceeded, MalformedRequest, and what `work` does.
    """
    seconds = timeout_of(request)
    try:
        async with asyncio.timeout(request.scope["started"] + seconds - time.monotonic()) as limit:
            watching = asyncio.create_task(_end_on_disconnect(request, limit))
            try:
                return await work()
            finally:
                watching.cancel()
    except TimeoutError as error:
        if watching.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        raise DeadlineExceeded(
            f"The response was not ready within {seconds:g} seconds; retry, or request less."
        ) from error
