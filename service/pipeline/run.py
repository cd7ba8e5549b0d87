"""One image, from its bytes to its answer: the same for HTTP, the command line and bulk runs.

recipe = Recipe(service, model, options, question, hiding)
answered = await ask(recipe, data)
result = await respond(recipe, answered)
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
from service.pipeline.service import Answered, Recipe

P = ParamSpec("P")
T = TypeVar("T")


async def ask(
    recipe: Recipe, data: Sent, opened: Callable[[Upload], None] | None = None
) -> Answered:
    """Open one image, put the question to the model, and where asked again with a part hidden.

    opened: told of the image once it is decoded; it may refuse by raising.
    Raises the ImageErrors of `open_upload`, InvalidOption, DeadlineExceeded, and what the scheduler
    does.
    """
    upload = await _opened(recipe, data)
    if opened is not None:
        opened(upload)
    answer = await _infer(recipe, recipe.question(upload.model_input.pixels))
    if upload.masked is None:
        return Answered(upload, answer, None)
    targets = tuple(explanation.class_id for explanation in answer.explanations)
    again = recipe.question(upload.masked.model_input.pixels)
    masked = await _infer(recipe, replace(again, targets=targets, activations=()))
    return Answered(upload, answer, masked)


async def respond(recipe: Recipe, answered: Answered) -> Result:
    """The image's place in the answer. Raises RenderFailed."""
    side = recipe.service.limits.render_side
    return await drawn(recipe, response.result, recipe.model, recipe.options, side, answered)


async def drawn(recipe: Recipe, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function makes of answers in a worker thread; its seconds count as rendering."""
    started = time.monotonic()
    value = await result_of(recipe.service.scheduler.call(function, *args, **kwargs))
    recipe.clock.seconds["render"] += time.monotonic() - started
    return value


async def result_of(future: Future[T]) -> T:
    """Await a scheduler's future; who stops waiting cancels it."""
    return await asyncio.wrap_future(future)


def as_error(error: BaseException) -> CamserveError:
    """An error of one image as one of ours; the unforeseen keeps its cause."""
    if isinstance(error, CamserveError):
        return error
    if not isinstance(error, Exception):
        raise error
    unexpected = CamserveError(
        "Something failed on the server's side; its log has the cause under this request id."
    )
    unexpected.__cause__ = error
    return unexpected


async def _opened(recipe: Recipe, data: Sent) -> Upload:
    service, options = recipe.service, recipe.options
    wants_photo = recipe.photo or (
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
            preview_side=service.limits.render_side if wants_photo else None,
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
