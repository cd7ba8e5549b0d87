"""Import the function of a `package.module:function` builder, and say what is wrong with it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from service.errors import ConfigurationError, nearest
from service.models.catalog import ModelSpec

SHOWN = 5
"""Number of functions that an error lists."""


def imported_function(spec: ModelSpec) -> Callable[..., Any]:
    """The function of the builder. Raises ConfigurationError with the nearest name.

    `spec.app_dir` is searched first, from now on also for what the module imports later.
    """
    module_name, _, function_name = spec.builder.partition(":")
    if spec.app_dir is not None and str(spec.app_dir.absolute()) not in sys.path:
        sys.path.insert(0, str(spec.app_dir.absolute()))
    module = _imported(spec, module_name)
    function = getattr(module, function_name, None)
    if function is None:
        problem = f"the module {module_name} has no function {function_name!r}"
        raise _refused(spec, problem, _hidden(spec) or _nearest_function(module, function_name))
    if isinstance(function, nn.Module) or not callable(function):
        problem = f"it is {type(function).__name__}, not a function that returns a module"
        raise _refused(spec, problem, f"Write one: def build(): return {function_name}")
    return function  # type: ignore[no-any-return]


def signature_mismatch(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """What to change where a function does not take the arguments, with a leading space, or ""."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a built-in
        return ""
    try:
        signature.bind(**arguments)
    except TypeError:
        return f" It takes {signature}; set them as `arguments` of the model in models.toml."
    return ""


def _imported(spec: ModelSpec, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _refused(spec, f"{error}", "Install what it imports.") from error
        raise _refused(spec, f"there is no module {error.name!r}", _where(spec, name)) from error
    except Exception as error:  # an import runs user code
        problem = f"its import raised {type(error).__name__}: {error}"
        raise _refused(spec, problem, "Fix the module, and start again.") from error


def _refused(spec: ModelSpec, problem: str, remedy: str) -> ConfigurationError:
    where = spec.at("builder")
    return ConfigurationError(f"{where}: cannot import {spec.builder!r}: {problem}. {remedy}")


def _where(spec: ModelSpec, name: str) -> str:
    """Where a module that is not found may be: hidden by another one, or in another folder."""
    folder = _folder(spec)
    close = nearest(name, _modules_in(folder), 1)
    function = spec.builder.partition(":")[2]
    suggestion = close.removesuffix("'?") + f":{function}'?" if close else ""
    return _hidden(spec) or f"It is imported from --app-dir, which is {folder}.{suggestion}"


def _folder(spec: ModelSpec) -> Path:
    return (spec.app_dir or Path()).absolute()


def _hidden(spec: ModelSpec) -> str:
    """What hides the user's module: a loaded one of the same name, such as `service`; or ""."""
    top, _, below = spec.builder.partition(":")[0].partition(".")
    function = spec.builder.partition(":")[2]
    folder = _folder(spec)
    file = getattr(sys.modules.get(top), "__file__", None)
    ours = (folder / f"{top}.py", folder / top / "__init__.py")
    if file is None or Path(file) in ours or top not in _modules_in(folder):
        return ""
    instead = f", or write {below}:{function} with --app-dir {folder / top}" if below else ""
    return (
        f"The name {top!r} is taken by {file}, which hides the one in {folder}. Rename yours"
        f"{instead}."
    )


def _modules_in(folder: Path) -> Iterable[str]:
    """The modules and packages of a folder, two levels deep, with dotted names."""

    def names(inside: Path) -> Iterator[str]:
        for path in inside.iterdir() if inside.is_dir() else ():
            if path.suffix == ".py" or (path.is_dir() and path.name.isidentifier()):
                yield path.stem

    top = sorted(names(folder))
    below = (f"{each}.{inner}" for each in top for inner in sorted(names(folder / each)))
    return [*top, *below]


def _nearest_function(module: ModuleType, name: str) -> str:
    known = [
        each
        for each, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    close = nearest(name, known, 1).strip()
    if close:
        return close.replace("'", f"'{module.__name__}:", 1)
    return f"It has {', '.join(sorted(known)[:SHOWN]) or 'none'}."
