"""Settings as flags of commands, and mistakes as sentences: what all commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import pydantic
import typer
from rich.console import Console
from rich.markup import escape

from service.errors import CamserveError
from service.settings import Settings

OUT = Console()
ERR = Console(stderr=True)

_FLAGS = {"models": "--model"}
OF_MODELS = ("config", "models", "weights", "app_dir", "allow_random_weights", "device", "workers")


def with_settings(names: Sequence[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each named setting; what is not given comes from the environment.

    The command receives the `Settings` as its first argument in place of those flags.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            with told_plainly():
                settings = Settings(**{k: v for k, v in given.items() if v not in (None, [])})
                command(settings, **values)

        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
            + [_flag(name) for name in names]
        )
        run.__annotations__ = {
            name: parameter.annotation
            for name, parameter in inspect.signature(run).parameters.items()
        }
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _flag(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    default = field.get_default()
    kind: Any = {bool: bool, int: int, float: float}.get(type(default), str)
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if name in ("models", "int8"):
        kind = list[str]
    text = f"{field.description} [env: CAMSERVE_{name.upper()}; default: {default or 'none'}]"
    if default == 0 and kind is int:
        text = text.replace("default: none", "default: 0")
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            kind | None,
            typer.Option(flag, help=escape(text), show_default=False),
        ],
    )


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn what the user can mend into one sentence and exit code 2."""
    try:
        yield
    except CamserveError as error:
        ERR.print(f"[red]error:[/] {escape(error.detail)}", soft_wrap=True)
        raise typer.Exit(2) from None
    except pydantic.ValidationError as error:
        for issue in error.errors():
            setting = "_".join(map(str, issue["loc"])).upper()
            ERR.print(f"[red]error:[/] CAMSERVE_{setting}: {escape(issue['msg'])}")
        raise typer.Exit(2) from None
