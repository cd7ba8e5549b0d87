"""Read `models.toml`: the models to serve, with the configuration of each."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from service.errors import ConfigurationError, nearest
from service.models.catalog import (
    ENTRY,
    NAME,
    Dtype,
    Fit,
    Floating,
    InputSpec,
    Interpolation,
    ModelSpec,
    Output,
    Task,
    check_names,
)
from service.models.huggingface import PREFIX, local_folder
from service.models.weights.labels import labels_of_text
from service.models.weights.metadata import check_unit

SHOWN = 5
"""Number of mistakes that one error lists."""


def read_config(path: Path) -> tuple[ModelSpec, ...]:
    """The models of a file, in its order; relative paths start at the folder of the file.

    Raises ConfigurationError with the file, and the key path or the line, of each mistake.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        beside = [each.name for each in path.parent.glob("*.toml")]
        raise ConfigurationError(
            f"--config {path}: {error.strerror}. It takes a file that has [[model]] for each "
            f"model.{nearest(path.name, beside, 1)}"
        ) from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}, line {line}: the file is not UTF-8.") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(_syntax(path, text, str(error))) from error
    try:
        tables = _File.model_validate(document).model
    except ValidationError as error:
        issues = error.errors()
        more = f"\n… and {len(issues) - SHOWN} more" if len(issues) > SHOWN else ""
        lines = [f"{path}: {_sentence(issue)}" for issue in issues[:SHOWN]]
        raise ConfigurationError("\n".join(lines) + more) from error
    specs = tuple(
        _spec(table, f"{path}: model[{index}]", path.parent) for index, table in enumerate(tables)
    )
    check_names(specs)
    return specs


def _size(value: object) -> object:
    """(height, width) in pixels."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"takes a number of pixels or [height, width], not {value!r}")
    return tuple(sides)


def _numbers(value: object) -> object:
    """One number per channel."""
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values or not all(type(x) in (int, float) and math.isfinite(x) for x in values):
        raise ValueError(f"takes a list with one number per channel, or one number, not {value!r}")
    return tuple(map(float, values))


def _means(value: object) -> object:
    numbers = _numbers(value)
    assert isinstance(numbers, tuple)
    check_unit(numbers, ())
    return numbers


def _divisors(value: object) -> object:
    numbers = _numbers(value)
    assert isinstance(numbers, tuple)
    if min(numbers) <= 0:
        raise ValueError(f"takes numbers above 0, not {value!r}")
    check_unit((), numbers)
    return numbers


def _resize(value: object) -> object:
    """The shorter side, or the (height, width) to cover, in pixels."""
    return _size(value) if isinstance(value, list) else _positive(value)


def _positive(value: object) -> object:
    if type(value) is not int or value < 1:
        raise ValueError(f"takes a whole number above 0, not {value!r}")
    return value


def _one_of(choices: Sequence[str]) -> BeforeValidator:
    def check(value: object) -> object:
        if value not in choices:
            close = nearest(str(value), choices, 1)
            raise ValueError(f"takes {', '.join(choices)}, not {value!r}.{close}")
        return value

    return BeforeValidator(check)


def _named(value: object) -> object:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"takes letters, digits, '.', '_' and '-', not {value!r}")
    return value


def _labels(value: object) -> object:
    if isinstance(value, list) and value and all(isinstance(label, str) for label in value):
        return tuple(value)
    if not isinstance(value, str):  # pydantic collects ValueErrors alone
        raise ValueError(  # noqa: TRY004
            "takes a list of strings, one per class, or the path of a file with them"
        )
    return value


def _select(value: object) -> object:
    if type(value) not in (int, str):
        raise ValueError(f"takes an index (0 is the first) or a key, not {value!r}")
    return value


def _key(value: object) -> object:
    if not isinstance(value, str) or not value.strip("."):
        raise ValueError(f"takes names joined by dots, such as 'state_dict_ema', not {value!r}")
    return value.strip(".")


def _digest(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-fA-F]{64}", value):
        raise ValueError(f"takes the 64 hexadecimal digits of a sha256, not {value!r}")
    return value


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Sides = tuple[int, int] | None
Numbers = tuple[float, ...] | None


class InputTable(_Table):
    """`[model.input]`: the transform from an image to the model input."""

    size: Annotated[Sides, BeforeValidator(_size)] = None
    resize: Annotated[int | tuple[int, int] | None, BeforeValidator(_resize)] = None
    fit: Annotated[Fit | None, _one_of(get_args(Fit))] = None
    interpolation: Annotated[Interpolation | None, _one_of(get_args(Interpolation))] = None
    mean: Annotated[Numbers, BeforeValidator(_means)] = None
    std: Annotated[Numbers, BeforeValidator(_divisors)] = None
    channels: Annotated[int | None, BeforeValidator(_positive)] = None


class OutputTable(_Table):
    """`[model.output]`: how the output becomes scores."""

    activation: Annotated[Output | None, _one_of(get_args(Output))] = None
    select: Annotated[int | str | None, BeforeValidator(_select)] = None


class ModelTable(_Table):
    """`[[model]]`: one model."""

    name: Annotated[str, BeforeValidator(_named)]
    builder: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    revision: str | None = None
    sha256: Annotated[str | None, BeforeValidator(_digest)] = None
    weights_key: Annotated[str | None, BeforeValidator(_key)] = None
    labels: Annotated[str | tuple[str, ...] | None, BeforeValidator(_labels)] = None
    input: InputTable = InputTable()
    output: OutputTable = OutputTable()
    target_layer: str | None = None
    task: Annotated[Task | None, _one_of(get_args(Task))] = None
    device: str | None = None
    dtype: Annotated[Dtype | None, _one_of(get_args(Dtype))] = None
    precision: Annotated[Floating | None, _one_of(get_args(Floating))] = None
    int8: str | None = None


class _File(_Table):
    model: tuple[ModelTable, ...] = Field(min_length=1)


_TABLES: Mapping[str, type[_Table]] = {"input": InputTable, "output": OutputTable}


def _spec(table: ModelTable, source: str, folder: Path) -> ModelSpec:
    input_table, local = table.input, local_folder(table.builder, folder)
    weights = None if table.weights is None else _weights(table, source, folder)
    if table.sha256 is not None and (weights is None or ENTRY.fullmatch(str(weights))):
        raise ConfigurationError(
            f"{source}.sha256: needs a weights file, and `weights` names none."
        )
    if table.weights_key is not None and (weights is None or ENTRY.fullmatch(str(weights))):
        raise ConfigurationError(
            f"{source}.weights_key: needs a weights file, and `weights` names none."
        )
    if table.revision is not None and not table.builder.startswith(PREFIX):
        raise ConfigurationError(
            f"{source}.revision: only {PREFIX}ORG/NAME has revisions, not {table.builder!r}."
        )
    return ModelSpec(
        name=table.name,
        builder=table.builder if local is None else f"{PREFIX}{local}",
        weights=weights,
        revision=table.revision,
        arguments=table.arguments,
        sha256=table.sha256,
        weights_key=table.weights_key,
        labels=_read_labels(table.labels, f"{source}.labels", folder),
        input=InputSpec(**{key: getattr(input_table, key) for key in InputTable.model_fields}),
        output=table.output.activation,
        select=table.output.select,
        target_layer=table.target_layer,
        task=table.task,
        device=table.device,
        dtype=table.dtype,
        precision=table.precision,
        int8=None if table.int8 is None else folder / table.int8,
        source=source,
    )


def _weights(table: ModelTable, source: str, folder: Path) -> Path:
    text = str(table.weights)
    path = folder / text
    if path.is_file():
        return path
    if table.builder.startswith("torchvision/") and ENTRY.fullmatch(text):
        return Path(text)
    raise ConfigurationError(_missing(f"{source}.weights", path))


def _read_labels(
    labels: str | tuple[str, ...] | None, where: str, folder: Path
) -> tuple[str, ...] | None:
    """The labels in models.toml, or those of a labels file (`labels.labels_of_text`)."""
    if labels is None or isinstance(labels, tuple):
        return labels
    path = folder / labels
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigurationError(_missing(where, path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{where}: cannot read {path} as UTF-8 text: {error}.") from error
    try:
        return labels_of_text(text, path.suffix.lower())
    except ValueError as error:
        raise ConfigurationError(f"{where}: {path} {error}.") from error


def _missing(where: str, path: Path) -> str:
    beside = [file.name for file in path.parent.glob("*") if file.is_file()]
    close = nearest(path.name, beside, 1)
    return (
        f"{where}: there is no file {path}; a relative path starts at the folder of models.toml."
        f"{close}"
    )


def _syntax(path: Path, text: str, message: str) -> str:
    """The message of the parser, with the line at the beginning."""
    position = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if position is None or position[1] is None:
        line, column = len(text.splitlines()) or 1, None
    else:
        line, column = int(position[1]), position[2]
    where = f"line {line}" + (f", column {column}" if column else "")
    return f"{path}, {where}: {message[: position.start()] if position else message}."


def _sentence(issue: Any) -> str:
    """One error of pydantic: the key path and the problem."""
    where, kind = _path(issue["loc"]), issue["type"]
    if kind == "extra_forbidden":
        *around, key = issue["loc"]
        last = around[-1] if around else None
        table = _TABLES.get(str(last), _File if last is None else ModelTable)
        known = tuple(table.model_fields)
        return f"{where}: unknown key.{nearest(str(key), known) or _all(known)}"
    if issue["loc"] == ("model",) and kind != "missing":
        return f"{where}: holds no model; write [[model]] with double brackets for each model."
    if kind == "missing":
        return f"{where}: is missing." + ("" if issue["loc"][1:] else " Begin with [[model]].")
    message = str(issue["msg"]).removeprefix("Value error, ")
    if kind != "value_error":
        message = f"{message[:1].lower()}{message[1:]}, not {issue['input']!r}"
    return f"{where}: {message}" + ("" if message.endswith("?") else ".")


def _all(keys: Sequence[str]) -> str:
    return f" Known keys: {', '.join(keys)}."


def _path(loc: Sequence[str | int]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text
