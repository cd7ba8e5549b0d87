"""Image files named on a command line: files, folders, patterns, standard input."""

from __future__ import annotations

import glob
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from service.errors import ConfigurationError, nearest

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

STDIN = Path("-")
"""Names standard input, as other commands have it; a file of that name is `./-`."""


def find_images(paths: Iterable[Path | str]) -> list[tuple[Path, Path]]:
    """Every image file, once, with the name that its results get below the out folder.

    A file is taken as it is, `-` is standard input; a folder is searched through, and a pattern
    (`*`, `?`, `[…]`, `**` for folders) matched, for the suffixes we read. Names lose their suffix
    where they stay unlike each other. Raises ConfigurationError for what does not exist, and for a
    folder or pattern without images.
    """
    found: dict[Path, Path] = {}
    for given in paths:
        for path, name in _named_by(str(given)):
            found.setdefault(path, name)
    return list(zip(found, _unlike_each_other(list(found.items())), strict=True))


def read_image(path: Path) -> bytes:
    """A file's bytes, or what comes on standard input. Raises OSError."""
    return sys.stdin.buffer.read() if path == STDIN else path.read_bytes()


def _named_by(given: str) -> list[tuple[Path, Path]]:
    path = Path(given)
    if given == "-":
        return [(STDIN, Path("stdin"))]
    if path.is_dir():
        inside = _images(path.rglob("*"))
        if not inside:
            raise ConfigurationError(f"no image is in the folder {path}.")
        return [(each, each.relative_to(path)) for each in inside]
    if path.exists():
        return [(path, Path(path.name))]
    if glob.has_magic(given):
        inside = _images(Path(each) for each in glob.iglob(given, recursive=True))  # noqa: PTH207
        if not inside:
            raise ConfigurationError(f"no image matches {given}.")
        root = _before_the_pattern(path)
        return [(each, each.relative_to(root)) for each in inside]
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    close = nearest(path.name, (each.name for each in beside))
    raise ConfigurationError(f"there is no file {path}.{close}")


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(each for each in paths if each.suffix.lower() in SUFFIXES and each.is_file())


def _before_the_pattern(pattern: Path) -> Path:
    """The folder that a pattern starts from: `photos` of `photos/*/a?.jpg`."""
    parts = [*pattern.parts]
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _unlike_each_other(found: list[tuple[Path, Path]]) -> list[Path]:
    """The shortest form of each name that no other has: bare, with suffix, with its folders."""
    bare = Counter(name.with_suffix("") for _, name in found)
    full = Counter(name for _, name in found)
    return [
        _inside_out(path)
        if full[name] > 1
        else name
        if bare[name.with_suffix("")] > 1
        else name.with_suffix("")
        for path, name in found
    ]


def _inside_out(path: Path) -> Path:
    """A whole path as one that stays below the out folder."""
    return Path(*(part for part in path.absolute().parts[1:] if part not in ("..", ".")))
