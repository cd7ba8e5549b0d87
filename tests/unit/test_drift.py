"""Drift: distances on paper, their noise, and a watch that holds the last answers alone."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from scipy.stats import chi2
from tiny import SmallNet, loaded

from service.errors import ConfigurationError
from service.evaluation.drift import (
    DETAILS,
    LEVEL,
    MIN_IMAGES,
    WINDOW,
    Baseline,
    Distribution,
    DriftWatch,
    Observation,
    noise_level,
    observe,
    psi,
    read_baseline,
)
from service.inference.questions import Explanation, InferenceResult, Prediction

PIXELS = torch.zeros(3, 32, 32, dtype=torch.uint8)


def answers(count: int, seed: int, shift: float = 0.0, labels: str = "ab") -> list[Observation]:
    generator = np.random.default_rng(seed)
    grids = generator.random((count, 6, 6)).astype(np.float32)
    scores = generator.beta(5, 2, count)
    names = generator.choice(list(labels), count)
    marked = generator.random(count) < shift
    grids[marked, 0, 0] += 20
    return [
        observe(str(name), float(score), grid)
        for name, score, grid in zip(names, scores, grids, strict=True)
    ]


def baseline(count: int = 400) -> Baseline:
    return Baseline.of("tiny", "0" * 12, "gradcam", ("features",), answers(count, 0))


def exceeded(watch: DriftWatch) -> set[tuple[str, str]]:
    return {(each.label, each.feature) for each in watch.distances() if each.psi > each.noise}


def test_an_observation_is_computed_on_paper():
    grid = np.zeros((4, 8), dtype=np.float32)
    grid[3, 7], grid[1, 1] = -3, 1
    found = observe("a", 0.7, grid, "supported")
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(32)
    assert found.entropy == pytest.approx(expected)
    assert found.border == pytest.approx(0.75)
    assert found.centre_x == pytest.approx(0.75 * 7.5 / 8 + 0.25 * 1.5 / 8)
    assert found.centre_y == pytest.approx(0.75 * 3.5 / 4 + 0.25 * 1.5 / 4)
    assert (found.peak, found.verdict, found.label, found.score) == (
        "lower right",
        "supported",
        "a",
        0.7,
    )


def test_details_are_the_differences_of_neighbours_in_corners_and_centre():
    pixels = np.zeros((3, 16, 24), dtype=np.uint8)
    pixels[1, 12:, 20:] = [0, 90, 0, 90]
    pixels[1, 6:10, 10:14] = [0, 0, 30, 30]
    found = observe("a", 0.7, None, pixels=pixels)
    assert [getattr(found, name) for name in DETAILS] == [0, 0, 0, 90, 10]


def test_an_even_map_has_entropy_1_and_a_map_of_zeros_none():
    assert observe("a", 1, np.ones((5, 5), dtype=np.float32)).entropy == pytest.approx(1)
    empty = observe("a", 1, np.zeros((5, 5), dtype=np.float32))
    assert math.isnan(empty.entropy)
    assert empty.peak is None


def test_the_index_is_that_of_the_formula():
    p, q = np.array([10.5, 30.5, 60.5]), np.array([20.5, 30.5, 50.5])
    p, q = p / p.sum(), q / q.sum()
    assert psi([10, 30, 60], [20, 30, 50]) == pytest.approx(np.sum((q - p) * np.log(q / p)))
    assert psi([5, 7], [5, 7]) == 0


def test_the_noise_level_is_the_quantile_of_chi_squared():
    for bins in (3, 8, 12):
        expected = chi2.ppf(LEVEL, bins - 1) * (1 / 400 + 1 / 500)
        assert noise_level(400, 500, bins) == pytest.approx(expected, rel=0.06)


def test_without_drift_nearly_no_distance_is_over_its_noise():
    """Of 40 windows with up to 21 distances each; the level is 1 of 10,000."""
    made = baseline()
    over = 0
    for seed in range(1, 41):
        watch = DriftWatch(made)
        for each in answers(WINDOW, seed):
            watch.add(each)
        over += bool(exceeded(watch))
    assert over <= 1


def test_evidence_that_moves_in_a_fifth_of_the_images_is_seen():
    watch = DriftWatch(baseline())
    for each in answers(WINDOW, 99, shift=0.2):
        watch.add(each)
    assert {("", "peak"), ("", "border"), ("", "entropy")} <= exceeded(watch)
    assert ("", "score") not in exceeded(watch)


def test_the_window_holds_the_last_answers_alone():
    watch = DriftWatch(baseline())
    for each in answers(3 * WINDOW, 99, shift=1.0):
        watch.add(each)
    assert watch.images == WINDOW
    assert exceeded(watch)
    for each in answers(WINDOW, 5):
        watch.add(each)
    assert watch.images == WINDOW
    assert not exceeded(watch)


def test_few_answers_have_no_distance():
    watch = DriftWatch(baseline())
    for each in answers(MIN_IMAGES - 1, 1, shift=1.0):
        watch.add(each)
    assert list(watch.distances()) == []


def test_classes_with_enough_images_have_distances_of_their_own():
    watch = DriftWatch(baseline())
    for each in answers(WINDOW, 3):
        watch.add(each)
    assert {each.label for each in watch.distances()} == {"", "a", "b"}


def test_a_new_class_is_seen_by_its_label():
    watch = DriftWatch(baseline())
    for each in answers(WINDOW, 3, labels="abc"):
        watch.add(each)
    assert ("", "label") in exceeded(watch)


def test_equal_numbers_share_a_bin_and_rare_categories_are_one():
    same = Distribution.of([1.0] * 150)
    assert same is not None
    assert sum(same.counts) == 150
    texts = Distribution.of(["a"] * 97 + ["b"] * 3 + ["c"])
    assert texts is not None
    assert (texts.values, texts.counts) == (("a", "b"), (97, 3, 1))
    assert Distribution.of([1.0] * (MIN_IMAGES - 1)) is None


def test_the_file_is_read_as_it_was_written(tmp_path: Path):
    file, made = tmp_path / "baseline.json", baseline()
    file.write_bytes(made.write())
    assert read_baseline(file) == made


DAMAGES = {
    "a later format": {"format": 2},
    "counts without bins": {"features": {"score": {"edges": [0.5], "counts": [1]}}},
    "no images": {"images": None},
    "a list of classes": {"classes": []},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_file_is_refused_with_what_to_do(tmp_path: Path, damage: str):
    file = tmp_path / "baseline.json"
    file.write_bytes(orjson.dumps(orjson.loads(baseline().write()) | DAMAGES[damage]))
    with pytest.raises(ConfigurationError, match="camserve baseline FOLDER"):
        read_baseline(file)
    with pytest.raises(ConfigurationError, match="No such file"):
        read_baseline(tmp_path / "nothing.json")


def test_too_few_images_make_no_baseline():
    with pytest.raises(ConfigurationError, match="99 explained images are too few"):
        baseline(99)


def result(method: str = "gradcam", layers: tuple[str, ...] = ("features",), explained: int = 1):
    grid = np.eye(3, dtype=np.float32)
    explanation = Explanation(explained, 0.9, 2.0, {}, method, layers, grid, 0, 1, (), 1.0)
    return InferenceResult((Prediction(1, 0.9, 2.0), Prediction(0, 0.1, 0.0)), (explanation,), ())


def test_answers_of_the_model_and_version_of_the_baseline_count():
    model = loaded(SmallNet())
    watch = DriftWatch(baseline())
    watch.note(model, result(), PIXELS)
    watch.note(replace(model, version="1" * 12), result(), PIXELS)
    watch.note(replace(model, spec=replace(model.spec, name="another")), result(), PIXELS)
    assert watch.images == 1


def test_maps_of_another_method_layer_or_class_count_by_label_and_score_alone(monkeypatch):
    noted: list[Observation] = []
    watch = DriftWatch(baseline())
    monkeypatch.setattr(DriftWatch, "add", lambda _self, each: noted.append(each))
    for each in (result(), result("hirescam"), result(layers=("early",)), result(explained=0)):
        watch.note(loaded(SmallNet()), each, PIXELS)
    assert [each.peak for each in noted] == ["upper left", None, None, None]
    assert {(each.label, each.score) for each in noted} == {("class 1", 0.9)}


def test_threads_may_share_a_watch():
    watch, rows = DriftWatch(baseline()), answers(300, 1)

    def fill() -> None:
        for each in rows:
            watch.add(each)
            if each is rows[-1]:
                list(watch.distances())

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watch.images == WINDOW
