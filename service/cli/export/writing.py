"""What `camserve export` does: pictures explained, here or by a service, written as one file."""

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
from service.cli.flags import ERR, say_left_out
from service.durable import whole
from service.errors import ConfigurationError
from service.images.image_files import find_images, text_of
from service.settings import Settings

Images = Sequence[tuple[Path, str]]
"""Files with the names that they have in the export: below the folder that was given."""


@dataclass(frozen=True, slots=True)
class Source:
    """The model that answers, and its answers in the order of the pictures."""

    model: str
    labels: Sequence[str]
    results: Iterable[Result]


@dataclass(frozen=True, slots=True)
class Remote:
    """A service that answers instead of this process; model: one of its own, None: its first."""

    url: str
    api_key: str | None
    model: str | None


Named = Iterator[tuple[str, Result]]
Form = Callable[[TextIO, Source, Named], None]
"""Writes an export to a file."""


def as_coco(file: TextIO, source: Source, results: Named) -> None:
    """One JSON object."""
    json.dump(coco.dataset(results, source.labels, f"camserve {source.model}"), file)


def as_labelbox(features: Mapping[str, str] | None) -> Form:
    """Newline-delimited JSON with the features of `labelbox.rows`."""

    def write(file: TextIO, _source: Source, results: Named) -> None:
        rows = labelbox.rows(results, features or labelbox.FEATURES)
        file.writelines(json.dumps(row) + "\n" for row in rows)

    return write


def run(
    given: Sequence[str],
    options: ExplainOptions,
    out: Path,
    write: Form,
    answers: Remote | Settings,
) -> None:
    """Explain and write; the file is there at the end or not at all.

    answers: who explains: a service, or with these settings this process. Ends with code 1 where a
    picture failed. Raises ConfigurationError, and what `find_images` and `explain_files` raise.
    """
    logs.configure_command()
    images = [(path, text_of(name.with_name(path.name))) for path, name in find_images(given)]
    asked = options.model_copy(update={"include": ["regions"]})
    failed: list[tuple[str, str]] = []

    def named(results: Iterable[Result]) -> Named:
        for (_, name), result in zip(images, results, strict=True):
            if result.error is not None:
                failed.append((name, result.error.detail))
            yield name, result

    with (
        _there(answers, images, asked)
        if isinstance(answers, Remote)
        else _here(answers, images, asked) as source,
        _written(out) as file,
    ):
        write(file, source, named(source.results))
    say_left_out(given)
    for name, detail in failed:
        ERR.print(f"[red]failed:[/] {escape(name)}: {escape(detail)}", soft_wrap=True)
    counts = f"{len(images) - len(failed)} explained, {len(failed)} failed"
    ERR.print(f"{counts} → {escape(text_of(out))}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _there(remote: Remote, images: Images, options: ExplainOptions) -> Iterator[Source]:
    """A service's answers. Raises ConfigurationError for what it says of every picture."""
    said: dict[str, Any] = options.model_dump(exclude_unset=True)
    if remote.model:
        said["model"] = remote.model
    try:
        with Client(remote.url, api_key=remote.api_key) as client:
            model = client.model(remote.model)
            results = client.explain_many([path for path, _ in images], **said)
            yield Source(f"{model.name} {model.version}", model.labels or [], results)
    except ClientError as error:
        raise ConfigurationError(error.detail) from error


@contextmanager
def _here(settings: Settings, images: Images, options: ExplainOptions) -> Iterator[Source]:
    """The answers of a service in this process, without HTTP."""

    def result(outcome: Outcome) -> Result:
        if isinstance(outcome, Failed):
            return Result(error=ClientError(outcome.detail, code=outcome.code))
        return read_result(outcome.result)

    service = build_service(settings.uncompiled())
    model = service.pool.model(None)
    files = [(path, Path(name)) for path, name in images]
    with explain_files(service, files, options, [], ERR) as outcomes:
        yield Source(f"{model.name} {model.version}", model.labels, map(result, outcomes))


@contextmanager
def _written(out: Path) -> Iterator[TextIO]:
    """A file that takes its name once it is written. Raises ConfigurationError."""
    try:
        with whole(out) as draft, draft.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ConfigurationError(f"{text_of(out)} cannot be written: {error.strerror}.") from error
