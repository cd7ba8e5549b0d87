"""Boxes and their maps against plain torchvision and a full backward pass on a private copy."""

from __future__ import annotations

import pytest
import torch
from detectors import answer, image, loaded, oracle, plain, question

from service.inference.contrast import Contrast

pytestmark = pytest.mark.timeout(120)

KINDS = ("faster_rcnn", "mask_rcnn", "retinanet", "fcos", "ssd")


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_and_scores_are_those_of_torchvision(kind: str) -> None:
    model, pixels = loaded(kind), image(1)
    expected = plain(model, pixels)
    (result,) = answer(model, question(model, pixels, explain_top=3))
    assert len(expected["scores"]) > 3
    kept = expected["scores"] >= 0.05
    assert [each.score for each in result.predictions] == expected["scores"][kept].tolist()
    assert [each.class_id for each in result.predictions] == expected["labels"][kept].tolist()
    boxes = expected["boxes"][kept]
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    assert torch.equal(torch.tensor([each.box for each in result.predictions]), sides)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_of_a_box_is_that_of_a_full_backward_pass(kind: str) -> None:
    model, pixels = loaded(kind), image(1)
    (result,) = answer(model, question(model, pixels, explain_top=4))
    assert len(result.explanations) == 4
    for explanation in result.explanations:
        expected = oracle(model, pixels, explanation.detection or 0)
        assert tuple(expected) == explanation.layers
        (cam,) = expected.values()
        found = torch.from_numpy(explanation.grid.copy()) * explanation.high
        assert torch.allclose(found, cam, rtol=0, atol=1e-5 * float(cam.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_that_runs_again_gives_the_map_of_the_whole_graph(kind: str) -> None:
    """A named layer is differentiated in the whole graph, the default by the tail alone."""
    model, pixels = loaded(kind), image(2)
    for of in ("class", "x1", "y2"):
        (short,) = answer(model, question(model, pixels, explain_top=3, of=of))
        for one in short.explanations:
            layers = one.layers
            (whole,) = answer(model, question(model, pixels, explain_top=3, of=of, layers=layers))
            other = next(each for each in whole.explanations if each.detection == one.detection)
            assert other.layers == layers
            assert abs(torch.from_numpy(one.grid - other.grid)).max() <= 1e-5
            assert one.window == other.window


@pytest.mark.parametrize("kind", KINDS)
def test_images_in_a_batch_get_what_they_get_alone(kind: str) -> None:
    model = loaded(kind)
    questions = [question(model, image(seed), explain_top=2) for seed in (1, 4)]
    together = answer(model, *questions)
    for one, result in zip(questions, together, strict=True):
        (alone,) = answer(model, one)
        for mine, theirs in zip(alone.predictions, result.predictions, strict=True):
            assert mine.class_id == theirs.class_id
            assert mine.score == pytest.approx(theirs.score, abs=1e-5)
        for mine_, theirs_ in zip(alone.explanations, result.explanations, strict=True):
            assert mine_.layers == theirs_.layers
            assert abs(torch.from_numpy(mine_.grid - theirs_.grid)).max() <= 1e-4


def test_the_window_of_a_map_is_the_padded_tensor_in_source_pixels() -> None:
    """70 × 90 is resized to 64 × 82 and padded to 64 × 96: 105.37 source pixels wide."""
    model = loaded("faster_rcnn")
    (result,) = answer(model, question(model, image(1)))
    assert result.explanations[0].window == pytest.approx((0, 0, 90 * 96 / 82, 70), abs=1e-9)


def test_a_contrast_is_of_the_same_row() -> None:
    """The gradient of z_a − z_b is the difference of the gradients of both logits of the row."""
    model, pixels = loaded("retinanet"), image(1)
    (result,) = answer(model, question(model, pixels))
    label = result.explanations[0].class_id
    other = 1 + label % 3
    contrast = Contrast((other,))
    (result,) = answer(model, question(model, pixels, contrast=contrast))
    (explanation,) = result.explanations
    assert dict(explanation.contrast) == {other: 1.0}
    assert explanation.logit_difference is not None
    assert explanation.logit_difference > 0


def test_nothing_detected_is_no_error() -> None:
    model = loaded("faster_rcnn")
    (result,) = answer(model, question(model, image(1), min_score=1.0))
    assert result.predictions == ()
    assert result.explanations == ()


@pytest.mark.parametrize("size", [(1, 1), (8, 160), (160, 8)])
def test_extreme_images_have_answers(size: tuple[int, int]) -> None:
    for kind in ("faster_rcnn", "retinanet", "ssd"):
        model = loaded(kind)
        (result,) = answer(model, question(model, image(1, size), explain_top=100, min_score=0.0))
        assert len(result.explanations) == len(result.predictions)


def test_a_detector_of_a_user_that_takes_a_list_is_explained_by_its_score() -> None:
    model, pixels = loaded("own"), image(1, (64, 64))
    assert model.takes_list
    assert model.head is None
    (result,) = answer(model, question(model, pixels, explain_top=2))
    assert len(result.explanations) == 2
    assert all(each.grid.any() for each in result.explanations)


@pytest.mark.parametrize("method", ["rise", "occlusion"])
def test_black_box_methods_weigh_the_score_by_the_overlap(method: str) -> None:
    model, pixels = loaded("ssd"), image(1)
    (result,) = answer(model, question(model, pixels, method=method, samples=20))
    (explanation,) = result.explanations
    assert explanation.grid.shape == model.preprocessing.canvas
    assert explanation.layers == ()
