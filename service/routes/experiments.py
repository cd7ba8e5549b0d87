"""`POST /experiments`: from images and edits to what each edit changed."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Annotated

import pydantic
from fastapi import APIRouter, Query, Request, Response

from api_schemas import options as wire
from api_schemas.answers import ExperimentAnswer, ExperimentResult
from service.errors import InvalidOption, MalformedRequest, UnsupportedMediaType
from service.images.upload import Upload
from service.pipeline import trials as pipeline
from service.pipeline.answer_size import quote_image
from service.pipeline.experiment_plan import ExperimentPlan, plan_edits
from service.pipeline.process import as_error, open_image, render, result_of
from service.pipeline.response import response_body
from service.pipeline.service import Clock, Recipe
from service.pipeline.trials import Opened
from service.routes import access, bodies, docs, forms, lifecycle
from service.routes.problems import describe
from service.routes.state import service_of
from service.scheduling.admission import Bill, Permit

router = APIRouter(tags=["classify"])

_ADVICE = "Ask for a smaller top_k, fewer targets or fewer edits."


@router.post("/experiments", **docs.experiments())
async def experiments(
    request: Request, options: Annotated[wire.ExperimentOptions, Query()]
) -> Response:
    """Edit each image, and answer how each edit changes its predictions, with controls.

    Every edit is made by itself, on the unedited image. The body is JSON, or a form with parts
    `image` and a part `edits`, which is a JSON list.
    """
    return await lifecycle.in_time(
        request, lambda body, permit: _answer(request, body, permit, options)
    )


async def _answer(
    request: Request, body: bytes, permit: Permit, options: wire.ExperimentOptions
) -> Response:
    images, options, edits = await _take_apart(request, body, options)
    permit.grow(len(images) - 1)
    service = service_of(request)
    async with lifecycle.model_in_use(request, options.model) as model:
        plan = await result_of(
            service.scheduler.call(plan_edits, model, options, edits, service.limits, len(images))
        )
        access.reserve(request, plan.price * len(images))
        request.scope["log"] = {"model": model.name}
        price = functools.partial(pipeline.entry_bytes, plan, service.limits.render_side)
        bill = Bill(permit, service.limits.answer_bytes, lambda: _ADVICE)
        quotes = [quote_image(image, service.limits.pixels, price) for image in images]
        bill.add(sum(quote.price for quote in quotes))
        clock = Clock(request.scope["started"])
        deadline = clock.started + lifecycle.timeout_of(request)
        recipe = pipeline.recipe(service, plan, deadline, clock)
        take = bodies.bounded(permit, service.limits.body_bytes)
        opened = await asyncio.gather(
            *(_opened(recipe, image, permit, take) for image in images), return_exceptions=True
        )
        for upload, quote in zip(opened, quotes, strict=True):
            if isinstance(upload, Upload):  # a file may hide its size until it is decoded
                bill.add(max(0, price((upload.width, upload.height)) - quote.price))
        results = await asyncio.gather(
            *(_one(plan, recipe, opened, index) for index in range(len(images))),
            return_exceptions=True,
        )
        return await _respond(request, recipe, results)


async def _take_apart(
    request: Request, body: bytes, options: wire.ExperimentOptions
) -> tuple[Sequence[bodies.Image], wire.ExperimentOptions, Sequence[wire.Edit]]:
    """The images, options and edits of a JSON body or a form."""
    service, kind = service_of(request), bodies.media_type(request)
    if kind == "multipart/form-data":
        content_type = request.headers["content-type"]
        images, edits = await result_of(
            service.scheduler.call(_form, content_type, body, service.limits.images)
        )
        return images, options, edits
    if not bodies.is_json(kind):
        said = f"{kind!r} is not a content type that experiments are sent in"
        raise UnsupportedMediaType(
            f"{said if kind else 'No content type was sent'}; send application/json, or a form: "
            "curl -F image=@cat.jpg -F 'edits=[…]'."
        )
    bodies.refuse_query(options)
    read = functools.partial(bodies.json_request, form=wire.ExperimentRequest)
    images, asked = await result_of(
        service.scheduler.call(read, body, max_images=service.limits.images)
    )
    return images, asked, asked.edits


def _form(
    content_type: str, body: bytes, max_images: int
) -> tuple[Sequence[bodies.Image], Sequence[wire.Edit]]:
    """The images and edits of a form.

    Raises as `form_parts`, EmptyBody without an image, and InvalidOption for wrong edits.
    """
    images, edits = forms.experiment_parts(content_type, body, max_images)
    edits = bodies.utf8_json(edits)
    bodies.check_json(
        edits, bodies.MAX_JSON_VALUES, bodies.MAX_JSON_NAMES, "edits have fewer; send fewer edits."
    )
    try:
        found = wire.EDITS.validate_json(edits)
    except pydantic.ValidationError as error:
        issues = error.errors(include_url=False)
        if any(issue["type"] == "json_invalid" for issue in issues):
            raise MalformedRequest(f"The part `edits` is not JSON: {issues[0]['msg']}.") from error
        named = [{**issue, "loc": ("edits", *issue["loc"])} for issue in issues]
        raise InvalidOption(describe(named, wire.ExperimentRequest.model_fields)) from error
    return images, found


async def _opened(
    recipe: Recipe, image: bodies.Image, permit: Permit, take: Callable[[int], None]
) -> Upload:
    """One image with its pixels, which the permit holds until the answer has left."""
    data = await bodies.image_bytes(image, recipe.service.fetcher, take)
    upload = await open_image(recipe, data)
    assert upload.source is not None
    permit.grow(0, 2 * upload.source.pixels.nbytes)  # and what the present edit shows
    return upload


async def _one(
    plan: ExperimentPlan, recipe: Recipe, opened: Opened, index: int
) -> ExperimentResult:
    trials = await pipeline.conduct(plan, recipe, opened, index)
    upload = opened[index]
    assert isinstance(upload, Upload)
    side = recipe.service.limits.render_side
    return await render(recipe, pipeline.result, plan, upload, trials, lifecycle.failure, side)


async def _respond(
    request: Request,
    recipe: Recipe,
    results: Sequence[ExperimentResult | BaseException],
) -> Response:
    failures = [as_error(each) for each in results if isinstance(each, BaseException)]
    if len(failures) == len(results):
        raise failures[0]
    header = lifecycle.report(request, recipe, len(results))
    places = [
        each
        if isinstance(each, ExperimentResult)
        else ExperimentResult(error=lifecycle.failure(each))
        for each in results
    ]
    call = recipe.service.scheduler.call(
        response_body, recipe, request.scope["request_id"], places, ExperimentAnswer
    )
    return Response(await result_of(call), media_type="application/json", headers=header)
