"""One run of `camserve bulk`: what is left to do, done here or on Ray, and how it ended."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.markup import escape

from api_schemas.options import ExplainOptions
from service import logs
from service.app import build_service, model_specs
from service.bulk.explaining import Explaining, Shard, cut
from service.bulk.inputs import Input, list_inputs
from service.bulk.results import Question, Results, Row, open_results
from service.errors import ConfigurationError
from service.flags import ERR
from service.settings import Settings

Stopped = Callable[[], int]
"""The number of the signal that asked to stop, or 0."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of every image; pictures: whether overlays and heatmaps are written."""

    settings: Settings
    options: ExplainOptions
    pictures: bool

    def question(self) -> Question:
        """What a folder of results is for. Raises ConfigurationError for the models' settings."""
        spec = model_specs(self.settings)[0]
        return {
            "model": f"{spec.name}={spec.builder}@{spec.weights or ''}",
            "pictures": self.pictures,
            "options": self.options.model_dump(mode="json"),
        }

    @contextmanager
    def explaining(self, results: Results) -> Iterator[Explaining]:
        """A service of this process, its threads running, that writes to the results."""
        service = build_service(self.settings)
        work = results.work()
        service.scheduler.start()
        try:
            yield Explaining(service, self.options, work, self.pictures)
        finally:
            service.scheduler.close()
            work.close()


@dataclass(frozen=True, slots=True)
class Share:
    """Of a Ray cluster: its address, how many actors at most, cores and GPUs of each."""

    address: str
    actors: int
    cpus: float
    gpus: float


def run(  # noqa: PLR0917 - what, of what, where to, and how
    job: Job, source: str, column: str, folder: Path, shard_size: int, share: Share | None
) -> None:
    """Explain what has no row yet. Raises typer.Exit where not all is well, ConfigurationError."""
    logs.configure("text", level=40)
    inputs = list_inputs(source, column)
    with open_results(folder, job.question()) as results, _signals() as stopped:
        done = results.done()
        left = [each for each in inputs if each.name not in done]
        if len(left) < len(inputs):
            ERR.print(f"{len(inputs) - len(left):,} of {len(inputs):,} images are done.")
        shards = cut(left, shard_size, results.next_number())
        if shards:
            with _finished(job, shards, results, share, stopped) as finished:
                for rows in finished:
                    done.update({row["path"]: row.get("error_code") for row in rows})
        _conclude(inputs, done, folder, stopped())


def _finished(
    job: Job, shards: list[Shard], results: Results, share: Share | None, stopped: Stopped
) -> AbstractContextManager[Iterator[list[Row]]]:
    """The rows of each shard once it is there; `error_code` and `path` of each at least."""
    if share is None:
        return _here(job, shards, results, stopped)
    try:
        from service.bulk.on_ray import explain_on_ray  # noqa: PLC0415 - an extra
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
        f"→ {escape(str(folder))}",
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
