"""Explaining files without a server: the scheduler's work, results wherever they are kept."""

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
from service.cam.heatmap import render_heatmap
from service.cli.tensorboard import Board
from service.durable import write_whole
from service.errors import CamserveError
from service.images.image_files import read_image, text_of
from service.images.upload import Upload
from service.inference.questions import InferenceResult
from service.models.loaded import LoadedModel
from service.pipeline import response
from service.pipeline.process import process_image, render_result
from service.pipeline.resolve import resolve_options
from service.pipeline.service import Recipe, Service

AT_ONCE = 16
"""Images that are read, asked or kept at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Explained:
    """A file that was explained; `name` is its own below the out folder."""

    path: Path
    name: Path
    model: LoadedModel
    options: ExplainOptions
    upload: Upload
    answer: InferenceResult
    result: Result


@dataclass(frozen=True, slots=True)
class Failed:
    """A file that was not, and why."""

    path: Path
    name: Path
    code: str
    detail: str


Outcome = Explained | Failed

Keeper = Callable[[Outcome], None]
"""Keeps what became of a file; called by several threads, in any order."""


@contextmanager
def explain_files(
    service: Service,
    images: Sequence[tuple[Path, Path]],
    options: ExplainOptions,
    keepers: Sequence[Keeper],
    console: Console,
) -> Iterator[Iterator[Outcome]]:
    """What becomes of each image of `find_images`, in their order, while the rest is under way.

    A progress bar runs on `console` where that is a terminal and there are several. Raises what
    `question` raises; a file that fails is an outcome.
    """
    service.scheduler.start()
    try:
        with explain_images(service, images, options, keepers, console) as outcomes:
            yield outcomes
    finally:
        service.scheduler.close()


@contextmanager
def explain_images(  # noqa: PLR0917 - as `explain_files`, and how files are read
    service: Service,
    images: Sequence[tuple[Path, Path]],
    options: ExplainOptions,
    keepers: Sequence[Keeper],
    console: Console,
    read: Callable[[Path], bytes] = read_image,
) -> Iterator[Iterator[Outcome]]:
    """As `explain_files`, in a service whose threads run, and go on when it ends.

    read: the bytes of an image; what it raises, an OSError or one of ours, is the image's.
    """
    model = service.pool.model(None)
    found = resolve_options(model, options, service.limits, images=1)
    recipe = Recipe(service, model, options, found.question, found.hiding, keeps_preview=True)
    job = _Job(recipe, keepers, read)
    with (
        ThreadPoolExecutor(max_workers=AT_ONCE) as waiters,
        Progress(console=console, disable=len(images) < 2 or not console.is_terminal) as bars,
    ):
        bar = bars.add_task("explaining", total=len(images))
        try:
            yield _in_order(waiters, job, images, lambda: bars.advance(bar))
        finally:
            waiters.shutdown(wait=False, cancel_futures=True)


def _in_order(
    waiters: ThreadPoolExecutor,
    job: _Job,
    images: Sequence[tuple[Path, Path]],
    ended: Callable[[], None],
) -> Iterator[Outcome]:
    """Outcomes in the order of the images, of which at most AT_ONCE are in memory."""
    left, waiting = iter(images), deque[Future[Outcome]]()
    while True:
        for path, name in islice(left, AT_ONCE - len(waiting)):
            waiting.append(waiters.submit(job.explain, path, name))
        if not waiting:
            return
        outcome = waiting.popleft().result()
        ended()
        yield outcome


@dataclass(frozen=True, slots=True)
class _Job:
    """What is the same for every file."""

    recipe: Recipe
    keepers: Sequence[Keeper]
    read: Callable[[Path], bytes]

    def explain(self, path: Path, name: Path) -> Outcome:
        """Explain one file; waits in this thread while the scheduler's threads work."""
        outcome: Outcome
        try:
            outcome = asyncio.run(self._explained(path, name))
        except CamserveError as error:
            outcome = Failed(path, name, error.code, error.detail)
        except OSError as error:
            outcome = Failed(path, name, "unreadable_file", f"{error.strerror or error}")
        try:
            for keep in self.keepers:
                self.recipe.service.scheduler.call(keep, outcome).result()
        except CamserveError as error:  # the overlay or the heatmap cannot be drawn
            return Failed(path, name, error.code, error.detail)
        except OSError as error:
            return Failed(path, name, "unwritable_file", f"{error.strerror or error}")
        return outcome

    async def _explained(self, path: Path, name: Path) -> Explained:
        recipe = self.recipe
        assert isinstance(recipe.options, ExplainOptions)
        found = await process_image(recipe, self.read(path))
        result = await render_result(recipe, found)
        return Explained(
            path, name, recipe.model, recipe.options, found.upload, found.inference, result
        )


def into_folder(
    out: Path,
    side: int,
    write: Callable[[Path, bytes], None] = write_whole,
    *,
    numbers: bool = True,
) -> Keeper:
    """Write NAME.overlay.jpeg, NAME.heatmap.png and NAME.json of each image into a folder.

    Further classes carry their id in the name. side: of the longer side of heatmaps, pixels.
    write: writes each file. numbers: whether the JSON is written; it is the last.
    """

    def keep(outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            return
        upload, style = outcome.upload, response.style_of(outcome.options)
        place = out / outcome.name
        place.parent.mkdir(parents=True, exist_ok=True)
        for index, explanation in enumerate(outcome.answer.explanations):
            tag = f".{explanation.class_id}" if index else ""
            drawn = response.overlay(upload, explanation, style)
            write(_beside(place, f"{tag}.overlay.{style.format}"), drawn.data)
            heatmap = render_heatmap(explanation.grid, upload.model_input.geometry, style, side)
            write(_beside(place, f"{tag}.heatmap.png"), heatmap.data)
        if numbers:
            said = outcome.result.model_dump(exclude_unset=True)
            write(_beside(place, ".json"), orjson.dumps(said, option=orjson.OPT_INDENT_2))

    return keep


def onto_board(board: Board) -> Keeper:
    """Each overlay as NAME/CLASS, and each captured layer's maps as NAME/LAYER."""

    def keep(outcome: Outcome) -> None:
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

    return keep


def as_json(outcome: Outcome, service: Service) -> bytes:
    """One line: `file`, `model`, and what `/explain` answers of an image, `error` if it failed."""
    model = service.pool.model(None)
    said = {
        "file": text_of(outcome.path),
        "model": {"name": model.name, "version": model.version},
        **(
            {"error": {"code": outcome.code, "detail": outcome.detail}}
            if isinstance(outcome, Failed)
            else outcome.result.model_dump(exclude_unset=True)
        ),
    }
    return orjson.dumps(said, option=orjson.OPT_APPEND_NEWLINE)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)
