"""The machine learning backend of Label Studio, at `/integrations/label-studio`.

Label Studio sends a whole selection of tasks in one request, waits at most 100 seconds, and stores
a prediction for every task whose entry is not `[]`. So a task that fails, or is not reached in
time, has `[]`. Label Studio sends health and setup before each selection, and sends no tasks that
have a prediction of setup's `model_version`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, Request, Response

from api_schemas.options import CommonOptions, ExplainOptions, PredictOptions
from api_schemas.protocols import LabelStudioRequest, LabelStudioSetup, LabelStudioTask
from service.errors import CamserveError, InvalidOption
from service.integrations.label_studio import overlay
from service.integrations.label_studio.host import LabelStudio, label_studio_of
from service.integrations.label_studio.label_config import (
    Parameters,
    TaskImage,
    images_in,
    model_version,
    parameters_in,
)
from service.integrations.label_studio.predictions import (
    MAX_FOUND,
    TaskEvidence,
    prediction,
    price,
)
from service.integrations.label_studio.task_images import fetch_image
from service.integrations.protocol_requests import parsed
from service.models.loaded import LoadedModel
from service.pipeline.answer_size import quote_image
from service.pipeline.process import as_error, render, result_of
from service.routes import bodies, docs, encodings, lifecycle
from service.routes.examples import NULL
from service.routes.integration import Integration
from service.routes.lifecycle import RequestWork
from service.routes.state import service_of
from service.scheduling.admission import Bill, Permit

router = APIRouter(prefix="/integrations/label-studio", tags=["Label Studio"])
_log = structlog.get_logger(__name__)

INTEGRATION = Integration(
    routers=(router, overlay.router),
    description="The machine learning backend of the labeling program.",
    schemas=(LabelStudioSetup, LabelStudioRequest),
    # The webhook does nothing. The overlay has a key of its own, in its query.
    open_paths=frozenset({f"{router.prefix}/webhook", f"{router.prefix}/overlay.png"}),
)

LABEL_STUDIO_SECONDS = 100.0
"""How long Label Studio waits for predictions."""

SHARE_OF_TIME = 0.9
"""Of the time for a request; the rest is for started tasks, and for sending the response."""

SETUP_BYTES, SETUP_SECONDS = 1 << 20, 3.0

MAX_EXTRA = 64 << 10
"""Bytes of a project's extra parameters."""

LOGGED = 100
"""Failed tasks of one request that are logged."""

LISTED = 20
"""Predictions considered for a project in which several classes can be chosen."""

_PROBLEMS = docs.problems(400, 401, 404, 408, 413, 422, 429, 503, 504)

_VERSION = "builtin-24bec9d19b86-gradcam-layer3"
_LABEL_CONFIG = (
    '<View><Image name="image" value="$image"/><BrushLabels name="cam" toName="image">'
    '<Label value="cam"/></BrushLabels></View>'
)
_EXAMPLE_SETUP = {
    "project": "1.1795168170",
    "schema": _LABEL_CONFIG,
    "extra_params": {"method": "layercam", "labels": {"sunflower": "yellow flower"}},
}
_EXAMPLE_REQUEST = {
    "tasks": [{"id": 7, "data": {"image": "/data/upload/1/ab12-cat.jpg"}}],
    "project": "1.1795168170",
    "label_config": _LABEL_CONFIG,
    "params": {"context": NULL},
}
_EXAMPLE_BRUSH = {
    "id": "c027ad3599",
    "from_name": "cam",
    "to_name": "image",
    "type": "brushlabels",
    "score": 0.9968,
    "original_width": 640,
    "original_height": 480,
    "image_rotation": 0,
    "value": {"format": "rle", "rle": [0, 18, 192, 0, 57, 27, 252], "brushlabels": ["cam"]},
}
_EXAMPLE_PREDICTION = {"result": [_EXAMPLE_BRUSH], "score": 0.9968, "model_version": _VERSION}


@router.get("/health", responses=docs.example({"status": "UP"}) | docs.problems(401))
async def health() -> dict[str, str]:
    """Liveness; Label Studio expects it within one second, before any other request."""
    return {"status": "UP"}


@router.post(
    "/setup",
    responses=docs.example({"model_version": _VERSION}) | _PROBLEMS,
    openapi_extra=docs.json_body(LabelStudioSetup, _EXAMPLE_SETUP),
)
async def setup(request: Request) -> Response:
    """The version of the predictions that this project would get.

    The project's extra parameters set options of /explain, and `labels` maps classes to labels.
    """
    service = service_of(request)
    with Permit(service.admission) as permit:  # no place: a full queue does not keep it out
        body = await bodies.read_body(request, permit, SETUP_BYTES, SETUP_SECONDS)
        body = await encodings.decoded(request, body, permit, SETUP_BYTES)

        async def work() -> Response:
            call = service.scheduler.call(_set_up, body)
            project, extra, parameters = await result_of(call)
            async with lifecycle.model_in_use(request, parameters.options.model) as model:
                await lifecycle.prepare(request, model, parameters.options, 1, permit)
                version = model_version(model, parameters.options)
            label_studio_of(request).remember(project, extra)
            return _json(orjson.dumps({"model_version": version}))

        return await lifecycle.watched(request, work)


@router.get("/versions", responses=docs.example({"versions": [_VERSION]}) | docs.problems(401))
async def versions(request: Request) -> dict[str, list[str]]:
    """The versions of predictions of the loaded models for a project without parameters."""
    models = service_of(request).pool.models.values()
    return {"versions": [model_version(model, ExplainOptions()) for model in models]}


@router.post("/webhook", responses=docs.example({"status": "ok"}))
async def webhook() -> dict[str, str]:
    """No effect, and no key needed: events of a project change no model."""
    return {"status": "ok"}


@router.post(
    "/predict",
    responses=docs.example({"results": [_EXAMPLE_PREDICTION]}) | _PROBLEMS,
    openapi_extra=docs.json_body(LabelStudioRequest, _EXAMPLE_REQUEST),
)
async def predict(request: Request) -> Response:
    """Class and evidence of each task, in the labels of its project.

    A click in a smart control requests the evidence for the class of its label, a choice that for
    the chosen class.
    """

    async def work(body: bytes, permit: Permit) -> Response:
        service = service_of(request)
        call = service.scheduler.call(_parsed_tasks, label_studio_of(request), body)
        task_request = await result_of(call)
        if not task_request.images and not task_request.is_interactive:
            return _json(_listed([b"[]"] * len(task_request.tasks)))
        async with lifecycle.model_in_use(request, task_request.parameters.options.model) as model:
            window = min(len(task_request.tasks), max(1, service.admission.max_images // 2))
            options = await result_of(service.scheduler.call(task_request.options, model))
            images = max(1, len(task_request.tasks) * len(task_request.images))
            work = await lifecycle.prepare(request, model, options, images, permit)
            selection = _Selection(request, work, task_request, permit, window)
            parts = await selection.answers()
            header = lifecycle.report(request, selection.work, len(parts))
            return _json(_listed(parts), header)

    until = request.scope["started"] + _seconds(request)
    return await lifecycle.in_time(request, work, waits=until)


@dataclass(frozen=True, slots=True)
class _TaskRequest:
    """A parsed request for predictions. clicked: the mark or choice that was just made."""

    tasks: list[LabelStudioTask]
    images: tuple[TaskImage, ...]
    parameters: Parameters
    clicked: dict[str, Any] | None

    @property
    def is_interactive(self) -> bool:
        return self.clicked is not None

    def options(self, model: LoadedModel) -> CommonOptions:
        """The options for the model: only predictions if the project has only choices.

        Those of a detector or a segmenter are its boxes and regions.
        """
        controls = [control for image in self.images for control in image.controls]
        options = self.parameters.options.model_copy(update={"top_k": LISTED})
        if model.task != "classification":
            least = options.min_score if model.task == "detection" else None
            return PredictOptions(model=options.model, top_k=MAX_FOUND, min_score=least)
        if all(control.kind == "choices" for control in controls):
            return PredictOptions(model=options.model, top_k=LISTED, fit=options.fit)
        target = self._clicked_class(model)
        return options.model_copy(update={"targets": [] if target is None else [target]})

    def _clicked_class(self, model: LoadedModel) -> str | None:
        """The id of the class of a click or a choice; None if its label matches no class."""
        clicked = self.clicked or {}
        value = clicked.get("value")
        named = value.get(str(clicked.get("type"))) if isinstance(value, dict) else None
        if not isinstance(named, list):
            return None
        chosen = {label for label in named if isinstance(label, str)}
        for control in (control for image in self.images for control in image.controls):
            if control.name != clicked.get("from_name"):
                continue
            for class_id, label in enumerate(model.labels):
                control_label = control.label_of(*self.parameters.names_of(label))
                if control_label in chosen:
                    return f"id:{class_id}"
        return None


def _set_up(body: bytes) -> tuple[str, bytes, Parameters]:
    """The project, its extra parameters as JSON, and the parsed parameters.

    Raises MalformedRequest, InvalidOption, also for a label_config that predictions fail on.
    """
    sent = parsed(LabelStudioSetup, body)
    images_in(sent.label_config)
    given = sent.extra_params or ""
    try:
        extra = given.encode() if isinstance(given, str) else orjson.dumps(given)
    except orjson.JSONEncodeError as error:  # nested deeper than it writes
        raise InvalidOption(f"The extra parameters cannot be stored: {error}.") from error
    if len(extra) > MAX_EXTRA:
        raise InvalidOption(
            f"The extra parameters have {len(extra)} bytes; send at most {MAX_EXTRA}."
        )
    return sent.project, extra, parameters_in(extra)


def _parsed_tasks(known: LabelStudio, body: bytes) -> _TaskRequest:
    """Raises MalformedRequest, InvalidOption."""
    sent = parsed(LabelStudioRequest, body)
    context = sent.params.context
    clicked = context.result[-1] if context is not None and context.result else None
    if clicked is not None and len(sent.tasks) != 1:
        raise InvalidOption(
            f"A click belongs to one task, and the request has {len(sent.tasks)}; send one."
        )
    extra = known.extra_of(sent.project)
    return _TaskRequest(sent.tasks, images_in(sent.label_config), parameters_in(extra), clicked)


class _Selection:
    """The tasks of one request, at once at most half of the service's places, so that others run.

    The first task uses the request's place; every other one takes a place, and waits until one is
    free.
    """

    def __init__(
        self,
        request: Request,
        work: RequestWork,
        task_request: _TaskRequest,
        permit: Permit,
        window: int,
    ) -> None:
        self._task_request = task_request
        self._permit = permit
        self._request = request
        self._service = service_of(request)
        self._window = window
        self._failures = 0
        self._waiting = iter(enumerate(task_request.tasks))
        self._parts = [b"[]"] * len(task_request.tasks)
        self._until = request.scope["started"] + _seconds(request)
        self._version = model_version(work.model, task_request.parameters.options)
        images = len(task_request.tasks) * len(task_request.images)
        most = self._service.limits.answer_bytes
        advice = functools.partial(work.sizes.advice, images)
        self.work = replace(
            work,
            price=price(task_request.images, work.sizes),
            # Most tasks take far less than their price; the real size is known after drawing.
            bill=Bill(permit, most, advice, in_turn=True),
        )

    async def answers(self) -> list[bytes]:
        """JSON for each task, in order; `[]` if it failed or the time was too short.

        A click has one task, and its error is raised: an annotator waits at the page.
        """
        if self._task_request.is_interactive:
            return [await self._answer(self._task_request.tasks[0], self._permit)]
        left = self._until - time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left), asyncio.TaskGroup() as group:
                for number in range(self._window):
                    group.create_task(self._work_off(self._first if number == 0 else self._admit))
        return self._parts

    async def _work_off(self, admit: Callable[[], Permit]) -> None:
        for index, task in self._waiting:
            try:
                ask = functools.partial(self._admitted, task, admit)
                self._parts[index] = await lifecycle.patiently(ask, self._until)
            except Exception as error:  # noqa: BLE001 - of one task; the others are kept
                self._log_failure(task, as_error(error))
            await asyncio.sleep(0)  # many tasks that fail at once must not block the event loop

    def _log_failure(self, task: LabelStudioTask, error: CamserveError) -> None:
        """Log each of the first failures; the last line says that others are not logged."""
        self._failures += 1
        if self._failures > LOGGED:
            return
        _log.warning(
            "label_studio_task_failed",
            task=task.id,
            code=error.code,
            detail=error.detail,
            more="not logged" if self._failures == LOGGED else None,
            exc_info=error.__cause__ if error.code == "internal_error" else None,
        )

    def _first(self) -> Permit:
        """A permit for bytes only: the request already has the place."""
        return Permit(self._service.admission)

    def _admit(self) -> Permit:
        return self._service.admission.admit()

    async def _admitted(self, task: LabelStudioTask, admit: Callable[[], Permit]) -> bytes:
        with admit() as permit:
            return await self._answer(task, permit)

    async def _answer(self, task: LabelStudioTask, permit: Permit) -> bytes:
        shown: list[tuple[TaskImage, TaskEvidence]] = []
        part = b""
        try:
            for image in self._task_request.images:
                shown += [(image, await self._evidence(image, task, permit))]
            part = await render(
                self.work,
                prediction,
                shown,
                self._version,
                of_click=self._task_request.is_interactive,
            )
        finally:
            self.work.bill.settle(len(part), sum(evidence.answered.priced for _, evidence in shown))
        return part

    async def _evidence(
        self, image: TaskImage, task: LabelStudioTask, permit: Permit
    ) -> TaskEvidence:
        work, limits = self.work, self._service.limits
        source = image.source(task.data)
        data = await fetch_image(self._request, source, task.id, lambda size: permit.grow(0, size))
        quote = quote_image(data, limits.pixels, work.price)

        async def hold() -> None:
            work.bill.add(quote.price)

        await lifecycle.patiently(hold, self._until)
        answered = await lifecycle.infer(work, data, quote)
        parameters, score = self._task_request.parameters, label_studio_of(self._request).score
        return TaskEvidence(work.model, answered, parameters, limits.render_side, score)


def _seconds(request: Request) -> float:
    """Seconds for a request, with time left to send the response."""
    return min(lifecycle.timeout_of(request), LABEL_STUDIO_SECONDS) * SHARE_OF_TIME


def _listed(parts: list[bytes]) -> bytes:
    return b'{"results":[' + b",".join(parts) + b"]}"


def _json(body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, media_type="application/json", headers=headers)
