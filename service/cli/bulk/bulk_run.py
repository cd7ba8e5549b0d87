"""Run `camserve bulk`: explain the images that have no row, here or on Ray."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import typer
from rich.markup import escape

from service import logs
from service.cli.bulk.inputs import Input, list_inputs
from service.cli.bulk.job import BulkJob, RayResources, Stopped, no_ray
from service.cli.bulk.result_folder import ResultFolder, Row, open_results
from service.cli.bulk.shards import Shard, split_into_shards
from service.cli.flags import ERR, print_left_out
from service.errors import ConfigurationError
from service.images.image_files import text_of


def run(  # noqa: PLR0917 - a command's arguments
    job: BulkJob,
    source: str,
    column: str,
    folder: Path,
    shard_size: int,
    cluster: RayResources | None,
) -> None:
    """Explain the images that have no row. Raises typer.Exit if any failed, ConfigurationError."""
    logs.configure_command()
    inputs = list_inputs(source, column)
    try:
        identity = job.identity(source, column)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror or error}.") from error
    with open_results(folder, identity) as results, _signals() as stopped:
        done = results.done()
        left = [image for image in inputs if image.name not in done]
        if len(left) < len(inputs):
            ERR.print(f"{len(inputs) - len(left):,} of {len(inputs):,} images are done.")
        shards = split_into_shards(left, shard_size, results.next_number())
        if shards:
            with _finished(job, shards, results, cluster, stopped) as finished:
                for rows in finished:
                    done.update({row["path"]: row.get("error_code") for row in rows})
        print_left_out([source])
        _conclude(inputs, done, folder, stopped())


def _finished(
    job: BulkJob,
    shards: list[Shard],
    results: ResultFolder,
    cluster: RayResources | None,
    stopped: Stopped,
) -> AbstractContextManager[Iterator[list[Row]]]:
    """Yields the rows of each finished shard; a row has at least `path` and `error_code`."""
    if cluster is None:
        return _here(job, shards, results, stopped)
    try:
        from service.cli.bulk.on_ray import explain_on_ray  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise no_ray(error) from error
    return explain_on_ray(job, shards, results, cluster, stopped)


@contextmanager
def _here(
    job: BulkJob, shards: list[Shard], results: ResultFolder, stopped: Stopped
) -> Iterator[Iterator[list[Row]]]:
    with job.explainer(results) as explainer:
        yield explainer.explain(shards, ERR, stopped)


def _conclude(
    inputs: list[Input], done: dict[str, str | None], folder: Path, signalled: int
) -> None:
    """Print the counts, and exit with the code for them."""
    codes = [done[image.name] for image in inputs if image.name in done]
    failed = sum(code is not None for code in codes)
    ERR.print(
        f"{len(codes) - failed:,} explained, {failed:,} failed, {len(inputs) - len(codes):,} left "
        f"→ {escape(text_of(folder))}",
        soft_wrap=True,
    )
    if signalled:
        raise typer.Exit(128 + signalled)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _signals() -> Iterator[Stopped]:
    """Let a first SIGINT or SIGTERM stop the run, and a second one end the process."""
    received = 0

    def stop(number: int, _frame: object) -> None:
        nonlocal received
        received = number
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
