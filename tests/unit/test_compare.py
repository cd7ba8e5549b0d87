"""Two models on the same images: exact zeros for the same weights, and figures that add up."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import detectors
import numpy as np
import pytest
from scipy.stats import binomtest, spearmanr
from tiny import Faulty, PaperNet, SmallNet, loaded
from torch import nn

from service.errors import ConfigurationError
from service.evaluation.box_matches import matched
from service.evaluation.compare import (
    ComparedImage,
    Comparison,
    UncomparedImage,
    compare_images,
    map_difference,
    shared_classes,
    summarise,
    wilson,
)
from service.evaluation.gates import GATES, check_gates, parse_gates
from service.evaluation.object_masks import read_masks
from service.images.decode import Geometry
from service.images.upload import Upload, open_upload
from service.inference.questions import Prediction
from service.models.loaded import LoadedModel

Opened = Callable[[LoadedModel], Upload]

WHOLE = Geometry((32, 32), (32, 32), (0.0, 0.0, 32.0, 32.0))


def opener(pixels: np.ndarray | bytes) -> Opened:
    return lambda model: open_upload(
        pixels, model.preprocessing, None, max_pixels=10**6, preview_side=None
    )


def images(count: int = 6, side: int = 40) -> list[tuple[Path, Opened]]:
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 120, (count, side, side, 3), dtype=np.uint8)
    return [(Path(f"{index}.png"), opener(array)) for index, array in enumerate(arrays)]


def compared(one: LoadedModel, other: LoadedModel, **options: object) -> list[ComparedImage]:
    found = list(compare_images(one, other, images(), **options))  # type: ignore[arg-type]
    assert all(isinstance(each, ComparedImage) for each in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("method", ["gradcam", "occlusion", "input_gradient"])
def test_two_loads_of_the_same_weights_differ_by_exactly_zero(method: str):
    for image in compared(loaded(SmallNet()), loaded(SmallNet()), method=method):
        assert image.score_change == 0
        assert not image.flipped
        assert image.maps is not None
        assert (image.maps.correlation, image.maps.overlap) == (pytest.approx(1, abs=1e-15), 1)
        assert image.maps.centre_shift == 0
        assert np.array_equal(image.one.explanation.grid, image.other.explanation.grid)  # type: ignore[union-attr]


def test_the_second_model_explains_the_class_of_the_first_and_flips_are_counted():
    one, other = loaded(SmallNet(seed=0)), loaded(SmallNet(seed=1))
    found = compared(one, other)
    for image in found:
        assert image.one.explanation.class_id == image.other.explanation.class_id  # type: ignore[union-attr]
        assert image.flipped == (image.one.label != image.other.label)
        assert image.other.score == image.other.explanation.score  # type: ignore[union-attr]
    comparison = summarise(one, other, found)
    assert comparison.overall.flips == len(comparison.flips) == sum(i.flipped for i in found)
    assert sum(each.images for each in comparison.classes.values()) == len(found)
    changes = [image.score_change for image in found]
    assert comparison.overall.score_change == pytest.approx(np.mean(changes))
    assert comparison.overall.score_distance == pytest.approx(np.mean(np.abs(changes)))


def test_maps_are_compared_cell_by_cell_where_the_cells_are_the_same():
    generator = np.random.default_rng(1)
    one, other = generator.random((2, 4, 5), dtype=np.float32)
    found = map_difference((one, WHOLE), (other, WHOLE))
    assert found.correlation == pytest.approx(spearmanr(one.ravel(), other.ravel()).statistic)
    assert found.overlap == pytest.approx(np.minimum(one / one.sum(), other / other.sum()).sum())


def test_the_centre_moves_by_a_share_of_the_diagonal():
    one, other = np.zeros((2, 2, 2), dtype=np.float32)
    one[0, 0], other[0, 1] = 1, 1
    assert map_difference((one, WHOLE), (other, WHOLE)).centre_shift == pytest.approx(
        16 / 32 / 2**0.5
    )


def test_a_map_of_zeros_has_no_centre_and_equals_only_another():
    zeros, ones = np.zeros((2, 2), dtype=np.float32), np.eye(2, dtype=np.float32)
    both, single = (map_difference((zeros, WHOLE), (each, WHOLE)) for each in (zeros, ones))
    assert (both.correlation, both.overlap, both.centre_shift) == (1, 1, None)
    assert (single.correlation, single.overlap, single.centre_shift) == (0, 0, None)


def test_maps_of_other_sizes_are_compared_over_what_both_models_see():
    """The second model sees the left half: the first one's evidence there is the same."""
    left = Geometry((32, 32), (16, 32), (0.0, 0.0, 16.0, 32.0))
    one, other = np.zeros((4, 4), dtype=np.float32), np.zeros((4, 2), dtype=np.float32)
    one[1, 0], one[3, 3], other[1, 0] = 1, 1, 1
    found = map_difference((one, WHOLE), (other, left))
    assert found.overlap == pytest.approx(1)
    assert found.centre_shift == pytest.approx(0)


def test_evidence_off_the_object_is_measured_in_source_pixels():
    grid = np.zeros((2, 2), dtype=np.float32)
    grid[0] = 1
    upper = np.zeros((32, 32), dtype=bool)
    upper[:16] = True
    cells = np.ones((2, 2), dtype=np.float32)
    found = map_difference((grid, WHOLE), (cells, WHOLE), upper)
    assert found.outside is not None
    # The bilinear map falls from 1 to 0 between the centres of the rows: an eighth lies below.
    assert found.outside == (pytest.approx(1 / 8, abs=0.01), pytest.approx(1 / 2))


def test_labels_match_by_text_and_a_repeated_text_only_in_equal_lists():
    assert shared_classes(["a", "b", "b"], ["a", "b", "b"]) == {0: 0, 1: 1, 2: 2}
    assert shared_classes(["a", "b", "b"], ["b", "a"]) == {0: 1}
    assert shared_classes(["a", "b"], ["c", "b", "a"]) == {0: 2, 1: 1}


def test_images_of_a_class_that_the_second_model_lacks_are_left_out_and_said():
    one = loaded(SmallNet())
    labels = [image.one.label for image in compared(one, one)]
    lacking = tuple(f"new {label}" if label == labels[0] else label for label in one.labels)
    other = replace(loaded(SmallNet()), labels=lacking)
    comparison = summarise(one, other, compare_images(one, other, images()))
    assert len(comparison.left_out) == labels.count(labels[0]) > 0
    assert comparison.overall.images == len(labels) - labels.count(labels[0])
    assert any(f"Only {other.name} has the labels new {labels[0]}" in n for n in comparison.notes)


def test_models_without_a_common_label_are_refused():
    other = replace(loaded(PaperNet()), labels=("x", "y"))
    with pytest.raises(ConfigurationError, match="no label in common"):
        compare_images(loaded(SmallNet()), other, images())


def test_a_model_of_another_input_size_and_layout_is_compared():
    one, other = loaded(SmallNet(), side=32), loaded(SmallNet(), side=24)
    comparison = summarise(one, other, compare_images(one, other, images()))
    assert comparison.overall.maps == 6
    assert any("see images differently" in note for note in comparison.notes)


def test_without_gradients_labels_and_scores_are_compared_and_the_reason_is_said():
    one = loaded(SmallNet())
    other = replace(loaded(SmallNet()), no_gradients="it is a script")
    comparison = summarise(one, other, compare_images(one, other, images()))
    assert (comparison.overall.maps, comparison.overall.correlation) == (0, None)
    assert comparison.overall.score_distance == 0
    assert "Maps are not compared: it is a script." in comparison.notes
    (gate,) = check_gates(comparison, {"maps": 0.8})
    assert not gate.is_kept
    assert "not measured" in str(gate)


@pytest.mark.parametrize("fault", ["forward", "nan", "backward"])
def test_an_image_that_one_model_fails_on_is_named_and_the_others_go_on(fault: str):
    red = np.zeros((40, 40, 3), dtype=np.uint8)
    red[..., 0] = 255
    shape = replace(loaded(Faulty(fault)).preprocessing, mean=(0.4,) * 3, std=(0.2,) * 3)
    one, other = (
        loaded(SmallNet(), "one"),
        replace(loaded(Faulty(fault), "two"), preprocessing=shape),
    )
    named = [(Path("red.png"), opener(red)), (Path("no.png"), opener(b"no image")), *images(2)]
    found = list(compare_images(one, other, named))
    assert isinstance(found[0], UncomparedImage)
    assert isinstance(found[1], UncomparedImage)
    assert (found[0].models, found[1].models) == (("two",), ("one", "two"))
    comparison = summarise(one, other, found)
    assert (comparison.overall.images, len(comparison.failed)) == (2, 2)


def test_the_interval_is_that_of_wilson():
    for count, of in ((0, 30), (3, 50), (50, 50)):
        expected = binomtest(count, of).proportion_ci(method="wilson")
        assert wilson(count, of) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson(0, 0) == (0, 1)


def comparison_of(one: nn.Module, other: nn.Module) -> Comparison:
    models = loaded(one), loaded(other)
    return summarise(*models, compare_images(*models, images()))


def test_a_gate_is_kept_at_its_threshold_and_not_beyond():
    comparison = comparison_of(SmallNet(seed=0), SmallNet(seed=3))
    share, maps = comparison.overall.flip_share, comparison.overall.correlation
    assert maps is not None
    kept = check_gates(comparison, {"flips": share, "maps": maps})
    assert [gate.is_kept for gate in kept] == [True, True]
    beyond = check_gates(comparison, {"scores": -1, "maps": maps + 1e-9})
    assert [gate.is_kept for gate in beyond] == [False, False]


def test_a_gate_by_class_measures_the_worst_class_with_enough_images():
    comparison = comparison_of(SmallNet(), SmallNet())
    some = comparison.overall
    classes = {
        "many": replace(some, images=20, flips=2),
        "more": replace(some, images=40, flips=8),
        "few": replace(some, images=2, flips=2),
    }
    whole = replace(comparison, overall=replace(some, images=62, flips=12), classes=classes)
    (gate,) = check_gates(whole, {"class_flips": 0.1})
    assert (gate.value, gate.where, gate.is_kept) == (0.2, "more", False)
    few = replace(whole, classes={"few": classes["few"]})
    (gate,) = check_gates(few, {"class_flips": 0.2})
    assert (gate.value, gate.where, gate.is_kept) == (pytest.approx(12 / 62), None, True)


def test_thresholds_are_numbers_or_percentages_and_override_the_defaults():
    assert parse_gates(["flips=2%", "maps=.8"], has_masks=False) == {"flips": 0.02, "maps": 0.8}
    defaults = parse_gates(["maps=.1", "defaults"], has_masks=False)
    assert "outside" not in defaults
    assert defaults == {
        name: 0.1 if name == "maps" else gate.threshold
        for name, gate in GATES.items()
        if "outside" not in name
    }
    assert set(parse_gates(["defaults"], has_masks=True)) == set(GATES)


@pytest.mark.parametrize("text", ["flps", "flips=many", "flips=200%", "flips=nan", "defaults=1"])
def test_another_gate_or_value_is_refused_with_what_is_accepted(text: str):
    with pytest.raises(ConfigurationError, match=f"--fail-on {text}"):
        parse_gates([text], has_masks=False)


def test_masks_are_polygons_run_lengths_or_boxes_by_file_name(tmp_path: Path):
    file = tmp_path / "coco.json"
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "sub/b.png"}],
        "annotations": [
            {"id": 1, "image_id": 1, "segmentation": [[0, 0, 3, 0, 3, 1, 0, 1]]},
            {"id": 2, "image_id": 1, "segmentation": {"size": [4, 6], "counts": [20, 4]}},
            {"id": 3, "image_id": 2, "bbox": [0, 0, 6, 2]},
        ],
    }
    file.write_text(json.dumps(coco))
    masks = read_masks(file)
    expected = np.zeros((4, 6), dtype=bool)
    expected[:2, :4], expected[:, 5] = True, True
    assert np.array_equal(masks.mask(Path("deep/a.png"), (6, 4)), expected)  # type: ignore[arg-type]
    assert masks.mask(Path("sub/b.png"), (6, 4)).sum() == 12  # type: ignore[union-attr]
    assert masks.mask(Path("c.png"), (6, 4)) is None
    with pytest.raises(ConfigurationError, match="annotation 2"):
        masks.mask(Path("a.png"), (7, 4))


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}', '{"images": [1], "annotations": []}'])
def test_a_file_that_is_not_coco_is_refused(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigurationError, match="not a COCO file"):
        read_masks(tmp_path / "x.json")
    with pytest.raises(ConfigurationError, match="No such file"):
        read_masks(tmp_path / "nothing.json")


def found(class_id: int, box: tuple[float, float, float, float], score: float = 0.9) -> Prediction:
    return Prediction(class_id, score, 0.0, 0, box)


def test_detections_are_matched_by_overlap_those_of_one_class_first():
    here, near, far = (0.0, 0, 10, 10), (1.0, 0, 10, 10), (50.0, 50, 10, 10)
    mine = [found(1, here), found(2, far)]
    theirs = [found(2, here), found(1, near), found(1, far), found(3, here)]
    pairs = matched(mine, theirs, {1: 1, 2: 2})
    assert pairs == [(mine[0], theirs[1]), (mine[1], theirs[2]), (None, theirs[0])]
    assert matched([], [], {1: 1}) == []


def test_two_loads_of_one_detector_differ_by_exactly_zero():
    one, other = detectors.loaded("faster_rcnn"), detectors.loaded("faster_rcnn")
    named = [(Path(f"{n}.png"), opener(scene(n))) for n in (1, 4)]
    compared = list(compare_images(one, other, named))
    comparison = summarise(one, other, compared)
    assert comparison.overall.images == len(compared) > 2
    assert (comparison.overall.flips, comparison.overall.score_distance) == (0, 0)
    assert comparison.overall.correlation == pytest.approx(1, abs=1e-15)
    assert (comparison.overall.overlap, comparison.overall.centre_shift) == (1, 0)
    assert comparison.notes[0].startswith("Counted are detections")


def test_detections_that_are_gained_lost_and_relabelled_are_flips():
    """The second detector's classes are renamed, or it has none of a score above 0.5."""
    one = detectors.loaded("faster_rcnn")
    none = replace(one, module=without_detections(one.module))
    named = [(Path("1.png"), opener(scene(1)))]
    count = len(list(compare_images(one, one, named)))
    for models, label in (((one, none), "nothing"), ((none, one), "nothing")):
        comparison = summarise(*models, compare_images(*models, named))
        assert comparison.overall.flips == comparison.overall.images == count
        assert all(label in flip for flip in comparison.flips)
        assert (comparison.overall.maps, comparison.overall.score_distance) == (0, 0)
    turned = replace(one, labels=("__background__", "ring", "square", "disc"))
    comparison = summarise(one, turned, compare_images(one, turned, named))
    changed = {(before, after) for _, before, after in comparison.flips}
    assert changed <= {("disc", "ring"), ("ring", "disc")}
    assert changed


def test_models_of_different_tasks_and_segmenters_are_not_compared():
    boxes, regions = detectors.loaded("faster_rcnn"), detectors.loaded("segmenter")
    for one, other in ((boxes, regions), (regions, regions), (boxes, loaded(SmallNet()))):
        with pytest.raises(ConfigurationError, match="two models that classify or two that detect"):
            compare_images(one, other, images())


def scene(seed: int) -> np.ndarray:
    return np.ascontiguousarray(detectors.image(seed).permute(1, 2, 0).numpy())


def without_detections(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    made.roi_heads.score_thresh = 1.1
    return made
