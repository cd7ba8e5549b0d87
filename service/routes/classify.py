"""`POST /explain` and `POST /predict`: from body to response, all images concurrently."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

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
from service.pipeline.process import as_error, render, render_result, result_of
from service.routes import bodies, docs, forms, lifecycle
from service.routes.lifecycle import Billed, RequestWork
from service.routes.negotiation import as_image
from service.routes.state import service_of
from service.scheduling.admission import Permit

router = APIRouter(tags=["classify"])

_Make = Callable[[Billed], Awaitable[wire.Result | Response]]
"""Turns an answered image into its entry of the response, or into the whole response."""


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
        make: _Make = functools.partial(render_result, work)
        if drawn:
            make = functools.partial(_image, work)
        elif len(uploads) == 1:
            make = functools.partial(_alone, request, work)
        results = await asyncio.gather(
            *(
                _one(work, upload, quote, take, make)
                for upload, quote in zip(uploads, quotes, strict=True)
            ),
            return_exceptions=True,
        )
        return await _respond(request, work, results)


async def _take_apart(
    request: Request, body: bytes, options: CommonOptions, form: type[CommonOptions]
) -> tuple[Sequence[bodies.Image], CommonOptions]:
    """Images and options of the body: a form, one raw image, or JSON."""
    service, kind = service_of(request), bodies.media_type(request)
    if kind == "multipart/form-data":
        content_type = request.headers["content-type"]
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
) -> wire.Result | Response:
    """Process one image from its bytes or URL to its entry, or to the whole response."""
    data = await bodies.image_bytes(image, work.service.fetcher, take)
    return await make(await lifecycle.infer(work, data, quote))


async def _image(work: RequestWork, answered: Billed) -> Response:
    """The overlay, or the heatmap, as the whole response."""
    assert isinstance(work.options, ExplainOptions)
    side = work.service.limits.render_side
    if not answered.inference.explanations:
        raise InvalidOption(
            "The model finds nothing to explain in this image, so there is no map to return; lower "
            "`min_score`, or request JSON, which says what was found."
        )
    explanation = answered.inference.explanations[0]
    image = await render(work, response.picture, answered.upload, explanation, work.options, side)
    return Response(image.data, media_type=image.media_type)


async def _alone(request: Request, work: RequestWork, answered: Billed) -> Response:
    """The JSON response to a request with one image."""
    call = work.service.scheduler.call(
        response.single_response, work, answered, request.scope["request_id"], time.monotonic()
    )
    return Response(await result_of(call), media_type="application/json")


async def _respond(
    request: Request,
    work: RequestWork,
    results: Sequence[wire.Result | Response | BaseException],
) -> Response:
    failures = [as_error(result) for result in results if isinstance(result, BaseException)]
    if len(failures) == len(results):
        raise failures[0]
    header = lifecycle.report(request, work, len(results))
    only = results[0]
    if isinstance(only, Response):
        work.bill.settle(len(only.body))
        only.headers.update(header)
        return only
    entries = [
        wire.Result(error=lifecycle.failure(result))
        if isinstance(result, BaseException)
        else result
        for result in results
        if not isinstance(result, Response)
    ]
    call = work.service.scheduler.call(
        response.response_body, work, request.scope["request_id"], entries
    )
    body = await result_of(call)
    work.bill.settle(len(body))
    return Response(body, media_type="application/json", headers=header)
