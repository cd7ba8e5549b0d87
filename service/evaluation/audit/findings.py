"""What an audit says of a class: findings, the trials behind them, and one verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from service.evaluation.audit.proportions import Interval, Proportion
from service.evaluation.audit.trials import Flips, Kind

Verdict = Literal["suspected_cue", "part_of_object", "look", "none_found", "not_tested"]

VERDICTS: Mapping[Verdict, str] = {
    "suspected_cue": "something other than the object turns images of other classes into this one",
    "part_of_object": "a part that alone turns others into this class, and that lies on the object",
    "look": "a part that alone turns others into this class: look whether it is the object",
    "none_found": "no cue of the tested kinds was found, which does not mean that there is none",
    "not_tested": "there are too few images",
}

INSIDE = 0.8
"""A part of which at least this share lies inside the object's mask is a part of the object."""


@dataclass(frozen=True, slots=True, eq=False)
class Paste:
    """One recipient before and after an edit, uint8 (C, h, w), and whether its class changed.

    recipient, donor: names of the images; donor is "" for a cast.
    """

    recipient: str
    donor: str
    before: Tensor
    after: Tensor
    turned: bool


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """An image of the class, uint8 (C, h, w), and where the edit took its pixels, bool (h, w)."""

    name: str
    image: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Necessity:
    """How far the class's logit (above the mean of all) falls when the part is hidden.

    images:  how many.
    drop:    its mean fall when the part is blurred, minus that of as large a region elsewhere.
    changed: images whose class changes. fill: what the region is replaced by.
    """

    images: int
    drop: float
    changed: int
    fill: str = "blur"


@dataclass(frozen=True, slots=True)
class PartFacts:
    """Where a part lies and what it looks like; it describes, and decides nothing.

    layer, number, share: of the class's evidence. presence: the share of the class's images.
    centre: mean (x, y) of its regions, 0..1. spread: the mean distance from it, as a share of the
    side. colour: mean of its pixels, 0..255 per channel. inside: the share of the regions inside
    the object's mask; None without masks.
    """

    layer: str
    number: int
    share: float
    presence: float
    centre: tuple[float, float]
    spread: float
    colour: tuple[int, ...]
    inside: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """An edit that turned enough images of other classes into the class.

    measured:  on unseen pairs, which is what counts; None if there were too few, or the bound on
               forward passes was reached.
    search:    on the pairs that it was found with; the best of many, so too high.
    confirmed: whether `measured` reaches the same rule.
    """

    kind: Kind
    place: str
    search: Flips
    measured: Flips | None
    confirmed: bool
    necessity: Necessity | None = None
    part: PartFacts | None = None
    pastes: Sequence[Paste] = ()
    strongest: Sequence[Shown] = ()

    @property
    def is_cue(self) -> bool:
        """Whether it is enough for `suspected_cue`."""
        if not self.confirmed:
            return False
        if self.part is None:
            return True
        return self.part.inside is not None and self.part.inside < INSIDE

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON, without images."""
        return {
            "kind": self.kind,
            "place": self.place,
            "confirmed": self.confirmed,
            "is_cue": self.is_cue,
            **_flips(self.measured),
            "search": _flips(self.search),
            "necessity": None if self.necessity is None else _fields(self.necessity),
            "part": None if self.part is None else _fields(self.part),
            "images": [each.name for each in self.strongest],
        }


@dataclass(frozen=True, slots=True)
class Tried:
    """The search of one trial, whether it led to a finding or not."""

    kind: Kind
    place: str
    flips: Flips


@dataclass(frozen=True, slots=True, eq=False)
class ClassAudit:
    """The audit of one class.

    images:   predicted as the class, of all that could be read. labelled: of these, how many have
              this label; None without labels.
    untested: what could not be tried, with the reason.
    forwards: forward passes for this class, with its part of those that all classes share.
    """

    class_id: int
    label: str
    verdict: Verdict
    images: int
    labelled: int | None = None
    findings: Sequence[Finding] = ()
    tried: Sequence[Tried] = ()
    untested: Mapping[str, str] = field(default_factory=dict)
    forwards: int = 0

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON, without images."""
        return {
            "class_id": self.class_id,
            "label": self.label,
            "verdict": self.verdict,
            "meaning": VERDICTS[self.verdict],
            "images": self.images,
            "labelled": self.labelled,
            "findings": [finding.as_json() for finding in self.findings],
            "tried": [
                {"kind": one.kind, "place": one.place, **_flips(one.flips)} for one in self.tried
            ],
            "untested": dict(self.untested),
            "forwards": self.forwards,
        }


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """The verdict of a class that was tested."""
    confirmed = [finding for finding in findings if finding.confirmed]
    if any(finding.is_cue for finding in confirmed):
        return "suspected_cue"
    if any(finding.part and finding.part.inside is None for finding in confirmed):
        return "look"
    return "part_of_object" if confirmed else "none_found"


def _flips(flips: Flips | None) -> dict[str, Any]:
    if flips is None:
        return {"flips": None, "control": None, "net": None, "interval": None}
    return {
        "flips": _proportion(flips.flips),
        "control": None if flips.control is None else _proportion(flips.control),
        "net": flips.net,
        "interval": list(flips.interval),
    }


def _proportion(one: Proportion) -> dict[str, Any]:
    return {"k": one.part, "n": one.n, "share": one.value, "interval": _listed(one.interval)}


def _listed(interval: Interval) -> list[float]:
    return list(interval)


def _fields(one: Necessity | PartFacts) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value := getattr(one, name), tuple) else value
        for name in one.__slots__
    }
