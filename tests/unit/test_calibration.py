"""An int8 front: written where its answers agree, refused otherwise, named in every answer."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import nncf  # noqa: F401 - takes seconds, which no test's clock should hold
import numpy as np
import openvino  # noqa: F401 - likewise
import pytest
import torch
from scipy.stats import spearmanr
from tiny import SmallNet
from torch import nn

from service.cam.rank_correlation import rank_correlation
from service.errors import ConfigurationError
from service.evaluation import calibration
from service.evaluation.calibration import calibrate
from service.inference.batch import run_compiled
from service.inference.questions import Question
from service.models.catalog import ModelSpec, parse_models, with_int8
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model

pytestmark = pytest.mark.timeout(180)

SIZE = 64


def make() -> nn.Module:
    return SmallNet(classes=11)


def load(int8: Path | None = None, labels: tuple[str, ...] | None = None) -> LoadedModel:
    sys.modules.setdefault("test_calibration_models", sys.modules[__name__])
    size = replace(ModelSpec("x", "y").input, size=(SIZE, SIZE), resize=SIZE)
    spec = ModelSpec("made", "test_calibration_models:make", input=size, int8=int8, labels=labels)
    return load_model(spec, compiler=Compiler())


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load()


@pytest.fixture(scope="module")
def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(calibration.MIN_IMAGES, 3, 8, 8, generator=generator)
    fine = nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")
    return list((fine * 255).to(torch.uint8))


@pytest.fixture(scope="module")
def front(model, pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    calibrate(model, pictures, folder)
    return folder


def test_it_is_written_with_what_it_costs(front: Path) -> None:
    about = json.loads((front / "calibration.json").read_text())
    assert about["images"] == calibration.MIN_IMAGES // 2
    assert calibration.MIN_AGREEMENT <= about["tenth"] <= about["median"] <= 1
    assert 0 <= about["same_peak"] <= 1
    assert 0.5 < about["same_class"] <= 1
    assert "i8" in (front / "front.xml").read_text(), "its weights are integers"


def test_a_model_served_from_it_says_so_and_answers_alike(front, model, pictures) -> None:
    served = load(front)
    assert served.compiled.precision == "int8"
    ask = [Question(picture, layers=("features",), targets=(3,)) for picture in pictures[1:9:2]]
    for one, other in zip(run_compiled(served, ask), run_compiled(model, ask), strict=True):
        assert (one.precision, other.precision) == ("int8", "float32")
        maps = one.explanations[0].grid, other.explanations[0].grid
        assert np.abs(maps[0] - maps[1]).max() < 0.2
        assert not np.array_equal(*maps), "it is another front"


def test_a_front_of_another_model_is_refused(front: Path, tmp_path: Path) -> None:
    about = json.loads((front / "calibration.json").read_text())
    for name in ("front.xml", "front.bin"):
        (tmp_path / name).write_bytes((front / name).read_bytes())
    stale = about | {"identity": about["identity"].replace("features", "head")}
    (tmp_path / "calibration.json").write_text(json.dumps(stale))
    with pytest.raises(ConfigurationError, match="camserve calibrate"):
        load(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"identity": 1}'])
def test_a_folder_that_holds_none_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ConfigurationError, match="camserve calibrate"):
        load(tmp_path)


def test_too_few_pictures_are_refused(model, pictures, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="39 images are too few"):
        calibrate(model, pictures[1:], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_agreement_is_refused(model, pictures, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "MIN_AGREEMENT", 1.01)
    with pytest.raises(ConfigurationError, match="is refused"):
        calibrate(model, pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_compiled_lane_is_refused(model, pictures, tmp_path: Path) -> None:
    hooked = replace(model, compiled=None, not_compiled="It branches.")
    with pytest.raises(ConfigurationError, match="It branches"):
        calibrate(hooked, pictures, tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40]),
        ([1, 2, 3, 4], [4, 3, 2, 1]),
        ([0, 0, 1, 5], [0, 2, 2, 3]),
        ([0.5, 0.1, 0.9, 0.9, 0], [0, 0.3, 1, 0.2, 0.2]),
    ],
)
def test_the_rank_correlation_is_spearmans(one: list[float], other: list[float]) -> None:
    found = rank_correlation(np.array(one, np.float32), np.array(other, np.float32))
    assert found == pytest.approx(spearmanr(one, other).statistic)


def test_a_map_of_equal_values_agrees_only_with_another() -> None:
    flat, slope = np.zeros((2, 2), np.float32), np.arange(4, dtype=np.float32).reshape(2, 2)
    assert rank_correlation(flat, flat) == 1
    assert rank_correlation(flat, slope) == 0


def test_models_are_given_their_fronts_by_name() -> None:
    specs = parse_models(["a=torchvision/resnet18", "b=torchvision/resnet18"])
    first, second = with_int8(specs, ["b=folder"])
    assert (first.int8, second.int8) == (None, Path("folder"))


@pytest.mark.parametrize("said", ["c=folder", "folder", "a=", "=folder"])
def test_a_front_for_no_model_is_refused(said: str) -> None:
    with pytest.raises(ConfigurationError, match="NAME=FOLDER"):
        with_int8(parse_models(["a=torchvision/resnet18"]), [said])
