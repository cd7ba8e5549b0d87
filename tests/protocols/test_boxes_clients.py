"""Boxes in KServe's and Triton's packages, and in curl, which TorchServe's documentation uses."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flowers import LABELS, Flowers

from api_schemas.client import Client
from api_schemas.client.results import Result

pytestmark = [pytest.mark.protocols, pytest.mark.timeout(180)]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(python: Path, flowers_url: str, flowers_folder: Path, scenes: list[Flowers]) -> Any:
    """What the clients printed of the first two images."""
    files = [str(flowers_folder / scene.name) for scene in scenes[:2]]
    command = [str(python), str(HERE / "boxes_client.py"), flowers_url, *files]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def ours(flowers_url: str, scenes: list[Flowers]) -> list[Result]:
    """What `/explain` answers for them, with the two best boxes explained."""
    with Client(flowers_url, trust_env=False) as client:
        files = [scene.file for scene in scenes[:2]]
        asked = {"model": "flower-boxes", "explain_top": 2, "include": "none"}
        return list(client.explain(files, **asked))


def test_kserves_first_protocol_has_the_boxes_of_each_instance(seen, ours) -> None:
    for found, result in zip(seen["kserve"]["predict"]["predictions"], ours, strict=True):
        assert [(each["label"], each["detection"]) for each in found] == [
            (each.label, each.detection) for each in result.predictions
        ]
        for each, prediction in zip(found, result.predictions, strict=True):
            assert each["box"] == pytest.approx(prediction.box, abs=1e-3)
            assert each["score"] == pytest.approx(prediction.score, abs=1e-5)
    ((explanation,),) = seen["kserve"]["explain"]["explanations"]
    assert explanation["detection"] == 0
    assert explanation["box"] == pytest.approx(ours[0].predictions[0].box, abs=1e-3)


@pytest.mark.parametrize("form", ["kserve binary", "kserve json", "triton binary"])
def test_the_open_inference_protocol_has_padded_boxes(seen, ours, form: str) -> None:
    who, how = form.split()
    outputs = seen[who][how]
    counts = [len(result.predictions) for result in ours]
    assert outputs["num_detections"] == counts
    assert np.shape(outputs["boxes"]) == (2, max(counts), 4)
    for row, result in enumerate(ours):
        listed, count = result.predictions, counts[row]
        assert outputs["labels"][row] == [
            *(each.label for each in listed),
            *[""] * (max(counts) - count),
        ]
        assert outputs["class_ids"][row][:count] == [each.class_id for each in listed]
        scores = [each.score for each in listed]
        np.testing.assert_allclose(outputs["scores"][row][:count], scores, atol=1e-5)
        corners = [(x, y, x + w, y + h) for x, y, w, h in (each.box for each in listed if each.box)]
        np.testing.assert_allclose(outputs["boxes"][row][:count], corners, atol=1e-2)
        assert not np.any(outputs["boxes"][row][count:])
        explained = [json.loads(text) for text in outputs["explain"][row] if text]
        assert [each["detection"] for each in explained] == [
            each.detection for each in result.explanations
        ]
        assert [each["layer"] for each in explained] == [each.layer for each in result.explanations]


def test_tritons_client_reads_what_the_outputs_of_a_detector_are(seen) -> None:
    described = {each["name"]: each for each in seen["triton"]["metadata"]["outputs"]}
    assert described["boxes"] == {"name": "boxes", "datatype": "FP32", "shape": [-1, -1, 4]}
    assert described["num_detections"]["datatype"] == "INT64"


def test_curl_gets_what_torchserves_object_detector_gives(
    flowers_url: str, flowers_folder: Path, scenes: list[Flowers], ours
) -> None:
    """As its documentation sends an image: `curl .../predictions/NAME -T FILE`."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    address = f"{flowers_url}/predictions/flower-boxes"
    command = [curl, "-sS", "--noproxy", "*", address, "-T", str(flowers_folder / scenes[0].name)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(ran.stdout)
    assert len(found) == len(ours[0].predictions) > 1
    for each, prediction in zip(found, ours[0].predictions, strict=True):
        assert list(each) == [prediction.label, "score"]
        assert prediction.label in LABELS
        x, y, w, h = prediction.box
        assert each[prediction.label] == pytest.approx([x, y, x + w, y + h], abs=1e-3)
        assert each["score"] == pytest.approx(prediction.score, abs=1e-5)
