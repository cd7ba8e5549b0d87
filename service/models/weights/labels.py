"""Labels as training scripts and data sets leave them: lists, objects either way round, CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

INSIDE = ("id2label", "label2id", "class_to_idx", "idx_to_class", "classes", "labels", "names")
"""Names under which a JSON object keeps them beside other things."""

_IDS = ("id", "index", "idx", "class_id", "class_index", "class_idx", "label_id", "target")
_NAMES = ("label", "name", "class", "class_name", "label_name", "category", "description", "text")
"""Columns of a CSV file, the first that is there."""

SHOWN = 5


def labels_of_text(text: str, suffix: str) -> tuple[str, ...]:
    """The labels in a file, in order of class id.

    text: JSON (a list; `{label: id}` or `{id: label}`, also inside an object), CSV with a column of
    ids, or one label a line. suffix: of the file's name, such as `.csv`.

    Raises ValueError with what is wrong there.
    """
    if suffix == ".json" or text.lstrip().startswith(("[", "{")):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from error
        return labels_of_json(found)
    if suffix in (".csv", ".tsv"):
        return _of_table(text, "\t" if suffix == ".tsv" else ",")
    # A label may hold what else separates lines, such as U+2028.
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise ValueError("is empty; it takes one label a line")
    if "" in lines:
        raise ValueError(f"has nothing on line {lines.index('') + 1}; it takes one label a line")
    return tuple(lines)


def labels_of_json(found: Any) -> tuple[str, ...]:
    """The labels in what JSON holds. Raises ValueError."""
    if isinstance(found, Mapping):
        inside = next((found[name] for name in INSIDE if _holds_labels(found.get(name))), None)
        if inside is not None:
            return labels_of_json(inside)
    if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
        return tuple(found)
    if isinstance(found, Mapping) and found:
        pairs = _pairs(found)
        if pairs is not None:
            return _in_order(pairs)
    raise ValueError(
        "must hold a JSON list of texts, one a class, or an object of {label: id} or {id: label}"
    )


def _holds_labels(value: Any) -> bool:
    return isinstance(value, (list, Mapping)) and bool(value)


def _pairs(found: Mapping[str, Any]) -> list[tuple[int, str]] | None:
    """(id, label) of an object either way round; a number that is no text is always an id."""
    values = list(found.values())
    if all(type(value) is int for value in values):
        return [(value, key) for key, value in found.items()]
    if all(_is_id(key) for key in found):
        named = [_name_in(value) for value in values]
        if None not in named:
            return [(int(key), str(name)) for key, name in zip(found, named, strict=True)]
    if all(isinstance(value, str) and _is_id(value) for value in values):
        return [(int(value), key) for key, value in found.items()]
    return None


def _name_in(value: Any) -> str | None:
    """A label, or the last of [WordNet id, label] as ImageNet's index has it."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return str(value[-1])
    return value if isinstance(value, str) else None


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _of_table(text: str, delimiter: str) -> tuple[str, ...]:
    first = text.partition("\n")[0]
    if delimiter not in first and ";" in first:
        delimiter = ";"
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    rows = [[cell.strip() for cell in row] for row in rows]
    if not rows:
        raise ValueError("is empty; it takes a row for each class")
    ids, names, rows = _columns(rows)
    short = next((n for n, row in enumerate(rows, 1) if len(row) <= max(ids, names)), None)
    if short is not None:
        raise ValueError(f"has too few columns in its row {short}")
    wrong = next((row[ids] for row in rows if not _is_id(row[ids])), None)
    if wrong is not None:
        raise ValueError(f"has {wrong!r} in its column of ids; it takes whole numbers from 0")
    return _in_order([(int(row[ids]), row[names]) for row in rows])


def _columns(rows: Sequence[list[str]]) -> tuple[int, int, list[list[str]]]:
    """The places of the columns of ids and of labels, and the rows without the header."""
    head = [cell.lower() for cell in rows[0]]
    ids = next((head.index(name) for name in _IDS if name in head), None)
    if ids is None:  # without a header: the one column that has nothing but ids
        width = range(min(map(len, rows)))
        numbers = [column for column in width if all(_is_id(row[column]) for row in rows)]
        if len(numbers) != 1 or len(width) != 2:
            raise ValueError(
                f"has the columns {', '.join(head[:SHOWN])}; it takes one of ids ({_IDS[0]}, "
                f"{_IDS[1]} …) and one of labels ({_NAMES[0]}, {_NAMES[1]} …)"
            )
        return numbers[0], 1 - numbers[0], list(rows)
    others = [place for place in range(len(head)) if place != ids]
    named = [head.index(name) for name in _NAMES if name in head]
    names = named[:1] or (others if len(others) == 1 else [])
    if not names:
        raise ValueError(
            f"has the columns {', '.join(head[:SHOWN])}; one of them must be called "
            f"{' or '.join(_NAMES[:3])}"
        )
    return ids, names[0], list(rows[1:])


def _in_order(pairs: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    """Labels by their ids, which must be 0, 1, 2 … Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(i for n, (i, _) in enumerate(pairs) if any(i == j for j, _ in pairs[:n]))
        raise ValueError(f"has two labels for the id {twice}")
    missing = [index for index in range(len(found)) if index not in found]
    if missing:
        raise ValueError(
            f"has {len(found)} labels and none for the id {missing[0]}; ids are 0 to "
            f"{len(found) - 1}"
        )
    return tuple(found[index] for index in range(len(found)))
