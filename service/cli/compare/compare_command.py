"""The flags of `camserve compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.cli.flags import with_settings
from service.settings import Settings


@with_settings(("config", "app_dir", "allow_random_weights", "device"))
def compare(  # noqa: PLR0913, PLR0917 - a command's parameters are its flags
    settings: Settings,
    one: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="The model in use: a model of the configuration, or [NAME=]BUILDER[@WEIGHTS].",
        ),
    ],
    other: Annotated[
        str, typer.Argument(metavar="B", help="The model that is to replace it, likewise.")
    ],
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Folder, file or pattern of images.")
    ],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GATE[=VALUE]",
            help="Exit with code 1 if a figure is beyond its threshold: flips=2%, maps=.8, … , or "
            "defaults for all gates; repeat for several.",
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="COCO file of the objects, to measure evidence off them."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Method of the maps; default: gradcam, of detectors hirescam."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Report as one self-contained .html file.")
    ] = None,
    worst: Annotated[
        int, typer.Option(min=0, max=500, help="Images in the report, the most different ones.")
    ] = 24,
    junit: Annotated[
        Path | None, typer.Option(help="File for the gates as JUnit XML, for CI.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="Only the result as JSON on standard output.")
    ] = False,
) -> None:
    """Compare two models on the same images: labels, scores, and where their evidence lies.

    Exit code 1: a gate of --fail-on refuses B. A file that cannot be read is listed; it refuses B
    only if A can answer it. Of detectors, detections are compared.
    """
    from service.cli.compare.compare_run import Destinations, run  # noqa: PLC0415 - loads torch

    outputs = Destinations(report, worst, junit, as_json)
    run(settings, (one, other), folder, fail_on or [], masks, method, outputs)
