"""Verdicts and effects of edits on boxes and regions, by the trained detector and segmenter.

Figures against plain torchvision on a private copy, and what edits of known objects do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import answer, image, loaded, question
from torch import Tensor
from torchvision.ops import box_iou

from service.cam.verdict import RUNS, Evidence, contrasts, design, hidden, judge
from service.inference.questions import ImageEdit, InferenceResult, TrackedEffect
from service.inference.tracked import Tracker, with_tracked
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent.parent / "tools" / "flower_scenes")
    import flower_networks
    import scenes

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def scene(shared_data: Path) -> scenes.Scene:
    return scenes.validation(shared_data / "flowers128.tar", 1)[0]


@cache
def flowers(kind: str) -> LoadedModel:
    return load_model(ModelSpec(kind, f"flower_networks:{kind}", labels=flower_networks.LABELS))


def with_edits(model: LoadedModel, pixels: Tensor, edits: Sequence[Tensor]) -> InferenceResult:
    """The effects of edits, each an edited image, on the best box or the largest region."""
    made = tuple(ImageEdit(2, lambda n, one=one: (one, pixels)[n]) for one in edits)
    (result,) = answer(
        model, question(model, pixels, method=None, edits=made, tracks=True, min_score=0.5)
    )
    return result


def corners(box: Any) -> tuple[int, int, int, int]:
    """Columns and rows of a box (x, y, w, h), 4 pixels larger on each side."""
    x, y, w, h = box
    return max(0, int(x) - 4), max(0, int(y) - 4), int(x + w) + 5, int(y + h) + 5


def best_match(raw: dict[str, Tensor], box: Any, label: int) -> list[float]:
    """Score and IoU of the best detection of a class over a box (x, y, w, h), one by one."""
    x, y, w, h = box
    found = [0.0, 0.0]
    for other, score, class_id in zip(raw["boxes"], raw["scores"], raw["labels"], strict=True):
        overlap = float(box_iou(torch.tensor([[x, y, x + w, y + h]]), other[None]))
        if int(class_id) == label and overlap >= 0.5 and float(score) > found[0]:
            found = [float(score), overlap]
    return found


def outputs(model: LoadedModel, images: Tensor) -> Any:
    with torch.no_grad():
        return copy.deepcopy(model.module)(model.normalised(images))


def filled(pixels: Tensor) -> Tensor:
    mean = pixels.double().mean(dim=(1, 2), keepdim=True)
    return mean.round().to(torch.uint8).expand_as(pixels)


def test_hiding_an_object_removes_its_box_and_keeping_only_it_keeps_the_box(
    scene: scenes.Scene,
) -> None:
    model, pixels = flowers("faster_rcnn"), scene.pixels
    (plain,) = answer(model, question(model, pixels, method=None, min_score=0.5))
    best = plain.predictions[0]
    left, top, right, bottom = corners(best.box)
    gone, kept, away = pixels.clone(), filled(pixels).clone(), pixels.clone()
    gone[:, top:bottom, left:right] = filled(pixels)[:, top:bottom, left:right]
    kept[:, top:bottom, left:right] = pixels[:, top:bottom, left:right]
    y, x = next(
        (y, x)
        for y in range(0, 296, 8)
        for x in range(0, 296, 8)
        if not bool(scene.masks[:, max(0, y - 12) : y + 36, max(0, x - 12) : x + 36].any())
    )
    away[:, y : y + 24, x : x + 24] = filled(pixels)[:, y : y + 24, x : x + 24]
    edits = (gone, kept, away)
    result = with_edits(model, pixels, edits)
    raw = outputs(model, torch.stack(edits))
    assert [each.box for each in result.tracked] == [best.box]
    values = []
    for effect, each in zip(result.effects, raw, strict=True):
        assert isinstance(effect, TrackedEffect)
        values.append(effect.values[0, :, 0].tolist())
        assert values[-1] == pytest.approx(best_match(each, best.box, best.class_id), abs=1e-5)
        assert effect.values[1].equal(effect.unedited), "the image itself changes nothing"
        shown = [score for score in each["scores"].tolist() if score >= 0.5]
        assert [one.score for one in effect.predictions] == pytest.approx(shown, abs=1e-5)
    assert values[0][0] < 0.5 < values[1][0]
    assert values[2][0] == pytest.approx(best.score, abs=0.1)


def test_the_verdict_on_a_box_is_that_of_its_score_in_a_private_copy() -> None:
    """Of two boxes; the maps cover the padded tensor, 82 of whose 96 columns are the image."""
    model, pixels = loaded("faster_rcnn"), image(1)
    (result,) = answer(model, question(model, pixels, verify=True, explain_top=2))
    plan = design((70, 90))
    raw = outputs(model, hidden(pixels, plan, slice(0, RUNS)))
    assert len(result.explanations) == 2
    for one in result.explanations:
        scores = [best_match(each, one.box, one.class_id)[0] for each in raw]
        falls = one.score - torch.tensor(scores)[:, None]
        evidence = Evidence(plan, falls, contrasts(pixels, plan), (0.0, 0.0, 96 / 82, 1.0))
        expected = judge(evidence, torch.from_numpy(one.grid.copy()), 0)
        assert one.verdict is not None
        assert (one.verdict.verdict, one.verdict.reason) == (expected.verdict, expected.reason)
        assert one.verdict.agreement == pytest.approx(expected.agreement, abs=2e-3)
        assert one.verdict.p_place == pytest.approx(expected.p_place, abs=5e-3)
        assert one.verdict.p_class is None


def test_a_region_is_measured_by_its_probability_and_by_the_pixels_that_keep_the_class(
    scene: scenes.Scene,
) -> None:
    model, pixels = flowers("lraspp"), scene.pixels
    (first,) = answer(model, question(model, pixels, method=None, tracks=True))
    target = first.tracked[0]
    assert target.mask is not None
    mask = torch.from_numpy(target.mask)
    gone = torch.where(mask, filled(pixels), pixels)
    kept = torch.where(mask, pixels, filled(pixels))
    result = with_edits(model, pixels, (gone, kept))
    shares = []
    out = outputs(model, torch.stack([gone, kept]))["out"]
    for effect, logits in zip(result.effects, out, strict=True):
        assert isinstance(effect, TrackedEffect)
        score, share = effect.values[0, :, 0].tolist()
        assert score == pytest.approx(
            float(logits.softmax(dim=0)[target.class_id][mask].mean()), abs=1e-5
        )
        held = logits.argmax(dim=0)[mask] == target.class_id
        assert share == pytest.approx(float(held.float().mean()), abs=1e-3)
        shares.append(share)
    assert shares[0] < shares[1]


def test_the_verdict_on_a_region_is_that_of_its_mean_probability() -> None:
    model, pixels = loaded("segmenter"), image(1, (64, 80))
    (result,) = answer(model, question(model, pixels, verify=True))
    (one,) = result.explanations
    plan = design((64, 80))
    out = outputs(model, hidden(pixels, plan, slice(0, RUNS)))["out"]
    assert one.region is not None
    inside = torch.from_numpy(one.region)
    scores = out.softmax(dim=1)[:, one.class_id, inside].mean(dim=1)
    evidence = Evidence(plan, one.score - scores[:, None], contrasts(pixels, plan))
    expected = judge(evidence, torch.from_numpy(one.grid.copy()), 0)
    assert one.verdict is not None
    assert one.verdict.verdict == expected.verdict
    assert one.verdict.agreement == pytest.approx(expected.agreement, abs=2e-3)


def test_an_edit_that_the_model_answers_with_nan_is_an_error_of_its_own() -> None:
    model, pixels = loaded("segmenter"), image(1, (64, 80))
    (found,) = answer(model, question(model, pixels, method=None, tracks=True))
    own = torch.ones(2, 1)
    for number, tracked in enumerate((torch.full((2, 1), torch.nan), own)):
        tracker = Tracker(
            found.tracked, own, lambda raw, one=tracked: [one] * len(raw["out"]), tuple
        )
        edit = ImageEdit(1, lambda _: 255 - pixels)
        asked = question(model, pixels, method=None, tracks=True, edits=(edit,))
        steps = with_tracked(model, asked, found, tracker)
        next(steps)
        with pytest.raises(StopIteration) as end:
            steps.send(Replica(model, model.module, Condition.of(model.module)))
        (effect,) = end.value.value.effects
        assert isinstance(effect, TrackedEffect) == bool(number)
