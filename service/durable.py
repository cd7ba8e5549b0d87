"""Files that are there whole or not at all, also after a power cut.

A name is given to a file only once its bytes are on the disk, and the name is on the disk before
anything else is told of it: fsync of the file, rename, fsync of the folder.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CANNOT = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF})
"""How file systems refuse to sync a folder that needs none."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft in the folder of `path`, with its suffix, that takes its name when the `with` ends.

    Where `path` is a link, its target is replaced. Raises OSError; nothing is left then.
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
    """Write a file that has all of `data`, or stays as it was. Raises OSError."""
    with whole(path) as draft:
        draft.write_bytes(data)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file to the disk; its name may be lost until its folder is synced. Raises OSError."""
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
    """Make a folder and those above it, and wait until their names are on the disk."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in new:
        sync_folder(each.parent)
