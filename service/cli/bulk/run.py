"""One run of `camserve bulk`: what is left to do, done here or on Ray, and how it ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import typer
from rich.markup import escape

from service import logs
from service.cli.bulk.explaining import Shard, cut
from service.cli.bulk.inputs import Input, list_inputs
from service.cli.bulk.job import Job, Share, Stopped
from service.cli.bulk.results import Results, Row, open_results
from service.cli.flags import ERR, say_left_out
from service.errors import ConfigurationError
from service.images.image_files import text_of


def run(  # noqa: PLR0917 - what, of what, where to, and how
    job: Job, source: str, column: str, folder: Path, shard_size: int, share: Share | None
) -> None:
    """Explain what has no row yet. Raises typer.Exit where not all is well, ConfigurationError."""
    logs.configure_command()
    inputs = list_inputs(source, column)
    try:
        identity = job.identity(source, column)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror or error}.") from error
    with open_results(folder, identity) as results, _signals() as stopped:
        done = results.done()
        left = [each for each in inputs if each.name not in done]
        if len(left) < len(inputs):
            ERR.print(f"{len(inputs) - len(left):,} of {len(inputs):,} images are done.")
        shards = cut(left, shard_size, results.next_number())
        if shards:
            with _finished(job, shards, results, share, stopped) as finished:
                for rows in finished:
                    done.update({row["path"]: row.get("error_code") for row in rows})
        say_left_out([source])
        _conclude(inputs, done, folder, stopped())


def _finished(
    job: Job, shards: list[Shard], results: Results, share: Share | None, stopped: Stopped
) -> AbstractContextManager[Iterator[list[Row]]]:
    """The rows of each shard once it is there; `error_code` and `path` of each at least."""
    if share is None:
        return _here(job, shards, results, stopped)
    try:
        from service.cli.bulk.on_ray import explain_on_ray  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--ray needs {error.name}, which is not installed: pip install -e '.[ray]' in the "
            "checkout."
        ) from error
    return explain_on_ray(job, shards, results, share, stopped)


@contextmanager
def _here(
    job: Job, shards: list[Shard], results: Results, stopped: Stopped
) -> Iterator[Iterator[list[Row]]]:
    with job.explaining(results) as explaining:
        yield explaining.explain(shards, ERR, stopped)


def _conclude(
    inputs: list[Input], done: dict[str, str | None], folder: Path, signalled: int
) -> None:
    """Say what is there now, and end with the exit code for it."""
    there = [done[each.name] for each in inputs if each.name in done]
    failed = sum(code is not None for code in there)
    ERR.print(
        f"{len(there) - failed:,} explained, {failed:,} failed, {len(inputs) - len(there):,} left "
        f"→ {escape(text_of(folder))}",
        soft_wrap=True,
    )
    if signalled:
        raise typer.Exit(128 + signalled)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _signals() -> Iterator[Stopped]:
    """SIGINT and SIGTERM ask to stop; the same again ends the process at once."""
    received = 0

    def stop(number: int, _frame: object) -> None:
        nonlocal received
        received = number
        signal.signal(number, signal.SIG_DFL)

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
