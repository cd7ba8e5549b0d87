"""Image files named on a command line: files, folders, patterns, standard input."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from service.errors import ConfigurationError, nearest

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".pjpeg", ".pjp"),
        *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
    }
)
"""Suffixes of images in a folder; a file that is named explicitly needs none of them."""

NAMED = 5
"""Number of skipped files that a message names."""

STDIN = Path("-")
"""Standard input, as in other commands; a file of that name is `./-`."""


def is_image(path: Path) -> bool:
    """Whether a file in a folder has an image suffix; macOS writes `._a.jpg` beside `a.jpg`."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._")


def skipped_files(paths: Iterable[Path | str]) -> str:
    """A message about files in folders that are not images, or "".

    Hidden files and files in hidden folders are not mentioned.
    """
    others = [
        text_of(path)
        for folder in map(Path, paths)
        if folder.is_dir()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_image(path) and not _is_hidden(path.relative_to(folder))
    ]
    if not others:
        return ""
    more = f" and {len(others) - NAMED:,} more" if len(others) > NAMED else ""
    files = "1 file" if len(others) == 1 else f"{len(others):,} files"
    return (
        f"skipped {files} without an image suffix: {', '.join(others[:NAMED])}{more}. Name a "
        "file explicitly to read it."
    )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part in _SYSTEM_FILES for part in path.parts)


_SYSTEM_FILES = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})


def find_images(paths: Iterable[Path | str]) -> list[tuple[Path, Path]]:
    """Every image file, once, with the name of its results below the output folder.

    `-` is standard input; a folder is searched recursively, and a pattern (`*`, `?`, `[…]`, `**`
    for folders) is matched, for files with an image suffix. Names lose their suffix if they remain
    unique. Raises ConfigurationError for a missing file, and for a folder or pattern without
    images.
    """
    images: dict[Path, Path] = {}
    for argument in paths:
        for path, name in _expand(str(argument)):
            images.setdefault(path, name)
    return list(zip(images, _unique_names(list(images.items())), strict=True))


def text_of(path: Path | str) -> str:
    r"""A path as unique UTF-8 text.

    A byte that is not UTF-8 becomes `\xNN`. A backslash that starts such a form in the path itself
    becomes `\x5c`, so that `\xNN` always stands for a byte.
    """
    escaped = re.sub(rb"\\(?=x[0-9a-fA-F]{2})", rb"\\x5c", os.fsencode(path))
    return escaped.decode("utf-8", "backslashreplace")


def read_image(path: Path) -> bytes:
    """The bytes of a file or of standard input. Raises OSError."""
    return sys.stdin.buffer.read() if path == STDIN else path.read_bytes()


def _expand(argument: str) -> list[tuple[Path, Path]]:
    path = Path(argument)
    if argument == "-":
        return [(STDIN, Path("stdin"))]
    if path.is_dir():
        inside = _images(path.rglob("*"))
        if not inside:
            others = skipped_files([path])
            raise ConfigurationError(
                f"there is no image in the folder {text_of(path)}{f'; {others}' if others else '.'}"
            )
        return [(file, file.relative_to(path)) for file in inside]
    if path.exists():
        return [(path, Path(path.name))]
    if glob.has_magic(argument):
        inside = _images(Path(match) for match in glob.iglob(argument, recursive=True))  # noqa: PTH207
        if not inside:
            raise ConfigurationError(f"no image matches {text_of(argument)}.")
        root = _pattern_root(path)
        return [(file, file.relative_to(root)) for file in inside]
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    close = nearest(path.name, (text_of(file.name) for file in beside))
    raise ConfigurationError(f"there is no file {text_of(path)}.{close}")


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if is_image(path) and path.is_file())


def _pattern_root(pattern: Path) -> Path:
    """The folder before the first wildcard: `photos` of `photos/*/a?.jpg`."""
    parts = [*pattern.parts]
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _unique_names(images: list[tuple[Path, Path]]) -> list[Path]:
    """The shortest unique form of each name: without suffix, with suffix, with its folders."""
    forms = [
        (name.with_suffix(""), name, _relative(path), _relative(path) / f"{index}")
        for index, (path, name) in enumerate(images)
    ]
    lengths = [0] * len(images)
    while longer := _collisions([form[n] for form, n in zip(forms, lengths, strict=True)], lengths):
        for index in longer:
            lengths[index] += 1
    return [form[length] for form, length in zip(forms, lengths, strict=True)]


def _collisions(names: Sequence[Path], lengths: Sequence[int]) -> list[int]:
    """Indices of the names whose results would collide with those of another name.

    Results of further classes contain the class: those of `a` are `a.7.…`, as those of `a.7`.
    """
    count = Counter(names)
    return [
        index
        for index, name in enumerate(names)
        if lengths[index] < 3
        and (count[name] > 1 or (_OF_A_CLASS.search(name.name) and name.with_suffix("") in count))
    ]


_OF_A_CLASS = re.compile(r"[.][0-9]+$")


def _relative(path: Path) -> Path:
    """A whole path as a relative path below the output folder."""
    return Path(*(part for part in path.absolute().parts[1:] if part not in ("..", ".")))
