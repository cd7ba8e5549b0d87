"""The compiled lane of detectors and segmenters: parts of the model that OpenVINO runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import LABELS, answer, image, loaded, oracle, plain, question
from torch import Tensor, nn

from service.inference.questions import InferenceResult, Question, lane_of
from service.models.catalog import InputSpec, ModelSpec
from service.models.compiled import lane as lanes
from service.models.compiled import parts
from service.models.compiled.front import alone
from service.models.compiled.lane import Compiler
from service.models.compiled.parts import CompiledPart, difference_of_boxes
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.probes.behaviour import Finding
from service.models.tasks import Detections

pytestmark = pytest.mark.timeout(120)

DETECTORS = ("faster_rcnn", "mask_rcnn", "retinanet", "fcos", "ssd")


def compiled(kind: str) -> LoadedModel:
    return loaded(kind, compiled=True)


def same(one: InferenceResult, other: InferenceResult) -> None:
    """Predictions and maps of two lanes, boxes in the same order, within rounding."""
    assert len(one.predictions) == len(other.predictions) > 0
    for mine, theirs in zip(one.predictions, other.predictions, strict=True):
        assert mine.class_id == theirs.class_id
        assert mine.score == pytest.approx(theirs.score, abs=1e-5)
        if mine.box is not None:
            assert mine.box == pytest.approx(theirs.box, abs=1e-2)
    assert len(one.explanations) == len(other.explanations)
    for mine_, theirs_ in zip(one.explanations, other.explanations, strict=True):
        assert mine_.layers == theirs_.layers
        assert mine_.window == theirs_.window
        assert abs(torch.from_numpy(mine_.grid - theirs_.grid)).max() <= 1e-3


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("faster_rcnn", ("backbone", "rpn.head")),
        ("mask_rcnn", ("backbone", "rpn.head")),
        ("retinanet", ("backbone", "head")),
        ("fcos", ("backbone", "head")),
        ("ssd", ("backbone", "head")),
        ("segmenter", ("backbone", "classifier")),
    ],
)
def test_the_backbone_and_the_head_behind_it_are_compiled(
    kind: str, names: tuple[str, ...]
) -> None:
    model = compiled(kind)
    assert model.folded is not None, model.not_compiled
    assert model.folded.compiled == names
    assert model.is_compiled
    assert model.slower is None
    made = [p for p, m in model.folded.module.named_modules() if isinstance(m, CompiledPart)]
    assert tuple(made) == names
    assert not any(isinstance(each, CompiledPart) for each in model.module.modules())


@pytest.mark.parametrize("kind", DETECTORS)
def test_boxes_and_maps_are_those_of_torch_on_a_private_copy(kind: str) -> None:
    model, pixels = compiled(kind), image(1)
    asked = question(model, pixels, explain_top=3)
    assert lane_of(model, asked) == "folded"
    (result,) = answer(model, asked, lane="folded")
    expected = plain(model, pixels)
    boxes = torch.tensor([each.box for each in result.predictions])
    boxes[:, 2:] += boxes[:, :2]
    mine = Detections(
        boxes,
        torch.tensor([each.score for each in result.predictions]),
        torch.tensor([each.class_id for each in result.predictions]),
    )
    kept = expected["scores"] >= asked.min_score
    theirs = Detections(*(expected[key][kept] for key in ("boxes", "scores", "labels")))
    assert difference_of_boxes(theirs, mine) <= 1e-5
    assert len(result.explanations) == 3
    for explanation in result.explanations:
        (cam,) = oracle(model, pixels, explanation.detection or 0).values()
        found = torch.from_numpy(explanation.grid.copy()) * explanation.high
        assert torch.allclose(found, cam, rtol=0, atol=1e-3 * float(cam.max()))


@pytest.mark.parametrize("kind", [*DETECTORS, "segmenter"])
def test_one_graph_serves_images_of_any_size_alone_and_in_a_batch(kind: str) -> None:
    model = compiled(kind)
    for size in ((70, 90), (90, 70), (64, 200)):
        asked = [_question(model, image(seed, size), explain_top=2) for seed in (1, 4)]
        together = answer(model, *asked, lane="folded")
        for one, result in zip(asked, together, strict=True):
            same(result, *answer(model, one))
            same(*answer(model, one, lane="folded"), result)


def _question(model: LoadedModel, pixels: Tensor, **more: Any) -> Question:
    size = int(pixels.shape[2]), int(pixels.shape[1])
    source = {"source": size} if model.task == "segmentation" else {}
    return question(model, pixels, **source, **more)


def test_threads_at_once_get_what_they_get_alone() -> None:
    model = compiled("retinanet")
    sizes = ((70, 90), (90, 70), (64, 120), (80, 80))
    asked = [question(model, image(n, sizes[n % 4]), explain_top=2) for n in range(12)]
    expected = [answer(model, one)[0] for one in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: answer(model, one, lane="folded")[0], asked))
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def test_both_programs_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wide: list[bool] = []
    model = load_model(
        ModelSpec("m", "detectors:ssd", labels=LABELS), compiler=Compiler(single_request_threads=2)
    )
    ran = parts._Shared.__call__

    def noted(shared: Any, tensors: Any) -> Any:
        wide.append(parts.is_alone.get())
        return ran(shared, tensors)

    monkeypatch.setattr(parts._Shared, "__call__", noted)
    asked = question(model, image(1), explain_top=2)
    (narrow,) = answer(model, asked, lane="folded")
    with alone(True):
        same(*answer(model, asked, lane="folded"), narrow)
    assert wide == [False, False, True, True]


def test_a_layer_inside_a_compiled_module_is_answered_by_the_model_itself() -> None:
    model = compiled("retinanet")
    inside = question(model, image(1), layers=("backbone.stem",))
    assert lane_of(model, inside) == "hooked"
    head = question(model, image(1), layers=("head.classification_head.conv.0",))
    assert lane_of(model, head) == "hooked"
    assert lane_of(model, question(model, image(1), method="rise", layers=())) == "folded"


def test_a_gradient_that_passes_a_compiled_head_has_torch_run_it() -> None:
    """A named output of the backbone is differentiated through the whole head."""
    model = compiled("retinanet")
    named = question(model, image(1), layers=("backbone[0]",), explain_top=2)
    assert lane_of(model, named) == "folded"
    same(*answer(model, named, lane="folded"), *answer(model, named))


def test_rise_runs_the_compiled_modules_too() -> None:
    model = compiled("faster_rcnn")
    asked = question(model, image(1), method="rise", samples=20, explain_top=1)
    same(*answer(model, asked, lane="folded"), *answer(model, asked))


def test_copies_share_the_program_and_keep_the_master_as_it_is() -> None:
    model = compiled("ssd")
    one, other = (model.replicate(folded=True).get_submodule("backbone") for _ in range(2))
    assert one is not other
    assert isinstance(one, CompiledPart)
    assert isinstance(other, CompiledPart)
    assert one._program is other._program


# ---- what is refused


def load(builder: str, compiler: Compiler | None, **more: Any) -> LoadedModel:
    return load_model(ModelSpec("m", builder, labels=LABELS, **more), compiler=compiler)


def test_a_backbone_that_takes_more_than_tensors_is_not_compiled() -> None:
    model = load("detectors:scaled", Compiler(), input=InputSpec(size=(64, 64), resize=64))
    assert model.not_compiled == "'backbone' does not take tensors alone."
    assert not model.is_compiled
    pixels = image(1, (64, 80))
    assert lane_of(model, _question(model, pixels)) == "hooked"


def test_without_a_compiler_it_is_said_that_compiling_is_off() -> None:
    assert loaded("ssd").not_compiled == "Compiling is switched off."


def test_other_numbers_of_the_backbone_leave_the_hooked_lane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "difference", lambda *_: 0.5)
    model = load("detectors:ssd", Compiler())
    assert model.folded is None
    assert model.not_compiled == "the output of 'backbone' differs from the hooked lane's by 0.5."
    same(*answer(model, question(model, image(1))), *answer(model, question(model, image(1))))


def test_other_numbers_of_the_head_leave_it_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = parts.difference

    def other(expected: Tensor, actual: Tensor) -> float:
        return measure(expected, actual) if expected.ndim == 4 else 0.5

    monkeypatch.setattr(parts, "difference", other)
    model = load("detectors:ssd", Compiler())
    assert model.folded is not None
    assert model.folded.compiled == ("backbone",)


def test_other_boxes_leave_the_hooked_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "difference_of_boxes", lambda *_: float("inf"))
    model = load("detectors:ssd", Compiler())
    assert model.folded is None
    assert model.not_compiled == "its predictions differ from the hooked lane's by inf."


def test_an_error_of_the_compiler_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unsupported operator\nwith details")

    monkeypatch.setattr("service.models.compiled.openvino_front.converted", broken)
    model = load("detectors:ssd", Compiler())
    assert model.not_compiled == "'backbone' cannot be compiled: unsupported operator"


def test_a_model_that_reads_its_backbone_is_not_compiled() -> None:
    model = load("detectors:reader", Compiler(), input=InputSpec(size=(64, 64), resize=64))
    assert model.not_compiled is not None
    assert "it cannot be compiled: " in model.not_compiled
    assert "has no attribute 'out_channels'" in model.not_compiled


def test_other_precisions_and_devices_are_not_compiled() -> None:
    model = loaded("ssd")
    with pytest.raises(lanes.NotCompiled, match="its parameters are float64, not float32"):
        parts._paths(replace(model, module=model.replicate().double()))
    with pytest.raises(lanes.NotCompiled, match="for the CPU, not for meta"):
        parts._paths(replace(model, module=model.replicate().to("meta")))
    with pytest.raises(lanes.NotCompiled, match="not in one module"):
        parts._paths(replace(model, default_layers=("backbone[0]", "head")))


def test_a_model_that_cannot_be_compared_is_not_compiled() -> None:
    unsteady = Finding("determinism", False, "The same image gets something else twice.")
    behaves = replace(loaded("ssd").behaviour, deterministic=False)
    model = replace(loaded("ssd"), behaviour=behaves, findings=(unsteady,))
    model = Compiler().compiled(model)
    assert model.not_compiled == unsteady.result


def test_the_cache_keeps_the_graphs_and_stale_ones_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "identity", lambda _: "the same")
    compiler = Compiler(cache=tmp_path)
    assert load("detectors:ssd", compiler).is_compiled
    files = sorted(tmp_path.glob("*.bin"))
    assert len(files) == 2
    for path in files:
        path.write_bytes(bytes(path.stat().st_size))
    again = load("detectors:ssd", compiler)
    assert again.folded is not None
    assert again.folded.compiled == ("backbone", "head")
    assert sorted(tmp_path.glob("*.bin")) == files
    assert all(any(path.read_bytes()) for path in files)


def test_a_part_that_cannot_take_a_smaller_image_is_tried_on_one_more_image() -> None:
    part = nn.Conv2d(3, 4, 9)
    assert parts._smaller(part, (torch.rand(2, 3, 20, 20),))[1].shape == (3, 4, 12, 12)
    assert parts._smaller(part, (torch.rand(2, 3, 40, 40),))[1].shape == (3, 4, 2, 2)


# ---- which boxes are the same


def boxes(*rows: tuple[float, ...], scores: tuple[float, ...]) -> Detections:
    return Detections(
        torch.tensor(rows).reshape(-1, 4), torch.tensor(scores), torch.ones(len(scores))
    )


ONE, TWO = (0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 30.0, 30.0)
FLAT = (5.0, 5.0, 5.0, 9.0)


@pytest.mark.parametrize(
    ("actual", "gap"),
    [
        (boxes(TWO, ONE, scores=(0.5, 0.5)), 0.0),
        (boxes(ONE, TWO, scores=(0.5, 0.3)), 0.2),
        (boxes(ONE, scores=(0.5,)), float("inf")),
        (boxes(ONE, TWO, FLAT, scores=(0.5, 0.5, 0.1)), float("inf")),
        (boxes(scores=()), float("inf")),
        (replace(boxes(ONE, TWO, scores=(0.5, 0.5)), labels=torch.zeros(2)), float("inf")),
    ],
)
def test_boxes_are_compared_by_place_and_class_not_by_their_order(
    actual: Detections, gap: float
) -> None:
    expected = boxes(ONE, TWO, scores=(0.5, 0.5))
    assert difference_of_boxes(expected, actual) == pytest.approx(gap)


def test_boxes_without_an_area_and_no_boxes_are_the_same() -> None:
    flat = boxes(FLAT, scores=(0.5,))
    assert difference_of_boxes(flat, flat) == 0
    assert difference_of_boxes(boxes(scores=()), boxes(scores=())) == 0


def test_one_of_ten_boxes_may_be_another_after_suppression() -> None:
    rows = [(20.0 * n, 0.0, 20.0 * n + 10, 10.0) for n in range(10)]
    expected = boxes(*rows, scores=(0.5,) * 10)
    swapped = boxes((3.0, 0.0, 13.0, 10.0), *rows[1:], scores=(0.5,) * 10)
    assert difference_of_boxes(expected, swapped) == 0
    twice = boxes((3.0, 0.0, 13.0, 10.0), (23.0, 0, 33.0, 10), *rows[2:], scores=(0.5,) * 10)
    assert difference_of_boxes(expected, twice) == float("inf")
