"""What `camserve explain` does: images found, explained, kept where that was wanted, and told."""

from __future__ import annotations

import sys
import webbrowser
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from api_schemas.options import ExplainOptions
from service import logs
from service.app import build_service
from service.cli.explain_files import (
    Failed,
    Keeper,
    Outcome,
    as_json,
    explain_files,
    into_folder,
    onto_board,
)
from service.cli.flags import ERR, OUT, say_left_out
from service.cli.report.contact_sheet import ContactSheet
from service.cli.report.page import HtmlReport
from service.cli.tensorboard import open_board
from service.errors import ConfigurationError
from service.images.image_files import find_images, text_of
from service.pipeline.service import Service
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where results go; None and False: not there.

    folder: an overlay, a heatmap and a JSON file each. lines: JSON on standard output.
    opened: in a browser, at the end.
    """

    folder: Path | None = None
    lines: bool = False
    sheet: Path | None = None
    report: Path | None = None
    tensorboard: Path | None = None
    opened: bool = False

    def places(self) -> list[Path]:
        """Everything that is written, the best to look at first."""
        return [each for each in (self.report, self.sheet, self.folder) if each is not None]


def run(settings: Settings, options: ExplainOptions, given: list[str], wanted: Wanted) -> None:
    """Explain what is given; ends with code 1 where any failed.

    Raises what `find_images`, `build_service` and `explain_files` raise, and ConfigurationError for
    a place that nothing can be written to.
    """
    logs.configure_command()
    images = find_images(given)
    _check_places(wanted)
    service = build_service(settings.uncompiled())
    with ExitStack() as stack:
        keepers = _keepers(service, options, wanted, stack)
        outcomes = stack.enter_context(explain_files(service, images, options, keepers, ERR))
        table = _Told(options)
        for outcome in outcomes:
            table.add(outcome)
            if wanted.lines:
                sys.stdout.buffer.write(as_json(outcome, service))
                sys.stdout.buffer.flush()
    if not wanted.lines:
        OUT.print(table.rows)
    say_left_out(given)
    for failed in table.failed:
        sentence = f"[red]failed:[/] {escape(text_of(failed.path))}: {escape(failed.detail)}"
        ERR.print(sentence, soft_wrap=True)
    counts = f"{table.explained} explained, {len(table.failed)} failed"
    places = ", ".join(map(text_of, wanted.places()))
    ERR.print(f"{counts} → {escape(places)}" if places else counts, soft_wrap=True)
    if wanted.opened and table.explained:
        _open(wanted, images[0][1] if len(images) == 1 else None, options.format)
    if table.failed:
        raise typer.Exit(1)


def _check_places(wanted: Wanted) -> None:
    """Refuse before anything is computed what could not be written in the end."""
    for flag, path, suffixes in (
        ("--sheet", wanted.sheet, (".jpg", ".jpeg", ".png", ".webp")),
        ("--report", wanted.report, (".html", ".htm")),
    ):
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise ConfigurationError(
                f"{flag} {path}: the name must end in {' or '.join(suffixes)}."
            )
        if not path.absolute().parent.is_dir():
            raise ConfigurationError(f"{flag} {path}: there is no folder {path.parent}.")
    if wanted.opened and not wanted.places():
        raise ConfigurationError("--open with --json needs --out, --sheet or --report, too.")


def _keepers(
    service: Service, options: ExplainOptions, wanted: Wanted, stack: ExitStack
) -> list[Keeper]:
    """What keeps results, each finished when the stack is unwound."""
    keepers: list[Keeper] = []
    model = service.pool.model(None)
    if wanted.folder is not None:
        keepers.append(into_folder(wanted.folder, service.limits.render_side))
    if wanted.sheet is not None:
        keepers.append(stack.enter_context(ContactSheet(wanted.sheet, model, options)).keep)
    if wanted.report is not None:
        keepers.append(stack.enter_context(HtmlReport(wanted.report, model, options)).keep)
    if wanted.tensorboard is not None:
        keepers.append(onto_board(stack.enter_context(open_board(wanted.tensorboard))))
    return keepers


class _Told:
    """What is said of each image: a row of a table, or why it failed."""

    def __init__(self, options: ExplainOptions) -> None:
        self.explained = 0
        self.failed: list[Failed] = []
        self.rows = Table(box=None)
        self.rows.add_column("image", overflow="fold")
        self.rows.add_column("prediction", overflow="fold")
        self.rows.add_column("score", justify="right")
        if options.mask is not None:
            self.rows.add_column("with the part hidden", overflow="fold")

    def add(self, outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            self.failed.append(outcome)
            return
        self.explained += 1
        best = outcome.result.predictions[0]  # type: ignore[index]
        row = [escape(text_of(outcome.path)), escape(best.label), f"{best.score:.1%}"]
        masked = outcome.result.masked
        if masked is not None:
            changes = [f"{each.label} {each.score:.1%}" for each in masked.changes]
            instead = masked.predictions[0]
            if instead.class_id not in {each.class_id for each in masked.changes}:
                changes.append(f"now {instead.label} {instead.score:.1%}")
            row.append(escape(", ".join(changes)))
        self.rows.add_row(*row)


def _open(wanted: Wanted, only: Path | None, overlay: str) -> None:
    """Show the result in the browser of this machine; `only`: the name of the one image."""
    place = wanted.places()[0]
    if place == wanted.folder and only is not None:
        place = place / only.with_name(f"{only.name}.overlay.{overlay}")
    if not webbrowser.open(place.absolute().as_uri()):
        result = escape(text_of(place))
        ERR.print(f"no browser could be opened; the result is {result}", soft_wrap=True)
