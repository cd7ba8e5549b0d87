"""The folder of results: shards that are there whole or not at all, joined by the images' names.

DST/job.json               the question that all of it answers
DST/part-00000.parquet     rows, one for each image
DST/pictures/part-00000/…  their overlays and heatmaps
DST/.unfinished/…          what is being written; a kill leaves it, the next start removes it
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from service.errors import ConfigurationError

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("model", pa.string()),
        ("version", pa.string()),
        ("class_id", pa.int32()),
        ("label", pa.string()),
        ("score", pa.float32()),
        ("overlays", pa.list_(pa.string())),
        ("heatmaps", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("error_code", pa.string()),
        ("error_detail", pa.string()),
    ]
)
"""Of every shard. `overlays` and `heatmaps` are paths below DST, one for each explained class;
`answer` is the JSON that /explain gives for the image. A row has those, or it has the error."""

Row = dict[str, Any]

Question = Mapping[str, Any]
"""What is asked of each image, as JSON has it."""


@dataclass(frozen=True, slots=True)
class Results:
    """The folder. Whoever opened it alone adds shards, in this process or in others."""

    folder: Path

    def done(self) -> dict[str, str | None]:
        """Each image that has a row, with its error code. Raises ConfigurationError."""
        found: dict[str, str | None] = {}
        for part in sorted(self.folder.glob("part-*.parquet")):
            try:
                table = pq.read_table(part, columns=["path", "error_code"])
            except (pa.ArrowException, OSError) as error:
                raise ConfigurationError(
                    f"{part} cannot be read ({error}); remove it, and its images are explained "
                    "again."
                ) from error
            codes = table["error_code"].to_pylist()
            found.update(zip(table["path"].to_pylist(), codes, strict=True))
        return found

    def next_number(self) -> int:
        """Of the first shard that is not there, nor any behind it."""
        numbers = [int(part.stem.partition("-")[2]) for part in self.folder.glob("part-*.parquet")]
        return max(numbers, default=-1) + 1

    def work(self) -> Work:
        """Begin to write shards."""
        return Work(self.folder, self.folder / ".unfinished" / uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Work:
    """One writer's place, which no other has: pictures go to `place`/SHARD/… until it is whole."""

    folder: Path
    place: Path

    def finish(self, shard: str, rows: Sequence[Row]) -> None:
        """Make the shard there, with its pictures; where another writer did so, drop this one.

        The last rename decides: before it nothing refers to the pictures. Those that no row refers
        to are dropped. Raises OSError.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        target, written = self.folder / f"{shard}.parquet", self.place / f"{shard}.parquet"
        pictures = self.folder / "pictures" / shard
        if target.exists():
            shutil.rmtree(self.place / shard, ignore_errors=True)
            return
        pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), written, compression="zstd")
        with written.open("rb") as file:
            os.fsync(file.fileno())
        if (self.place / shard).exists():
            named = {Path(each).name for row in rows for each in _pictures(row)}
            for drawn in (self.place / shard).iterdir():
                if drawn.name not in named:
                    drawn.unlink()
            shutil.rmtree(pictures, ignore_errors=True)
            pictures.parent.mkdir(exist_ok=True)
            (self.place / shard).rename(pictures)
        written.rename(target)

    def close(self) -> None:
        """Remove what is unfinished."""
        shutil.rmtree(self.place, ignore_errors=True)
        with suppress(OSError):  # another writer's is still there
            self.place.parent.rmdir()


def _pictures(row: Row) -> list[str]:
    return [*row.get("overlays", ()), *row.get("heatmaps", ())]


@contextmanager
def open_results(folder: Path, question: Question) -> Iterator[Results]:
    """Open DST for one job at a time, and remove what a killed one left unfinished.

    question: what is asked of each image; the folder is for this one alone.
    Raises ConfigurationError where the folder is for another, is in use, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            _lock(lock.fileno(), folder)
            _check(folder / "job.json", question)
            _remove_unfinished(folder)
            yield Results(folder)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename or folder}: {error.strerror or error}."
        ) from error


def _lock(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigurationError(f"another job writes to {folder} right now.") from error


def _check(file: Path, question: Question) -> None:
    asked = orjson.dumps(question, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    if not file.exists():
        new = file.with_suffix(".new")
        new.write_bytes(asked)
        new.rename(file)
        return
    try:
        before, now = orjson.loads(file.read_bytes()), orjson.loads(asked)
    except orjson.JSONDecodeError as error:
        raise ConfigurationError(f"{file} is not what a job wrote: {error}.") from error
    if before != now:
        other = sorted(key for key in before.keys() | now if before.get(key) != now.get(key))
        raise ConfigurationError(
            f"{file.parent} holds answers to another question: {', '.join(other)} differ (see "
            f"{file.name}). Take another folder, or ask the same."
        )


def _remove_unfinished(folder: Path) -> None:
    shutil.rmtree(folder / ".unfinished", ignore_errors=True)
    for pictures in (folder / "pictures").glob("part-*"):
        if not (folder / f"{pictures.name}.parquet").exists():
            shutil.rmtree(pictures)
