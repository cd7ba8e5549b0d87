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
        *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    }
)
"""Of the files that are taken of a folder; one that is named is taken whatever it is called."""

NAMED = 5
"""How many files that were left out one line names."""

STDIN = Path("-")
"""Names standard input, as other commands have it; a file of that name is `./-`."""


def is_image(path: Path) -> bool:
    """Whether a file of a folder is called as an image is; macOS puts `._a.jpg` beside `a.jpg`."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._")


def skipped_files(paths: Iterable[Path | str]) -> str:
    """A line that names what folders hold beside images, or "".

    Files that are hidden, or in a hidden folder, are not meant.
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
    return any(part.startswith(".") or part in _OF_SYSTEMS for part in path.parts)


_OF_SYSTEMS = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})


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


def text_of(path: Path | str) -> str:
    r"""A path as text that is UTF-8; no other path has it.

    A byte that is not UTF-8 is `\xNN`. A backslash that begins such a form in the path itself is
    `\x5c`, so that `\xNN` stands for a byte always.
    """
    escaped = re.sub(rb"\\(?=x[0-9a-fA-F]{2})", rb"\\x5c", os.fsencode(path))
    return escaped.decode("utf-8", "backslashreplace")


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
            others = skipped_files([path])
            raise ConfigurationError(
                f"there is no image in the folder {text_of(path)}{f'; {others}' if others else '.'}"
            )
        return [(each, each.relative_to(path)) for each in inside]
    if path.exists():
        return [(path, Path(path.name))]
    if glob.has_magic(given):
        inside = _images(Path(each) for each in glob.iglob(given, recursive=True))  # noqa: PTH207
        if not inside:
            raise ConfigurationError(f"no image matches {text_of(given)}.")
        root = _before_the_pattern(path)
        return [(each, each.relative_to(root)) for each in inside]
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    close = nearest(path.name, (text_of(each.name) for each in beside))
    raise ConfigurationError(f"there is no file {text_of(path)}.{close}")


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(each for each in paths if is_image(each) and each.is_file())


def _before_the_pattern(pattern: Path) -> Path:
    """The folder that a pattern starts from: `photos` of `photos/*/a?.jpg`."""
    parts = [*pattern.parts]
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _unlike_each_other(found: list[tuple[Path, Path]]) -> list[Path]:
    """The shortest form of each name that no other has: bare, with suffix, with its folders."""
    forms = [
        (name.with_suffix(""), name, _inside_out(path), _inside_out(path) / f"{place}")
        for place, (path, name) in enumerate(found)
    ]
    lengths = [0] * len(found)
    while longer := _alike([form[n] for form, n in zip(forms, lengths, strict=True)], lengths):
        for place in longer:
            lengths[place] += 1
    return [form[length] for form, length in zip(forms, lengths, strict=True)]


def _alike(names: Sequence[Path], lengths: Sequence[int]) -> list[int]:
    """Places of the names whose results would have names of another's results.

    Results of further classes carry the class: those of `a` are `a.7.…`, and so are those of `a.7`.
    """
    count = Counter(names)
    return [
        place
        for place, name in enumerate(names)
        if lengths[place] < 3
        and (count[name] > 1 or (_OF_A_CLASS.search(name.name) and name.with_suffix("") in count))
    ]


_OF_A_CLASS = re.compile(r"[.][0-9]+$")


def _inside_out(path: Path) -> Path:
    """A whole path as one that stays below the out folder."""
    return Path(*(part for part in path.absolute().parts[1:] if part not in ("..", ".")))
