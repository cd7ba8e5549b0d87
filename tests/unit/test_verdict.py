"""Verdicts: the design, the test of place, and models whose evidence is known by construction."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from service.cam import verdict
from service.cam.verdict import CELLS, RUNS, Design, Evidence, contrasts, design, hidden, judge

PLACES = [((96, 96), verdict.WHOLE), ((64, 128), verdict.WHOLE), ((96, 96), (0.0, 0.2, 1.0, 0.6))]
"""Sizes of the model input (height, width), and where it shows the image: squared, wide, padded."""


def pink(seed: int, size: tuple[int, int]) -> Tensor:
    """Noise with the spectrum of photographs, uint8 (3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(3, *size, generator=generator)
    rows, columns = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]
    distance = (rows**2 + columns**2).sqrt().clamp(min=1 / max(size))
    noise = torch.fft.irfft2(torch.fft.rfft2(white) / distance, s=size)
    return (noise / noise.std() * 40 + 120).clamp(0, 255).to(torch.uint8)


def square(seed: int, plan: Design, *, away_from: Tensor | None = None) -> Tensor:
    """A mask (height, width) of a square of about a tenth of the area, at a random place."""
    left, top, width, height = plan.area
    side = round(0.33 * math.sqrt(width * height))
    generator = np.random.default_rng(seed)
    while True:
        y, x = generator.integers(height - side + 1), generator.integers(width - side + 1)
        mask = torch.zeros(plan.size)
        mask[top + y : top + y + side, left + x : left + x + side] = 1
        if away_from is None or not bool((mask * away_from).any()):
            return mask


def evidence_of(image: Tensor, plan: Design, logits: object) -> Evidence:
    """Forty calls of a function of images, uint8 (n, 3, height, width), to logits (n, classes)."""
    assert callable(logits)
    falls = logits(image[None]) - logits(hidden(image, plan, slice(0, RUNS)))
    return Evidence(plan, falls, contrasts(image, plan))


def test_cells_are_hidden_independently_of_each_other_and_of_the_fill() -> None:
    """Orthogonal columns, each balanced, by the definition of a Plackett–Burman design."""
    signs = 2 * verdict._columns(CELLS).double() - 1
    fill = torch.cat([torch.ones(RUNS // 2), -torch.ones(RUNS // 2)]).double()
    assert torch.equal(signs.T @ signs, RUNS * torch.eye(CELLS, dtype=torch.float64))
    assert not bool((signs.T @ fill).any())
    assert not bool(signs.sum(dim=0).any())


@pytest.mark.parametrize(("size", "seen"), PLACES)
def test_a_run_changes_only_what_it_hides_and_never_the_padding(
    size: tuple[int, int], seen: tuple[float, float, float, float]
) -> None:
    image, plan = pink(0, size), design(size, seen)
    masks, made = plan.masks(slice(0, RUNS)), hidden(image, plan, slice(0, RUNS))
    shown = masks[:, None].expand(-1, 3, -1, -1) == 0
    assert torch.equal(made[shown], image.expand(RUNS, -1, -1, -1)[shown])
    left, top, width, height = plan.area
    outside = torch.ones(size, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    assert not bool(masks[:, outside].any())
    shares = masks.mean(dim=(1, 2)) * math.prod(size) / (width * height)
    assert float(shares.min()) > 0.1
    assert float(shares.max()) < 0.9
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)
    wholly = (masks[0] == 1).nonzero()[:20]
    mean = image[:, top : top + height, left : left + width].double().mean(dim=(1, 2))
    for y, x in wholly.tolist():
        assert (made[0, :, y, x] - mean).abs().max() <= 1


@pytest.mark.parametrize(("size", "seen"), PLACES)
def test_the_square_that_decides_is_supported_and_another_one_is_not(
    size: tuple[int, int], seen: tuple[float, float, float, float]
) -> None:
    """The logit is a fixed template's product with the pixels of one square, and nothing else."""
    true, other = Counter[str](), Counter[str]()
    plan = design(size, seen)
    for seed in range(100):
        mask = square(seed, plan)
        image = torch.where(mask.bool(), pink(seed + 1000, size) // 4 + 180, pink(seed, size) // 2)

        def logits(images: Tensor, mask: Tensor = mask) -> Tensor:
            one = (images.float() * mask).sum(dim=(1, 2, 3)) / mask.sum() / 50
            return torch.stack([one, -one], dim=1)

        evidence = evidence_of(image, plan, logits)
        true[judge(evidence, mask, 0).verdict] += 1
        other[judge(evidence, square(seed, plan, away_from=mask), 0).verdict] += 1
    assert true["supported"] >= 95
    assert true["refuted"] == 0
    assert other["supported"] <= 5


def test_each_further_look_needs_a_smaller_p_value() -> None:
    size, generator = (96, 96), torch.Generator().manual_seed(0)
    plan, between = design(size), 0
    for seed in range(60):
        mask = square(seed, plan)
        noise = torch.rand(size, generator=generator) / 3
        evidence = evidence_of(
            pink(seed, size),
            plan,
            lambda images, weights=mask + noise: torch.stack(
                [(images.float() * weights).mean(dim=(1, 2, 3))] * 2, 1
            ),
        )
        one = judge(evidence, mask, 0)
        third = judge(replace(evidence, looks=3), mask, 0)
        assert (third.p_place, third.p_centred) == (one.p_place, one.p_centred)
        if one.verdict != "supported":
            assert third.verdict == one.verdict
        elif max(one.p_place, one.p_centred) > verdict.LEVEL / 3:
            assert third.verdict == "inconclusive"
            between += 1
        else:
            assert third == one
    assert between, "some lie between the two levels"


def test_a_network_that_saturates_on_its_square_is_judged_by_its_logit() -> None:
    """One logit through a ReLU of a template match; the map is what the template covers."""
    plan, found = design((96, 96)), Counter[str]()
    for seed in range(50):
        mask = square(seed, plan)
        pattern = (
            torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(seed)) > 0.5
        ) * mask
        image = torch.where(mask.bool(), (pattern * 255).to(torch.uint8), pink(seed, (96, 96)))
        template = (pattern - 0.5) * mask

        def logits(images: Tensor, template: Tensor = template) -> Tensor:
            match = (images.float() / 255 * template).sum(dim=(1, 2, 3)) / template.abs().sum()
            return torch.stack([(8 * match).relu() - 1, 1 - (8 * match).relu()], dim=1)

        found[judge(evidence_of(image, plan, logits), mask, 0).verdict] += 1
    assert found["supported"] >= 45
    assert found["refuted"] == 0


def by_loops(evidence: Evidence, grid: Tensor, class_id: int) -> dict[str, float]:
    """`judge` for a square input, copy by copy and run by run, in numpy."""
    plan, side = evidence.plan, verdict.SIDE
    hides = np.stack(
        [
            [
                [np.mean(cell) for cell in np.array_split(row, side, axis=1)]
                for row in np.array_split(mask, side, axis=0)
            ]
            for mask in plan.masks(slice(0, RUNS)).double().numpy()
        ]
    )
    base = grid.double().numpy().reshape(side, len(grid) // side, side, -1).mean(axis=(1, 3))
    falls = evidence.falls[:, class_id].double().numpy()

    def residual(values: np.ndarray, half: slice) -> np.ndarray:
        area = hides.mean(axis=(1, 2))[half]
        known = np.stack([np.ones(RUNS // 2), area], axis=1)
        return values - known @ np.linalg.lstsq(known, values, rcond=None)[0]

    halves = slice(0, RUNS // 2), slice(RUNS // 2, RUNS)
    drops = [residual(falls[half], half) for half in halves]
    drops = [values / np.linalg.norm(values) for values in drops]

    def agreement(cells: np.ndarray) -> list[float]:
        parts = [
            residual(np.array([(cells * hides[run]).sum() for run in range(RUNS)[half]]), half)
            for half in halves
        ]
        whole = np.corrcoef(np.concatenate(parts), np.concatenate(drops))[0, 1]
        return [whole, *(np.corrcoef(a, b)[0, 1] for a, b in zip(parts, drops, strict=True))]

    own, as_good, weighted, weights, scores = agreement(base), 0, 0.0, 0.0, []
    for flipped in (base, base[:, ::-1]):
        for turns in range(4):
            for down in range(side):
                for across in range(side):
                    copy = np.roll(np.rot90(flipped, turns), (down, across), axis=(0, 1))
                    score = agreement(copy)[0]
                    scores.append(score)
                    angle = 2 * np.pi * (np.arange(side) + 0.5) / side
                    mass = np.maximum(copy, 0)
                    middle = [
                        np.angle((mass.sum(axis=1 - axis) * np.exp(1j * angle)).sum())
                        % (2 * np.pi)
                        / (2 * np.pi)
                        - 0.5
                        for axis in (0, 1)
                    ]
                    weight = math.exp(-(middle[0] ** 2 + middle[1] ** 2) / (2 * 0.18**2))
                    is_as_good = score >= own[0] - 1e-9
                    as_good += is_as_good
                    weighted += weight * is_as_good
                    weights += weight
    return {
        "agreement": own[0],
        "mean": own[1],
        "blur": own[2],
        "p_place": as_good / len(scores),
        "p_centred": weighted / weights,
    }


def test_the_verdicts_figures_are_those_of_a_calculation_by_loops() -> None:
    size, generator = (84, 84), torch.Generator().manual_seed(5)
    plan, image = design(size), pink(3, size)
    template = torch.rand(3, *size, generator=generator)
    evidence = evidence_of(
        image,
        plan,
        lambda images: torch.stack([(images.float() * template).mean(dim=(1, 2, 3))] * 2, 1),
    )
    grid = torch.rand(28, 28, generator=generator) ** 3
    found, expected = judge(evidence, grid, 1), by_loops(evidence, grid, 1)
    assert found.agreement == pytest.approx(expected["agreement"], abs=1e-6)
    assert found.agreement_by_fill == pytest.approx((expected["mean"], expected["blur"]), abs=1e-6)
    assert found.p_place == pytest.approx(expected["p_place"], abs=1e-12)
    assert found.p_centred == pytest.approx(expected["p_centred"], abs=1e-6)


def test_a_map_or_a_score_that_does_not_vary_decides_nothing() -> None:
    size = (64, 64)
    plan, image = design(size), pink(0, size)
    evidence = evidence_of(image, plan, lambda images: images.float().mean(dim=(2, 3)))
    for flat in (torch.zeros(7, 7), torch.full((7, 7), 0.3), -torch.ones(7, 7)):
        assert judge(evidence, flat, 0).reason == "flat_map"
    constant = evidence_of(image, plan, lambda images: torch.ones(len(images), 2))
    assert judge(constant, torch.rand(7, 7), 0).reason == "flat_score"
    by_area = Evidence(plan, plan.hides().mean(dim=1, keepdim=True), contrasts(image, plan))
    assert judge(by_area, torch.rand(7, 7), 0).reason == "flat_score", "the hidden area alone"


def test_a_centred_object_is_no_support_for_a_centred_blob_of_another_shape() -> None:
    """A blob in the middle knows nothing of the image; a map has to beat all of its sizes."""
    plan, size = design((96, 96)), (96, 96)
    mask = torch.zeros(size)
    mask[30:66, 30:66] = 1
    image = torch.where(mask.bool(), pink(1, size) // 4 + 180, pink(0, size) // 2)
    evidence = evidence_of(
        image,
        plan,
        lambda images: (images.float() * mask).mean(dim=(1, 2, 3))[:, None].expand(-1, 2),
    )
    middle = (torch.arange(14) + 0.5) / 14 - 0.5
    for sigma in verdict.CENTRES:
        blob = torch.exp(-(middle[:, None] ** 2 + middle[None] ** 2) / (2 * sigma**2))
        assert judge(evidence, blob, 0).verdict == "inconclusive"
        assert judge(evidence, blob, 0).reason == "centre_as_good"
    assert judge(evidence, mask, 0).verdict == "supported"


def test_the_share_of_classes_is_given_from_twenty_classes_on() -> None:
    size = (64, 64)
    plan, image = design(size), pink(0, size)
    for classes, is_given in ((19, False), (20, True)):
        templates = (
            torch.rand(classes, *size, generator=torch.Generator().manual_seed(classes))
            * torch.linspace(0.5, 1, classes)[:, None, None]
        )
        evidence = evidence_of(
            image, plan, lambda x, t=templates: torch.einsum("nchw,khw->nk", x.float(), t)
        )
        assert (judge(evidence, torch.rand(7, 7), 0).p_class is not None) == is_given


def test_a_contrast_is_judged_by_the_lead_over_the_other_class() -> None:
    size = (96, 96)
    plan = design(size)
    mask = square(1, plan)
    image = torch.where(mask.bool(), pink(1, size) // 4 + 180, pink(0, size) // 2)

    def logits(images: Tensor) -> Tensor:
        common = images.float().mean(dim=(1, 2, 3))
        lead = (images.float() * mask).mean(dim=(1, 2, 3))
        return torch.stack([common + lead, common], dim=1)

    evidence = evidence_of(image, plan, logits)
    assert judge(evidence, mask, 0, contrast={1: 1.0}).verdict == "supported"
    assert (
        judge(evidence, mask, 0, contrast={1: 1.0}).agreement > judge(evidence, mask, 0).agreement
    )


@pytest.mark.parametrize("bins", [3, 14])
def test_a_row_is_averaged_over_bins_by_the_overlap_of_its_cells(bins: int) -> None:
    """Against a mean over a thousand points of each bin."""
    row = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0], dtype=torch.float64)
    start, extent = -0.1, 1.3
    points = start + extent * (torch.arange(bins * 1000, dtype=torch.float64) + 0.5) / (bins * 1000)
    inside = (points >= 0) & (points < 1)
    values = torch.where(inside, row[(points * 5).long().clamp(0, 4)], 0)
    expected = values.reshape(bins, 1000).mean(dim=1)
    assert torch.allclose(verdict.average(bins, 5, start, extent) @ row, expected, atol=5e-3)


def test_falls_within_the_rounding_of_the_logits_are_a_flat_score() -> None:
    """A class that ignores the image, computed twice with other roundings."""
    size, plan = (64, 64), design((64, 64))
    falls = 1e-6 * torch.randn(RUNS, 3, generator=torch.Generator().manual_seed(0))
    noise = Evidence(plan, falls, contrasts(pink(0, size), plan), rounding=1e-5)
    assert judge(noise, torch.rand(7, 7), 0).reason == "flat_score"
    assert judge(replace(noise, rounding=0.0), torch.rand(7, 7), 0).reason != "flat_score"
