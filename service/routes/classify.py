"""`POST /explain` and `POST /predict`: from body to response, all images concurrently."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute

from api_schemas import answers as wire
from api_schemas.options import (
    CommonOptions,
    ExplainOptions,
    ExplainRequest,
    PredictOptions,
    PredictRequest,
)
from service.errors import InvalidOption
from service.pipeline import response
from service.pipeline.answer_size import Quote, quote_image
from service.pipeline.process import as_error, result_of
from service.pipeline.service import ProcessedImage
from service.routes import bodies, docs, forms, lifecycle
from service.routes.lifecycle import RequestWork
from service.routes.negotiation import as_image
from service.routes.state import service_of
from service.scheduling.admission import Permit

MAX_QUERY = 512
"""Bytes of a query whose options are kept."""

MAX_QUERIES = 256
"""Queries whose options are kept, by route."""


class _KnownQueries(APIRoute):
    """Validates a short query once: clients repeat the same one, and the options are immutable."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        validated = super().get_route_handler()
        known: OrderedDict[bytes, CommonOptions] = OrderedDict()

        async def handle(request: Request) -> Response:
            query = request.scope["query_string"]
            options = known.get(query)
            if options is not None:
                response: Response = await self.endpoint(request, options)
                return response
            response = await validated(request)
            if len(query) <= MAX_QUERY:  # it was valid: its request was answered
                known[query] = request.scope["options"]
                if len(known) > MAX_QUERIES:
                    known.popitem(last=False)
            return response

        return handle


router = APIRouter(tags=["classify"], route_class=_KnownQueries)

_Made = wire.Result | bytes | Response
"""An image's entry of the response, or the whole response: JSON or an image."""

_Make = Callable[[ProcessedImage, float], _Made]
"""Makes that of a processed image, which was ready at a time; see `answer_image`."""


@router.post("/explain", **docs.explain())
async def explain(request: Request, options: Annotated[ExplainOptions, Query()]) -> Response:
    """Classify each image and explain its predictions."""
    return await _answer_in_time(request, options, ExplainRequest)


@router.post("/predict", **docs.predict())
async def predict(request: Request, options: Annotated[PredictOptions, Query()]) -> Response:
    """Classify each image, without explanations."""
    return await _answer_in_time(request, options, PredictRequest)


async def _answer_in_time(
    request: Request, options: CommonOptions, form: type[CommonOptions]
) -> Response:
    request.scope["options"] = options
    return await lifecycle.in_time(
        request, lambda body, permit: _classify(request, body, permit, options, form)
    )


async def _classify(
    request: Request,
    body: bytes,
    permit: Permit,
    options: CommonOptions,
    form: type[CommonOptions],
) -> Response:
    uploads, options = await _take_apart(request, body, options, form)
    permit.grow(len(uploads) - 1)
    drawn = as_image(request.headers.get("accept", ""), options, len(uploads))
    options = drawn or options
    async with lifecycle.model_in_use(request, options.model) as model:
        work = await lifecycle.prepare(request, model, options, len(uploads), permit)
        if drawn:
            sizes = work.sizes
            price = sizes.heatmap if "heatmap" in drawn.include else sizes.overlay
            work = replace(work, price=price)
        quotes = [quote_image(upload, work.service.limits.pixels, work.price) for upload in uploads]
        work.bill.add(sum(quote.price for quote in quotes))
        take = bodies.bounded(permit, work.service.limits.body_bytes)
        make: _Make = functools.partial(response.rendered_result, work)
        if drawn:
            make = functools.partial(_image, work)
        elif len(uploads) == 1:
            make = functools.partial(response.single_response, work, request.scope["request_id"])
        entries = [
            _one(work, upload, quote, take, make)
            for upload, quote in zip(uploads, quotes, strict=True)
        ]
        return await _respond(request, work, await _all_of(entries))


async def _take_apart(
    request: Request, body: bytes, options: CommonOptions, form: type[CommonOptions]
) -> tuple[Sequence[bodies.Image], CommonOptions]:
    """Images and options of the body: a form, one raw image, or JSON."""
    service, kind = service_of(request), bodies.media_type(request)
    if kind == "multipart/form-data":
        content_type = request.headers["content-type"]
        alone = forms.single_image(content_type, body)
        if alone is not None:
            return [alone], options
        call = service.scheduler.call(
            forms.multipart_images, content_type, body, service.limits.images
        )
        return await result_of(call), options
    if bodies.is_json(kind):
        bodies.refuse_query(options)
        return await result_of(
            service.scheduler.call(bodies.json_request, body, form, service.limits.images)
        )
    return bodies.raw_image(kind, body), options


async def _one(
    work: RequestWork, image: bodies.Image, quote: Quote, take: Callable[[int], None], make: _Make
) -> _Made:
    """Process one image from its bytes or URL to its entry, or to the whole response."""
    data = await bodies.image_bytes(image, work.service.fetcher, take)
    return await lifecycle.answer(work, data, quote, make)


async def _all_of(
    entries: Sequence[Coroutine[Any, Any, _Made]],
) -> Sequence[_Made | BaseException]:
    """The entries of all images, each with its result or its error; a single one without a task."""
    if len(entries) > 1:
        several: list[_Made | BaseException]
        several = await asyncio.gather(*entries, return_exceptions=True)
        return several
    try:
        return [await entries[0]]
    except Exception as error:  # noqa: BLE001 - as gather returns it
        return [error]


def _image(work: RequestWork, processed: ProcessedImage, ready: float) -> Response:
    """The overlay, or the heatmap, as the whole response."""
    assert isinstance(work.options, ExplainOptions)
    side = work.service.limits.render_side
    if not processed.inference.explanations:
        raise InvalidOption(
            "The model finds nothing to explain in this image, so there is no map to return; lower "
            "`min_score`, or request JSON, which says what was found."
        )
    explanation = processed.inference.explanations[0]
    image = response.picture(processed.upload, explanation, work.options, side)
    work.clock.add("render", time.monotonic() - ready)
    return Response(image.data, media_type=image.media_type)


async def _respond(
    request: Request,
    work: RequestWork,
    results: Sequence[_Made | BaseException],
) -> Response:
    failures = [as_error(result) for result in results if isinstance(result, BaseException)]
    if len(failures) == len(results):
        raise failures[0]
    header = lifecycle.report(request, work, len(results))
    only = results[0]
    if isinstance(only, bytes):
        only = Response(only, media_type="application/json")
    if isinstance(only, Response):
        work.bill.settle(len(only.body))
        only.headers.update(header)
        return only
    entries = [
        wire.Result(error=lifecycle.failure(result))
        if isinstance(result, BaseException)
        else result
        for result in results
        if not isinstance(result, (bytes, Response))
    ]
    call = work.service.scheduler.call(
        response.response_body, work, request.scope["request_id"], entries
    )
    body = await result_of(call)
    work.bill.settle(len(body))
    return Response(body, media_type="application/json", headers=header)
