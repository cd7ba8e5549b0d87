"""Trials: one edit, how many recipients it turns into a class, and the same for its controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from service.evaluation.audit import edits
from service.evaluation.audit.parts import STRONGEST, Part, region
from service.evaluation.audit.passes import Passes
from service.evaluation.audit.proportions import Interval, Proportion, difference_interval
from service.evaluation.audit.sample import Pair, Sample, Scanned, paired

Kind = Literal["place", "cast", "sharpness", "part"]

Make = Callable[[Pair], Tensor]
"""The recipient of a pair with the edit, uint8 (C, h, w)."""

Control = Callable[[Pair, int], Tensor]
"""The same for a control; the second argument is a donor of a third class."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When the flips of a kind of edit count.

    flips: the least share of recipients that turn into the class.
    net:   the least share above that of the control, whose 95 % interval begins above `bound`.
    """

    flips: float
    net: float
    bound: float = 0.0

    def holds(self, flips: Proportion, control: Proportion | None) -> bool:
        """Whether both shares reach the rule; without a control only the first counts."""
        if flips.value < self.flips or control is None:
            return flips.value >= self.flips
        low, _ = difference_interval(flips, control)
        return flips.value - control.value >= self.net and low > self.bound


RULES = {
    "ring": Rule(0.5, 0.5),
    "third": Rule(0.5, 0.5),
    "corner": Rule(0.3, 0.3),
    "cast": Rule(0.5, 0.5),
    "sharpness": Rule(0.3, 0.3),
    "part": Rule(0.55, 0.2, 0.2),
}
"""By the last word of a trial's rule; frozen on the development half of benchmarks/audits.py."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """An edit with its pairs.

    pairs, unseen: to search and to confirm with, each pair with a donor of a third class.
    controls: the same edit of something else; the highest of their shares is the control.
    mask:     of a donor, where the edit takes its pixels; None: everywhere.
    """

    kind: Kind
    name: str
    rule: Rule
    make: Make
    controls: tuple[Control, ...]
    pairs: Sequence[tuple[Pair, int]]
    unseen: Sequence[tuple[Pair, int]]
    mask: Callable[[int], Tensor] | None = None
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Flips:
    """How many recipients an edit turned into the class; `control` is None if it was not run.

    turned: for each pair.
    """

    flips: Proportion
    control: Proportion | None
    turned: tuple[bool, ...] = field(default=(), repr=False)

    @property
    def net(self) -> float:
        """The share minus that of the control."""
        return self.flips.value - (self.control.value if self.control else 0.0)

    @property
    def interval(self) -> Interval:
        """The 95 % interval of `net`; of the share itself without a control."""
        if self.control is None:
            return self.flips.interval
        return difference_interval(self.flips, self.control)


def measured(
    passes: Passes, trial: Trial, class_id: int, *, unseen: bool = False, whole: bool = False
) -> Flips:
    """Run a trial; its controls only if the flips alone reach the rule, or if `whole`."""
    pairs = trial.unseen if unseen else trial.pairs
    turned = _turned(passes, [trial.make(pair) for pair, _ in pairs], class_id)
    flips = Proportion(sum(turned), len(turned))
    if not trial.controls or not (whole or trial.rule.holds(flips, None)):
        return Flips(flips, None, tuple(turned))
    controls = [
        Proportion(sum(_turned(passes, [make(*each) for each in pairs], class_id)), len(pairs))
        for make in trial.controls
    ]
    return Flips(flips, max(controls, key=lambda each: each.value), tuple(turned))


def _turned(passes: Passes, images: Sequence[Tensor], class_id: int) -> list[bool]:
    found: list[bool] = (passes.logits(images).argmax(dim=1) == class_id).tolist()
    return found


def pixel_trials(scanned: Scanned, chosen: Sample) -> list[Trial]:
    """The trials that need no layer: fixed places, and the sharpness of the class's images."""
    images = scanned.images
    pairs = list(zip(chosen.pairs, chosen.strangers, strict=True))
    unseen = list(zip(chosen.unseen_pairs, chosen.unseen_strangers, strict=True))

    def with_donor(kind: Kind, name: str, make: Callable[[Tensor, Tensor], Tensor]) -> Trial:
        def of(pair: Pair) -> Tensor:
            return make(images[pair.recipient], images[pair.donor])

        def control(pair: Pair, stranger: int) -> Tensor:
            return of(Pair(pair.recipient, stranger))

        mask = found.get(name)
        where = None if mask is None else lambda _: mask
        rule = RULES[name.rpartition(" ")[2]]
        return Trial(kind, name, rule, of, (control,), pairs, unseen, where)

    found = edits.places(*images[chosen.own[0]].shape[1:])

    def place(name: str, mask: Tensor) -> Trial:
        return with_donor("place", name, lambda one, other: edits.pasted(one, other, mask))

    def sharp(one: Tensor, other: Tensor) -> Tensor:
        return edits.as_sharp_as(one, edits.sharpness(other))

    return [
        *(place(name, mask) for name, mask in found.items()),
        with_donor("sharpness", "sharpness", sharp),
    ]


def part_trial(  # noqa: PLR0917 - a part, and how it is pasted
    passes: Passes, scanned: Scanned, chosen: Sample, part: Part, layer: str, largest: float
) -> Trial:
    """A part of the class's strongest images pasted in place.

    Its controls are another place of the same donors, and the same place of other classes' images.
    It is confirmed with further images that show the part, if there are any, and unseen recipients.
    """
    images, own = scanned.images, chosen.own
    height, width = images[own[0]].shape[1:]
    at = {own[number]: number for number in range(len(own))}

    def mask(donor: int) -> Tensor:
        return region(part, at[donor], (height, width), passes.model, largest)

    def make(pair: Pair) -> Tensor:
        return edits.pasted(images[pair.recipient], images[pair.donor], mask(pair.donor))

    def elsewhere(pair: Pair, _: int) -> Tensor:
        other = edits.elsewhere(mask(pair.donor), pair.donor)
        return edits.pasted(images[pair.recipient], images[pair.donor], other)

    def stranger(pair: Pair, donor: int) -> Tensor:
        return edits.pasted(images[pair.recipient], images[donor], mask(pair.donor))

    strongest = [own[number] for number in part.order[:STRONGEST]]
    further = [own[number] for number in part.unseen] or strongest
    pairs = paired(chosen.recipients, strongest)
    unseen = paired(chosen.unseen_recipients, further)
    return Trial(
        "part",
        f"part {part.number + 1} of {layer}",
        RULES["part"],
        make,
        (elsewhere, stranger),
        list(zip(pairs, chosen.strangers, strict=True)),
        list(zip(unseen, chosen.unseen_strangers, strict=True)),
        mask,
        part,
    )
