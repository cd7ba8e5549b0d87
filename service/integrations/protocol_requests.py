"""Answers requests of other protocols with the same steps as `/explain`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import orjson
import pydantic
from fastapi import Request, Response

from api_schemas.options import CommonOptions, ExplainOptions
from service.errors import (
    BodyTooLarge,
    EmptyBody,
    InvalidImageData,
    InvalidOption,
    MalformedRequest,
    UnknownVersion,
)
from service.images.upload import Sent
from service.models.loaded import LoadedModel
from service.pipeline.answer_size import AnswerSizes, Price, Quote, quote_image
from service.pipeline.process import as_error, render, result_of
from service.pipeline.service import ProcessedImage, Service
from service.resources import collector_paused
from service.routes import access, bodies, lifecycle
from service.routes.lifecycle import RequestWork
from service.routes.problems import describe
from service.routes.state import service_of
from service.scheduling.admission import Bill, Permit

Form = TypeVar("Form", bound=pydantic.BaseModel)
Options = TypeVar("Options", bound=CommonOptions)

_OURS_ALONE = frozenset({"model", "mask", "activations", "activation_as", "activation_kind"})
_LISTS = frozenset({"targets", "layer", "include"})

MAX_NUMBERS = 2_500_000
"""In a JSON body, where tensors may be lists of numbers: 16 images of 224 x 224. The JSON parser
holds the GIL meanwhile: 0.1 s of CPU for this many."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image, and the options for it."""

    data: Sent
    options: CommonOptions


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer for one image, and its options."""

    model: LoadedModel
    options: CommonOptions
    answered: ProcessedImage
    render_side: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A parsed request.

    respond:     makes the response; like the parsing, it runs in a worker thread.
    every_class: predict all classes of a classifier, whatever `top_k` is.
    price:       bytes of the response per image; None: as in a response of `/explain` or
                 `/predict`.
    """

    images: Sequence[ImageRequest]
    respond: Callable[[Sequence[Reply]], Response]
    every_class: bool = False
    price: Callable[[AnswerSizes], Price] | None = None


async def answer(
    request: Request,
    name: str | Callable[[bytes], str],
    read: Callable[[LoadedModel, bytes], Plan],
) -> Response:
    """Answer a request to a model; the first image that fails fails the request.

    name: of the model, or a function that reads it from the body; like `read`, it runs in a worker
    thread. Admission, bounds, deadline, disconnect, scheduler and metrics are those of `/explain`.
    """

    async def work(body: bytes, permit: Permit) -> Response:
        scheduler = service_of(request).scheduler
        of_model = name if isinstance(name, str) else await result_of(scheduler.call(name, body))
        async with lifecycle.model_in_use(request, of_model) as model:
            plan = await result_of(scheduler.call(read, model, body))
            works = await _works(request, model, plan, permit)
            most = works[0].service.limits.pixels
            quotes = [
                quote_image(image.data, most, work.price)
                for image, work in zip(plan.images, works, strict=True)
            ]
            bill = works[0].bill
            grids = sum(work.sizes.grids for work in works)
            bill.add(grids + sum(quote.price for quote in quotes))
            replies = await _replies(works, plan.images, quotes)
            response = await render(works[0], plan.respond, replies)
            bill.settle(len(response.body))
            response.headers.update(lifecycle.report(request, works[0], len(works)))
            return response

    return await lifecycle.in_time(request, work)


async def _works(
    request: Request, model: LoadedModel, plan: Plan, permit: Permit
) -> list[RequestWork]:
    """The work of each image, on one clock. Raises EmptyBody, BodyTooLarge, QueueFull."""
    count = len(plan.images)
    if not count:
        raise EmptyBody("The request has no image; send at least one.")
    check_count(count, service_of(request).limits.images)
    permit.grow(count - 1)
    keys = [image.options.model_dump_json() for image in plan.images]
    alike = Counter(keys)
    by_options: dict[str, RequestWork] = {}
    costs: list[float] = []
    for key, image in zip(keys, plan.images, strict=True):
        if key in by_options:
            continue
        work = await lifecycle.prepare(
            request, model, image.options, alike[key], permit, charge=costs.append
        )
        if plan.price is not None:
            work = replace(work, price=plan.price(work.sizes))
        if plan.every_class and model.task == "classification":
            work = replace(work, question=_of_every_class(work))
        if by_options:
            first = next(iter(by_options.values()))
            work = replace(work, clock=first.clock, bill=first.bill)
        else:
            advice = partial(work.sizes.advice, count)
            bill = Bill(permit, work.service.limits.answer_bytes, advice)
            work = replace(work, bill=bill)
        by_options[key] = work
    access.reserve(request, sum(costs))
    return [by_options[key] for key in keys]


def check_count(images: int, most: int) -> None:
    """Raise BodyTooLarge for more images than one request may have."""
    if images > most:
        raise BodyTooLarge(f"The request has more than {most} images; send them in several.")


async def _replies(
    works: Sequence[RequestWork], images: Sequence[ImageRequest], quotes: Sequence[Quote]
) -> list[Reply]:
    """The reply for each image. Raises the error of the first image that failed."""
    files = (image.data for image in images)
    outcomes = await asyncio.gather(
        *map(lifecycle.infer, works, files, quotes), return_exceptions=True
    )
    replies: list[Reply] = []
    for work, outcome in zip(works, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            raise as_error(outcome)
        replies.append(Reply(work.model, work.options, outcome, work.service.limits.render_side))
    return replies


def _of_every_class(work: RequestWork) -> Callable[..., Any]:
    classes = len(work.model.labels)
    return partial(work.question, top_k=classes)


def named(service: Service, name: str, version: str | None) -> str:
    """The name of the model at a path with a version.

    It is NAME-VERSION if there is such a model, or NAME if VERSION is its version in `/models`.
    Raises UnknownModel, UnknownVersion.
    """
    if version is None:
        return name
    if f"{name}-{version}" in service.library.entries:
        return f"{name}-{version}"
    service.library.entry(name)
    model = service.pool.models.get(name)
    if model is not None and model.version == version:
        return name
    served = "" if model is None else f" It is served in version {model.version};"
    raise UnknownVersion(
        f"Model {name!r} has no version {version!r}.{served} this path also selects a model with "
        f"the name {name}-{version}."
    )


def parsed(form: type[Form], body: bytes) -> Form:
    """A JSON body. Raises MalformedRequest, InvalidOption."""
    try:
        return form.model_validate(json_of(body))
    except pydantic.ValidationError as error:
        raise InvalidOption(describe(error.errors(include_url=False))) from error


def json_of(body: bytes) -> Any:
    """The value of a JSON body. Raises MalformedRequest."""
    advice = "send images as base64, or tensors as bytes."
    body = bodies.utf8_json(body)
    bodies.check_json(body, MAX_NUMBERS, MAX_NUMBERS // 3, advice)  # a list for each pixel
    try:
        with collector_paused():
            return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"The body is not JSON: {error}.") from error


def query(request: Request) -> dict[str, Any]:
    """The parameters of the query; a repeated one becomes a list."""
    given: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        given.setdefault(name, []).append(value)
    return {name: values if len(values) > 1 else values[0] for name, values in given.items()}


def file_in(text: str) -> bytes:
    """The image file in base64 or a data: URI. Raises InvalidImageData."""
    data = bodies.image_file(text)
    if isinstance(data, InvalidImageData):
        raise data
    return data


def options(form: type[Options], given: Mapping[str, Any]) -> Options:
    """Options of `/explain` or `/predict` from a protocol's parameters.

    `target` means `targets`, and a single value may replace a list.
    Raises InvalidOption.
    """
    fields: dict[str, Any] = {}
    for key, value in given.items():
        name = "targets" if key == "target" else key
        if name in _OURS_ALONE:
            raise InvalidOption(f"This protocol does not accept `{key}`; use /explain.")
        fields[name] = [value] if name in _LISTS and not isinstance(value, list) else value
    try:
        return form(**fields)
    except pydantic.ValidationError as error:
        known = ExplainOptions.model_fields
        raise InvalidOption(describe(error.errors(include_url=False), known)) from error


def json_response(content: Any, status: int = 200) -> Response:
    """JSON, numpy arrays and numbers included."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status_code=status, media_type="application/json")
