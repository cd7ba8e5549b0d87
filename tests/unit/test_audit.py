"""The audit of a model: its statistics on paper, its edits, and a model whose cue is known."""

from __future__ import annotations

import math
from dataclasses import replace

import audited
import pytest
import torch
from sklearn.decomposition import NMF
from tiny import loaded
from torch import Tensor

from service.evaluation.audit import edits
from service.evaluation.audit.audit import Audit, audit
from service.evaluation.audit.class_audit import MOST_FORWARDS
from service.evaluation.audit.factors import factorise
from service.evaluation.audit.findings import Finding, PartFacts, verdict_of
from service.evaluation.audit.parts import Part, region
from service.evaluation.audit.proportions import Proportion, difference_interval
from service.evaluation.audit.sample import Scanned, sample
from service.evaluation.audit.trials import RULES, Flips, Rule

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def found() -> Audit:
    """The audit of the model that sees a corner, on 40 images of each class."""
    images, labels = audited.images(40)
    return audit(loaded(audited.SeesCorner()), images, labels=labels)


@pytest.mark.parametrize(
    ("part", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (0, 0, 0, 1)],
)
def test_the_interval_of_a_proportion_is_that_of_newcombes_table(
    part: int, n: int, low: float, high: float
) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3 (Wilson)."""
    assert Proportion(part, n).interval == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_the_interval_of_a_difference_is_that_of_newcombes_table(
    one: tuple[int, int], other: tuple[int, int], low: float, high: float
) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 873-890, table II, method 10."""
    assert difference_interval(Proportion(*one), Proportion(*other)) == pytest.approx(
        (low, high), abs=6e-5
    )


def test_factors_are_as_near_the_matrix_as_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(1)
    true = torch.rand(120, 4, generator=generator) @ torch.rand(4, 30, generator=generator)
    values = true + 0.1 * torch.rand(120, 30, generator=generator)
    weights, factors = factorise(values, 4, seed=0)
    ours = float((values - weights @ factors).square().sum())
    theirs = NMF(4, max_iter=2000, tol=1e-6).fit(values.numpy()).reconstruction_err_ ** 2
    assert ours <= 1.05 * theirs
    assert float(weights.min()) >= 0
    assert float(factors.min()) >= 0
    assert factors.norm(dim=1).tolist() == pytest.approx([1] * 4, abs=1e-5)


def test_a_matrix_of_two_disjoint_factors_is_taken_apart() -> None:
    weights = torch.tensor([[1.0, 0], [2, 0], [0, 3], [0, 1]])
    factors = torch.tensor([[0.6, 0.8, 0, 0], [0, 0, 0, 1.0]])
    _, ours = factorise(weights @ factors, 2, seed=3)
    first, second = sorted(ours.tolist())
    assert first == pytest.approx([0, 0, 0, 1], abs=1e-4)
    assert second == pytest.approx([0.6, 0.8, 0, 0], abs=1e-4)


def test_places_have_the_shares_of_the_image_that_their_names_say() -> None:
    shares = {name: float(mask.float().mean()) for name, mask in edits.places(200, 100).items()}
    corners = {name: share for name, share in shares.items() if name.endswith("corner")}
    assert shares["ring"] == pytest.approx(1 - 0.8 * 0.8)
    assert shares["top third"] == pytest.approx(1 / 3, abs=0.01)
    assert list(corners.values()) == pytest.approx([0.09] * 4)
    union = torch.stack([edits.places(200, 100)[name] for name in corners]).sum(dim=0)
    assert int(union.max()) == 1


def test_a_region_elsewhere_is_as_large_and_somewhere_else() -> None:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[2:6, 3:9] = True
    other = edits.elsewhere(mask, seed=5)
    assert int(other.sum()) == int(mask.sum())
    assert not torch.equal(other, mask)


def test_an_image_is_blurred_to_the_wanted_sharpness_and_never_sharpened() -> None:
    image = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)
    sharp = edits.sharpness(image)
    made = edits.as_sharp_as(image, sharp / 3)
    assert sharp / 6 < edits.sharpness(made) <= sharp / 3
    assert edits.as_sharp_as(image, 2 * sharp) is image


def test_a_cast_multiplies_the_channels_and_clips() -> None:
    image = torch.tensor([100, 100, 240], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    assert edits.cast(image, "blue")[:, 0, 0].tolist() == [85, 85, 255]


def test_a_region_is_bounded_by_half_of_the_peak_and_by_its_share_of_the_area() -> None:
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0] = 1.0
    part = Part(0, maps, 1.0, (0,))
    model = loaded(audited.SeesCorner())
    small = region(part, 0, (32, 32), model, largest=0.02)
    whole = region(part, 0, (32, 32), model, largest=1.0)
    assert 0 < int(small.sum()) <= round(0.02 * 1024)
    assert int(whole.sum()) > int(small.sum())
    assert bool(small[0, 0])
    assert not bool(whole[12:, 12:].any())


def scanned(predicted: list[int], labels: list[int | None] | None = None) -> Scanned:
    """Images of which only the predicted classes matter."""
    classes, count = max(predicted) + 1, len(predicted)
    logits = torch.zeros(count, classes)
    logits[range(count), predicted] = 1.0
    nothing: list[Tensor | None] = [None] * count
    return Scanned([], logits, labels or [None] * count, nothing, [f"{i}" for i in range(count)])


def test_no_image_is_used_both_to_search_and_to_confirm() -> None:
    chosen = sample(scanned([0] * 50 + [1] * 60 + [2] * 60), 0, seed=4)
    assert not isinstance(chosen, str)
    assert len(chosen.recipients) == 24
    assert len(chosen.unseen_recipients) == 64
    assert not set(chosen.donors) & set(chosen.unseen_donors)
    assert not set(chosen.recipients) & set(chosen.unseen_recipients)
    assert all(index >= 50 for index in (*chosen.recipients, *chosen.strangers))
    classes = [50 <= index < 110 for index in chosen.recipients]
    assert classes.count(True) == 12
    thirds = [50 <= index < 110 for index in chosen.strangers]
    assert all(one != other for one, other in zip(classes, thirds, strict=True))


def test_an_image_with_the_label_of_the_class_is_no_recipient() -> None:
    labels: list[int | None] = [0] * 30 + [0] * 10 + [1] * 30
    chosen = sample(scanned([0] * 30 + [1] * 40, labels), 0, seed=0)
    assert not isinstance(chosen, str)
    assert all(index >= 40 for index in (*chosen.recipients, *chosen.unseen_recipients))


def test_with_many_classes_recipients_are_of_those_that_come_nearest() -> None:
    predicted = [index // 20 for index in range(20 * 60)]
    one = scanned(predicted)
    logits = one.logits.clone()
    near = list(range(20 * 30, 20 * 54))  # classes 30 to 53
    logits[near, 0] = 0.9
    chosen = sample(replace(one, logits=logits), 0, seed=0)
    assert not isinstance(chosen, str)
    assert {predicted[index] for index in chosen.recipients} == set(range(30, 54))


@pytest.mark.parametrize(("own", "others"), [(19, 60), (30, 19)])
def test_a_class_with_too_few_images_is_not_sampled(own: int, others: int) -> None:
    reason = sample(scanned([0] * own + [1] * others), 0, seed=0)
    assert isinstance(reason, str)
    assert "20" in reason


def test_a_rule_needs_the_flips_the_difference_and_its_bound() -> None:
    rule = Rule(0.5, 0.2, 0.2)
    assert rule.holds(Proportion(12, 24), None)
    assert not rule.holds(Proportion(11, 24), None)
    assert not rule.holds(Proportion(12, 24), Proportion(6, 24))  # its bound is −0.02
    assert rule.holds(Proportion(20, 24), Proportion(6, 24))


def test_the_planted_corner_is_a_suspected_cue_and_the_middle_is_to_be_looked_at(
    found: Audit,
) -> None:
    assert [one.verdict for one in found.classes] == ["suspected_cue", "look", "look", "look"]
    places = {one.place: one for one in found.classes[0].findings}
    corner = places["top left corner"]
    assert corner.confirmed
    assert corner.measured is not None
    assert corner.measured.flips == Proportion(64, 64)
    assert corner.measured.control == Proportion(0, 64)
    assert "bottom right corner" not in places
    assert places["top third"].search.net == 1
    assert {one.turned for one in corner.pastes} == {True}
    assert torch.equal(corner.pastes[0].after[:, 10:, 10:], corner.pastes[0].before[:, 10:, 10:])


def test_with_masks_the_part_on_the_object_is_a_part_of_it_and_the_corner_stays_a_cue() -> None:
    images, labels = audited.images(40)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[8:24, 8:24] = True
    model = loaded(audited.SeesCorner())
    known = audit(model, images, labels=labels, masks=[mask] * len(images))
    verdicts = [one.verdict for one in known.classes]
    assert verdicts == ["suspected_cue"] + ["part_of_object"] * 3
    inside = [one.part.inside for one in known.classes[1].findings if one.part]
    assert inside[0] is not None
    assert inside[0] >= 0.8


def test_the_cost_is_counted_and_bounded(found: Audit) -> None:
    assert all(0 < one.forwards <= MOST_FORWARDS for one in found.classes)


def test_an_audit_depends_on_its_seed_alone(found: Audit) -> None:
    images, labels = audited.images(40)
    again = audit(loaded(audited.SeesCorner()), images, labels=labels)
    assert again.as_json() == found.as_json()


def test_a_model_without_a_target_layer_is_audited_without_parts() -> None:
    images, _ = audited.images(30)
    one = audit(loaded(audited.SeesCornerDirectly()), images).classes[0]
    assert one.verdict == "suspected_cue"
    assert "no target layer" in one.untested["parts"]
    assert {tried.kind for tried in one.tried} == {"place", "sharpness", "cast"}


def test_a_model_without_gradients_and_linear_head_is_audited_without_parts() -> None:
    images, _ = audited.images(30)
    model = replace(loaded(audited.SeesCorner()), no_gradients="planted")
    one = audit(model, images).classes[0]
    assert one.verdict == "suspected_cue"
    assert "planted" in one.untested["parts"]


def finding(inside: float | None, *, part: bool = True, confirmed: bool = True) -> Finding:
    facts = PartFacts("layer", 1, 0.5, 0.9, (0.1, 0.1), 0.1, (1, 2, 3), inside)
    flips = Flips(Proportion(24, 24), Proportion(0, 24))
    kind = "part" if part else "place"
    return Finding(kind, "x", flips, flips, confirmed, part=facts if part else None)


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([], "none_found"),
        ([finding(None, confirmed=False)], "none_found"),
        ([finding(None)], "look"),
        ([finding(0.9)], "part_of_object"),
        ([finding(0.9), finding(0.3)], "suspected_cue"),
        ([finding(None), finding(None, part=False)], "suspected_cue"),
    ],
)
def test_the_verdict_follows_from_what_was_confirmed(findings: list[Finding], verdict: str) -> None:
    assert verdict_of(findings) == verdict


def test_there_is_a_rule_for_every_trial() -> None:
    names = {name.rpartition(" ")[2] for name in edits.places(10, 10)}
    assert names | {"cast", "sharpness", "part"} == set(RULES)
    assert not math.isnan(sum(rule.flips for rule in RULES.values()))
