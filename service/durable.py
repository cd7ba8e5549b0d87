"""Atomic, durable files: complete or absent, also after a power failure.

Each write is an fsync of the file, a rename, and an fsync of the folder.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CANNOT = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF})
"""Errors of file systems that cannot sync a folder, and need not."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft in the folder of `path`, with its suffix, which is renamed to `path` at the end.

    If `path` is a link, its target is replaced. Raises OSError, without leaving a draft.
    """
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    try:
        yield draft
        sync(draft)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(target.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to a file atomically. Raises OSError."""
    with whole(path) as draft:
        draft.write_bytes(data)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync it; its name is durable once its folder is synced. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk. Raises OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and wait until their names are on the disk."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for created in new:
        sync_folder(created.parent)
