"""The folder of results: shards that are there whole or not at all, joined by the images' names.

DST/job.json                      the job whose results they are: its source, model and options
DST/model.json                    the model that answered, as it was loaded
DST/part-00000.parquet            rows, one for each image
DST/pictures/part-00000-WRITER/…  their overlays and heatmaps; the rows name the folder
DST/.unfinished/WRITER/…          what is being written; a kill leaves it, the next start removes it
DST/.owner                        the run that may add shards; a later run takes it over
DST/.lock, DST/.commit            held while a run lasts, and while a shard is added

What a row refers to is on the disk before the row is: each file is synced, then named, then its
folder is synced. Each writer has names of its own until the shard's name is given, which one writer
alone gets.
"""

from __future__ import annotations

import errno
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

from service.durable import make_folder, sync, sync_folder, write_synced, write_whole
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

Identity = Mapping[str, Any]
"""What decides what the rows say, as JSON has it."""

_PICTURES = b"camserve.pictures"
"""In the metadata of a shard: the folder of its images below DST/pictures."""

_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK})


@dataclass(frozen=True, slots=True)
class Results:
    """The folder. Whoever opened it alone adds shards, in this process or in others.

    run: names the run that owns the folder; once another run does, nothing of this one is added.
    """

    folder: Path
    run: str

    def done(self) -> dict[str, str | None]:
        """Each image that has a row, with its error code. Raises ConfigurationError."""
        found: dict[str, str | None] = {}
        for part in sorted(self.folder.glob("part-*.parquet")):
            found.update(_codes(part))
        return found

    def next_number(self) -> int:
        """Of the first shard that is not there, nor any behind it."""
        numbers = [int(part.stem.partition("-")[2]) for part in self.folder.glob("part-*.parquet")]
        return max(numbers, default=-1) + 1

    def check_model(self, identity: Identity) -> None:
        """Note the model that answers, or compare it with the one that did so far.

        Raises ConfigurationError where it is another one, OSError.
        """
        file = self.folder / "model.json"
        draft = self.folder / f".{uuid.uuid4().hex}.json"
        write_synced(draft, _as_json(identity))
        try:
            if not _name(draft, file):
                _compare(file, identity)
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(self.folder)

    def work(self) -> Work:
        """Begin to write shards."""
        writer = uuid.uuid4().hex[:16]
        return Work(self.folder, self.run, self.folder / ".unfinished" / writer, writer)


@dataclass(frozen=True, slots=True)
class Work:
    """One writer's place, which no other has: images go to `place`/SHARD/… until it is whole."""

    folder: Path
    run: str
    place: Path
    writer: str

    def pictures(self, shard: str) -> str:
        """Where the images of a shard will be, below DST."""
        return f"pictures/{shard}-{self.writer}"

    def finish(self, shard: str, rows: Sequence[Row]) -> list[Row]:
        """Make the shard there, with its images; where another writer did so, drop this one.

        Returns the rows that are there, of another writer's `path` and `error_code` alone. Images
        that no row refers to are dropped. Raises ConfigurationError where the folder belongs to
        another run by now, OSError.
        """
        make_folder(self.place)
        target, written = self.folder / f"{shard}.parquet", self.place / f"{shard}.parquet"
        drawn, pictures = self.place / shard, self.folder / self.pictures(shard)
        schema = SCHEMA.with_metadata({_PICTURES: pictures.name.encode()})
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), written, compression="zstd")
        sync(written)
        self._drop_all_but({Path(each).name for row in rows for each in _pictures(row)}, drawn)
        with _committing(self.folder):
            self._check_owner()
            if drawn.exists() and not target.exists():
                make_folder(pictures.parent)
                drawn.rename(pictures)
                sync_folder(pictures.parent)
            if _name(written, target):
                sync_folder(self.folder)
                return list(rows)
        written.unlink()
        for each in (drawn, pictures):
            shutil.rmtree(each, ignore_errors=True)
        return [{"path": path, "error_code": code} for path, code in _codes(target).items()]

    def close(self) -> None:
        """Remove what is unfinished."""
        shutil.rmtree(self.place, ignore_errors=True)
        with suppress(OSError):  # another writer's is still there
            self.place.parent.rmdir()

    def _check_owner(self) -> None:
        owner = self.folder / ".owner"
        if not owner.exists() or owner.read_text() != self.run:
            raise ConfigurationError(
                f"another run of camserve bulk took over {self.folder}; this one adds no more."
            )

    def _drop_all_but(self, named: set[str], drawn: Path) -> None:
        """Keep the images that rows refer to. Raises OSError where one of them is not there."""
        there = {each.name for each in drawn.iterdir()} if drawn.exists() else set()
        if lost := named - there:
            raise FileNotFoundError(errno.ENOENT, "an image was removed", str(drawn / min(lost)))
        for name in there - named:
            (drawn / name).unlink()
        if there:
            sync_folder(drawn)


def _pictures(row: Row) -> list[str]:
    return [*row.get("overlays", ()), *row.get("heatmaps", ())]


def _codes(part: Path) -> dict[str, str | None]:
    try:
        table = pq.read_table(part, columns=["path", "error_code"])
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(
            f"{part} cannot be read ({error}); remove it, and its images are explained again."
        ) from error
    return dict(zip(table["path"].to_pylist(), table["error_code"].to_pylist(), strict=True))


def _name(written: Path, target: Path) -> bool:
    """Give a file its name, unless a file has it: one writer alone gets it. Raises OSError."""
    try:
        os.link(written, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            return False
        written.rename(target)
        return True
    written.unlink()
    return True


@contextmanager
def open_results(folder: Path, identity: Identity) -> Iterator[Results]:
    """Open DST for one job at a time, and remove what a killed one left unfinished.

    identity: of the job; the folder is for this one alone.
    Raises ConfigurationError where the folder is for another, is in use, or cannot be written.
    """
    try:
        make_folder(folder)
        with (folder / ".lock").open("w") as lock:
            _lock(lock.fileno(), folder)
            _check(folder / "job.json", identity)
            run = uuid.uuid4().hex
            with _committing(folder):
                write_whole(folder / ".owner", run.encode())
                _remove_unfinished(folder)
            yield Results(folder, run)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename or folder}: {error.strerror or error}."
        ) from error


def _lock(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigurationError(f"another job writes to {folder} right now.") from error


@contextmanager
def _committing(folder: Path) -> Iterator[None]:
    """Hold back other writers; a run that takes the folder over waits for it, too."""
    with (folder / ".commit").open("w") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        yield


def _as_json(identity: Identity) -> bytes:
    return orjson.dumps(identity, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS, default=str)


def _check(file: Path, identity: Identity) -> None:
    if file.exists():
        _compare(file, identity)
        return
    if any(file.parent.glob("part-*.parquet")):
        raise ConfigurationError(
            f"{file.parent} holds results without the {file.name} that says of which job. Use "
            "another folder."
        )
    write_whole(file, _as_json(identity))


def _compare(file: Path, identity: Identity) -> None:
    """Raises ConfigurationError that names what differs between a file and this job."""
    try:
        before, now = orjson.loads(file.read_bytes()), orjson.loads(_as_json(identity))
    except orjson.JSONDecodeError as error:
        raise ConfigurationError(f"{file} is not what a job wrote: {error}.") from error
    one, other = _flat(before), _flat(now)
    changes = [
        f"{key} was {_short(one.get(key))} and is {_short(other.get(key))}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)  # null, too, where an older version recorded none
    ]
    if not changes:
        return
    raise ConfigurationError(
        f"{file.parent} holds the results of another job: {'; '.join(changes)} (see {file.name}). "
        "Nothing was explained. Use another folder for this job, or run the earlier job again as "
        "it was."
    )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, each in value.items():
        flat |= _flat(each, f"{key}.{name}" if key else name)
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    text = "not given" if value is None else text
    return text if len(text) <= 80 else f"{text[:77]}…"


def _remove_unfinished(folder: Path) -> None:
    shutil.rmtree(folder / ".unfinished", ignore_errors=True)
    kept = {_pictures_of(part) for part in folder.glob("part-*.parquet")}
    for pictures in (folder / "pictures").glob("part-*"):
        if pictures.name not in kept:
            shutil.rmtree(pictures)


def _pictures_of(part: Path) -> str:
    """The name of the folder of a shard's images. Raises ConfigurationError."""
    try:
        metadata = pq.read_schema(part).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(
            f"{part} cannot be read ({error}); remove it, and its images are explained again."
        ) from error
    return str(metadata.get(_PICTURES, part.stem.encode()).decode())
