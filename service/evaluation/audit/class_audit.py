"""The audit of one class: search with every trial, confirm what was found, give a verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.evaluation.audit import edits
from service.evaluation.audit.findings import (
    ClassAudit,
    Finding,
    Necessity,
    PartFacts,
    Paste,
    Shown,
    Tried,
    verdict_of,
)
from service.evaluation.audit.parts import LARGEST, STRONGEST, find_parts, why_no_parts
from service.evaluation.audit.passes import Passes
from service.evaluation.audit.proportions import Proportion
from service.evaluation.audit.sample import (
    CONFIRMED,
    LEAST,
    Pair,
    Sample,
    Scanned,
    balanced,
    images_of,
    lead,
    sample,
)
from service.evaluation.audit.trials import (
    RULES,
    Flips,
    Trial,
    measured,
    part_trial,
    pixel_trials,
)

MOST_FORWARDS = 1_100
"""Forward passes for one class, at most."""

CAST_IMAGES = 100
"""Images, of all classes, to which each cast is applied; they serve every class."""

SHOWN, PASTES = 6, 4


@dataclass(frozen=True, slots=True, eq=False)
class Casts:
    """The classes of images under each colour cast.

    chosen:  their indices. classes: by cast, those after it. missing: why there are none.
    nothing: the class that most strongly blurred images become, and the share of them.
    shared:  the forward passes for all of this that count for each class.
    """

    chosen: Sequence[int]
    classes: Mapping[str, Sequence[int]]
    missing: str | None
    nothing: tuple[int, float]
    shared: int


def cast_images(passes: Passes, scanned: Scanned, seed: int) -> Casts:
    """Run the casts, and a strong blur that shows which class stands for nothing."""
    before = passes.forwards
    chosen = balanced(scanned.predicted, CAST_IMAGES, seed)
    images = images_of(scanned, chosen)
    missing = None if images[0].shape[0] == 3 else "casts need three channels"
    classes = {
        name: passes.logits(edits.cast(image, name) for image in images).argmax(dim=1).tolist()
        for name in (() if missing else edits.CASTS)
    }
    sigma = edits.BLUR * max(images[0].shape[1:])
    blurred = passes.logits(edits.blurred(image, sigma) for image in images[:24])
    (best, count), *_ = Counter(blurred.argmax(dim=1).tolist()).most_common(1)
    nothing = best, count / len(blurred)
    enough = sum(count >= LEAST for count in Counter(scanned.predicted).values())
    shared = math.ceil((passes.forwards - before) / max(1, enough))
    return Casts(chosen, classes, missing, nothing, shared)


def audit_class(
    passes: Passes, scanned: Scanned, casts: Casts | None, class_id: int, seed: int
) -> ClassAudit:
    """Audit one class; `casts` are those of `cast_images` for the same images."""
    before, label = passes.forwards, passes.model.labels[class_id]
    shared = 0 if casts is None else casts.shared
    predicted = scanned.predicted
    own = [index for index, found in enumerate(predicted) if found == class_id]
    labels = [scanned.labels[index] for index in own]
    labelled = None if set(scanned.labels) == {None} else labels.count(class_id)
    chosen = sample(scanned, class_id, seed)
    if isinstance(chosen, str) or casts is None:
        reason = {"everything": chosen if isinstance(chosen, str) else "there are no images"}
        return ClassAudit(class_id, label, "not_tested", len(own), labelled, untested=reason)
    trials = pixel_trials(scanned, chosen)
    parts, untested = part_trials(passes, scanned, chosen, class_id, seed)
    trials += [*cast_trials(scanned, casts, class_id), *parts]
    if casts.missing:
        untested["casts"] = casts.missing
    searched = [(trial, _searched(passes, trial, casts, class_id)) for trial in trials]
    hits = [
        (trial, flips) for trial, flips in searched if trial.rule.holds(flips.flips, flips.control)
    ]
    findings = list[Finding]()
    for trial, flips in _in_order(hits):
        used = shared + passes.forwards - before
        findings.append(_finding(passes, scanned, trial, flips, class_id, MOST_FORWARDS - used))
    return ClassAudit(
        class_id,
        label,
        verdict_of(findings),
        len(own),
        labelled,
        findings,
        [Tried(trial.kind, trial.name, flips) for trial, flips in searched],
        untested,
        shared + passes.forwards - before,
    )


def part_trials(
    passes: Passes, scanned: Scanned, chosen: Sample, class_id: int, seed: int
) -> tuple[list[Trial], dict[str, str]]:
    """The trials of the class's parts; or, by `parts`, why there are none."""
    model = passes.model
    reason = why_no_parts(model)
    if reason is not None or model.target_layer is None:
        return [], {"parts": reason or "the model has no target layer"}
    layer = model.target_layer
    parts = find_parts(passes, images_of(scanned, chosen.own), class_id, layer, seed)
    if isinstance(parts, str):
        return [], {"parts": parts}
    return [part_trial(passes, scanned, chosen, part, layer, LARGEST) for part in parts], {}


def cast_trials(scanned: Scanned, casts: Casts, class_id: int) -> list[Trial]:
    """A trial for each cast, whose search has run for all classes together."""
    predicted, used = scanned.predicted, set(casts.chosen)
    able = [
        index
        for index in balanced(predicted, len(predicted), class_id)
        if class_id not in {predicted[index], scanned.labels[index]}
    ]
    pairs = [(Pair(index, index), index) for index in able if index in used]
    unseen = [(Pair(index, index), index) for index in able if index not in used][:CONFIRMED]

    def trial(name: str) -> Trial:
        def make(pair: Pair) -> Tensor:
            return edits.cast(scanned.images[pair.recipient], name)

        return Trial("cast", name, RULES["cast"], make, (), pairs, unseen)

    return [trial(name) for name in casts.classes]


def _searched(passes: Passes, trial: Trial, casts: Casts, class_id: int) -> Flips:
    if trial.kind != "cast":
        return measured(passes, trial, class_id)
    after = dict(zip(casts.chosen, casts.classes[trial.name], strict=True))
    turned = [after[pair.recipient] == class_id for pair, _ in trial.pairs]
    return Flips(Proportion(sum(turned), len(turned)), None, tuple(turned))


def _in_order(hits: Sequence[tuple[Trial, Flips]]) -> list[tuple[Trial, Flips]]:
    """The best of each kind first: the bound on forward passes may not allow to confirm all."""
    ranked, ranks = sorted(hits, key=lambda hit: -hit[1].net), Counter[str]()
    order = []
    for trial, flips in ranked:
        ranks[trial.kind] += 1
        order.append((ranks[trial.kind], trial, flips))
    return [(trial, flips) for _, trial, flips in sorted(order, key=lambda one: one[0])]


def _finding(  # noqa: PLR0917 - what was found, and what is left to spend
    passes: Passes, scanned: Scanned, trial: Trial, search: Flips, class_id: int, left: int
) -> Finding:
    """Confirm a hit on unseen pairs, and describe it."""
    again = None
    if len(trial.unseen) >= LEAST and len(trial.unseen) * (1 + len(trial.controls)) <= left:
        again = measured(passes, trial, class_id, unseen=True, whole=True)
    confirmed = again is not None and trial.rule.holds(again.flips, again.control)
    used, flips = (trial.unseen, again) if again is not None else (trial.pairs, search)
    return Finding(
        trial.kind,
        trial.name,
        search,
        again,
        confirmed,
        _necessity(passes, scanned, trial, class_id) if trial.part else None,
        _part_facts(scanned, trial) if trial.part else None,
        _pastes(scanned, trial, [pair for pair, _ in used], flips),
        _strongest(scanned, trial),
    )


def _strongest_donors(trial: Trial) -> list[int]:
    """The donors of the search, each once, in order."""
    return list(dict.fromkeys(pair.donor for pair, _ in trial.pairs))[:STRONGEST]


def _necessity(passes: Passes, scanned: Scanned, trial: Trial, class_id: int) -> Necessity:
    donors, mask = _strongest_donors(trial), trial.mask
    assert mask is not None
    images = images_of(scanned, donors)
    own = [edits.hidden(image, mask(at)) for image, at in zip(images, donors, strict=True)]
    other = [
        edits.hidden(image, edits.elsewhere(mask(at), at))
        for image, at in zip(images, donors, strict=True)
    ]
    hidden = passes.logits(own)
    drop = lead(passes.logits(other), class_id) - lead(hidden, class_id)
    changed = int((hidden.argmax(dim=1) != class_id).sum())
    return Necessity(len(donors), float(drop.mean()), changed)


def _part_facts(scanned: Scanned, trial: Trial) -> PartFacts:
    donors, part, mask = _strongest_donors(trial), trial.part, trial.mask
    assert part is not None
    assert mask is not None
    regions = [mask(donor) for donor in donors]
    centres = torch.stack([_centre(region) for region in regions])
    middle = centres.mean(dim=0)
    pixels = [
        scanned.images[donor][:, region] for donor, region in zip(donors, regions, strict=True)
    ]
    colour = torch.cat(pixels, dim=1).float().mean(dim=1).round().int().tolist()
    inside = [
        float(known[region].float().mean())
        for donor, region in zip(donors, regions, strict=True)
        if (known := scanned.masks[donor]) is not None
    ]
    return PartFacts(
        trial.name.partition(" of ")[2],
        part.number + 1,
        part.share,
        part.presence,
        (float(middle[0]), float(middle[1])),
        float((centres - middle).norm(dim=1).mean()),
        tuple(colour),
        sum(inside) / len(inside) if 2 * len(inside) >= len(donors) else None,
    )


def _centre(region: Tensor) -> Tensor:
    """The mean x, y of a region, bool (h, w), 0..1."""
    rows, columns = region.nonzero(as_tuple=True)
    height, width = region.shape
    return torch.stack(
        [(columns.float().mean() + 0.5) / width, (rows.float().mean() + 0.5) / height]
    )


def _pastes(scanned: Scanned, trial: Trial, pairs: Sequence[Pair], flips: Flips) -> list[Paste]:
    """Four recipients before and after; one of them kept its class, if any did."""
    turned = [number for number, one in enumerate(flips.turned) if one]
    kept = [number for number, one in enumerate(flips.turned) if not one]
    chosen = turned[: PASTES - min(1, len(kept))]
    chosen += kept[: PASTES - len(chosen)]
    return [
        Paste(
            scanned.names[pairs[number].recipient],
            "" if trial.kind == "cast" else scanned.names[pairs[number].donor],
            scanned.images[pairs[number].recipient],
            trial.make(pairs[number]),
            flips.turned[number],
        )
        for number in chosen
    ]


def _strongest(scanned: Scanned, trial: Trial) -> list[Shown]:
    """Six images that the edit took its pixels from; none for a cast."""
    if trial.kind == "cast":
        return []
    return [
        Shown(scanned.names[donor], scanned.images[donor], trial.mask and trial.mask(donor))
        for donor in _strongest_donors(trial)[:SHOWN]
    ]
