"""The clients that people already have, against the service: KServe's and Triton's own packages."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pictures
import pytest
import torch
from tiny import SmallNet

from service.images.decode import Preprocessing

pytestmark = [pytest.mark.protocols, pytest.mark.timeout(180)]

HERE = Path(__file__).parent
SIDE = 224


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture as a file, as pixels, and as what the model takes."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = pictures.noise(SIDE, SIDE)
    normal = Preprocessing()
    unit = pixels.astype(np.float32) / 255
    normalized = (unit - np.float32(normal.mean)) / np.float32(normal.std)
    (folder / "picture.png").write_bytes(pictures.file(pixels))
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "normalized.npy", normalized.transpose(2, 0, 1)[None].astype(np.float32))
    return {path.stem: path for path in folder.iterdir()}


def told(python: Path, script: str, *arguments: object) -> Any:
    """What a client script printed."""
    command = [str(python), str(HERE / script), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def ours(url: str, files: dict[str, Path]) -> Any:
    """What `/explain` answers for the picture file, with class 3 explained."""
    answer = httpx.post(
        f"{url}/explain",
        params={"include": "grid", "targets": 3},
        content=files["picture"].read_bytes(),
        headers={"content-type": "image/png"},
        trust_env=False,
    )
    return answer.raise_for_status().json()["results"][0]


@pytest.fixture(scope="module")
def logits(files: dict[str, Path]) -> Any:
    """The model's own logits for the tensor, without the service."""
    with torch.no_grad():
        return SmallNet().eval()(torch.from_numpy(np.load(files["normalized"])))[0].numpy()


@pytest.fixture(scope="module")
def kserve(python: Path, url: str, files: dict[str, Path]) -> Any:
    return told(python, "kserve_client.py", url, files["picture"], files["pixels"])


@pytest.fixture(scope="module")
def triton(python: Path, url: str, files: dict[str, Path], admin_key: str) -> Any:
    address = url.removeprefix("http://")
    return told(
        python, "triton_client.py", address, files["picture"], files["normalized"], admin_key
    )


def test_kserves_v1_predict_gives_what_predict_gives(kserve, ours, logits) -> None:
    file, wrapped, pixels = kserve["v1"]["predict"]["predictions"]
    expected = ours["predictions"]
    for found in (file, wrapped):  # in batches of one or two: the last bit differs
        assert [each["class_id"] for each in found] == [each["class_id"] for each in expected]
        scores = [[each["score"] for each in several] for several in (found, expected)]
        np.testing.assert_allclose(*scores, rtol=1e-5)
    np.testing.assert_allclose(
        [each["logit"] for each in pixels], sorted(logits)[:-6:-1], rtol=1e-4, atol=1e-6
    )


def test_kserves_v1_explain_gives_what_explain_gives(kserve, ours) -> None:
    ((explanation,),) = kserve["v1"]["explain"]["explanations"]
    (expected,) = ours["explanations"]
    assert (explanation["class_id"], explanation["layer"]) == (3, "features")
    np.testing.assert_allclose(grid_of(explanation), grid_of(expected), atol=1e-5)
    assert kserve["v1"]["explain"]["predictions"][0][0]["class_id"] is not None


def grid_of(explanation: Any) -> Any:
    grid = explanation["grid"]
    return np.frombuffer(base64.b64decode(grid["data"]), "<f4").reshape(grid["shape"])


def test_kserves_client_shows_the_reason_of_a_refusal(kserve) -> None:
    status, message = kserve["v1"]["refused"]
    assert status == 400
    assert "not a supported image format" in message


def test_kserves_client_sees_health(kserve) -> None:
    assert kserve["v1"]["ready"] is True
    seen = {name: kserve["v2"][name] for name in ("live", "ready", "model_ready", "absent")}
    assert seen == {"live": True, "ready": True, "model_ready": True, "absent": False}


@pytest.mark.parametrize("back", ["binary", "json"])
def test_kserves_v2_infer_in_every_form_it_can_send(kserve, ours, logits, back: str) -> None:
    infer = kserve["v2"]["infer"]
    best = [each["class_id"] for each in ours["predictions"]][:2]
    for form, count in (("files_in_binary", 2), ("base64_in_json", 1), ("base64_in_binary", 1)):
        outputs = infer[f"{form}_{back}_back"]
        assert outputs["class_ids"] == [best] * count
        assert outputs["labels"] == [[f"class {index}" for index in best]] * count
        assert np.shape(outputs["scores"]) == (count, 7)
        assert np.shape(outputs["grid"])[:2] == (count, 1)
    scores = torch.from_numpy(logits).softmax(0).numpy()
    for form in ("pixels_in_json", "pixels_in_binary"):
        np.testing.assert_allclose(infer[f"{form}_{back}_back"]["scores"][0], scores, rtol=1e-4)


def test_tritons_client_sees_health_and_metadata(triton) -> None:
    seen = {name: triton[name] for name in ("live", "ready", "model_ready", "absent_ready")}
    assert seen == {"live": True, "ready": True, "model_ready": True, "absent_ready": False}
    assert "binary_tensor_data" in triton["server"]["extensions"]
    assert triton["model"]["name"] == "small"
    assert triton["model"]["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    (line,) = triton["index"]
    assert (line["name"], line["state"]) == ("small", "READY")
    assert [line["version"]] == triton["model"]["versions"]


def test_tritons_client_reads_the_answer_for_a_file(triton, ours) -> None:
    expected = [each["class_id"] for each in ours["predictions"]]
    for form in ("files", "base64"):
        assert triton["infer"][form]["class_ids"] == [expected]


@pytest.mark.parametrize("form", ["True_True", "True_False", "False_True", "False_False"])
def test_tritons_tensors_as_the_model_takes_them_give_its_own_logits(
    triton, logits, form: str
) -> None:
    """In binary and in JSON, there and back; with its classification extension."""
    outputs = triton["infer"][f"tensor_{form}"]
    scores = torch.from_numpy(logits).softmax(0).numpy()
    np.testing.assert_allclose(outputs["scores"][0], scores, rtol=1e-4)
    best = np.argsort(-logits)[:2]
    assert [text.split(":")[1:] for text in outputs["logits"][0]] == [
        [str(index), f"class {index}"] for index in best
    ]
    np.testing.assert_allclose(
        [float(text.split(":")[0]) for text in outputs["logits"][0]], logits[best], atol=1e-5
    )
    assert outputs["targets"] == [[2]]
    assert np.max(outputs["grid"]) == 1
    (((heatmap,),),) = (outputs["heatmap"],)
    encoded = heatmap["base64"] if isinstance(heatmap, dict) else heatmap
    assert pictures.opened(base64.b64decode(encoded)).size == (SIDE, SIDE)


def test_tritons_client_shows_the_reason_of_a_refusal(triton) -> None:
    status, message = triton["refused"]
    assert status == "404"
    assert "No model is called 'absent'" in message
