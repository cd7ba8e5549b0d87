"""Options of detectors and segmenters: places, and what a classifier refuses."""

from __future__ import annotations

import pytest

from api_schemas.client.requests import read_options
from api_schemas.methods import DEFAULTS, METHODS
from api_schemas.options import ExplainOptions, ExplainRequest, RunLengths


@pytest.mark.parametrize(
    ("given", "places"),
    [
        (["3,4"], [(3.0, 4.0)]),
        (["1,2,30.5,40"], [(1.0, 2.0, 30.5, 40.0)]),
        ([3, 4], [(3.0, 4.0)]),
        ([[3, 4], [1, 2, 3, 4]], [(3.0, 4.0), (1.0, 2.0, 3.0, 4.0)]),
        (
            {"size": [2, 3], "counts": [6]},
            [RunLengths(size=(2, 3), counts=[6])],
        ),
        (None, []),
    ],
)
def test_places_are_text_numbers_or_masks(given: object, places: list[object]) -> None:
    """A query gives text, JSON also numbers and objects, one or several."""
    request = ExplainRequest.model_validate({"at": given, "images": [{"data": ""}]})
    assert request.places() == places


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("3", "a point x,y or a box x,y,w,h"),
        ("1,2,3", "a point x,y or a box x,y,w,h"),
        ("a,b", "a point x,y or a box x,y,w,h"),
        ("nan,1", "a point x,y or a box x,y,w,h"),
        ("1,2,0,4", "no width or no height"),
        ('{"size": 3}', "a mask in `at`"),
    ],
)
def test_a_place_that_is_none_is_refused_with_the_accepted_forms(given: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_options(ExplainOptions, {"at": given})


def test_the_default_method_of_each_task_is_one_of_its_methods() -> None:
    for task, method in DEFAULTS.items():
        assert task in METHODS[method].tasks
