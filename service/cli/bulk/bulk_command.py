"""The flags of `camserve bulk`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api_schemas.options import ExplainOptions
from service.cli.flags import (
    OF_MODELS,
    RayActors,
    RayAddress,
    RayCpus,
    RayGpus,
    with_options,
    with_settings,
)
from service.errors import ConfigurationError, install_hint
from service.settings import Settings


@with_settings((*OF_MODELS, "compile", "precision", "int8", "cache_dir", "max_batch"))
@with_options
def bulk(  # noqa: PLR0913, PLR0917 - a command's parameters are its flags
    options: ExplainOptions,
    settings: Settings,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder of images, text file with one path per line, Parquet file with a column "
            "of paths; or one of these in a bucket (s3://…, gs://…).",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the results.")],
    column: Annotated[str, typer.Option(help="Column of a Parquet SRC.")] = "path",
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images per Parquet file: the most that a kill loses.")
    ] = 256,
    write_images: Annotated[
        bool, typer.Option("--images/--no-images", help="Also write overlays and heatmaps.")
    ] = True,
    regions: Annotated[
        bool,
        typer.Option(
            "--regions/--no-regions", help="Add mask, boxes, polygons and peak to `answer`."
        ),
    ] = False,
    ray: RayAddress = None,
    ray_actors: RayActors = 64,
    ray_cpus: RayCpus = 1,
    ray_gpus: RayGpus = 0,
) -> None:
    """Explain any number of images, and resume an interrupted run.

    DST receives Parquet files with exactly one row per image, an error for each failed one, and
    overlays and heatmaps. The exit code is 1 if any failed.
    """
    try:
        from service.cli.bulk.bulk_run import run  # noqa: PLC0415 - as above
        from service.cli.bulk.job import BulkJob, RayResources  # noqa: PLC0415 - loads torch, and extras
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"camserve bulk needs {error.name}, which is not installed: {install_hint('bulk')}."
        ) from error
    if regions:
        options = options.model_copy(update={"include": ["grid", "regions"]})
    job = BulkJob(settings, options, write_images)
    cluster = None if ray is None else RayResources(ray, ray_actors, ray_cpus, ray_gpus)
    run(job, source, column, folder.absolute(), shard_size, cluster)
