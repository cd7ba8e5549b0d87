"""`camserve baseline`, and a service that compares its answers with the file."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import orjson
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from service.app import create_app
from service.cli.main import app
from service.errors import ConfigurationError
from service.evaluation.drift import DETAILS, MIN_IMAGES
from service.settings import Settings

pytestmark = pytest.mark.timeout(120)

PNG = {"content-type": "image/png"}
TINY = ("--model", "tiny:small", "--workers", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many images as a baseline needs, a broken one, and the file of `camserve baseline`."""
    root = tmp_path_factory.mktemp("drift")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(MIN_IMAGES):
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index:03}.png")
    (root / "images" / "broken.png").write_bytes(b"no image")
    result = run("baseline", root / "images", "--out", root / "baseline.json", *TINY)
    assert f"{MIN_IMAGES} images, 1 left out" in result.stderr
    return root


def run(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def metrics(client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    found = (line.rpartition(" ") for line in lines if line.startswith("camserve_drift"))
    return {name: float(value) for name, _, value in found}


def test_the_results_of_bulk_give_the_same_baseline(folder: Path):
    run("bulk", folder / "images", folder / "results", "--no-images", *TINY, code=1)
    for source in (folder / "results", folder / "results" / "part-00000.parquet"):
        run("baseline", source, "--out", folder / "again.json")
        one, other = (
            orjson.loads((folder / name).read_bytes()) for name in ("baseline.json", "again.json")
        )
        missing = one["features"].keys() - other["features"].keys()
        assert missing == set(DETAILS), "the files have no pixels"
        for name, found in other["features"].items():
            assert found["counts"] == one["features"][name]["counts"], name


def test_a_service_exports_distances_once_the_window_has_enough_images(folder: Path, serve):
    with serve(models=("tiny:small",), workers=1, baseline=folder / "baseline.json") as client:
        assert metrics(client) == {'camserve_drift_images{model="small"}': 0}
        for image in sorted((folder / "images").glob("???.png")):
            body = image.read_bytes()
            assert (
                client.post("/explain?include=none", content=body, headers=PNG).status_code == 200
            )
        until = time.monotonic() + 20  # nothing waits for an observation
        while metrics(client)['camserve_drift_images{model="small"}'] < MIN_IMAGES:
            assert time.monotonic() < until
        found = metrics(client)
        for feature in ("score", "entropy", "border", "centre_x", "centre_y", "peak", *DETAILS):
            labels = f'{{class="",feature="{feature}",model="small"}}'
            assert found[f"camserve_drift_psi{labels}"] == 0, "the same images"
            assert found[f"camserve_drift_noise{labels}"] > 0


def test_without_a_baseline_nothing_is_watched(client):
    assert metrics(client) == {}


def test_a_baseline_of_another_model_is_refused_at_the_start(folder: Path):
    settings = Settings(models=("other=tiny:small",), baseline=folder / "baseline.json")
    with pytest.raises(ConfigurationError, match="is of the model 'small', and the models are oth"):
        create_app(settings)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("nowhere",), "no file nowhere"),
        (("few", *TINY), "1 explained images are too few"),
        (("few/x.parquet",), "cannot be read"),
        (("few", "--out", "nowhere/b.json"), "no folder nowhere"),
    ],
)
def test_wrong_usage_is_code_2_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], part: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "few" / "a.png")
    (tmp_path / "few" / "x.parquet").write_bytes(b"no parquet")
    result = run("baseline", *arguments, code=2)
    assert part in " ".join(result.stderr.split())
