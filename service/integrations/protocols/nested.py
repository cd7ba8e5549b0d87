"""Nested JSON lists as flat values: shape, count and types are checked before numpy gets them.

numpy makes an array of strings, as wide as the longest, of a row that mixes one string with
numbers; so it gets only plain numbers. The work is done in pieces, between which other threads run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from service.errors import InvalidImageData

MAX_DEPTH = 8
"""Depth of nested lists at most, and dimensions of a tensor of a V2 request."""

_PIECE = 1 << 16


def shape_of(data: Any) -> tuple[int, ...]:
    """The lengths of a list and of the first lists within it. Raises InvalidImageData."""
    shape: list[int] = []
    while isinstance(data, list):
        if len(shape) == MAX_DEPTH:
            raise InvalidImageData(f"The lists are nested more than {MAX_DEPTH} deep.")
        shape.append(len(data))
        data = data[0] if data else None
    return tuple(shape)


def leaves(data: Any, shape: Sequence[int]) -> Iterator[Any]:
    """The values of the innermost lists, in order.

    Raises InvalidImageData if a list has another length than the first one of its depth.
    """
    rows: list[Any] = [data]
    for depth, length in enumerate(shape):
        if depth:
            rows = list(chain.from_iterable(rows))
        if any(type(row) is not list or len(row) != length for row in rows):
            raise InvalidImageData(
                "The nested lists have different lengths; send rows of equal length."
            )
    return chain.from_iterable(rows)


def array_of(data: Any, most: int) -> NDArray[Any]:
    """Nested lists of at most `most` numbers: int64 where all are whole, else float32.

    Raises InvalidImageData.
    """
    shape = shape_of(data)
    if not shape:
        raise InvalidImageData("An image is base64 of its file, or nested lists of numbers.")
    if math.prod(shape) > most:
        raise InvalidImageData(
            f"The nested lists hold more than {most} numbers; send the image as a file in base64."
        )
    kinds = set[type]()
    for piece in _pieces(leaves(data, shape)):
        kinds.update(map(type, piece))
    dtype = np.float32 if float in kinds else np.int64
    return numbers_of(data, shape, dtype).reshape(shape)


def numbers_of(data: Any, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """The numbers in nested lists of this shape, flat.

    Raises InvalidImageData for a value that is not a number or does not fit the dtype: too large,
    or a fraction in an integer dtype.
    """
    values = np.empty(math.prod(shape), dtype)
    start = 0
    for piece in _pieces(leaves(data, shape)):
        values[start : start + len(piece)] = _converted(piece, values.dtype)
        start += len(piece)
    return values


def _converted(piece: list[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    kinds = set(map(type, piece))
    if not kinds <= {int, float}:
        raise InvalidImageData(
            "The nested lists have values that are not numbers; send numbers only."
        )
    if dtype.kind in "iu" and float in kinds:
        if not all(float(number).is_integer() for number in piece):
            raise InvalidImageData(
                f"The lists have fractions, which {dtype.name} cannot hold; send whole numbers."
            )
        piece = [int(number) for number in piece]
    try:
        with np.errstate(over="ignore"):
            return np.array(piece, dtype)
    except OverflowError as error:
        raise InvalidImageData(f"A number in the lists is too large for {dtype.name}.") from error


def _pieces(values: Iterator[Any]) -> Iterator[list[Any]]:
    while piece := list(islice(values, _PIECE)):
        yield piece
