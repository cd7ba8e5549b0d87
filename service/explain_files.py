"""Explaining files without a server: the scheduler's work, results as files in a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pydantic
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from api_schemas.options import ExplainOptions
from service.cam.heatmap import render_heatmap
from service.errors import CamserveError, ConfigurationError, InvalidOption
from service.models.loaded import LoadedModel
from service.questions import Answer, Question
from service.routes import wire
from service.routes.asking import question
from service.routes.problems import describe
from service.routes.state import Service
from service.tensorboard import Board
from service.upload import Upload, open_upload

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class Explained:
    """A file that was explained."""

    path: Path
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A file that was not, and why."""

    path: Path
    detail: str


@dataclass(slots=True)
class Report:
    """What became of each file, in the order they were given."""

    explained: list[Explained] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)


def find_images(paths: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Every image file with the name, without suffix, that its results get below the out folder.

    Files are taken as they are; folders are searched through, for the suffixes we read.
    Raises ConfigurationError for a path that does not exist or a folder without images.
    """
    found: list[tuple[Path, Path]] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
            if not inside:
                raise ConfigurationError(f"no image is in the folder {path}.")
            found += [(each, each.relative_to(path)) for each in inside]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise ConfigurationError(f"there is no file {path}.")
    taken = Counter(name.with_suffix("") for _, name in found)
    return [
        (path, name if taken[name.with_suffix("")] > 1 else name.with_suffix(""))
        for path, name in found
    ]


def explain_options(**values: Any) -> ExplainOptions:
    """The options of `/explain`. Raises InvalidOption with what is wrong in words."""
    try:
        return ExplainOptions(**values)
    except pydantic.ValidationError as error:
        raise InvalidOption(describe(error.errors(include_url=False))) from error


def explain_files(  # noqa: PLR0917 - what, of what, where to, and who is told
    service: Service,
    paths: Sequence[Path],
    out: Path,
    options: ExplainOptions,
    console: Console,
    board: Board | None = None,
) -> Report:
    """Write NAME.overlay.jpeg, NAME.heatmap.png and NAME.json for each image.

    On the board each overlay is NAME/CLASS, and each captured layer's maps NAME/LAYER. A progress
    bar runs on `console` where there are several. Raises what `find_images` and `question` raise; a
    file that fails is in the report.
    """
    images = find_images(paths)
    model = service.pool.model(None)
    ask = question(model, options, service.limits, images=1)
    job = _Job(service, model, options, ask, board)
    ended: dict[Path, Explained | Failed] = {}
    service.scheduler.start()
    try:
        with (
            ThreadPoolExecutor(max_workers=16) as waiters,
            Progress(console=console, disable=len(images) < 2) as progress,
        ):
            bar = progress.add_task("explaining", total=len(images))
            futures = [
                waiters.submit(job.explain, path, out / name, str(name)) for path, name in images
            ]
            for future in as_completed(futures):
                result = future.result()
                ended[result.path] = result
                progress.advance(bar)
    finally:
        service.scheduler.close()
    report = Report()
    for path, _ in images:
        line = ended[path]
        if isinstance(line, Explained):
            report.explained.append(line)
        else:
            report.failed.append(line)
    return report


@dataclass(frozen=True, slots=True)
class _Job:
    """What is the same for every file."""

    service: Service
    model: LoadedModel
    options: ExplainOptions
    question: Callable[[Tensor], Question]
    board: Board | None

    def explain(self, path: Path, out: Path, name: str) -> Explained | Failed:
        """Explain one file; waits in this thread while the scheduler's threads work."""
        scheduler, limits = self.service.scheduler, self.service.limits
        try:
            upload = scheduler.call(
                open_upload,
                path.read_bytes(),
                self.model.preprocessing,
                self.options.fit,
                max_pixels=limits.pixels,
                photo_side=limits.render_side,
            ).result()
            asked = self.question(upload.model_input.pixels)
            answer = scheduler.submit(self.model, asked).result().answer
            return scheduler.call(self.write, path, upload, answer, out, name).result()
        except CamserveError as error:
            return Failed(path, error.detail)
        except OSError as error:
            return Failed(path, f"{error.strerror or error}")

    def write(self, path: Path, upload: Upload, answer: Answer, out: Path, name: str) -> Explained:
        """Write the files of one image; further classes carry their id in the name."""
        side, style = self.service.limits.render_side, wire.style_of(self.options)
        out.parent.mkdir(parents=True, exist_ok=True)
        for place, explanation in enumerate(answer.explanations):
            tag = f".{explanation.class_id}" if place else ""
            drawn = wire.overlay(upload, explanation, style)
            _beside(out, f"{tag}.overlay.{style.format}").write_bytes(drawn.data)
            geometry = upload.model_input.geometry
            heatmap = render_heatmap(explanation.grid, geometry, style, side)
            _beside(out, f"{tag}.heatmap.png").write_bytes(heatmap.data)
            if self.board is not None:
                self.board.add(f"{name}/{self.model.labels[explanation.class_id]}", drawn)
        if self.board is not None:
            for activation in answer.activations:
                call = f".{activation.call}" if activation.call else ""
                maps, _ = wire.picture_of(self.model, activation)
                self.board.add(f"{name}/{activation.layer}{activation.part}{call}", maps)
        numbers = wire.result(self.model, upload, answer, self.options, side)
        _beside(out, ".json").write_bytes(
            orjson.dumps(numbers.model_dump(exclude_unset=True), option=orjson.OPT_INDENT_2)
        )
        best = answer.predictions[0]
        return Explained(path, self.model.labels[best.class_id], best.score)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)
