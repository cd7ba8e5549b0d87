"""One image, from its bytes to its answer: the same for HTTP, the command line and bulk runs.

recipe = Recipe(service, model, options, question, hiding)
answered = await ask(recipe, data)
result = await drawn(recipe, response.result, model, answered.upload, …)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

from torch import Tensor

from api_schemas.answers import Result
from api_schemas.options import CommonOptions, ExplainOptions
from service.errors import CamserveError
from service.images.formats import check_format
from service.images.upload import Hiding, Sent, Upload, open_upload
from service.inference.questions import Answer, Question
from service.metrics import STAGES
from service.models.loaded import LoadedModel
from service.pipeline import response
from service.pipeline.service import Service

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class Clock:
    """Seconds by stage, summed over the images of one request.

    started: on `time.monotonic()`'s clock, from when `total` counts.
    """

    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def stop(self) -> None:
        """Set `total`; only the first call counts, since the answer may hold it by then."""
        self.seconds["total"] = self.seconds["total"] or time.monotonic() - self.started

    def milliseconds(self) -> dict[str, float]:
        return {stage: round(value * 1000, 3) for stage, value in self.seconds.items()}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How each image of a request is answered.

    question: made of an image's pixels, as `resolve.question` returns it.
    hiding:   the part of each image that is hidden for a second answer; None where none is.
    deadline: until when images are waited for, on `time.monotonic()`'s clock; None: for ever.
    photo:    whether a photo to draw on is kept where the options ask for no overlay, too.
    """

    service: Service
    model: LoadedModel
    options: CommonOptions
    question: Callable[[Tensor], Question]
    hiding: Hiding | None
    deadline: float | None = None
    clock: Clock = field(default_factory=Clock)
    photo: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """One image, opened and answered; `masked` with a part of it hidden, where that was asked."""

    upload: Upload
    answer: Answer
    masked: Answer | None


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
    return await drawn(recipe, _result, recipe, answered)


async def respond_alone(
    recipe: Recipe, answered: Answered, serialise: Callable[[response.Result], bytes]
) -> bytes:
    """The whole answer about a single image, rendered and serialised in one call of a worker.

    serialise: what becomes of the image's place in the answer; the clock has stopped by then.
    Raises RenderFailed, and what `serialise` does.
    """
    submitted = time.monotonic()

    def make() -> bytes:
        result = _result(recipe, answered)
        recipe.clock.seconds["render"] += time.monotonic() - submitted
        recipe.clock.stop()
        return serialise(result)

    return await result_of(recipe.service.scheduler.call(make))


def _result(recipe: Recipe, answered: Answered) -> response.Result:
    return response.result(
        recipe.model,
        answered.upload,
        answered.answer,
        recipe.options,
        recipe.service.limits.render_side,
        answered.masked,
    )


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
            photo_side=service.limits.render_side if wants_photo else None,
            hiding=recipe.hiding,
            budget=service.decoding,
            deadline=recipe.deadline,
        )
    )
    recipe.clock.seconds["decode"] += time.monotonic() - started
    return upload


async def _infer(recipe: Recipe, question: Question) -> Answer:
    timed = await result_of(
        recipe.service.scheduler.submit(recipe.model, question, recipe.deadline)
    )
    recipe.clock.seconds["queue"] += timed.queue
    recipe.clock.seconds["inference"] += timed.inference
    return timed.answer
