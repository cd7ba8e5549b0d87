"""List the images to explain: of a folder, a text file, a Parquet file or a bucket."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from service.errors import BodyTooLarge, ConfigurationError
from service.images.image_files import is_image, text_of


@dataclass(frozen=True, slots=True)
class Input:
    """One image of SRC.

    name: unique: the path below the folder (`text_of`), or the path in the list.
    location: a path of this machine, or a URL that pyarrow reads (s3, gs, file …).
    """

    name: str
    location: str

    def read(self, max_bytes: int) -> bytes:
        """Return the file's bytes. Raises OSError, and BodyTooLarge for more than `max_bytes`."""
        try:
            with _opened(self.location) as file:
                data: bytes = file.read(max_bytes + 1)
        except (pa.ArrowException, ValueError) as error:  # a NUL in the name is a ValueError
            raise OSError(str(error)) from error
        if len(data) > max_bytes:
            raise BodyTooLarge(
                f"The file has more than {max_bytes} bytes; CAMSERVE_MAX_BODY_BYTES sets this "
                "limit."
            )
        return data


def list_inputs(source: str, column: str) -> list[Input]:
    """Return the images of SRC in its order, each once.

    column: the column of a Parquet file that has the paths.
    Raises ConfigurationError if SRC does not exist, has no image or cannot be read.
    """
    try:
        listed = list(_listed(source, column))
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise ConfigurationError(f"{text_of(source)} cannot be read: {error}") from error
    inputs = list({image.name: image for image in listed}.values())
    if not inputs:
        raise ConfigurationError(f"there is no image in {text_of(source)}.")
    return inputs


def absolute_source(source: str) -> str:
    """Return SRC as text that does not depend on the current folder."""
    return source.rstrip("/") if "://" in source else text_of(Path(source).resolve())


def _listed(source: str, column: str) -> Iterator[Input]:
    kind = _kind(source)
    if kind == fs.FileType.NotFound:
        raise ConfigurationError(
            f"SRC {text_of(source)}: there is no such folder, text file or Parquet file."
        )
    if kind == fs.FileType.Directory:
        yield from _in_bucket(source) if "://" in source else _in_folder(Path(source))
        return
    with _opened(source) as file:
        is_table = source.endswith(".parquet")
        names = _column(file, source, column) if is_table else _lines(file, source)
    folder = source.rpartition("/")[0] if "://" in source else str(Path(source).absolute().parent)
    for name in names:
        is_absolute = "://" in name or Path(name).is_absolute()
        yield Input(name, name if is_absolute else f"{folder}/{name}")


def _kind(source: str) -> Any:
    if "://" in source:
        system, path = _resolve(source)
        return system.get_file_info(path).type
    here = Path(source)  # not by pyarrow, whose paths are UTF-8
    if here.is_dir():
        return fs.FileType.Directory
    return fs.FileType.File if here.exists() else fs.FileType.NotFound


def _in_folder(folder: Path) -> Iterator[Input]:
    for path in sorted(folder.rglob("*")):
        if is_image(path) and path.is_file():
            yield Input(text_of(path.relative_to(folder)), str(path.absolute()))


def _in_bucket(source: str) -> Iterator[Input]:
    system, path = _resolve(source.rstrip("/"))
    files = system.get_file_info(fs.FileSelector(path, recursive=True))
    for file in sorted(files, key=lambda info: info.path):
        if file.type == fs.FileType.File and is_image(Path(file.path)):
            name = file.path.removeprefix(path).lstrip("/")
            yield Input(name, f"{source.rstrip('/')}/{name}")


def _column(file: Any, source: str, column: str) -> Iterable[str]:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    if column not in names:
        raise ConfigurationError(
            f"{source} has no column {column!r}; give --column one of {', '.join(names)}."
        )
    values = parquet.read(columns=[column])[column]
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ConfigurationError(
            f"the column {column!r} of {source} holds {values.type}, not paths of images."
        )
    return [name for name in values.to_pylist() if name]


def _lines(file: Any, source: str) -> Iterable[str]:
    """Return the lines, which end with LF or CR LF only: a name may contain other separators."""
    data: bytes = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigurationError(
            f"line {line} of {text_of(source)} is not UTF-8; save the list as UTF-8, or give the "
            "folder of the images itself, whose names may have any bytes."
        ) from error
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [line for line in lines if line.strip()]


def _opened(location: str) -> Any:
    if "://" not in location:
        return Path(location).open("rb")
    system, path = _resolve(location)
    return system.open_input_file(path)


def _resolve(location: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; the path has no escapes."""
    scheme, _, rest = location.partition("://")
    host, _, path = rest.partition("/")
    system, root = _file_system(f"{scheme}://{host}/")
    return system, f"{root.rstrip('/')}/{path}"


@functools.cache
def _file_system(url: str) -> tuple[Any, str]:
    """Return a file system and its root; cached, because a bucket's keeps its connections."""
    system, root = fs.FileSystem.from_uri(url)
    return system, str(root)
