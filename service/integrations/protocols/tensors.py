"""Tensors on the wire of the Open Inference Protocol V2: in JSON, or as raw bytes behind it.

https://github.com/kserve/open-inference-protocol; the binary form is its binary tensor data
extension: little-endian, row-major, a BYTES element is its length in 4 bytes and itself.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from api_schemas.protocols import InferInput
from service.errors import InvalidImageData, MalformedRequest
from service.integrations.protocol_requests import check_count, file_in
from service.integrations.protocols.nested import leaves, numbers_of, shape_of

T = TypeVar("T")

DTYPES = MappingProxyType(
    {
        "BOOL": "|b1",
        "UINT8": "|u1",
        "UINT16": "<u2",
        "UINT32": "<u4",
        "UINT64": "<u8",
        "INT8": "|i1",
        "INT16": "<i2",
        "INT32": "<i4",
        "INT64": "<i8",
        "FP16": "<f2",
        "FP32": "<f4",
        "FP64": "<f8",
    }
)

_TEXT = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/= \t\n\r\v\f"


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of an answer.

    values: numbers, or the elements of a BYTES tensor in row-major order: texts, or files, which
            are base64 in JSON.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    values: NDArray[Any] | Sequence[str] | Sequence[bytes]

    def in_json(self) -> dict[str, Any]:
        values: Any = self.values
        if isinstance(values, np.ndarray):
            values = np.ascontiguousarray(values).reshape(-1)
        elif any(isinstance(element, bytes) for element in values):
            values = [base64.b64encode(element).decode("ascii") for element in values]
        return self._described() | {"data": values}

    def in_binary(self) -> tuple[dict[str, Any], list[bytes]]:
        """The tensor's entry in the JSON, and its bytes, in pieces so that no file is copied."""
        if isinstance(self.values, np.ndarray):
            raw = [self.values.astype(DTYPES[self.datatype]).tobytes()]
        else:
            files = [value.encode() if isinstance(value, str) else value for value in self.values]
            raw = [part for file in files for part in (struct.pack("<I", len(file)), file)]
        size = sum(map(len, raw))
        return self._described() | {"parameters": {"binary_data_size": size}}, raw

    def _described(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


def files(tensor: InferInput, raw: bytes | None, most: int) -> list[bytes]:
    """The image files of a BYTES tensor. Raises MalformedRequest, InvalidImageData, BodyTooLarge.

    most: images in one request; more are refused before any is read.
    """
    count = _count(tensor)
    check_count(count, most)
    if raw is None:
        elements = list(_flat(tensor, lambda shape: leaves(tensor.data, shape)))
        if not all(isinstance(element, str) for element in elements):
            raise InvalidImageData("BYTES in JSON are strings: the base64 of each image file.")
        return [file_in(element) for element in elements]
    parts = _elements(raw, count)
    _check_count(tensor, len(parts))
    # Some clients send base64 in this form too.
    return [file_in(part.decode(errors="replace")) if is_base64(part) else part for part in parts]


def is_base64(data: bytes) -> bool:
    """Whether an element is base64 or a data: URI; no image file consists of such characters."""
    return data[:5].lower() == b"data:" or not data.translate(None, _TEXT)


def numbers(tensor: InferInput, raw: bytes | None, most: int) -> NDArray[Any]:
    """The values of a tensor of numbers, in its shape.

    most: images in one request. Raises MalformedRequest, InvalidImageData, BodyTooLarge.
    """
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None or tensor.datatype == "BOOL":
        raise MalformedRequest(
            f"The datatype {tensor.datatype!r} cannot hold an image; send BYTES, UINT8 or FP32."
        )
    _count(tensor)
    check_count(tensor.shape[0], most)
    if raw is not None:
        if len(raw) % np.dtype(dtype).itemsize:
            raise MalformedRequest(
                f"{len(raw)} bytes are not a multiple of the size of {tensor.datatype}."
            )
        values = np.frombuffer(raw, dtype)
        _check_count(tensor, values.size)
    elif tensor.datatype == "FP16":
        raise MalformedRequest("FP16 cannot be sent in JSON; send it as binary data.")
    else:
        values = _flat(tensor, lambda shape: numbers_of(tensor.data, shape, dtype))
    return values.reshape(tensor.shape)


def _flat(tensor: InferInput, read: Callable[[Sequence[int]], T]) -> T:
    """The result of `read` for `data`, flat or nested, if it has as many elements as the shape."""
    try:
        shape = shape_of(tensor.data)
        _check_count(tensor, math.prod(shape))
        return read(shape)
    except InvalidImageData as error:
        raise MalformedRequest(
            f"The data of input {tensor.name!r} is not {tensor.datatype}: {error.detail}"
        ) from error


def raw_parts(inputs: Sequence[InferInput], tail: bytes) -> list[bytes | None]:
    """The bytes behind the JSON that belong to each input. Raises MalformedRequest."""
    parts: list[bytes | None] = []
    for tensor in inputs:
        size = _binary_size(tensor.parameters or {})
        if (size is None) == (tensor.data is None):
            raise MalformedRequest(
                f"Input {tensor.name!r} needs either `data` or `binary_data_size` with that many "
                "bytes behind the JSON."
            )
        if size is not None and len(tail) < size:
            raise MalformedRequest(f"The body ends within the binary data of {tensor.name!r}.")
        parts.append(None if size is None else tail[:size])
        tail = tail[size or 0 :]
    if tail:
        raise MalformedRequest(f"{len(tail)} bytes behind the JSON belong to no input.")
    return parts


def _binary_size(parameters: Mapping[str, Any]) -> int | None:
    size = parameters.get("binary_data_size")
    if size is None or (isinstance(size, int) and size >= 0):
        return size
    raise MalformedRequest("`binary_data_size` is a number of bytes, such as 150528.")


def _elements(raw: bytes, most: int) -> list[bytes]:
    """The elements of a BYTES tensor, at most one more than `most`."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw) and len(elements) <= most:
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if at + 4 > len(raw) or end > len(raw):
            raise MalformedRequest("The binary data ends within an element of BYTES.")
        elements.append(raw[at + 4 : end])
        at = end
    return elements


def _count(tensor: InferInput) -> int:
    """The number of elements of the shape. Raises MalformedRequest."""
    if min(tensor.shape) < 0:
        raise MalformedRequest(
            f"The shape {tensor.shape} of input {tensor.name!r} has a negative number of elements."
        )
    return math.prod(tensor.shape)


def _check_count(tensor: InferInput, count: int) -> None:
    if _count(tensor) != count:
        more = "or more " if count > _count(tensor) else ""
        raise MalformedRequest(
            f"Input {tensor.name!r} has {count} {more}elements, which do not have the shape "
            f"{tensor.shape}."
        )
