"""One image, from its bytes to its result: the same for HTTP, the command line and bulk runs.

recipe = Recipe(service, model, options, resolved.question, resolved.hiding)
processed = await process_image(recipe, data)
result = await render_result(recipe, processed)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import ParamSpec, TypeVar

from api_schemas.answers import Result
from api_schemas.options import ExplainOptions
from service.errors import CamserveError
from service.images.formats import check_format
from service.images.upload import Sent, Upload, open_upload
from service.inference.questions import InferenceResult, Question
from service.pipeline import response
from service.pipeline.service import ProcessedImage, Recipe

P = ParamSpec("P")
T = TypeVar("T")


async def process_image(
    recipe: Recipe, data: Sent, opened: Callable[[Upload], None] | None = None
) -> ProcessedImage:
    """Decode one image and run inference, twice if a part of it is to be hidden.

    opened: called with the image once it is decoded; it may refuse it by raising.
    Raises the ImageErrors of `open_upload`, InvalidOption, DeadlineExceeded, and what the scheduler
    does.
    """
    upload = await _open(recipe, data)
    if opened is not None:
        opened(upload)
    inference = await _infer(recipe, recipe.question(upload.model_input.pixels))
    if upload.masked is None:
        return ProcessedImage(upload, inference, None)
    targets = tuple(explanation.class_id for explanation in inference.explanations)
    question = recipe.question(upload.masked.model_input.pixels)
    masked = await _infer(recipe, replace(question, targets=targets, activations=()))
    return ProcessedImage(upload, inference, masked)


async def render_result(recipe: Recipe, processed: ProcessedImage) -> Result:
    """The image's result in the answer. Raises RenderFailed."""
    side = recipe.service.limits.render_side
    return await render(
        recipe, response.image_result, recipe.model, recipe.options, side, processed
    )


async def render(recipe: Recipe, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that renders in a worker thread; its seconds count as rendering."""
    started = time.monotonic()
    value = await result_of(recipe.service.scheduler.call(function, *args, **kwargs))
    recipe.clock.seconds["render"] += time.monotonic() - started
    return value


async def result_of(future: Future[T]) -> T:
    """Await a scheduler's future; cancelling the task cancels the future."""
    return await asyncio.wrap_future(future)


def as_error(error: BaseException) -> CamserveError:
    """An error of one image as a CamserveError; an unexpected one is kept as the cause."""
    if isinstance(error, CamserveError):
        return error
    if not isinstance(error, Exception):
        raise error
    unexpected = CamserveError(
        "Something failed on the server's side; its log has the cause under this request id."
    )
    unexpected.__cause__ = error
    return unexpected


async def _open(recipe: Recipe, data: Sent) -> Upload:
    service, options = recipe.service, recipe.options
    keeps_preview = recipe.keeps_preview or (
        isinstance(options, ExplainOptions) and "overlay" in options.include
    )
    if isinstance(data, bytes):
        check_format(data, service.limits.formats)
    started = time.monotonic()
    upload = await result_of(
        service.scheduler.call_in_turn(
            id(recipe.clock),  # one for all images of a request
            open_upload,
            data,
            recipe.model.preprocessing,
            options.fit,
            max_pixels=service.limits.pixels,
            preview_side=service.limits.render_side if keeps_preview else None,
            hiding=recipe.hiding,
            budget=service.decoding,
            deadline=recipe.deadline,
        )
    )
    recipe.clock.seconds["decode"] += time.monotonic() - started
    return upload


async def _infer(recipe: Recipe, question: Question) -> InferenceResult:
    timed = await result_of(
        recipe.service.scheduler.submit(recipe.model, question, recipe.deadline)
    )
    recipe.clock.seconds["queue"] += timed.queue_seconds
    recipe.clock.seconds["inference"] += timed.inference_seconds
    return timed.result
