"""`POST /explain` and `POST /predict`: from the body to the answer, one image beside the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

import orjson
import structlog
from fastapi import APIRouter, Query, Request, Response
from torch import Tensor

from api_schemas import answers as wire
from api_schemas.options import (
    CommonOptions,
    ExplainOptions,
    ExplainRequest,
    PredictOptions,
    PredictRequest,
)
from service.admission import Permit
from service.errors import (
    CamserveError,
    DeadlineExceeded,
    InvalidImageData,
    InvalidOption,
    NotAcceptable,
)
from service.metrics import STAGES
from service.models.loaded import LoadedModel
from service.questions import Answer, Question
from service.routes import asking, bodies, docs
from service.routes.accept import preferred_image
from service.routes.middleware import CLIENT_CLOSED_REQUEST
from service.routes.problems import status_of
from service.routes.state import Service, service_of
from service.routes.wire import overlay, result, style_of
from service.upload import Hiding, open_upload

T = TypeVar("T")

router = APIRouter(tags=["classify"])
_log = structlog.get_logger(__name__)


@router.post("/explain", **docs.explain())
async def explain(request: Request, options: Annotated[ExplainOptions, Query()]) -> Response:
    """Classify each image and explain its predictions."""
    return await _answer_in_time(request, options, ExplainRequest)


@router.post("/predict", **docs.predict())
async def predict(request: Request, options: Annotated[PredictOptions, Query()]) -> Response:
    """Classify each image, without explanations."""
    return await _answer_in_time(request, options, PredictRequest)


@dataclass(slots=True)
class _Clock:
    """Seconds by stage, summed over the images of one request."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def milliseconds(self) -> dict[str, float]:
        return {stage: round(value * 1000, 3) for stage, value in self.seconds.items()}


@dataclass(frozen=True, slots=True)
class _Work:
    """One request, understood."""

    service: Service
    model: LoadedModel
    options: CommonOptions
    question: Callable[[Tensor], Question]
    hiding: Hiding | None
    deadline: float
    clock: _Clock


class _ClientGone(Exception):
    """The client hung up before its answer was ready."""


async def _answer_in_time(
    request: Request, options: CommonOptions, form: type[CommonOptions]
) -> Response:
    """Take a permit, read the body, and work until the answer, the deadline or the hang-up."""
    service = service_of(request)
    limits = service.limits
    deadline = request.scope["started"] + limits.timeout
    with service.admission.admit(bodies.declared_bytes(request)) as permit:
        body = await bodies.read_body(request, permit, limits.body_bytes, limits.timeout)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                work = _classify(request, body, permit, options, form)
                return await _until_gone(request, work)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"The answer was not ready within {limits.timeout:g} seconds; try again, or ask "
                "for less."
            ) from error
        except _ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _classify(
    request: Request,
    body: bytes,
    permit: Permit,
    options: CommonOptions,
    form: type[CommonOptions],
) -> Response:
    uploads, options = await _take_apart(request, body, options, form)
    permit.grow(len(uploads) - 1)
    image_format = _image_format(request, options, len(uploads))
    if image_format and isinstance(options, ExplainOptions):
        options = options.model_copy(update={"format": image_format, "include": ["overlay"]})
    service = service_of(request)
    loading = service.library.demand(options.model)
    if loading is not None:
        # Others may wait for the same model: whoever hangs up must not stop its loading.
        await asyncio.shield(asyncio.wrap_future(loading))
    with service.pool.use(options.model or service.library.default) as model:
        work = _understand(request, model, options, len(uploads))
        results = await asyncio.gather(
            *(_one(work, upload, image_format) for upload in uploads), return_exceptions=True
        )
        return await _respond(request, work, results)


async def _take_apart(
    request: Request, body: bytes, options: CommonOptions, form: type[CommonOptions]
) -> tuple[Sequence[bytes | InvalidImageData], CommonOptions]:
    """The images and options of a body of any of the three kinds."""
    service, kind = service_of(request), bodies.media_type(request)
    if kind == "multipart/form-data":
        content_type = request.headers["content-type"]
        call = service.scheduler.call(
            bodies.multipart_images, content_type, body, service.limits.images
        )
        return await _result_of(call), options
    if bodies.is_json(kind):
        if request.url.query:
            raise InvalidOption(
                "A JSON request carries its options as fields beside `images`; leave the query "
                "empty."
            )
        return await _result_of(
            service.scheduler.call(bodies.json_request, body, form, service.limits.images)
        )
    return bodies.raw_image(kind, body), options


def _image_format(request: Request, options: CommonOptions, images: int) -> str | None:
    """The format of the overlay that is the whole answer, where `Accept` prefers an image."""
    if not isinstance(options, ExplainOptions):
        return None
    image_format = preferred_image(request.headers.get("accept", ""), options.format)
    if image_format and images > 1:
        raise NotAcceptable(
            f"{images} images cannot be answered by one picture; ask for application/json, or "
            "send them one by one."
        )
    return image_format


def _understand(request: Request, model: LoadedModel, options: CommonOptions, images: int) -> _Work:
    """Everything that can be refused before any image is opened is refused here."""
    service = service_of(request)
    question = asking.question(model, options, service.limits, images)
    request.scope["log"] = {"model": model.name}
    deadline = request.scope["started"] + service.limits.timeout
    return _Work(service, model, options, question, asking.hiding(options), deadline, _Clock())


async def _one(
    work: _Work, data: bytes | InvalidImageData, image_format: str | None
) -> wire.Result | Response:
    """One image from its bytes to its place in the answer."""
    if isinstance(data, InvalidImageData):
        raise data
    service, options, seconds = work.service, work.options, work.clock.seconds
    side = service.limits.render_side
    wants_photo = isinstance(options, ExplainOptions) and "overlay" in options.include
    started = time.monotonic()
    upload = await _result_of(
        service.scheduler.call(
            open_upload,
            data,
            work.model.preprocessing,
            options.fit,
            max_pixels=service.limits.pixels,
            photo_side=side if wants_photo else None,
            hiding=work.hiding,
        )
    )
    seconds["decode"] += time.monotonic() - started
    answer = await _ask(work, work.question(upload.model_input.pixels))
    masked = None
    if upload.masked is not None:
        targets = tuple(explanation.class_id for explanation in answer.explanations)
        again = work.question(upload.masked.model_input.pixels)
        masked = await _ask(work, replace(again, targets=targets, activations=()))
    started = time.monotonic()
    if image_format and isinstance(options, ExplainOptions):
        drawn = service.scheduler.call(overlay, upload, answer.explanations[0], style_of(options))
        picture = await _result_of(drawn)
        rendered: wire.Result | Response = Response(picture.data, media_type=picture.media_type)
    else:
        rendered = await _result_of(
            service.scheduler.call(result, work.model, upload, answer, options, side, masked)
        )
    seconds["render"] += time.monotonic() - started
    return rendered


async def _ask(work: _Work, question: Question) -> Answer:
    timed = await _result_of(work.service.scheduler.submit(work.model, question, work.deadline))
    work.clock.seconds["queue"] += timed.queue
    work.clock.seconds["inference"] += timed.inference
    return timed.answer


async def _respond(
    request: Request,
    work: _Work,
    results: Sequence[wire.Result | Response | BaseException],
) -> Response:
    failures = [_as_error(each) for each in results if isinstance(each, BaseException)]
    if len(failures) == len(results):
        raise failures[0]
    work.clock.seconds["total"] = time.monotonic() - request.scope["started"]
    for stage, value in work.clock.seconds.items():
        work.service.metrics.stage_seconds.labels(stage).observe(value)
    timing = work.clock.milliseconds()
    header = {"Server-Timing": ", ".join(f"{stage};dur={ms}" for stage, ms in timing.items())}
    request.scope["log"] |= {"images": len(results), **timing}
    only = results[0]
    if isinstance(only, Response):
        only.headers.update(header)
        return only
    answer = wire.Answer(
        id=request.scope["request_id"],
        model=wire.ModelVersion(name=work.model.name, version=work.model.version),
        results=[each if isinstance(each, wire.Result) else _failed(each) for each in results],
        timing_ms=wire.Timing(**timing),
    )
    body = await _result_of(work.service.scheduler.call(_dump, answer))
    return Response(body, media_type="application/json", headers=header)


def _dump(answer: wire.Answer) -> bytes:
    return orjson.dumps(answer.model_dump(exclude_unset=True))


def _failed(error: Any) -> wire.Result:
    """The place of an image that failed among others that did not."""
    known = _as_error(error)
    status = status_of(known)
    if status == 500:
        _log.error(known.code, exc_info=error)
    return wire.Result(error=wire.ImageFailure(code=known.code, detail=known.detail, status=status))


def _as_error(error: BaseException) -> CamserveError:
    if isinstance(error, CamserveError):
        return error
    if not isinstance(error, Exception):
        raise error
    unexpected = CamserveError(
        "Something failed on the server's side; its log has the cause under this request id."
    )
    unexpected.__cause__ = error
    return unexpected


async def _until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and cancel it where the client hangs up first; the body must be read.

    Cancelling it cancels what it waits for, so that jobs nobody wants are dropped unrun.
    Raises _ClientGone.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _ClientGone("The client hung up.")
    finally:
        watching.cancel()
        working.cancel()
        # What it waits for is cancelled only when it has run once more; until then its jobs look
        # wanted, and its permit must not be given to somebody else.
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _result_of(future: Future[T]) -> T:
    return await asyncio.wrap_future(future)
