"""`camserve explain`: find the images, explain them, write the results, print a table."""

from __future__ import annotations

import sys
import webbrowser
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.markup import escape

from api_schemas.answers import Explanation, Prediction, verdict_summary
from api_schemas.options import ExplainOptions
from service import logs
from service.app import build_service
from service.cli.explain_files import (
    Failed,
    Outcome,
    Sink,
    as_json,
    explain_files,
    into_folder,
    onto_board,
)
from service.cli.flags import ERR, print_left_out, print_tables, table
from service.cli.report.contact_sheet import ContactSheet
from service.cli.report.page import HtmlReport
from service.cli.tensorboard import open_board
from service.errors import ConfigurationError
from service.images.image_files import find_images, text_of
from service.pipeline.service import Service
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Destinations:
    """Where results go; None or False: nowhere.

    folder: an overlay, a heatmap and a JSON file per image. lines: JSON on standard output.
    browser: open the result in a browser at the end.
    """

    folder: Path | None = None
    lines: bool = False
    sheet: Path | None = None
    report: Path | None = None
    tensorboard: Path | None = None
    browser: bool = False

    def paths(self) -> list[Path]:
        """Return all that is written; the first one is opened in a browser."""
        return [path for path in (self.report, self.sheet, self.folder) if path is not None]


def run(
    settings: Settings, options: ExplainOptions, given: list[str], destinations: Destinations
) -> None:
    """Explain the given images; exits with code 1 if any failed.

    Raises the errors of `find_images`, `build_service` and `explain_files`, and
    ConfigurationError for a path that cannot be written.
    """
    logs.configure_command()
    images = find_images(given)
    _check_paths(destinations)
    service = build_service(settings.uncompiled())
    with ExitStack() as stack:
        sinks = _sinks(service, options, destinations, stack)
        outcomes = stack.enter_context(explain_files(service, images, options, sinks, ERR))
        rows = _ResultTable(options)
        for outcome in outcomes:
            rows.add(outcome)
            if destinations.lines:
                sys.stdout.buffer.write(as_json(outcome, service))
                sys.stdout.buffer.flush()
    if not destinations.lines:
        print_tables(rows.rows)
    print_left_out(given)
    for failed in rows.failed:
        sentence = f"[red]failed:[/] {escape(text_of(failed.path))}: {escape(failed.detail)}"
        ERR.print(sentence, soft_wrap=True)
    counts = f"{rows.explained} explained, {len(rows.failed)} failed"
    paths = ", ".join(map(text_of, destinations.paths()))
    ERR.print(f"{counts} → {escape(paths)}" if paths else counts, soft_wrap=True)
    if destinations.browser and rows.explained:
        _open_browser(destinations, images[0][1] if len(images) == 1 else None, options.format)
    if rows.failed:
        raise typer.Exit(1)


def _check_paths(destinations: Destinations) -> None:
    """Raises ConfigurationError before any work for a file that could not be written."""
    for flag, path, suffixes in (
        ("--sheet", destinations.sheet, (".jpg", ".jpeg", ".png", ".webp")),
        ("--report", destinations.report, (".html", ".htm")),
    ):
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise ConfigurationError(
                f"{flag} {path}: the name must end in {' or '.join(suffixes)}."
            )
        if not path.absolute().parent.is_dir():
            raise ConfigurationError(f"{flag} {path}: there is no folder {path.parent}.")
    if destinations.browser and not destinations.paths():
        raise ConfigurationError("--open with --json needs --out, --sheet or --report as well.")


def _sinks(
    service: Service, options: ExplainOptions, destinations: Destinations, stack: ExitStack
) -> list[Sink]:
    """Return the sinks of the results; the stack finishes them."""
    sinks: list[Sink] = []
    model = service.pool.model(None)
    one_map = {
        "--sheet": destinations.sheet,
        "--tensorboard": destinations.tensorboard,
    }
    for flag, path in one_map.items():
        if path is not None:
            model.check_classifies(flag)
    if destinations.folder is not None:
        sinks.append(into_folder(destinations.folder, service.limits.render_side))
    if destinations.sheet is not None:
        sinks.append(stack.enter_context(ContactSheet(destinations.sheet, model, options)).add)
    if destinations.report is not None:
        sinks.append(stack.enter_context(HtmlReport(destinations.report, model, options)).add)
    if destinations.tensorboard is not None:
        sinks.append(onto_board(stack.enter_context(open_board(destinations.tensorboard))))
    return sinks


class _ResultTable:
    """A table with a row per explained image, and the failures."""

    def __init__(self, options: ExplainOptions) -> None:
        self.explained = 0
        self.failed: list[Failed] = []
        more = ["verdict"] if options.verify != "false" else []
        more += ["with the part hidden"] if options.mask is not None else []
        self.rows = table("image", "prediction", "score", *more, right=("score",))

    def add(self, outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            self.failed.append(outcome)
            return
        self.explained += 1
        row = [escape(text_of(outcome.path)), *_best(outcome.result.predictions or [])]
        if outcome.options.verify != "false":
            row.append(escape(_verdicts(outcome.result.explanations or [])))
        masked = outcome.result.masked
        if masked is not None:
            changes = [f"{change.label} {change.score:.1%}" for change in masked.changes]
            top = masked.predictions[0]
            if top.class_id not in {change.class_id for change in masked.changes}:
                changes.append(f"now {top.label} {top.score:.1%}")
            row.append(escape(", ".join(changes)))
        self.rows.add_row(*row)


def _best(predictions: list[Prediction]) -> tuple[str, str]:
    """The best prediction with its score, and how many more boxes there are."""
    if not predictions:
        return "nothing found", ""
    best, more = predictions[0], len(predictions) - 1
    is_box = best.box is not None and more > 0
    return escape(best.label) + (f" and {more} more" if is_box else ""), f"{best.score:.1%}"


def _verdicts(explanations: list[Explanation]) -> str:
    """The verdict on each map; if there are several, with its class."""
    found = [
        (each.label, verdict_summary(each.verify))
        for each in explanations
        if each.verify is not None
    ]
    return ", ".join(text if len(found) == 1 else f"{label} {text}" for label, text in found)


def _open_browser(destinations: Destinations, only: Path | None, overlay: str) -> None:
    """Open the result in a browser; `only`: the name of the image if there is only one."""
    path = destinations.paths()[0]
    if path == destinations.folder and only is not None:
        path = path / only.with_name(f"{only.name}.overlay.{overlay}")
    if not webbrowser.open(path.absolute().as_uri()):
        ERR.print(f"no browser was found; open {escape(text_of(path))}", soft_wrap=True)
