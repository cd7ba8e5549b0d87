"""What a question costs, announced before it runs, and what many targets hold while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
from tiny import SmallNet, loaded
from torch import Tensor

from api_schemas.methods import BACKWARD, METHODS
from api_schemas.options import ExplainOptions, PredictOptions
from service.errors import InvalidOption
from service.inference import batch
from service.inference.contrast import Contrast
from service.inference.method_table import cost
from service.inference.questions import InferenceResult, Question
from service.models.loaded import LoadedModel
from service.pipeline.resolve import resolve_options
from service.pipeline.service import Limits
from service.scheduling.scheduler import InferenceJob

PIXELS = oracles.picture(10, 32, 32)
LAST, FIRST = "features", "features.0"
AT_ONCE = [name for name, record in METHODS.items() if record.has_layer and not record.runs]
WALKING = [name for name in AT_ONCE if METHODS[name].walks]
LIMITS = Limits(32, 1 << 25, 1 << 26, 2048, 1 << 26, 2000, 60)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(SmallNet(classes=120))


def question(**options: Any) -> Question:
    return Question(PIXELS, **{"layers": (LAST,)} | options)


def behind(model: LoadedModel, path: str) -> float:
    return 1 - model.layer(path).share


def answer_of(model: LoadedModel, asked: Question) -> InferenceResult:
    (answer,) = oracles.answers(model, asked)
    assert isinstance(answer, InferenceResult), answer
    return answer


@pytest.mark.parametrize("method", AT_ONCE)
def test_a_map_at_the_last_layer_costs_what_a_prediction_costs(
    model: LoadedModel, method: str
) -> None:
    assert cost(model, question(method=None)) == 1
    assert cost(model, question(method=method)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("method", WALKING)
@pytest.mark.parametrize("targets", [1, 5, 100])
def test_targets_cost_a_walk_each_through_the_share_of_the_model_behind_the_layer(
    model: LoadedModel, method: str, targets: int
) -> None:
    asked = question(method=method, layers=(FIRST,), explain_top=targets)
    expected = 1 + BACKWARD * targets * behind(model, FIRST)
    assert behind(model, FIRST) > 0.5
    assert cost(model, asked) == pytest.approx(expected, abs=0.01)
    named = replace(asked, explain_top=1, targets=tuple(range(targets)))
    assert cost(model, named) == cost(model, asked)


@pytest.mark.parametrize("method", ["cam", "eigencam"])
def test_methods_without_a_gradient_cost_no_walk(model: LoadedModel, method: str) -> None:
    assert cost(model, question(method=method, layers=(FIRST,), explain_top=100)) == 1


def test_fused_layers_share_the_walk_to_the_earliest(model: LoadedModel) -> None:
    both = cost(model, question(layers=(LAST, FIRST), explain_top=3))
    assert both == cost(model, question(layers=(FIRST,), explain_top=3))


def test_a_contrast_rides_along(model: LoadedModel) -> None:
    asked = question(layers=(FIRST,), targets=(1,))
    assert cost(model, replace(asked, contrast=Contrast((2,)))) == cost(model, asked)


def test_guided_gradcam_pays_for_its_map_and_for_the_input(model: LoadedModel) -> None:
    guided = cost(model, question(method="guided_backprop", layers=(), explain_top=3))
    asked = question(method="guided_gradcam", layers=(FIRST,), explain_top=3)
    more = BACKWARD * 3 * behind(model, FIRST)
    assert cost(model, asked) == pytest.approx(guided + more, abs=0.02)


def test_captured_gradients_cost_one_walk_to_the_earliest_layer(model: LoadedModel) -> None:
    asked = question(method="cam", activations=(LAST, FIRST), kinds=("grad_output",))
    assert cost(model, asked) == pytest.approx(1 + BACKWARD * behind(model, FIRST), abs=0.01)
    of_input = replace(asked, kinds=("grad_input",))
    assert cost(model, of_input) == pytest.approx(1 + BACKWARD, abs=0.01)
    assert cost(model, replace(asked, kinds=("output",))) == 1


@pytest.mark.parametrize(
    "options",
    [
        ExplainOptions(explain_top=100, layer=[FIRST]),
        ExplainOptions(method="guided_gradcam", explain_top=7, layer=[FIRST]),
        ExplainOptions(method="rise", samples=9, mask='{"boxes": [[1, 1, 9, 9]]}'),
        ExplainOptions(explain_top=9, layer=[FIRST], mask='{"boxes": [[1, 1, 9, 9]]}'),
        ExplainOptions(layer=[FIRST], activations=[FIRST], activation_kind="grad_input"),
        PredictOptions(),
    ],
)
def test_the_price_of_a_request_is_what_its_answers_announce_summed(
    model: LoadedModel, options: Any
) -> None:
    options = options.model_copy(update={"include": ["none"], "size": "model"})
    resolved = resolve_options(model, options, LIMITS, 3)
    asked = resolved.question(PIXELS)
    passes = 2 if getattr(options, "mask", None) else 1
    announced = [each.cost for each in answer_of(model, asked).explanations] or [1.0]
    assert len(set(announced)) == 1
    activations = 0.02 * model.activation_bytes(asked.activations, inputs=True) / 2**20
    assert resolved.price == pytest.approx(3 * (passes * announced[0] + activations))


def test_what_costs_too_much_at_an_early_layer_is_refused(model: LoadedModel) -> None:
    options = ExplainOptions(explain_top=100, layer=[FIRST])
    most = cost(model, question(layers=(FIRST,), explain_top=100))
    assert most > 50
    resolve_options(model, options, replace(LIMITS, cost=most), 1)
    with pytest.raises(InvalidOption, match=f"costs {most:g} forward passes"):
        resolve_options(model, options, replace(LIMITS, cost=most - 1), 1)
    masked = options.model_copy(update={"mask": '{"boxes": [[1, 1, 9, 9]]}'})
    with pytest.raises(InvalidOption, match=f"costs {2 * most:g} forward passes"):
        resolve_options(model, masked, replace(LIMITS, cost=most), 1)


# ---- what many targets hold


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the gradients that each walk gives."""
    walks: list[int] = []

    def gradients(*args: Any, **kwargs: Any) -> list[Tensor]:
        found = inner(*args, **kwargs)
        walks.append(sum(tensor.nbytes for tensor in found))
        return found

    inner = batch.gradients
    monkeypatch.setattr(batch, "gradients", gradients)
    return walks


@pytest.mark.parametrize("layers", [(FIRST,), (LAST,), (FIRST, LAST)])
@pytest.mark.parametrize("method", WALKING)
def test_targets_that_do_not_fit_one_walk_have_the_same_maps(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, method: str, layers: tuple[str, ...]
) -> None:
    asked = question(method=method, layers=layers, explain_top=100, contrast=Contrast((3,)))
    at_once = answer_of(model, asked)
    floats = sum(model.activation_bytes([path], inputs=False) for path in layers)
    monkeypatch.setattr(batch, "BACKWARD_BYTES", 7 * floats)
    walks = watched(monkeypatch)
    chunked = answer_of(model, asked)
    assert len(walks) == 1 + 15, "of the captured gradients, and of seven targets each"
    assert max(walks) <= 7 * floats
    for one, other in zip(at_once.explanations, chunked.explanations, strict=True):
        assert one.class_id == other.class_id
        assert abs(one.grid - other.grid).max() < 1e-6
        assert one.high == pytest.approx(other.high, rel=1e-6)


def test_a_hundred_targets_at_an_early_layer_hold_no_more_than_a_walk(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = watched(monkeypatch)
    large = loaded(SmallNet(classes=120), side=512)
    pixels = oracles.picture(10, 512, 512)
    asked = Question(pixels, layers=(FIRST,), explain_top=100)
    assert 100 * large.activation_bytes([FIRST], inputs=False) > 2 * batch.BACKWARD_BYTES
    assert len(answer_of(large, asked).explanations) == 100
    assert 0 < max(walks) <= batch.BACKWARD_BYTES


def test_chunks_leave_the_graph_to_the_gradients_that_are_captured(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = question(
        layers=(FIRST,), targets=(4,), activations=(LAST, FIRST), kinds=("grad_output",)
    )
    whole = answer_of(model, asked)
    monkeypatch.setattr(batch, "BACKWARD_BYTES", 1)
    chunked = answer_of(model, asked)
    assert {each.layer for each in whole.activations} == {FIRST, LAST}
    for one, other in zip(whole.activations, chunked.activations, strict=True):
        assert abs(one.values - other.values).max() < 1e-6
        assert abs(one.values).max() > 0


@pytest.mark.parametrize("method", ["cam", "eigencam", "scorecam", "ablationcam"])
def test_methods_without_a_gradient_differentiate_nothing(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    walks = watched(monkeypatch)
    asked = question(method=method, explain_top=20)
    assert not asked.needs_graph
    assert len(answer_of(model, asked).explanations) == 20
    assert sum(walks) == 0


def test_images_with_other_numbers_of_targets_share_no_walk(model: LoadedModel) -> None:
    """Every target of one walks the graph of the whole batch, which its price does not count."""

    def job(**options: Any) -> InferenceJob:
        return InferenceJob(model, question(**options), None)

    many, one, none = job(explain_top=100), job(), job(method="cam", explain_top=100)
    assert many.can_share_batch(job(targets=tuple(range(100))))
    assert one.can_share_batch(job(targets=(3,)))
    assert not many.can_share_batch(one)
    assert many.can_share_batch(none)
    assert one.can_share_batch(none)
    assert not one.can_share_batch(job(targets=(3,), libra=True)), "other rules for gradients"
