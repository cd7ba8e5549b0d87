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
from service.images.decode import ModelInput
from service.images.formats import check_format
from service.images.upload import Sent, Upload, open_upload
from service.inference.questions import Explanation, InferenceResult, Question
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
    upload = await open_image(recipe, data)
    if opened is not None:
        opened(upload)
    inference = await _infer(recipe, _question(recipe, upload.model_input))
    if recipe.service.watch is not None:  # nothing waits for it, and it is off the event loop
        pixels = upload.model_input.pixels
        recipe.service.scheduler.call(recipe.service.watch, recipe.model, inference, pixels)
    if upload.masked is None:
        return ProcessedImage(upload, inference, None)
    targets = tuple(explanation.class_id for explanation in inference.explanations)
    question = _question(recipe, upload.masked.model_input)
    masked = await _infer(recipe, replace(question, targets=targets, activations=()))
    return ProcessedImage(upload, inference, masked)


def _question(recipe: Recipe, model_input: ModelInput) -> Question:
    geometry = model_input.geometry
    question = recipe.question(model_input.pixels)
    return replace(
        question, seen=geometry.content, source=geometry.source_size, shown=geometry.seen
    )


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


async def open_image(recipe: Recipe, data: Sent) -> Upload:
    """Decode one image in a worker thread. Raises as `open_upload`."""
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
            keeps_source=recipe.keeps_source,
            budget=service.decoding,
            deadline=recipe.deadline,
        )
    )
    recipe.clock.seconds["decode"] += time.monotonic() - started
    return upload


async def _infer(recipe: Recipe, question: Question) -> InferenceResult:
    result = await run_question(recipe, question)
    if isinstance(recipe.options, ExplainOptions) and recipe.options.verify == "search":
        layers = recipe.model.finer_layers(question.layers)
        for layer in layers:
            result = await _search(recipe, question, result, layer, 1 + len(layers))
    for explanation in result.explanations:
        if explanation.verdict is not None:
            labels = recipe.model.name, explanation.method, explanation.verdict.verdict
            recipe.service.metrics.verdicts.labels(*labels).inc()
    return result


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
    recipe.clock.seconds["queue"] += timed.queue_seconds
    recipe.clock.seconds["inference"] += timed.inference_seconds
    return timed.result
