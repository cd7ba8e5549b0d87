"""The names that an error suggests, and that finding them is bounded."""

from __future__ import annotations

import difflib

import pytest

from service import errors
from service.errors import InvalidOption, nearest


def test_the_closest_names_are_suggested_nearest_first() -> None:
    known = ["layer1", "layer2", "avgpool", "x" * 5000]
    assert nearest("layr1", known) == " Did you mean 'layer1' or 'layer2'?"
    assert nearest("nothing alike", known) == ""


def test_a_long_name_is_compared_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difflib, "get_close_matches", lambda *_, **__: pytest.fail("compared"))
    assert nearest("layer" * 100, ["layer" * 100 + str(n) for n in range(1000)]) == ""


def test_a_name_is_compared_with_a_thousand_of_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 21,000 labels; long ones are not compared with at all."""
    compared: list[str] = []
    find = difflib.get_close_matches

    def count(name: str, known: list[str], **more: float) -> list[str]:
        compared.extend(known)
        return find(name, known, **more)

    monkeypatch.setattr(errors.difflib, "get_close_matches", count)
    known = [f"label {n:05} {'x' * (n % 150)}" for n in range(21_000)] + ["tench"]
    assert nearest("tenth", known) == " Did you mean 'tench'?"
    assert len(compared) == 1000
    assert max(map(len, compared)) <= 100


def test_a_detail_is_cut_however_long_the_name_in_it_is() -> None:
    error = InvalidOption(f"There is no {'x' * 1_000_000}.")
    assert len(error.detail) == len(str(error)) == 2001
    assert error.detail.endswith("x…")
