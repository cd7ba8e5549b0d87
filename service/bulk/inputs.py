"""What is to be explained: the images of a folder, a listing, a Parquet file or a bucket."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from service.errors import BodyTooLarge, ConfigurationError
from service.image_files import SUFFIXES


@dataclass(frozen=True, slots=True)
class Input:
    """One image.

    name: as SRC has it: below a folder, or as a listing says it; no other input has it.
    location: where it is: a path of this machine, or a URL that pyarrow reads (s3, gs, file …).
    """

    name: str
    location: str

    def read(self, max_bytes: int) -> bytes:
        """The file. Raises OSError, and BodyTooLarge over so many bytes."""
        try:
            with _opened(self.location) as file:
                data: bytes = file.read(max_bytes + 1)
        except pa.ArrowException as error:
            raise OSError(str(error)) from error
        if len(data) > max_bytes:
            raise BodyTooLarge(
                f"The file has more than {max_bytes} bytes; CAMSERVE_MAX_BODY_BYTES says how many "
                "are read."
            )
        return data


def list_inputs(source: str, column: str) -> list[Input]:
    """Every image of SRC in its order; what is named twice is listed once.

    column: of a Parquet file, with the paths.
    Raises ConfigurationError where SRC is not there, names no image or cannot be read.
    """
    try:
        listed = list(_listed(source, column))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{source} cannot be read: {error}") from error
    inputs = list({each.name: each for each in listed}.values())
    if not inputs:
        raise ConfigurationError(f"no image is in {source}.")
    return inputs


def _listed(source: str, column: str) -> Iterator[Input]:
    system, path = _place(source)
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise ConfigurationError(f"there is no {source}.")
    if info.type == fs.FileType.Directory:
        yield from _in_bucket(source) if "://" in source else _in_folder(Path(source))
        return
    with system.open_input_file(path) as file:
        names = _column(file, source, column) if path.endswith(".parquet") else _lines(file)
    folder = source.rpartition("/")[0] if "://" in source else str(Path(source).absolute().parent)
    for name in names:
        there = "://" in name or Path(name).is_absolute()
        yield Input(name, name if there else f"{folder}/{name}")


def _in_folder(folder: Path) -> Iterator[Input]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name = os.fsencode(path.relative_to(folder).as_posix())  # which may not be UTF-8
            yield Input(name.decode("utf-8", "backslashreplace"), str(path.absolute()))


def _in_bucket(source: str) -> Iterator[Input]:
    system, path = _place(source.rstrip("/"))
    found = system.get_file_info(fs.FileSelector(path, recursive=True))
    for each in sorted(found, key=lambda info: info.path):
        if each.type == fs.FileType.File and Path(each.path).suffix.lower() in SUFFIXES:
            name = each.path.removeprefix(path).lstrip("/")
            yield Input(name, f"{source.rstrip('/')}/{name}")


def _column(file: Any, source: str, column: str) -> Iterable[str]:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    if column not in names:
        raise ConfigurationError(
            f"{source} has no column {column!r}; --column names one of {', '.join(names)}."
        )
    values = parquet.read(columns=[column])[column]
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ConfigurationError(
            f"the column {column!r} of {source} holds {values.type}, not paths of images."
        )
    return [name for name in values.to_pylist() if name]


def _lines(file: Any) -> Iterable[str]:
    text: str = file.read().decode("utf-8-sig")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _opened(location: str) -> Any:
    if "://" not in location:
        return Path(location).open("rb")
    system, path = _place(location)
    return system.open_input_file(path)


def _place(location: str) -> tuple[Any, str]:
    """The file system of a location and the path there; nothing in the path is an escape."""
    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).absolute())
    scheme, _, rest = location.partition("://")
    host, _, path = rest.partition("/")
    system, root = _file_system(f"{scheme}://{host}/")
    return system, f"{root.rstrip('/')}/{path}"


@functools.cache
def _file_system(url: str) -> tuple[Any, str]:
    """Made once: a bucket's keeps its connections. Raises pyarrow's errors for what it lacks."""
    system, root = fs.FileSystem.from_uri(url)
    return system, str(root)
