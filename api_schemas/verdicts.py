"""Verdicts in words: for tables, captions, and the fields of other tools."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

SENTENCES: Mapping[str, str] = MappingProxyType(
    {
        "supported": "Hiding what this map marks lowers the score of the class more than hiding "
        "the same shape in 95 % of all other places.",
        "refuted": "The class does not depend on what this map marks: half of all other places "
        "explain the score at least as well.",
        "flat_map": "The map is the same everywhere: it marks no place.",
        "flat_score": "The score hardly changes, whatever half of the image is hidden.",
        "elsewhere_as_good": "More than 5 % of all other places explain the score as well as this "
        "map.",
        "centre_as_good": "Places in the center, where photographers put objects, explain the "
        "score as well as this map.",
        "fills_disagree": "The score falls with one fill of the hidden parts, but not with the "
        "other.",
    }
)
"""What each verdict says; an inconclusive one has the sentence of its reason."""


class Verdict(Protocol):
    """What the verdicts of the service and of its answers have in common."""

    @property
    def verdict(self) -> str: ...

    @property
    def reason(self) -> str | None: ...

    @property
    def agreement(self) -> float: ...


def summary(found: Verdict) -> str:
    """The verdict with its agreement: "supported (agreement 0.71)"."""
    return f"{found.verdict} (agreement {found.agreement:z.2f})"


def sentence(found: Verdict) -> str:
    """What the verdict says, in one sentence."""
    return SENTENCES[found.reason or found.verdict]
