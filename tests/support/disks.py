"""What a disk holds after a power cut, from what a program did: a played page cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Notes which files and folders below `root` are synced, and checks what depends on them.

    when_named: called with its path each time a file or folder got a name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.synced: set[int] = set()  # inodes whose content is on the disk
        self.names: dict[int, dict[str, int]] = {}  # by folder, all as inodes
        self.when_named: list[Callable[[Path], None]] = []

    def is_kept(self, path: Path) -> bool:
        """Whether a power cut now would leave this file, its bytes and every folder above it."""
        inside = [each for each in path.parents if each.is_relative_to(self.root)]
        named = all(
            self.names.get(each.parent.stat().st_ino, {}).get(each.name) == each.stat().st_ino
            for each in (path, *inside[:-1])
        )
        return named and path.stat().st_ino in self.synced

    def _fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        inode = os.fstat(descriptor).st_ino
        if path.is_dir():
            self.names[inode] = {each.name: each.lstat().st_ino for each in path.iterdir()}
        else:
            self.synced.add(inode)

    def _named(self, target: Any) -> None:
        for check in self.when_named:
            check(Path(target))


@contextmanager
def playing(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Play a disk below `root` while the `with` runs."""
    disk = Disk(root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk._fsync)
        for name in ("link", "rename", "replace"):
            patch.setattr(os, name, _then(getattr(os, name), disk._named))
        yield disk


def _then(function: Callable[..., None], note: Callable[[Any], None]) -> Callable[..., None]:
    def both(source: Any, target: Any, **options: Any) -> None:
        function(source, target, **options)
        note(target)

    return both
