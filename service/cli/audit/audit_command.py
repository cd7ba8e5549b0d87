"""The flags of `camserve audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.cli.flags import (
    OF_MODELS,
    RayActors,
    RayAddress,
    RayCpus,
    RayGpus,
    with_settings,
)
from service.errors import ConfigurationError, install_hint
from service.settings import Settings


@with_settings((*OF_MODELS, "compile", "precision", "cache_dir", "max_batch"))
def audit(  # noqa: PLR0913, PLR0917 - a command's parameters are its flags
    settings: Settings,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of images.")],
    labels: Annotated[
        str | None,
        typer.Option(
            help="The right classes: by-folder (the first folder below FOLDER is the label), a CSV "
            "file with the columns path and label, or a JSON object of label by path."
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="COCO file with the objects' masks: tells a part of the object apart."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("audit"),
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with code 1 if a class has this verdict: suspected_cue, part_of_object, "
            "look, none_found, not_tested. Repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of which images are drawn.")] = 0,
    ray: RayAddress = None,
    ray_actors: RayActors = 64,
    ray_cpus: RayCpus = 1,
    ray_gpus: RayGpus = 0,
) -> None:
    """Find what turns images of other classes into each class: cues, colour, blur, parts.

    OUT receives audit.json, audit.html, images.parquet and trials.parquet. An interrupted run
    resumes. A bad image does not stop it.
    """
    try:
        from service.cli.audit.audit_run import AuditJob, run  # noqa: PLC0415 - loads torch, and extras
        from service.cli.bulk.job import RayResources  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"camserve audit needs {error.name}, which is not installed: {install_hint('bulk')}."
        ) from error
    cluster = None if ray is None else RayResources(ray, ray_actors, ray_cpus, ray_gpus)
    run(AuditJob(settings, folder, labels, masks, seed), out.absolute(), fail_on or [], cluster)
