"""One image, from its bytes to its result: the same for HTTP, the command line and bulk runs.

recipe = Recipe(service, model, options, resolved.question, resolved.hiding)
result = await answer_image(recipe, data, partial(response.rendered_result, recipe))
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

from api_schemas.options import ExplainOptions
from service.errors import CamserveError
from service.images.decode import ModelInput
from service.images.formats import check_format
from service.images.upload import Sent, Upload, open_upload
from service.inference.questions import Explanation, InferenceResult, Question
from service.pipeline.service import ProcessedImage, Recipe
from service.scheduling.scheduler import InferenceJob, TimedResult

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
    upload = await open_image(recipe, data)
    if opened is not None:
        opened(upload)
    return await _processed(recipe, upload)


async def answer_image(
    recipe: Recipe,
    data: Sent,
    make: Callable[[ProcessedImage, float], T],
    *,
    fits: Callable[[Upload], bool] = lambda _: True,
    opened: Callable[[Upload], None] = lambda _: None,
) -> T:
    """`process_image`, and what is made of it; the event loop has a step between only if needed.

    make: called in a worker with the processed image, and when it was ready, on
          `time.monotonic()`'s clock.
    fits: called in a worker with the opened image; False if `opened` has to be called.
    Raises as `process_image` and `make` do.
    """

    def go_on(upload: Upload) -> Upload | InferenceJob:
        if upload.masked is not None or _searches(recipe) or not fits(upload):
            return upload
        question = _question(recipe, upload.model_input)
        then = partial(_made, recipe, upload, make)
        return InferenceJob(recipe.model, question, recipe.deadline, then)

    answer: T | Upload = await result_of(_opening(recipe, data, go_on))
    if not isinstance(answer, Upload):
        return answer
    opened(answer)
    processed = await _processed(recipe, answer)
    return await result_of(recipe.service.scheduler.call(make, processed, time.monotonic()))


def _made(
    recipe: Recipe,
    upload: Upload,
    make: Callable[[ProcessedImage, float], T],
    timed: TimedResult,
) -> T:
    """What is made of an opened image and its result, in a worker."""
    inference = _noted(recipe, timed)
    _count_verdicts(recipe, inference)
    _watch(recipe, upload, inference)
    return make(ProcessedImage(upload, inference, None), timed.ended)


async def _processed(recipe: Recipe, upload: Upload) -> ProcessedImage:
    inference = await _infer(recipe, _question(recipe, upload.model_input))
    _watch(recipe, upload, inference)
    if upload.masked is None:
        return ProcessedImage(upload, inference, None)
    targets = tuple(explanation.class_id for explanation in inference.explanations)
    question = _question(recipe, upload.masked.model_input)
    masked = await _infer(recipe, replace(question, targets=targets, activations=()))
    return ProcessedImage(upload, inference, masked)


def _watch(recipe: Recipe, upload: Upload, inference: InferenceResult) -> None:
    """Compare the answer with the baseline, off the event loop; nothing waits for it."""
    if recipe.service.watch is not None:
        pixels = upload.model_input.pixels
        recipe.service.scheduler.call(recipe.service.watch, recipe.model, inference, pixels)


def _question(recipe: Recipe, model_input: ModelInput) -> Question:
    return recipe.question(**model_input.placed)


async def render(recipe: Recipe, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that renders in a worker thread; its seconds count as rendering."""
    started = time.monotonic()
    value = await result_of(recipe.service.scheduler.call(function, *args, **kwargs))
    recipe.clock.add("render", time.monotonic() - started)
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


async def open_image(recipe: Recipe, data: Sent) -> Upload:
    """Decode one image in a worker thread. Raises as `open_upload`."""
    return await result_of(_opening(recipe, data, lambda upload: upload))


def _opening(recipe: Recipe, data: Sent, go_on: Callable[[Upload], Any]) -> Future[Any]:
    """Have an image opened, and `go_on` with it, in a worker."""
    service, options = recipe.service, recipe.options
    keeps_preview = recipe.keeps_preview or (
        isinstance(options, ExplainOptions) and "overlay" in options.include
    )
    if isinstance(data, bytes):
        check_format(data, service.limits.formats)
    opens = partial(
        open_upload,
        data,
        recipe.model.preprocessing,
        options.fit,
        max_pixels=service.limits.pixels,
        preview_side=service.limits.render_side if keeps_preview else None,
        hiding=recipe.hiding,
        keeps_source=recipe.keeps_source,
        budget=service.decoding,
        deadline=recipe.deadline,
    )
    started = time.monotonic()

    def opened() -> Any:
        upload = opens()
        recipe.clock.add("decode", time.monotonic() - started)
        return go_on(upload)

    # One number for all images of a request.
    return service.scheduler.call_in_turn(id(recipe.clock), opened)


async def _infer(recipe: Recipe, question: Question) -> InferenceResult:
    result = await run_question(recipe, question)
    if _searches(recipe):
        layers = recipe.model.finer_layers(question.layers)
        for layer in layers:
            result = await _search(recipe, question, result, layer, 1 + len(layers))
    _count_verdicts(recipe, result)
    return result


def _searches(recipe: Recipe) -> bool:
    """Whether earlier layers are tried where a map is not supported."""
    return isinstance(recipe.options, ExplainOptions) and recipe.options.verify == "search"


def _count_verdicts(recipe: Recipe, result: InferenceResult) -> None:
    for explanation in result.explanations:
        if explanation.verdict is not None:
            labels = recipe.model.name, explanation.method, explanation.verdict.verdict
            recipe.service.metrics.verdicts.labels(*labels).inc()


async def _search(
    recipe: Recipe, question: Question, result: InferenceResult, layer: str, looks: int
) -> InferenceResult:
    """The result with the maps of an earlier layer where only these are supported."""
    open_ids = tuple(one.class_id for one in result.explanations if _is_inconclusive(one))
    if not open_ids:
        return result
    assert result.evidence is not None, "verdicts rest on it"
    evidence = replace(result.evidence, looks=looks)
    again = replace(question, targets=open_ids, layers=(layer,), activations=(), evidence=evidence)
    others = {one.class_id: one for one in (await run_question(recipe, again)).explanations}
    explanations = [_better(one, others.get(one.class_id), layer) for one in result.explanations]
    return replace(result, explanations=tuple(explanations))


def _is_inconclusive(explanation: Explanation) -> bool:
    return explanation.verdict is not None and explanation.verdict.verdict == "inconclusive"


def _better(explanation: Explanation, other: Explanation | None, layer: str) -> Explanation:
    if other is None or other.verdict is None:
        return explanation
    return replace(
        other if other.verdict.verdict == "supported" else explanation,
        tried=(*explanation.tried, (layer, other.verdict)),
        cost=explanation.cost + other.cost,
    )


async def run_question(recipe: Recipe, question: Question) -> InferenceResult:
    """Run inference on one image. Raises what the scheduler does."""
    timed = await result_of(
        recipe.service.scheduler.submit(recipe.model, question, recipe.deadline)
    )
    return _noted(recipe, timed)


def _noted(recipe: Recipe, timed: TimedResult) -> InferenceResult:
    """The result without its times, which are the clock's now."""
    recipe.clock.add("queue", timed.queue_seconds)
    recipe.clock.add("inference", timed.inference_seconds)
    return timed.result
