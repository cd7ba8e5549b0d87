"""`camserve export`: explain images, here or by a service, and write one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.markup import escape

from api_schemas.adapters import coco, labelbox
from api_schemas.client import Client
from api_schemas.client.errors import ClientError
from api_schemas.client.results import Result, read_result
from api_schemas.options import ExplainOptions
from service import logs
from service.app import build_service
from service.cli.explain_files import Failed, Outcome, explain_files
from service.cli.flags import ERR, print_left_out
from service.durable import whole
from service.errors import ConfigurationError
from service.images.image_files import find_images, text_of
from service.settings import Settings

Images = Sequence[tuple[Path, str]]
"""Files, with their names in the export: below the given folder."""


@dataclass(frozen=True, slots=True)
class ModelResults:
    """The model, and its results in the order of the images."""

    model: str
    labels: Sequence[str]
    results: Iterable[Result]


@dataclass(frozen=True, slots=True)
class RemoteService:
    """A running service to use; model: one of its models, None: its first."""

    url: str
    api_key: str | None
    model: str | None


Named = Iterator[tuple[str, Result]]
Writer = Callable[[TextIO, ModelResults, Named], None]
"""Writes results to a file in one format."""


def as_coco(file: TextIO, source: ModelResults, results: Named) -> None:
    """Write one COCO JSON object."""
    json.dump(coco.dataset(results, source.labels, f"camserve {source.model}"), file)


def as_labelbox(features: Mapping[str, str] | None) -> Writer:
    """Return a writer of newline-delimited JSON with the features of `labelbox.rows`."""

    def write(file: TextIO, _source: ModelResults, results: Named) -> None:
        rows = labelbox.rows(results, features or labelbox.FEATURES)
        file.writelines(json.dumps(row) + "\n" for row in rows)

    return write


def run(
    given: Sequence[str],
    options: ExplainOptions,
    out: Path,
    write: Writer,
    answers: RemoteService | Settings,
) -> None:
    """Explain images and write the file, which is complete or absent.

    answers: a running service, or the settings for a service in this process. Exits with code 1 if
    an image failed. Raises ConfigurationError, and the errors of `find_images` and `explain_files`.
    """
    logs.configure_command()
    images = [(path, text_of(name.with_name(path.name))) for path, name in find_images(given)]
    with_regions = options.model_copy(update={"include": ["regions"]})
    failed: list[tuple[str, str]] = []

    def named(results: Iterable[Result]) -> Named:
        for (_, name), result in zip(images, results, strict=True):
            if result.error is not None:
                failed.append((name, result.error.detail))
            yield name, result

    with (
        _from_service(answers, images, with_regions)
        if isinstance(answers, RemoteService)
        else _from_process(answers, images, with_regions) as source,
        _written(out) as file,
    ):
        write(file, source, named(source.results))
    print_left_out(given)
    for name, detail in failed:
        ERR.print(f"[red]failed:[/] {escape(name)}: {escape(detail)}", soft_wrap=True)
    counts = f"{len(images) - len(failed)} explained, {len(failed)} failed"
    ERR.print(f"{counts} → {escape(text_of(out))}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _from_service(
    remote: RemoteService, images: Images, options: ExplainOptions
) -> Iterator[ModelResults]:
    """Yield the results of a running service. Raises ConfigurationError if it cannot be used."""
    arguments: dict[str, Any] = options.model_dump(exclude_unset=True)
    if remote.model:
        arguments["model"] = remote.model
    try:
        with Client(remote.url, api_key=remote.api_key) as client:
            model = client.model(remote.model)
            results = client.explain_many([path for path, _ in images], **arguments)
            yield ModelResults(f"{model.name} {model.version}", model.labels or [], results)
    except ClientError as error:
        raise ConfigurationError(error.detail) from error


@contextmanager
def _from_process(
    settings: Settings, images: Images, options: ExplainOptions
) -> Iterator[ModelResults]:
    """Yield the results of a service in this process, without HTTP."""

    def result(outcome: Outcome) -> Result:
        if isinstance(outcome, Failed):
            return Result(error=ClientError(outcome.detail, code=outcome.code))
        return read_result(outcome.result)

    service = build_service(settings.uncompiled())
    model = service.pool.model(None)
    files = [(path, Path(name)) for path, name in images]
    with explain_files(service, files, options, [], ERR) as outcomes:
        yield ModelResults(f"{model.name} {model.version}", model.labels, map(result, outcomes))


@contextmanager
def _written(out: Path) -> Iterator[TextIO]:
    """Open a file that gets its name once it is complete. Raises ConfigurationError."""
    try:
        with whole(out) as draft, draft.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ConfigurationError(f"{text_of(out)} cannot be written: {error.strerror}.") from error
