"""Shared by all commands: flags for settings and options, and errors as sentences."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import structlog
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from api_schemas.options import ExplainOptions
from service import logs
from service.errors import CamserveError, InvalidOption
from service.images.image_files import skipped_files
from service.settings import PREFIX, Settings, warn_of_unknown_variables

_log = structlog.get_logger(__name__)

OUT = Console()
ERR = Console(stderr=True)

_FLAGS = {"models": "--model", "targets": "--target"}
OF_MODELS = ("config", "models", "weights", "app_dir", "allow_random_weights", "device", "workers")


RayAddress = Annotated[
    str | None, typer.Option("--ray", help="Run on this Ray cluster: auto, or HOST:PORT.")
]
RayActors = Annotated[
    int, typer.Option(min=1, help="On Ray: maximum number of actors, each with its own model.")
]
RayCpus = Annotated[float, typer.Option(min=0.01, help="On Ray: cores per actor.")]
RayGpus = Annotated[float, typer.Option(min=0, help="On Ray: GPUs per actor.")]

Command = Callable[..., None]


def with_settings(names: Sequence[str]) -> Callable[[Command], Command]:
    """Give a command a flag for each named setting; the environment sets the others.

    The command receives the `Settings` as its first argument instead of those flags.
    """

    def decorate(command: Command) -> Command:
        return _with_flags(command, [_flag(name) for name in names], _read_settings)

    return decorate


def _read_settings(**given: Any) -> Settings:
    """Return the settings of flags and environment; logs variables that are none of them."""
    settings = Settings(**given)
    logs.configure(settings.log_format)
    warn_of_unknown_variables()
    return settings


def with_options(command: Command) -> Command:
    """Give a command a flag for each option of `/explain` except `model` and `include`.

    The command receives the `ExplainOptions` as its first argument instead of those flags.
    """
    names = [name for name in ExplainOptions.model_fields if name not in ("model", "include")]
    return _with_flags(command, [_option(name) for name in names], explain_options)


def explain_options(**values: Any) -> ExplainOptions:
    """Return the options of `/explain`. Raises InvalidOption with a sentence."""
    try:
        return ExplainOptions(include=["grid"], **values)
    except pydantic.ValidationError as error:
        from service.routes.problems import describe  # noqa: PLC0415 - loads a web framework

        raise InvalidOption(describe(error.errors(include_url=False))) from error


def _with_flags(
    command: Command, flags: Sequence[inspect.Parameter], make: Callable[..., Any]
) -> Command:
    """Return the command with flags instead of its first argument, which `make` builds of them."""
    other = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    def run(*arguments: Any, **values: Any) -> None:
        given = {flag.name: values.pop(flag.name) for flag in flags}
        with errors_as_sentences():
            first = make(**{k: v for k, v in given.items() if v not in (None, [])})
            command(first, *arguments, **values)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in other]
        + list(flags)
    )
    run.__annotations__ = {
        name: parameter.annotation for name, parameter in inspect.signature(run).parameters.items()
    }
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def _flag(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    default = field.get_default()
    kind: Any = {bool: bool, int: int, float: float}.get(type(default), str)
    if name in ("models", "int8"):
        kind = list[str]
    shown = ", ".join(default) if isinstance(default, tuple) else default
    text = (
        f"{field.description} [env: {PREFIX}{name.upper()}; "
        f"default: {'none' if shown in (None, '') else str(shown)}]"
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            kind | None,
            typer.Option(_spelled(name, kind), help=escape(text), show_default=False),
        ],
    )


def _spelled(name: str, kind: Any) -> str:
    """The flag of a setting or an option; a switch has two forms."""
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    return f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag


def _option(name: str) -> inspect.Parameter:
    field = ExplainOptions.model_fields[name]
    is_list = get_origin(field.annotation) is list
    value_type = get_args(field.annotation)[0] if is_list else field.annotation
    if len(parts := [part for part in get_args(value_type) if part is not type(None)]) == 1:
        value_type = parts[0]  # an optional option
    kind: Any = value_type if value_type in (bool, int, float) else str
    choices = (
        [str(choice) for choice in get_args(value_type)]
        if get_origin(value_type) is Literal
        else []
    )
    default = field.get_default()
    text = field.description or ""
    text += f" One of: {', '.join(choices)}." if choices and choices[0] not in text else ""
    if default not in (None, []):
        text += f" [default: {', '.join(default) if is_list else default}]"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[kind] | None if is_list else kind | None,
            typer.Option(
                _spelled(name, kind),
                help=escape(text),
                show_default=False,
                autocompletion=(lambda: choices) if choices else None,
            ),
        ],
    )


def print_left_out(paths: Iterable[str]) -> None:
    """Print to standard error which files of the given folders are not images."""
    line = skipped_files(paths)
    if line:
        ERR.print(escape(line), soft_wrap=True)


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Print an error that the user can fix as one sentence, and exit with code 2."""
    try:
        yield
    except CamserveError as error:
        ERR.print(f"[red]error:[/] {escape(error.detail)}", soft_wrap=True)
        raise typer.Exit(2) from None
    except pydantic.ValidationError as error:
        for issue in error.errors():
            ERR.print(f"[red]error:[/] {escape(_of_setting(issue))}", soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def errors_as_events() -> Iterator[None]:
    """Log an error that ends the command, and exit with code 2: all of standard error is JSON."""
    try:
        yield
    except CamserveError as error:
        _log.error("not_started", code=error.code, detail=error.detail)
        raise typer.Exit(2) from None


def _of_setting(issue: Any) -> str:
    """Return the sentence of an invalid setting: its flag and variable, the value, the problem."""
    name, message = str(issue["loc"][0]), issue["msg"].removeprefix("Value error, ")
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if issue["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]}, not {issue['input']!r}"
    return f"{flag} ({PREFIX}{name.upper()}): {message}."


def table(*columns: str, right: Sequence[str] = (), **options: Any) -> Table:
    """Return a table without lines, whose cells are folded and never cut off.

    right: headings of columns of numbers.
    """
    made = Table(box=None, **options)
    for heading in columns:
        made.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    return made


def print_tables(*tables: Table) -> None:
    """Print to standard output; where that is no terminal, lines are as long as they need to be."""
    console = OUT if OUT.is_terminal else Console(width=1000)
    for each in tables:
        console.print(each)
