"""`api_schemas.answers`: each verdict and each reason has its words."""

from __future__ import annotations

from typing import get_args

import pytest

from api_schemas import answers
from api_schemas.answers import VERDICT_SENTENCES, verdict_sentence, verdict_summary
from service.cam.verdict import Name, Reason, Verdict


def verdict(name: Name, reason: Reason | None = None, agreement: float = 0.714) -> Verdict:
    return Verdict(name, reason, agreement, (0.7, 0.7), (0.0, 0.5), 0.01, 0.02, 0.3, 0.2, None)


def test_each_verdict_and_each_reason_has_a_sentence_and_nothing_else_does() -> None:
    wire = answers.Verification.model_fields
    assert set(get_args(wire["verdict"].annotation)) == set(get_args(Name))
    assert set(VERDICT_SENTENCES) == {*get_args(Name), *get_args(Reason)} - {"inconclusive"}


def test_an_inconclusive_verdict_is_told_by_its_reason() -> None:
    for reason in get_args(Reason):
        assert verdict_sentence(verdict("inconclusive", reason)) == VERDICT_SENTENCES[reason]
    for name in ("supported", "refuted"):
        assert verdict_sentence(verdict(name)) == VERDICT_SENTENCES[name]


@pytest.mark.parametrize(
    ("agreement", "words"), [(0.714, "0.71"), (-0.25, "-0.25"), (-0.001, "0.00")]
)
def test_a_summary_has_the_agreement_with_two_digits(agreement: float, words: str) -> None:
    assert (
        verdict_summary(verdict("supported", None, agreement)) == f"supported (agreement {words})"
    )
