"""Numbers in nested lists of JSON: what is refused before numpy sees it, and what it costs."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from counting import lines_run

from api_schemas.protocols import InferInput
from service.errors import BodyTooLarge, InvalidImageData, MalformedRequest
from service.images.decode import Preprocessing
from service.integrations.protocols import nested, tensors
from service.integrations.protocols.nested import array_of, shape_of
from service.integrations.protocols.pixels import images_of
from service.integrations.protocols.tensors import files, is_base64, numbers
from service.routes import bodies

MOST = 1000


def tensor(data: Any, shape: list[int], datatype: str = "UINT8") -> InferInput:
    return InferInput(name="x", shape=shape, datatype=datatype, data=data)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ([[1, 2], [3, 255]], "i"),
        ([[1, 2.5], [3, 4]], "f"),
        ([[[0.25]]], "f"),
        ([[1.0, 2.0]], "f"),
    ],
)
def test_numbers_keep_their_values_and_whether_they_are_whole(data: Any, kind: str) -> None:
    found = array_of(data, MOST)
    assert found.dtype.kind == kind
    np.testing.assert_array_equal(found, np.array(data))


STRANGE = {
    "a string": "red",
    "a digit as text": "1",
    "a wide string": "x" * 100_000,
    "true": True,
    "null": None,
    "an object": {},
    "a list": [1],
    "an empty list": [],
    "a number of 20 digits": 10**20,
}


@pytest.mark.parametrize("leaf", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("place", [0, 7, -1])
def test_a_leaf_that_is_no_number_is_refused_before_numpy_sees_it(
    monkeypatch: pytest.MonkeyPatch, leaf: Any, place: int
) -> None:
    """Not a wide array of strings: 402 kB made 918 MB of one, and stopped the service."""
    array = np.array
    seen: list[Any] = []
    monkeypatch.setattr(
        nested.np, "array", lambda data, *a: (seen.extend(data), array(data, *a))[1]
    )
    flat: list[Any] = [1] * 64
    flat[place] = leaf
    for data in (flat, [flat[:32], flat[32:]], [[[each] for each in flat]]):
        with pytest.raises(InvalidImageData):
            array_of(data, MOST)
    with pytest.raises(MalformedRequest, match=r"UINT8|elements"):
        numbers(tensor(flat, [1, 8, 8]), None, 8)
    assert {type(each) for each in seen} <= {int}


@pytest.mark.parametrize(
    "data",
    [
        [[1, 2], [3]],
        [[1, 2], 3],
        [1, [2, 3]],
        [[[1]], [[1, 2]]],
        [[[1]], [1]],
        [[], [1]],
    ],
)
def test_lists_of_different_lengths_are_refused(data: Any) -> None:
    with pytest.raises(InvalidImageData, match=r"different lengths|not numbers"):
        array_of(data, MOST)


def test_lists_without_end_are_refused_at_once() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    with pytest.raises(InvalidImageData, match="8 deep"):
        shape_of(deep)
    with pytest.raises(InvalidImageData, match="more than 1000 numbers"):
        array_of([[0] * 101] * 10, MOST)
    for nothing in ("text", 3, None, {}):
        with pytest.raises(InvalidImageData):
            array_of(nothing, MOST)


def test_reading_numbers_takes_steps_and_memory_in_proportion_to_them() -> None:
    few, many = (lines_run(array_of, [[1, 2, 3]] * n, 10**7) for n in (10_000, 40_000))
    assert many <= 4.5 * few
    data = [[1.5, "x" * 1_000_000] * 500] * 100
    tracemalloc.start()
    try:
        with pytest.raises(InvalidImageData):
            array_of(data, 10**7)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("UINT8", [1, 256]),
        ("UINT8", [-1, 2]),
        ("INT8", [1, 200]),
        ("INT64", [1, 2**63]),
        ("UINT8", [1, 0.5]),
        ("FP32", [1, "2"]),
        ("FP64", [True, 2]),
    ],
)
def test_a_tensor_s_numbers_fit_their_datatype(datatype: str, data: list[Any]) -> None:
    with pytest.raises(MalformedRequest, match=datatype):
        numbers(tensor(data, [1, 2], datatype), None, 8)


def test_a_tensor_may_be_flat_or_nested() -> None:
    flat = numbers(tensor([1, 2.0, 3, 4], [1, 2, 2]), None, 8)
    again = numbers(tensor([[[1, 2], [3, 4]]], [1, 2, 2]), None, 8)
    assert flat.tolist() == again.tolist() == [[[1, 2], [3, 4]]]
    assert flat.dtype == np.uint8


@pytest.mark.parametrize("datatype", ["BYTES", "UINT8", "FP32"])
@pytest.mark.parametrize("raw", [None, b"", b"\0\0\0\0" * 60_000])
def test_more_images_than_allowed_are_refused_by_the_shape_alone(
    monkeypatch: pytest.MonkeyPatch, datatype: str, raw: bytes | None
) -> None:
    monkeypatch.setattr(nested, "leaves", lambda *_: pytest.fail("it was read"))
    asked = tensor([""] * 60_000 if raw is None else None, [60_000], datatype)
    read = files if datatype == "BYTES" else numbers
    with pytest.raises(BodyTooLarge, match="more than 8 images"):
        read(asked, raw, 8)


def test_elements_are_read_no_further_than_the_shape_goes() -> None:
    asked = tensor(None, [2], "BYTES")
    with pytest.raises(MalformedRequest, match="3 or more elements"):
        files(asked, b"\0\0\0\0" * 1_000_000, 8)
    steps = lines_run(tensors._elements, b"\0\0\0\0" * 1_000_000, 8)
    assert steps < 100


# ---- base64


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"aGVsbG8=", True),
        (b"aGVs\r\nbG8= \n", True),
        (b"data:image/png;base64,aGVsbG8=", True),
        (b"DATA:image/png;base64,aGVsbG8=", True),
        (b"\x89PNG\r\n", False),
        (b"GIF89a\0", False),
        (b"a" + b" " * 40_000 + b"\0", False),
    ],
)
def test_base64_is_told_from_files(data: bytes, text: bool) -> None:
    assert is_base64(data) is text


@pytest.mark.parametrize("gap", [" ", "\n", "\r\n", "\t", "  \v\f"])
def test_whitespace_in_base64_costs_no_memory(gap: str) -> None:
    """A space every two characters made a list of half a million strings."""
    text = gap.join(["QUJD"[n % 2 * 2 :][:2] for n in range(200_000)])
    tracemalloc.start()
    try:
        for whole in (text, f"data:image/png;base64,{text}"):
            assert bodies.image_file(whole) == b"ABC" * 100_000
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text) + 500_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ["%%%", "QUJ", "QUJD\u00a0", "QU-_", "data:" + "x" * 5000 + ";base64,QUJD", "data:;base64"],
)
def test_what_is_no_base64_is_refused(text: str) -> None:
    assert isinstance(bodies.image_file(text), InvalidImageData)


# ---- pixels


@pytest.mark.parametrize("values", ["unit", "normalized"])
def test_pixels_are_converted_band_by_band(values: str) -> None:
    """The peak is the answer and a few bands, not float copies of the whole batch."""
    batch = np.zeros((2, 4096, 64, 3), np.float32)
    tracemalloc.start()
    try:
        pixels = images_of(batch, Preprocessing(), values)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(each.nbytes for each in pixels) * 2.5 > peak
