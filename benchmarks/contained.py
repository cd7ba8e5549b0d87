"""A bound on a server's memory, as near to a container's as this machine allows.

    with bounded(3 << 30) as bound:
        serving(Kind(..., prefix=bound.prefix))
    print(bound.how)

A control group of version 1 or 2 where this process may make one, seen by the server as a container
sees its own; else RLIMIT_DATA, under which an allocation fails where a container would be killed.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")

_JOIN = 'echo $$ >"$0/cgroup.procs" && '
_SEE = 'mount --bind "$0" "$1" && shift && '
_RUN = 'exec "$@"'


@dataclass(frozen=True, slots=True)
class Bound:
    """How a server is started so that its memory is bounded.

    prefix: of its command. how: in words. group: the control group; None: there is none.
    """

    prefix: tuple[str, ...]
    how: str
    group: Path | None = None

    def peak(self) -> int | None:
        """Bytes used at most, by the control group's own count, files in the cache included."""
        return self._number("memory.peak", "memory.max_usage_in_bytes")

    def _number(self, *names: str) -> int | None:
        for name in names if self.group is not None else ():
            with suppress(OSError, ValueError):
                return int((self.group / name).read_text())  # type: ignore[operator]
        return None


@contextmanager
def bounded(size: int) -> Iterator[Bound]:
    """Bound a server that is started inside to that many bytes."""
    for version, parent, files in (
        (2, CGROUP, {"memory.max": size, "memory.swap.max": 0}),
        (1, CGROUP / "memory", {"memory.limit_in_bytes": size}),
    ):
        group = _group(parent, files)
        if group is not None:
            try:
                yield _bound(version, parent, group, size)
            finally:
                _remove(group)
            return
    kibibytes = size >> 10
    prefix = ("sh", "-c", f'ulimit -d {kibibytes} && exec "$@"', "sh")
    yield Bound(prefix, f"RLIMIT_DATA of {size >> 20} MiB, which the server does not see")


def _group(parent: Path, files: dict[str, int]) -> Path | None:
    """A new control group with these values; None where that is not allowed here."""
    group = parent / f"camserve-hostile-{os.getpid()}"
    try:
        if parent is CGROUP:
            if "memory" not in (parent / "cgroup.controllers").read_text().split():
                return None
            (parent / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError:
        return None
    for name, value in files.items():
        try:
            (group / name).write_text(str(value))
        except OSError:
            if value:  # there may be no swap to forbid
                group.rmdir()
                return None
    return group


def _bound(version: int, parent: Path, group: Path, size: int) -> Bound:
    how = f"a control group (version {version}) of {size >> 20} MiB"
    own = ("unshare", "--mount", "--propagation", "private")
    seen = (*own, "sh", "-c", _JOIN + _SEE + _RUN, str(group), str(parent))
    joined = ("sh", "-c", _JOIN + _RUN, str(group))
    try:
        subprocess.run([*seen, "true"], check=True, capture_output=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return Bound(joined, f"{how}, which the server does not see", group)
    return Bound(seen, f"{how}, seen by the server", group)


def _remove(group: Path) -> None:
    for _ in range(50):  # its last process may not be gone yet
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)
