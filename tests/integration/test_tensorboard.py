"""`camserve explain`: the options of `/explain` as flags, and TensorBoard images."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from service.cam.encoding import EncodedImage
from service.cli.main import app
from service.cli.tensorboard import open_board

pytestmark = pytest.mark.timeout(60)

CPU = ("--workers", "1", "--device", "cpu")


def explain(folder: Path, *flags: str, code: int = 0, model: str = "tiny:small") -> str:
    """Run the command on one picture of a folder; what it said."""
    image = folder / "a.png"
    image.write_bytes(pictures.png())
    out = ("--out", str(folder / "out"))
    result = CliRunner().invoke(app, ["explain", str(image), *out, "--model", model, *CPU, *flags])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def written(folder: Path) -> Any:
    return json.loads((folder / "out" / "a.json").read_text())


def shown(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """Every image of an event folder by its tag, read as TensorBoard reads it."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    found = {}
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        found[tag] = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    return found


def test_overlays_and_feature_maps_are_written_as_tensorboard_images(
    tmp_path: Path, client: Any
) -> None:
    board = tmp_path / "board"
    explain(
        *(tmp_path, "--tensorboard", str(board), "--target", "3", "--target", "class 0"),
        *("--activations", "features.?", "--activations", "head"),
    )
    found = shown(board)
    layers = [*(f"features.{index}" for index in range(5)), "head"]
    assert sorted(found) == sorted(f"a/{name}" for name in ("class 3", "class 0", *layers))
    overlay = np.asarray(Image.open(tmp_path / "out" / "a.overlay.jpeg"))
    assert np.array_equal(found["a/class 3"], overlay)
    asked = {"activations": layers, "activation_as": "image"}
    response = client.post(
        "/predict", content=pictures.png(), headers={"content-type": "image/png"}, params=asked
    )
    for each in response.json()["results"][0]["activations"]:
        grid = found[f"a/{each['layer']}"]
        assert grid.shape[:2] == (each["image"]["height"], each["image"]["width"])
        assert grid.min() < grid.max()
    assert [each["layer"] for each in written(tmp_path)["activations"]] == layers


def test_each_call_of_a_layer_is_an_image_of_its_own(tmp_path: Path) -> None:
    board = tmp_path / "board"
    captures = ("--activations", "layer1.0.relu")
    explain(tmp_path, "--tensorboard", str(board), *captures, model="nets:resnet")
    assert {"a/layer1.0.relu", "a/layer1.0.relu.1"} <= set(shown(board))


def test_several_files_have_a_group_each(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("x.png", "y.png"):
        (tmp_path / "more" / name).write_bytes(pictures.png())
    board = tmp_path / "board"
    explain(tmp_path, str(tmp_path / "more"), "--tensorboard", str(board), "--target", "1")
    assert sorted(shown(board)) == ["a/class 1", "x/class 1", "y/class 1"]


def test_a_board_keeps_every_pixel(tmp_path: Path) -> None:
    pixels = pictures.noise(9, 7)
    with open_board(tmp_path) as board:
        board.add("one/colour", EncodedImage("image/png", 9, 7, pictures.file(pixels)))
    assert np.array_equal(shown(tmp_path)["one/colour"], pixels)


def test_without_tensorboard_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = explain(tmp_path, "--tensorboard", str(tmp_path / "board"), code=2)
    assert "extra `tensorboard`" in said
    assert "pip install" in said
    assert not (tmp_path / "out").exists()
    explain(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said = explain(tmp_path, "--tensorboard", str(tmp_path / "file"), code=2)
    assert "--tensorboard" in said


# ---- the options of /explain


def over_http(client: Any, **options: Any) -> Any:
    """The explanation that the service gives of the same picture."""
    response = client.post(
        "/explain", content=pictures.png(), headers={"content-type": "image/png"}, params=options
    )
    (explanation,) = response.json()["results"][0]["explanations"]
    return explanation


@pytest.mark.parametrize(
    "options",
    [
        {"method": "layercam"},
        {"method": "rise", "samples": "6", "seed": "4"},
        {"method": "integrated_gradients", "steps": "3"},
        {"contrast": "1"},
        {"contrast": "class 2", "method": "hirescam"},
    ],
)
def test_flags_are_the_options_of_the_route(
    tmp_path: Path, client: Any, options: dict[str, str]
) -> None:
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    explain(tmp_path, "--target", "5", *flags)
    (explanation,) = written(tmp_path)["explanations"]
    assert explanation == over_http(client, targets="5", include="grid", **options)


def test_regions_are_in_the_numbers_where_asked(tmp_path: Path, client: Any) -> None:
    explain(tmp_path, "--target", "5")
    assert "regions" not in written(tmp_path)["explanations"][0]
    explain(tmp_path, "--target", "5", "--regions")
    expected = over_http(client, targets="5", include="regions")
    assert written(tmp_path)["explanations"][0]["regions"] == expected["regions"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "gradcm"], "method"),
        (["--method", "rise", "--samples", "0"], "samples"),
        (["--method", "rise", "--samples", "5000"], "5001 forward passes"),
        (["--seed", "-1"], "seed"),
        (["--contrast", "dog"], "no class labelled 'dog'"),
        (["--target", "1", "--contrast", "1"], "contrast"),
        (["--method", "rise", "--layer", "features"], "has no layer"),
        (["--activations", "layer*"], "matches 'layer*'"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_any_file_is_read(
    tmp_path: Path, flags: list[str], words: str
) -> None:
    assert words in explain(tmp_path, *flags, code=2)
    assert not (tmp_path / "out").exists()
