"""Which images an audit of one class uses: donors and recipients, to search and to confirm."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGES = 50
"""The most images of a class that are looked at."""

LEAST = 20
"""With fewer images predicted as a class, it is not tested; nor with fewer of all others."""

SEARCHED, CONFIRMED = 24, 64
"""Pairs of a donor and a recipient, to search with and to confirm with."""

NEAREST = 24
"""With more other classes than this, the recipients are of those that come nearest the class."""


@dataclass(frozen=True, slots=True, eq=False)
class Scanned:
    """What a model answered for all images that could be read.

    images:    uint8 (C, h, w) at the model's input size; read when they are used.
    logits:    (n, classes), float.
    labels:    the right class of each image; None where it is unknown.
    masks:     bool (h, w), where the object is; None where it is unknown.
    names:     of each image, for the report.
    """

    images: Sequence[Tensor]
    logits: Tensor
    labels: Sequence[int | None]
    masks: Sequence[Tensor | None]
    names: Sequence[str]

    @property
    def predicted(self) -> list[int]:
        """The class of each image's largest logit."""
        classes: list[int] = self.logits.argmax(dim=1).tolist()
        return classes


@dataclass(frozen=True, slots=True)
class Pair:
    """Indices of two images: what the donor shows is put into the recipient."""

    recipient: int
    donor: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The images of one class's audit, as indices.

    own:        predicted as the class, IMAGES at most.
    donors, unseen_donors: two parts of `own`, to search and to confirm with.
    recipients, unseen_recipients: predicted as other classes, and not labelled as this one.
    strangers, unseen_strangers: for each recipient a donor of a third class, for the control.
    """

    own: tuple[int, ...]
    donors: tuple[int, ...]
    unseen_donors: tuple[int, ...]
    recipients: tuple[int, ...]
    unseen_recipients: tuple[int, ...]
    strangers: tuple[int, ...]
    unseen_strangers: tuple[int, ...]

    @property
    def pairs(self) -> list[Pair]:
        """The pairs to search with."""
        return paired(self.recipients, self.donors)

    @property
    def unseen_pairs(self) -> list[Pair]:
        """The pairs to confirm with: no image of them is in a pair of the search."""
        return paired(self.unseen_recipients, self.unseen_donors)


def paired(recipients: Sequence[int], donors: Sequence[int]) -> list[Pair]:
    """Each recipient with a donor, the donors in turn; none without a donor."""
    if not donors:
        return []
    return [Pair(each, donors[number % len(donors)]) for number, each in enumerate(recipients)]


def sample(scanned: Scanned, class_id: int, seed: int) -> Sample | str:
    """The images for the audit of a class, or why there are too few."""
    generator = random.Random(f"{seed} {class_id}")  # noqa: S311 - images
    predicted = scanned.predicted
    own = [index for index, found in enumerate(predicted) if found == class_id]
    if len(own) < LEAST:
        return f"{len(own)} images are predicted as it, and at least {LEAST} are needed"
    own = generator.sample(own, min(IMAGES, len(own)))
    others: dict[int, list[int]] = defaultdict(list)
    for index, (found, label) in enumerate(zip(predicted, scanned.labels, strict=True)):
        if class_id not in {found, label}:
            others[found].append(index)
    if sum(map(len, others.values())) < LEAST:
        return f"fewer than {LEAST} images are predicted as other classes"
    for members in others.values():
        generator.shuffle(members)
    order = list(_in_turn(_nearest(scanned, class_id, others)))
    most = min(SEARCHED, len(order) // 2)
    recipients, unseen = order[:most], order[most : most + CONFIRMED]
    half = min(SEARCHED, len(own) // 2)
    third = _strangers([*recipients, *unseen], others, predicted)
    return Sample(
        tuple(own),
        tuple(own[:half]),
        tuple(own[half:]),
        tuple(recipients),
        tuple(unseen),
        tuple(third[:most]),
        tuple(third[most:]),
    )


def balanced(predicted: Sequence[int], count: int, seed: int) -> list[int]:
    """At most `count` images, as many of each predicted class as possible."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, found in enumerate(predicted):
        groups[found].append(index)
    generator = random.Random(seed)  # noqa: S311 - images
    for members in groups.values():
        generator.shuffle(members)
    return list(_in_turn([groups[key] for key in sorted(groups)]))[:count]


def _nearest(
    scanned: Scanned, class_id: int, others: Mapping[int, list[int]]
) -> list[Sequence[int]]:
    """The images of other classes by class: the classes the model confuses most come first.

    With more than NEAREST, only those whose images come nearest the class by their logits, as far
    as they have LEAST images together.
    """
    classes = sorted(others)
    if len(classes) <= NEAREST:
        return [others[key] for key in classes]

    def gap(key: int) -> float:
        rows = scanned.logits[others[key]].float()
        return float((rows[:, key] - rows[:, class_id]).mean())

    chosen, images = list[Sequence[int]](), 0
    for key in sorted(classes, key=gap):
        if len(chosen) >= NEAREST and images >= SEARCHED + CONFIRMED:
            break
        chosen.append(others[key])
        images += len(others[key])
    return chosen


def _in_turn(groups: Iterable[Sequence[int]]) -> Iterable[int]:
    """One of each group, then the next of each, until all are through."""
    groups = [group for group in groups if group]
    for number in range(max(map(len, groups), default=0)):
        yield from (group[number] for group in groups if number < len(group))


def _strangers(
    recipients: Sequence[int], others: Mapping[int, list[int]], predicted: Sequence[int]
) -> list[int]:
    """For each recipient an image that is predicted as neither its class nor the audited one.

    With two classes there is no third: it is another image of the recipient's class then.
    """
    classes, found, used = sorted(others), list[int](), defaultdict[int, int](int)
    for number, recipient in enumerate(recipients):
        allowed = [key for key in classes if key != predicted[recipient]] or classes
        key = allowed[number % len(allowed)]
        members = [each for each in others[key] if each != recipient] or others[key]
        found.append(members[-1 - used[key] % len(members)])
        used[key] += 1
    return found


def images_of(scanned: Scanned, indices: Iterable[int]) -> list[Tensor]:
    """The images of indices, uint8 (C, h, w)."""
    return [scanned.images[index] for index in indices]


def lead(logits: Tensor, class_id: int) -> Tensor:
    """How far a class's logit is above the mean of all, (n,)."""
    return torch.sub(logits[:, class_id], logits.mean(dim=1))
