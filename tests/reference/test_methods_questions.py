"""Targets, contrast, fused layers, output activations, mixed batches and flags."""

from __future__ import annotations

import math
from dataclasses import replace

import oracles
import pytest
import torch
from tiny import Faulty, PaperNet, SmallNet, loaded
from torch import Tensor, nn
from torch.nn import functional

from service.errors import NonFiniteOutput
from service.inference.contrast import Contrast
from service.inference.questions import Explanation, InferenceResult, Question
from service.models.loaded import LoadedModel

pytestmark = [pytest.mark.reference, pytest.mark.timeout(30)]

PIXELS = oracles.picture(10, 64, 64)
LAST, INNER = "features", "features.1"


def small(net: nn.Module | None = None, **changes) -> LoadedModel:
    """A small net whose classes differ: fresh heads hardly do."""
    net = net or SmallNet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        nn.init.normal_(net.head.weight, std=2)
    return replace(loaded(net, side=64), **changes)


def ask(model: LoadedModel, pixels: Tensor = PIXELS, **options) -> InferenceResult:
    options = {"layers": (LAST,)} | options
    (answer,) = oracles.answers(model, Question(pixels, **options))
    assert isinstance(answer, InferenceResult), answer
    return answer


def only(answer: InferenceResult) -> Explanation:
    (explanation,) = answer.explanations
    return explanation


@pytest.mark.parametrize("layer", [LAST, INNER])
def test_contrast_is_the_map_of_the_difference_of_two_logits(layer: str) -> None:
    """By full backward of y₂ − y₅; being linear, it is also the difference before the ReLU."""
    model = small()
    found = only(ask(model, targets=(2,), contrast=Contrast((5,)), layers=(layer,)))
    maps = []
    for value in (lambda y: y[2] - y[5], lambda y: y[2], lambda y: y[5]):
        activation, gradient = oracles.full_backward(model, layer, PIXELS, value)
        maps.append((gradient.mean(dim=(1, 2), keepdim=True) * activation).sum(dim=0))
    difference, two, five = maps
    assert oracles.distance(found, difference.relu()) < 1e-5
    assert oracles.distance(found, (two - five).relu()) < 1e-4
    assert found.contrast == {5: 1.0}


@pytest.mark.parametrize(
    "method",
    [
        "gradcampp",
        "eigencam",
        "cam",
        "scorecam",
        "ablationcam",
        "occlusion",
        "rise",
        "input_gradient",
        "guided_backprop",
        "guided_gradcam",
        "integrated_gradients",
    ],
)
def test_contrast_is_taken_by_every_method_that_knows_a_class(method: str) -> None:
    """As if the model's output were the difference itself; EigenCAM knows no class."""
    model = small()
    net = SmallNet()
    with torch.no_grad():
        net.head.weight[2] = model.module.head.weight[2] - model.module.head.weight[5]
        net.head.bias[2] = model.module.head.bias[2] - model.module.head.bias[5]
    lead = replace(loaded(net, side=64), output="none")
    model = replace(model, output="none")
    options = {"method": method, "targets": (2,), "samples": 20, "steps": 5}
    found = only(ask(model, contrast=Contrast((5,)), **options))
    expected = only(ask(lead, **options))
    assert oracles.distance(found, oracles.raw(expected)) < 1e-4


@pytest.mark.parametrize("layer", [LAST, INNER])
def test_several_targets_from_one_graph_equal_one_at_a_time(layer: str) -> None:
    model = small()
    together = ask(model, targets=(6, 0, 3, 1, 5), layers=(layer,))
    assert [each.class_id for each in together.explanations] == [6, 0, 3, 1, 5]
    for each in together.explanations:
        alone = only(ask(model, targets=(each.class_id,), layers=(layer,)))
        assert oracles.distance(each, oracles.raw(alone)) < 1e-5
        assert each.logit == pytest.approx(alone.logit, abs=1e-6)


def test_explain_top_explains_the_best_predictions_in_order() -> None:
    answer = ask(small(), explain_top=3)
    assert [e.class_id for e in answer.explanations] == [p.class_id for p in answer.predictions[:3]]
    assert [e.score for e in answer.explanations] == [p.score for p in answer.predictions[:3]]
    assert "target_not_predicted" in answer.explanations[1].flags
    assert "target_not_predicted" not in answer.explanations[0].flags


def test_explain_top_beyond_the_classes_explains_them_all() -> None:
    assert len(ask(small(), explain_top=50).explanations) == 7


def test_class_0_is_a_class_and_not_the_absence_of_one() -> None:
    model = small()
    assert oracles.best(model, PIXELS) != 0
    found = only(ask(model, targets=(0,)))
    activation, gradient = oracles.full_backward(model, LAST, PIXELS, lambda y: y[0])
    expected = (gradient.mean(dim=(1, 2), keepdim=True) * activation).sum(dim=0).relu()
    assert found.class_id == 0
    assert oracles.distance(found, expected) < 1e-5
    against_zero = only(ask(model, targets=(2,), contrast=Contrast((0,))))
    assert oracles.distance(against_zero, oracles.raw(only(ask(model, targets=(2,))))) > 1e-2


def test_fused_layers_are_the_mean_of_their_scaled_maps_at_the_finest_ones_shape() -> None:
    model = small()
    maps = [oracles.raw(only(ask(model, targets=(2,), layers=(layer,)))) for layer in (INNER, LAST)]
    assert [each.shape for each in maps] == [(32, 32), (16, 16)]
    fine, coarse = (each / each.max() for each in maps)
    coarse = functional.interpolate(coarse[None, None], (32, 32), mode="bilinear")[0, 0]
    for layers in ((INNER, LAST), (LAST, INNER)):
        found = only(ask(model, targets=(2,), layers=layers))
        assert oracles.distance(found, (fine + coarse) / 2) < 1e-5
        assert found.layers == layers


@pytest.mark.parametrize("output", ["softmax", "sigmoid", "none"])
def test_scores_follow_the_models_output_and_maps_the_logits(output: str) -> None:
    """A multi-label model's scores do not compete; a map explains the logit in any case."""
    model = small(output=output)
    answer = ask(model, targets=(2,), top_k=7)
    logits = torch.tensor([p.logit for p in sorted(answer.predictions, key=lambda p: p.class_id)])
    scores = {"softmax": logits.softmax(0), "sigmoid": logits.sigmoid(), "none": logits}[output]
    for each in answer.predictions:
        assert each.score == pytest.approx(float(scores[each.class_id]), rel=1e-5)
    assert only(answer).score == pytest.approx(float(scores[2]), rel=1e-5)
    plain = only(ask(small(), targets=(2,)))
    assert oracles.distance(only(answer), oracles.raw(plain)) < 1e-6


MIXED = [
    Question(oracles.picture(20, 64, 64), layers=(LAST,)),
    Question(oracles.picture(21, 64, 64), layers=(INNER,), targets=(1, 4)),
    Question(oracles.picture(22, 64, 64), layers=(LAST, INNER), method="layercam", targets=(3,)),
    Question(
        oracles.picture(23, 64, 64),
        layers=(LAST,),
        method="gradcampp",
        contrast=Contrast((6,)),
        targets=(0,),
    ),
    Question(oracles.picture(24, 64, 64), layers=(LAST,), method="scorecam"),
    Question(
        oracles.picture(25, 64, 64), layers=("features.3",), method="ablationcam", targets=(2, 5)
    ),
    Question(oracles.picture(26, 64, 64), method="rise", samples=20, targets=(2,)),
    Question(oracles.picture(27, 64, 64), method="integrated_gradients", steps=9),
    Question(oracles.picture(28, 64, 64), layers=(LAST,), method="guided_gradcam"),
    Question(oracles.picture(29, 64, 64), method=None, activations=("features.0", LAST)),
    Question(
        oracles.picture(30, 64, 64),
        layers=(INNER,),
        targets=(5,),
        activations=(INNER, "head"),
        kinds=("output", "input", "grad_output", "grad_input"),
    ),
    Question(oracles.picture(31, 64, 64), layers=(LAST,), method="cam", explain_top=2),
    Question(oracles.picture(32, 64, 64), layers=(INNER,), method="eigencam"),
]


def test_a_batch_of_everything_equals_single_runs() -> None:
    """Methods, targets, layers, captures side by side: to 1e-5 at the last layer, 5e-2 inside."""
    model = small()
    together = oracles.answers(model, *MIXED)
    for question, found in zip(MIXED, together, strict=True):
        (alone,) = oracles.answers(model, question)
        assert isinstance(found, InferenceResult)
        assert isinstance(alone, InferenceResult)
        tolerance = 1e-5 if question.layers == (LAST,) else 5e-2
        assert len(found.explanations) == len(alone.explanations)
        for mine, its in zip(found.explanations, alone.explanations, strict=True):
            assert mine.class_id == its.class_id
            assert mine.flags == its.flags
            assert oracles.distance(mine, oracles.raw(its)) <= tolerance, question.method
        assert len(found.activations) == len(alone.activations)
        for mine, its in zip(found.activations, alone.activations, strict=True):
            assert (mine.layer, mine.kind, mine.call, mine.part) == (
                (its.layer, its.kind, its.call, its.part)
            )
            expected = torch.from_numpy(its.values.copy())
            if expected.any():
                assert oracles.distance(torch.from_numpy(mine.values.copy()), expected) <= 5e-2


def test_a_map_without_any_evidence_is_said_and_not_stretched() -> None:
    """A black picture in a net without biases: zero everywhere, range [0, 0]."""
    found = only(ask(loaded(PaperNet(), side=64), 0 * PIXELS, targets=(0,), layers=("maps",)))
    assert "all_zero" in found.flags
    assert not found.grid.any()
    assert (found.low, found.high) == (0, 0)
    some = only(ask(loaded(PaperNet(), side=64), targets=(1,), layers=("maps",)))
    assert "all_zero" not in some.flags


def test_a_score_near_one_is_flagged_saturated() -> None:
    net = PaperNet()
    with torch.no_grad():
        net.head.weight *= 100
    model = loaded(net, side=64)
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    assert "saturated" in only(ask(model, white, targets=(1,), layers=("maps",))).flags
    assert "saturated" not in only(ask(model, white, targets=(0,), layers=("maps",))).flags
    unbounded = replace(model, output="none")
    assert "saturated" not in only(ask(unbounded, white, targets=(1,), layers=("maps",))).flags


@pytest.mark.parametrize(("side", "flagged"), [(28, False), (24, True)])
def test_a_map_of_fewer_than_seven_cells_a_side_is_flagged(side: int, flagged: bool) -> None:
    model = loaded(SmallNet(), side=side)
    found = only(ask(model, oracles.picture(1, side, side), layers=(LAST,)))
    assert min(found.grid.shape) == side // 4
    assert ("low_resolution" in found.flags) is flagged


class Shared(nn.Module):
    """One ReLU for both convolutions, as many nets have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=4), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.second(self.relu(self.first(x)))).mean(dim=(2, 3)))


def test_a_layer_that_runs_twice_is_flagged_and_explained_at_its_last_call() -> None:
    model = small(Shared())
    found = only(ask(model, targets=(1,), layers=("relu",)))
    activation, gradient = oracles.full_backward(model, "relu", PIXELS, lambda y: y[1])
    expected = (gradient.mean(dim=(1, 2), keepdim=True) * activation).sum(dim=0).relu()
    assert oracles.distance(found, expected) < 1e-5
    assert "module_called_n_times" in found.flags
    assert "module_called_n_times" not in only(ask(model, targets=(1,), layers=("second",))).flags


def test_logits_that_are_not_finite_are_an_error_of_that_image_alone() -> None:
    """`Faulty` gives NaN for red pictures; ImageNet's normalisation is left out here."""
    model = loaded(Faulty("nan"), side=64)
    red = PIXELS.clone()
    red[0] = 255
    threshold = replace(model, preprocessing=replace(model.preprocessing, std=(0.5, 0.5, 0.5)))
    plain = Question(PIXELS // 2, layers=(LAST,), targets=(1,))
    before, failed, after = oracles.answers(
        threshold, plain, Question(red, layers=(LAST,), targets=(1,)), plain
    )
    assert isinstance(failed, NonFiniteOutput)
    for answer in (before, after):
        assert isinstance(answer, InferenceResult)
        assert math.isfinite(only(answer).high)
        assert only(answer).high > 0
    (alone,) = oracles.answers(threshold, plain)
    assert oracles.distance(only(before), oracles.raw(only(alone))) < 1e-5
