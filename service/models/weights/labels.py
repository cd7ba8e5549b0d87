"""Read labels in the formats of training scripts and data sets: JSON, CSV, text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

INSIDE = ("id2label", "label2id", "class_to_idx", "idx_to_class", "classes", "labels", "names")
"""Keys of a JSON object that contain the labels."""

_IDS = ("id", "index", "idx", "class_id", "class_index", "class_idx", "label_id", "target")
_NAMES = ("label", "name", "class", "class_name", "label_name", "category", "description", "text")
"""Columns of a CSV file, in order of precedence."""

SHOWN = 5


def labels_of_text(text: str, suffix: str) -> tuple[str, ...]:
    """The labels in a file, in order of class id.

    text: JSON (a list; `{label: id}` or `{id: label}`, also inside an object), CSV with a column of
    ids, or one label per line. suffix: of the file name, such as `.csv`.

    Raises ValueError with the problem.
    """
    if suffix == ".json" or text.lstrip().startswith(("[", "{")):
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from error
        return labels_of_json(document)
    if suffix in (".csv", ".tsv"):
        return _of_table(text, "\t" if suffix == ".tsv" else ",")
    # A label may contain other line separators, such as U+2028.
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise ValueError("is empty; it needs one label per line")
    if "" in lines:
        raise ValueError(f"has nothing on line {lines.index('') + 1}; it needs one label per line")
    return tuple(lines)


def labels_of_json(document: Any) -> tuple[str, ...]:
    """The labels in a JSON document. Raises ValueError."""
    if isinstance(document, Mapping):
        inside = next(
            (document[name] for name in INSIDE if _holds_labels(document.get(name))), None
        )
        if inside is not None:
            return labels_of_json(inside)
    if (
        isinstance(document, list)
        and document
        and all(isinstance(label, str) for label in document)
    ):
        return tuple(document)
    if isinstance(document, Mapping) and document:
        pairs = _pairs(document)
        if pairs is not None:
            return _in_order(pairs)
    raise ValueError(
        "must be a JSON list of strings, one per class, or an object of {label: id} or {id: label}"
    )


def _holds_labels(value: Any) -> bool:
    return isinstance(value, (list, Mapping)) and bool(value)


def _pairs(document: Mapping[str, Any]) -> list[tuple[int, str]] | None:
    """(id, label) of `{id: label}` or `{label: id}`; a JSON number is always an id."""
    values = list(document.values())
    if all(type(value) is int for value in values):
        return [(value, key) for key, value in document.items()]
    if all(_is_id(key) for key in document):
        named = [_name_in(value) for value in values]
        if None not in named:
            return [(int(key), str(name)) for key, name in zip(document, named, strict=True)]
    if all(isinstance(value, str) and _is_id(value) for value in values):
        return [(int(value), key) for key, value in document.items()]
    return None


def _name_in(value: Any) -> str | None:
    """A label, or the last of [WordNet id, label] as ImageNet's index has it."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
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
        raise ValueError("is empty; it needs one row per class")
    ids, names, rows = _columns(rows)
    short = next((n for n, row in enumerate(rows, 1) if len(row) <= max(ids, names)), None)
    if short is not None:
        raise ValueError(f"has too few columns in its row {short}")
    wrong = next((row[ids] for row in rows if not _is_id(row[ids])), None)
    if wrong is not None:
        raise ValueError(f"has {wrong!r} in its column of ids; ids are whole numbers from 0")
    return _in_order([(int(row[ids]), row[names]) for row in rows])


def _columns(rows: Sequence[list[str]]) -> tuple[int, int, list[list[str]]]:
    """The indices of the columns of ids and of labels, and the rows without the header."""
    head = [cell.lower() for cell in rows[0]]
    ids = next((head.index(name) for name in _IDS if name in head), None)
    if ids is None:  # without a header: the only column with nothing but ids
        width = range(min(map(len, rows)))
        numbers = [column for column in width if all(_is_id(row[column]) for row in rows)]
        if len(numbers) != 1 or len(width) != 2:
            raise ValueError(
                f"has the columns {', '.join(head[:SHOWN])}; it needs one of ids ({_IDS[0]}, "
                f"{_IDS[1]} …) and one of labels ({_NAMES[0]}, {_NAMES[1]} …)"
            )
        return numbers[0], 1 - numbers[0], list(rows)
    others = [column for column in range(len(head)) if column != ids]
    named = [head.index(name) for name in _NAMES if name in head]
    names = named[:1] or (others if len(others) == 1 else [])
    if not names:
        raise ValueError(
            f"has the columns {', '.join(head[:SHOWN])}; one of them must be called "
            f"{' or '.join(_NAMES[:3])}"
        )
    return ids, names[0], list(rows[1:])


def _in_order(pairs: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    """Labels sorted by id; the ids must be 0, 1, 2 … Raises ValueError."""
    by_id = dict(pairs)
    if len(by_id) < len(pairs):
        twice = next(i for n, (i, _) in enumerate(pairs) if any(i == j for j, _ in pairs[:n]))
        raise ValueError(f"has two labels for the id {twice}")
    missing = [index for index in range(len(by_id)) if index not in by_id]
    if missing:
        raise ValueError(
            f"has {len(by_id)} labels and none for the id {missing[0]}; ids are 0 to "
            f"{len(by_id) - 1}"
        )
    return tuple(by_id[index] for index in range(len(by_id)))
