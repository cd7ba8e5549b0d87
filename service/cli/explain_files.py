"""Explain files without a server, and pass the outcomes to sinks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import orjson
from rich.console import Console
from rich.progress import Progress

from api_schemas.answers import Result
from api_schemas.options import ExplainOptions
from service.cli.tensorboard import Board
from service.durable import write_whole
from service.errors import CamserveError
from service.images.image_files import read_image, text_of
from service.images.upload import Upload
from service.inference.questions import InferenceResult
from service.models.loaded import LoadedModel
from service.pipeline import response
from service.pipeline.process import answer_image
from service.pipeline.resolve import resolve_options
from service.pipeline.service import ProcessedImage, Recipe, Service

AT_ONCE = 16
"""Images that are read, explained or written at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Explained:
    """An explained file; `name` is the path of its results below the out folder."""

    path: Path
    name: Path
    model: LoadedModel
    options: ExplainOptions
    upload: Upload
    answer: InferenceResult
    result: Result


@dataclass(frozen=True, slots=True)
class Failed:
    """A file that failed, with the error."""

    path: Path
    name: Path
    code: str
    detail: str


Outcome = Explained | Failed

Sink = Callable[[Outcome], None]
"""Receives the outcome of a file; several threads call it, in any order."""


@contextmanager
def explain_files(
    service: Service,
    images: Sequence[tuple[Path, Path]],
    options: ExplainOptions,
    sinks: Sequence[Sink],
    console: Console,
) -> Iterator[Iterator[Outcome]]:
    """Yield the outcome of each image of `find_images`, in order, while later ones are computed.

    A progress bar runs on `console` if that is a terminal and there are several images. Raises the
    errors of `resolve_options`; a file that fails is an outcome.
    """
    service.scheduler.start()
    try:
        with explain_images(service, images, options, sinks, console) as outcomes:
            yield outcomes
    finally:
        service.scheduler.close()


@contextmanager
def explain_images(  # noqa: PLR0917 - as `explain_files`, and how files are read
    service: Service,
    images: Sequence[tuple[Path, Path]],
    options: ExplainOptions,
    sinks: Sequence[Sink],
    console: Console,
    read: Callable[[Path], bytes] = read_image,
) -> Iterator[Iterator[Outcome]]:
    """As `explain_files`, in a service whose scheduler runs before and after.

    read: returns the bytes of an image; its OSError or CamserveError is the outcome.
    """
    model = service.pool.model(None)
    request = resolve_options(model, options, service.limits, images=1)
    recipe = Recipe(service, model, options, request.question, request.hiding, keeps_preview=True)
    explainer = _FileExplainer(recipe, sinks, read)
    with (
        ThreadPoolExecutor(max_workers=AT_ONCE) as waiters,
        Progress(console=console, disable=len(images) < 2 or not console.is_terminal) as bars,
    ):
        bar = bars.add_task("explaining", total=len(images))
        try:
            yield _in_order(waiters, explainer, images, lambda: bars.advance(bar))
        finally:
            waiters.shutdown(wait=False, cancel_futures=True)


def _in_order(
    waiters: ThreadPoolExecutor,
    explainer: _FileExplainer,
    images: Sequence[tuple[Path, Path]],
    on_outcome: Callable[[], None],
) -> Iterator[Outcome]:
    """Yield outcomes in the order of the images; at most AT_ONCE images are in memory."""
    left, waiting = iter(images), deque[Future[Outcome]]()
    while True:
        for path, name in islice(left, AT_ONCE - len(waiting)):
            waiting.append(waiters.submit(explainer.explain, path, name))
        if not waiting:
            return
        outcome = waiting.popleft().result()
        on_outcome()
        yield outcome


@dataclass(frozen=True, slots=True)
class _FileExplainer:
    """Explains files with one recipe."""

    recipe: Recipe
    sinks: Sequence[Sink]
    read: Callable[[Path], bytes]

    def explain(self, path: Path, name: Path) -> Outcome:
        """Explain one file; blocks this thread while the scheduler's threads work."""
        outcome: Outcome
        try:
            outcome = asyncio.run(self._explained(path, name))
        except CamserveError as error:
            outcome = Failed(path, name, error.code, error.detail)
        except OSError as error:
            outcome = Failed(path, name, "unreadable_file", f"{error.strerror or error}")
        try:
            for sink in self.sinks:
                self.recipe.service.scheduler.call(sink, outcome).result()
        except CamserveError as error:  # the overlay or the heatmap cannot be drawn
            return Failed(path, name, error.code, error.detail)
        except OSError as error:
            return Failed(path, name, "unwritable_file", f"{error.strerror or error}")
        return outcome

    async def _explained(self, path: Path, name: Path) -> Explained:
        recipe = self.recipe
        options = recipe.options
        assert isinstance(options, ExplainOptions)

        def explained(processed: ProcessedImage, ready: float) -> Explained:
            result = response.rendered_result(recipe, processed, ready)
            upload, inference = processed.upload, processed.inference
            return Explained(path, name, recipe.model, options, upload, inference, result)

        return await answer_image(recipe, self.read(path), explained)


def into_folder(
    out: Path,
    side: int,
    write: Callable[[Path, bytes], None] = write_whole,
    *,
    json: bool = True,
) -> Sink:
    """Return a sink that writes NAME.overlay.jpeg, NAME.heatmap.png and NAME.json of each image.

    Files of further classes have the class id in their name. side: longer side of heatmaps, pixels.
    write: writes a file. json: whether NAME.json is written; it is the last file.
    """

    def sink(outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            return
        upload, style = outcome.upload, response.style_of(outcome.options)
        stem = out / outcome.name
        stem.parent.mkdir(parents=True, exist_ok=True)
        for index, explanation in enumerate(outcome.answer.explanations):
            of = explanation.class_id if explanation.detection is None else explanation.detection
            tag = f".{of}" if index else ""
            drawn = response.overlay(upload, explanation, style)
            write(_with_ending(stem, f"{tag}.overlay.{style.format}"), drawn.data)
            heatmap = response.heatmap(upload, explanation, style, side)
            write(_with_ending(stem, f"{tag}.heatmap.png"), heatmap.data)
        if json:
            result = outcome.result.model_dump(exclude_unset=True)
            write(_with_ending(stem, ".json"), orjson.dumps(result, option=orjson.OPT_INDENT_2))

    return sink


def onto_board(board: Board) -> Sink:
    """Return a sink that adds overlays as NAME/CLASS, and maps of captured layers as NAME/LAYER."""

    def sink(outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            return
        model, style = outcome.model, response.style_of(outcome.options)
        for explanation in outcome.answer.explanations:
            drawn = response.overlay(outcome.upload, explanation, style)
            board.add(f"{text_of(outcome.name)}/{model.labels[explanation.class_id]}", drawn)
        for activation in outcome.answer.activations:
            call = f".{activation.call}" if activation.call else ""
            maps, _ = response.activation_image(model, activation)
            board.add(f"{text_of(outcome.name)}/{activation.layer}{activation.part}{call}", maps)

    return sink


def as_json(outcome: Outcome, service: Service) -> bytes:
    """Return a JSON line with `file`, `model`, and the result of `/explain`, or `error`."""
    model = service.pool.model(None)
    line = {
        "file": text_of(outcome.path),
        "model": {"name": model.name, "version": model.version},
        **(
            {"error": {"code": outcome.code, "detail": outcome.detail}}
            if isinstance(outcome, Failed)
            else outcome.result.model_dump(exclude_unset=True)
        ),
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _with_ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)
