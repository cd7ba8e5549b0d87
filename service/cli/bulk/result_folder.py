"""The folder of results: each shard is complete or absent.

DST/job.json                      the job of these results: source, model and options
DST/model.json                    the model that answered, as it was loaded
DST/part-00000.parquet            rows, one for each image or detection
DST/pictures/part-00000-WRITER/…  their overlays and heatmaps; the rows name the folder
DST/.unfinished/WRITER/…          drafts; the next run removes those of a killed one
DST/.owner                        the run that may add shards; a later run takes over
DST/.lock, DST/.commit            held while a run lasts, and while a shard is added

A file is on the disk before the row that refers to it: each file is synced, then renamed, then its
folder is synced. A writer uses names with its id until it gives a shard its final name, which only
one writer can do. The names `pictures` and `camserve.pictures` are those of folders of 0.1.0.
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
        ("detection", pa.int32()),
        ("box", pa.list_(pa.float32(), 4)),
        ("area", pa.float64()),
        ("margin", pa.float32()),
        ("entropy", pa.float32()),
        ("overlays", pa.list_(pa.string())),
        ("heatmaps", pa.list_(pa.string())),
        ("verdict", pa.string()),
        ("agreement", pa.float32()),
        ("p_place", pa.float32()),
        ("p_centred", pa.float32()),
        ("answer", pa.string()),
        ("error_code", pa.string()),
        ("error_detail", pa.string()),
    ]
)
"""The columns of a shard, whose rows are images; of a detector its detections and of a segmenter
its regions, the rows of an image together. `detection` and `box` (x, y, w, h in source pixels) are
of a detection, `area` of a mask. An image in which nothing is found has one row without a class.

`margin` (of the two best probabilities, 0 undecided) and `entropy` (0 certain, 1 undecided) of a
classifier are for labeling the uncertain images first. `overlays` and `heatmaps` are paths below
DST, one per explained class; `verdict` and its numbers are of the first one's map, null without
`--verify`; `answer` is the JSON of /explain for the image, in its first row. A row has these, or it
has the error."""

Row = dict[str, Any]

Identity = Mapping[str, Any]
"""What determines the rows, as a JSON object."""

_IMAGES = b"camserve.pictures"
"""The key in a shard's metadata for the folder of its images below DST/pictures."""

_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK})


@dataclass(frozen=True, slots=True)
class ResultFolder:
    """The folder. Only the run that opened it last adds shards, from any process.

    run: the id of the run that owns the folder.
    """

    folder: Path
    run: str

    def done(self) -> dict[str, str | None]:
        """Return the error code of each image that has a row. Raises ConfigurationError."""
        codes: dict[str, str | None] = {}
        for part in sorted(self.folder.glob("part-*.parquet")):
            codes.update(_codes(part))
        return codes

    def next_number(self) -> int:
        """Return the number after that of the last shard."""
        numbers = [int(part.stem.partition("-")[2]) for part in self.folder.glob("part-*.parquet")]
        return max(numbers, default=-1) + 1

    def check_model(self, identity: Identity) -> None:
        """Write model.json, or compare the model with it.

        Raises ConfigurationError if it is another model, OSError.
        """
        file = self.folder / "model.json"
        draft = self.folder / f".{uuid.uuid4().hex}.json"
        write_synced(draft, _as_json(identity))
        try:
            if not _rename_new(draft, file):
                _compare(file, identity)
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(self.folder)

    def writer(self) -> ShardWriter:
        """Return a new writer of shards."""
        writer = uuid.uuid4().hex[:16]
        return ShardWriter(self.folder, self.run, self.folder / ".unfinished" / writer, writer)


@dataclass(frozen=True, slots=True)
class ShardWriter:
    """Writes shards: images go to `drafts`/SHARD/… until the shard is complete."""

    folder: Path
    run: str
    drafts: Path
    writer: str

    def images_folder(self, shard: str) -> str:
        """Return the folder for the images of a shard, below DST."""
        return f"pictures/{shard}-{self.writer}"

    def finish(self, shard: str, rows: Sequence[Row]) -> list[Row]:
        """Add the shard with its images, unless another writer has added it.

        Returns the rows of the shard; of another writer's only `path` and `error_code`. Images
        without a row are removed. Raises ConfigurationError if another run owns the folder now,
        OSError.
        """
        make_folder(self.drafts)
        target, written = self.folder / f"{shard}.parquet", self.drafts / f"{shard}.parquet"
        drawn, images = self.drafts / shard, self.folder / self.images_folder(shard)
        schema = SCHEMA.with_metadata({_IMAGES: images.name.encode()})
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), written, compression="zstd")
        sync(written)
        self._drop_all_but({Path(file).name for row in rows for file in _image_files(row)}, drawn)
        with _committing(self.folder):
            self._check_owner()
            if drawn.exists() and not target.exists():
                make_folder(images.parent)
                drawn.rename(images)
                sync_folder(images.parent)
            if _rename_new(written, target):
                sync_folder(self.folder)
                return list(rows)
        written.unlink()
        for path in (drawn, images):
            shutil.rmtree(path, ignore_errors=True)
        return [{"path": path, "error_code": code} for path, code in _codes(target).items()]

    def close(self) -> None:
        """Remove the drafts."""
        shutil.rmtree(self.drafts, ignore_errors=True)
        with suppress(OSError):  # another writer's is still there
            self.drafts.parent.rmdir()

    def _check_owner(self) -> None:
        owner = self.folder / ".owner"
        if not owner.exists() or owner.read_text() != self.run:
            raise ConfigurationError(f"another run took over {self.folder}; this run has stopped.")

    def _drop_all_but(self, named: set[str], drawn: Path) -> None:
        """Remove images without a row. Raises OSError if an image of a row is missing."""
        present = {path.name for path in drawn.iterdir()} if drawn.exists() else set()
        if lost := named - present:
            raise FileNotFoundError(errno.ENOENT, "an image was removed", str(drawn / min(lost)))
        for name in present - named:
            (drawn / name).unlink()
        if present:
            sync_folder(drawn)


def _image_files(row: Row) -> list[str]:
    return [*row.get("overlays", ()), *row.get("heatmaps", ())]


def _codes(part: Path) -> dict[str, str | None]:
    try:
        table = pq.read_table(part, columns=["path", "error_code"])
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(
            f"{part} cannot be read ({error}). Remove it; its images are then explained again."
        ) from error
    return dict(zip(table["path"].to_pylist(), table["error_code"].to_pylist(), strict=True))


def _rename_new(written: Path, target: Path) -> bool:
    """Rename a file, and return whether it was done: not if the name exists. Raises OSError."""
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
def open_results(folder: Path, identity: Identity) -> Iterator[ResultFolder]:
    """Open DST for one run at a time, and remove the drafts of a killed run.

    identity: of the job; a folder has the results of one job.
    Raises ConfigurationError if the folder is of another job, is in use, or cannot be written.
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
            yield ResultFolder(folder, run)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename or folder}: {error.strerror or error}."
        ) from error


def _lock(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigurationError(
            f"another run is writing to {folder}. Wait for it, or use another folder."
        ) from error


@contextmanager
def _committing(folder: Path) -> Iterator[None]:
    """Lock the folder against other writers and against a run that takes over."""
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
            f"{file.parent} holds results but no {file.name}, so their job is unknown. Use another "
            "folder."
        )
    write_whole(file, _as_json(identity))


def _compare(file: Path, identity: Identity) -> None:
    """Raises ConfigurationError that lists what differs between a file and this job."""
    try:
        old, new = orjson.loads(file.read_bytes()), orjson.loads(_as_json(identity))
    except orjson.JSONDecodeError as error:
        raise ConfigurationError(
            f"{file} is not valid JSON: {error}. Use another folder."
        ) from error
    before, now = _flat(old), _flat(new)
    changes = [
        f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)  # an older version recorded fewer keys: null
    ]
    if not changes:
        return
    raise ConfigurationError(
        f"{file.parent} holds the results of another job: {'; '.join(changes)} (see {file.name}). "
        "Nothing was explained. Use another folder for this job, or repeat the earlier job with "
        "its options."
    )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{key}.{name}" if key else name)
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    text = "not given" if value is None else text
    return text if len(text) <= 80 else f"{text[:77]}…"


def _remove_unfinished(folder: Path) -> None:
    shutil.rmtree(folder / ".unfinished", ignore_errors=True)
    kept = {_images_folder_of(part) for part in folder.glob("part-*.parquet")}
    for images in (folder / "pictures").glob("part-*"):
        if images.name not in kept:
            shutil.rmtree(images)


def _images_folder_of(part: Path) -> str:
    """Return the name of the folder of a shard's images. Raises ConfigurationError."""
    try:
        metadata = pq.read_schema(part).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(
            f"{part} cannot be read ({error}). Remove it; its images are then explained again."
        ) from error
    return str(metadata.get(_IMAGES, part.stem.encode()).decode())
