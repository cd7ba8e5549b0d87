"""A class by its id or its label, also where labels are made of digits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import SmallNet, loaded

from api_schemas.options import ExplainOptions
from service.errors import InvalidOption, UnknownClass
from service.models.loaded import LoadedModel


def labelled(*labels: str) -> LoadedModel:
    return replace(loaded(SmallNet(len(labels)), "digits"), labels=labels)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        *(("0", 0), ("2", 2), ("cat", 2), ("id:2", 2), ("label:cat", 2), ("002", 2)),
        *(("id:0", 0), ("label:0", 0), ("label:7", 1), ("id:1", 1)),
    ],
)
def test_digits_are_an_id_and_others_a_label(target: str, expected: int) -> None:
    assert labelled("0", "7", "cat").class_id(target) == expected


def test_an_id_that_is_the_label_of_another_class_is_refused_with_both_ways() -> None:
    model = labelled("1", "0", "cat")
    with pytest.raises(InvalidOption) as error:
        model.class_id("0")
    assert "'0' is the id of the class labelled '1' and the label of class 1" in error.value.detail
    assert "write id:0 or label:0" in error.value.detail
    assert (model.class_id("id:0"), model.class_id("label:0")) == (0, 1)


def test_an_id_that_is_not_there_names_the_class_whose_label_it_is() -> None:
    model = labelled("2019", "2020")
    with pytest.raises(UnknownClass) as error:
        model.class_id("2020")
    assert "has no class 2020; its ids are 0 to 1." in error.value.detail
    assert "'2020' is the label of class 1: label:2020 means it" in error.value.detail
    assert model.class_id("label:2020") == 1
    with pytest.raises(UnknownClass) as error:
        model.class_id("2021")
    assert "label" not in error.value.detail


def test_a_number_of_json_is_an_id() -> None:
    model = labelled("1", "0")
    options = ExplainOptions.model_validate({"targets": [0], "contrast": 1})
    assert model.class_id(options.targets[0]) == 0
    assert [model.class_id(each) for each in options.contrast] == [1]


def test_a_label_that_begins_so_is_itself() -> None:
    model = labelled("id:1", "label:x", "x")
    assert [model.class_id(each) for each in ("id:1", "label:x", "x", "label:label:x")] == [
        0,
        1,
        2,
        1,
    ]


@pytest.mark.parametrize("target", ["id:9", "id:-1", "id:", "label:nothing", "nothing", "-1"])
def test_what_is_no_class_is_refused(target: str) -> None:
    with pytest.raises(UnknownClass):
        labelled("a", "b").class_id(target)


def test_a_label_of_several_classes_is_refused_with_their_ids() -> None:
    for target in ("7", "label:7"):
        with pytest.raises((InvalidOption, UnknownClass), match="1, 2"):
            labelled("a", "7", "7").class_id(target)
