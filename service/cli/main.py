"""The command `camserve`.

A command imports what it needs when it runs, so that `--help` and shell completion do not wait for
torch, which takes seconds to import.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from api_schemas.options import ExplainOptions
from service import __version__
from service.cli.audit.audit_command import audit
from service.cli.baseline import baseline
from service.cli.bulk.bulk_command import bulk
from service.cli.compare.compare_command import compare
from service.cli.export.export_command import export
from service.cli.flags import OF_MODELS, errors_as_events, with_options, with_settings
from service.cli.layers_command import layers
from service.cli.model_commands import calibrate, check, models
from service.cli.token import overlay_token
from service.settings import Settings

EXIT_CODES = (
    "Exit codes: 0 success; 1 some images or models failed, the others are done; 2 nothing was "
    "done, because a flag, a name or a setting is invalid; 130 interrupted."
)

app = typer.Typer(
    name="camserve",
    help="Image classification with the evidence for it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"camserve {__version__}")
        raise typer.Exit


@app.callback()
def _of_all_commands(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Image classification with the evidence for it."""


@app.command()
@with_settings(tuple(Settings.model_fields))
def serve(settings: Settings) -> None:
    """Serve models over HTTP."""
    from service.cli.listening import listening

    as_events = errors_as_events() if settings.log_format == "json" else nullcontext()
    with as_events, listening(settings.host, settings.port) as sockets:
        if settings.process_count > 1:
            from service.cli.serve_processes import run_processes

            run_processes(settings, sockets)
            return
        from service.cli.serve_http import run

        run(settings, sockets)


@app.command(epilog=EXIT_CODES)
@with_settings(OF_MODELS)
@with_options
def explain(  # noqa: PLR0913, PLR0917 - a command's parameters are its flags
    options: ExplainOptions,
    settings: Settings,
    images: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders of them, patterns such as 'photos/**/*.jpg', or - for "
            "standard input.",
            metavar="IMAGE…",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for an overlay, a heatmap and a JSON file per image. [default: "
            "explained, unless --json, --sheet or --report is given]",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json/--no-json", help="Only results on standard output: one line of JSON per image."
        ),
    ] = False,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Contact sheet of all images, as one .jpg, .png or .webp file."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Report on all images, as one self-contained .html file.")
    ] = None,
    browser: Annotated[
        bool,
        typer.Option(
            "--open/--no-open", help="Open the result: the report, the sheet, or the files."
        ),
    ] = False,
    regions: Annotated[
        bool,
        typer.Option(
            "--regions/--no-regions", help="Add mask, boxes, polygons and peak to the JSON."
        ),
    ] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Folder for overlays and feature maps as TensorBoard images."),
    ] = None,
) -> None:
    """Explain images without a server.

    A bad file does not stop the others; the exit code is 1 if any failed.
    """
    from service.cli.explain import Destinations, run

    if regions:
        options = options.model_copy(update={"include": ["grid", "regions"]})
    nothing_else = not (as_json or sheet or report)
    run(
        settings,
        options,
        images,
        Destinations(
            folder=out or (Path("explained") if nothing_else else None),
            lines=as_json,
            sheet=sheet,
            report=report,
            browser=browser,
            tensorboard=tensorboard,
        ),
    )


for command in (models, layers, check, calibrate, overlay_token):
    app.command()(command)
app.command(epilog=EXIT_CODES)(bulk)
app.command()(audit)
app.command(epilog=EXIT_CODES)(export)
app.command()(compare)
app.command()(baseline)


def main() -> None:
    """The entry point; Ctrl-C exits with code 130 and no traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
