"""FiftyOne's own SDK, with a real database, after `apply_explanations` and the operator."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pictures
import pytest
import torch
from flowers import LABELS, SIDE, Flowers
from numpy.typing import NDArray
from torchvision.ops import box_convert, box_iou

from api_schemas.client import Client
from api_schemas.client.results import Result, decode_mask

pytestmark = [pytest.mark.protocols, pytest.mark.timeout(400)]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
START_SECONDS = 60

FILES = {
    "0.png": pictures.png(120, 90, seed=0),
    "1.png": pictures.png(120, 90, seed=1),
    "broken.jpg": b"no picture",
    "turned.jpg": pictures.jpeg(120, 90, seed=2, orientation=6),
}


@pytest.fixture(scope="module")
def environment() -> Path:
    """The folder .venv-fiftyone."""
    found = Path(os.environ.get("CAMSERVE_TEST_FIFTYONE", ROOT / ".venv-fiftyone"))
    if not (found / "bin/python").exists():
        pytest.skip("FiftyOne is not installed: `make protocols` does it")
    return found


@pytest.fixture(scope="module")
def database(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a mongod of that environment, with the OpenSSL that is there beside it."""
    (packages,) = environment.glob("lib/python3*/site-packages")
    folder = tmp_path_factory.mktemp("mongod")
    for name in ("ssl", "crypto"):
        (library,) = packages.glob(f"psycopg2_binary.libs/lib{name}-*.so.1.1")
        (folder / f"lib{name}.so.1.1").symlink_to(library)
        (folder / library.name).symlink_to(library)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "log"
    command = [str(packages / "fiftyone/db/bin/mongod"), "--dbpath", str(folder), "--nounixsocket"]
    command += ["--bind_ip", "127.0.0.1", "--port", str(port)]
    with (
        log.open("w") as said,
        subprocess.Popen(
            command,
            env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
            stdout=said,
            stderr=subprocess.STDOUT,
        ) as mongod,
    ):
        try:
            if not _answers(mongod, port):
                pytest.skip(f"mongod does not run here: {log.read_text()[-300:]}")
            yield f"mongodb://127.0.0.1:{port}"
        finally:
            mongod.terminate()
            mongod.wait(40)


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            threading.Event().wait(0.1)
        else:
            return True
    return False


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def sdk(
    environment: Path, database: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Run a script of this folder beside the SDK; what it printed."""

    def told(script: str, *arguments: object) -> Any:
        own = {
            "HOME": str(tmp_path_factory.mktemp("home")),
            "FIFTYONE_DATABASE_URI": database,
            "FIFTYONE_DO_NOT_TRACK": "true",
            "FIFTYONE_PLUGINS_DIR": str(ROOT / "api_schemas" / "adapters"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        command = [str(environment / "bin/python"), str(HERE / script), *map(str, arguments)]
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | own
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    return told


@pytest.fixture(scope="module")
def seen(sdk: Callable[..., Any], url: str, photos: Path) -> Any:
    """What the SDK read back from its database."""
    return sdk("fiftyone_client.py", url, photos)


@pytest.fixture(scope="module")
def ours(url: str, photos: Path) -> dict[str, Result]:
    with Client(url, trust_env=False) as client:
        answer = client.explain([photos / name for name in FILES], include=["heatmap", "regions"])
        return dict(zip(FILES, answer, strict=True))


def drawn(regions: Any, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """How often each pixel is in a detection's mask, from relative boxes and their masks."""
    height, width = shape
    canvas = np.zeros(shape, dtype=np.uint8)
    for _, _, (x, y, _, _), mask in regions:
        part = np.array(mask)
        left, top = round(x * width), round(y * height)
        canvas[top : top + part.shape[0], left : left + part.shape[1]] += part
    return canvas


@pytest.mark.parametrize("name", ["0.png", "1.png", "turned.jpg"])
def test_each_sample_has_class_heatmap_peak_and_regions(seen, ours, name: str) -> None:
    held, result = seen["in_place"]["all"][name], ours[name]
    best, explanation = result.predictions[0], result.explanations[0]
    width, height = result.image.width, result.image.height
    assert (width, height) == ((90, 120) if name == "turned.jpg" else (120, 90))
    assert (held["best"], held["error"]) == ([best.label, best.score], None)
    assert held["heatmap"]["range"] == [0, 255]
    np.testing.assert_array_equal(held["heatmap"]["map"], np.asarray(explanation.heatmap))
    ((label, points, confidence),) = held["peaks"]
    x, y = explanation.regions.peak
    assert (label, points, confidence) == (best.label, [[x / width, y / height]], [best.score])
    assert [box for _, _, box, _ in held["regions"]] == [
        [x / width, y / height, w / width, h / height] for x, y, w, h in explanation.regions.boxes
    ]
    assert {(label, score) for label, score, _, _ in held["regions"]} == {(best.label, best.score)}


@pytest.mark.parametrize("name", ["0.png", "1.png", "turned.jpg"])
def test_the_detections_masks_are_the_mask_of_the_map(seen, ours, name: str) -> None:
    """But for regions under four pixels, which have no box; and none is drawn twice."""
    mask = ours[name].explanations[0].regions.mask
    canvas = drawn(seen["in_place"]["all"][name]["regions"], mask.shape)
    assert canvas.max() == 1
    assert not (canvas.astype(bool) & ~mask).any()
    left = (mask & ~canvas.astype(bool)).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(left, connectivity=8)
    assert (stats[1:, cv2.CC_STAT_AREA] < 4).all()


def test_a_sample_that_fails_says_why_and_costs_no_other(seen, ours) -> None:
    place = seen["in_place"]
    assert place["failed"] == ["broken.jpg"]
    assert place["all"]["broken.jpg"] == {
        "error": ours["broken.jpg"].error.detail,
        "heatmap": True,
    }
    assert (place["errors"], sum(place["counts"].values())) == (1, len(FILES))


def test_fields_have_fiftyones_own_types(seen) -> None:
    schema = {name: kind for name, kind in seen["in_place"]["schema"].items() if name != "metadata"}
    of_one = {
        "": "Classification",
        "_heatmap": "Heatmap",
        "_peak": "Keypoints",
        "_regions": "Detections",
    }
    assert schema == {
        field + ending: kind for field in ("camserve", "two") for ending, kind in of_one.items()
    }


def test_a_view_is_explained_with_other_options_and_nothing_else_is(
    seen, url: str, photos: Path
) -> None:
    one = seen["in_place"]["one"]
    with Client(url, trust_env=False) as client:
        asked = {"targets": [3, "class 5"], "threshold": 0.2, "include": "regions"}
        result = client.explain(photos / "0.png", **asked)[0]
    assert [label for label, _, _ in one["peaks"]] == ["class 3", "class 5"]
    assert [label for label, _, _, _ in one["regions"]] == [
        each.label for each in result.explanations for _ in each.regions.boxes
    ]
    assert np.shape(one["heatmap"]["map"]) == (12, 16)
    assert one["best"][0] == result.predictions[0].label
    assert seen["in_place"]["others"] == len(FILES) - 1


def test_verdicts_are_fields_that_can_be_counted_and_go_with_the_next_run(
    seen, url: str, photos: Path
) -> None:
    names = [name for name in FILES if name != "broken.jpg"]
    with Client(url, trust_env=False) as client:
        asked = {"targets": [3, 5], "verify": True, "include": "regions"}
        answer = client.explain([photos / name for name in names], **asked)
        ours = dict(zip(names, answer, strict=True))
    found = seen["verified"]
    assert set(found["filled"]) == set(ours)
    for name, result in ours.items():
        held, first = found["filled"][name], result.explanations[0].verify
        assert held["verdict"] == first.verdict
        assert held["agreement"] == pytest.approx(first.agreement, abs=1e-3)
        assert held["verdicts"] == [
            each.verify.verdict for each in result.explanations for _ in each.regions.boxes
        ]
    counts = Counter(result.explanations[0].verify.verdict for result in ours.values())
    assert dict(map(tuple, found["counts"])) == dict(counts) | {None: 1}
    assert found["of_regions"] == sum(len(held["verdicts"]) for held in found["filled"].values())
    assert found["left"] == 0


def test_the_operator_of_the_plugin_does_the_same(seen, url: str, photos: Path) -> None:
    operator = seen["operator"]
    assert operator["uri"] == "@camserve/explanations/apply_explanations"
    assert {"url", "field", "method", "model", "layer", "threshold", "verify"} <= set(
        operator["form"]
    )
    assert operator["result"] == {"samples": 2, "failed": 0}
    assert list(operator["filled"]) == ["0.png", "1.png"]
    with Client(url, trust_env=False) as client:
        answer = client.explain(photos / "1.png", method="layercam", layer="features.0")
    heatmap = operator["filled"]["1.png"]["heatmap"]["map"]
    np.testing.assert_array_equal(heatmap, np.asarray(answer[0].explanations[0].heatmap))


def test_what_is_wrong_for_every_sample_is_raised(seen) -> None:
    assert seen["layer"][0] == seen["model"][0] == "NotFound"
    assert "'absent'" in seen["layer"][1]


# ---- a detector and a segmenter of flowers, on scenes whose flowers are known


@pytest.fixture(scope="module")
def scored(
    sdk: Callable[..., Any],
    flowers_url: str,
    flowers_folder: Path,
    scenes: list[Flowers],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """How FiftyOne's own evaluation scores what `apply_explanations` stored."""
    truth = {
        scene.name: {
            "boxes": [
                (label, [number / SIDE for number in box])
                for label, box in zip(scene.labels, scene.boxes, strict=True)
            ],
            "classes": scene.classes.tolist(),
        }
        for scene in scenes
    }
    file = tmp_path_factory.mktemp("truth") / "truth.json"
    file.write_text(json.dumps(truth))
    return sdk("fiftyone_boxes.py", flowers_url, flowers_folder, file)


@pytest.fixture(scope="module")
def answers(flowers_url: str, flowers_folder: Path, scenes: list[Flowers]) -> dict[str, Result]:
    """What the service answers: boxes with the two best explained."""
    names = [scene.name for scene in scenes]
    with Client(flowers_url, trust_env=False) as client:
        paths = [flowers_folder / name for name in names]
        asked = {"model": "flower-boxes", "explain_top": 2, "include": "regions"}
        return dict(zip(names, client.explain(paths, **asked), strict=True))


def test_boxes_are_detections_in_shares_of_the_sides(scored, answers) -> None:
    assert sum(len(found) for found in scored["boxes"]["found"].values()) > len(answers)
    for name, result in answers.items():
        found = scored["boxes"]["found"][name]
        assert [(each["label"], each["score"]) for each in found] == [
            (each.label, pytest.approx(each.score)) for each in result.predictions
        ]
        for each, prediction in zip(found, result.predictions, strict=True):
            assert each["box"] == pytest.approx([number / SIDE for number in prediction.box])
        assert scored["boxes"]["peaks"][name] == [
            [each.label, pytest.approx([number / SIDE for number in each.regions.peak])]
            for each in result.explanations
        ]


def test_fiftyones_evaluation_matches_them_with_the_flowers_that_are_there(scored, scenes) -> None:
    """Its overlaps are torchvision's, and most flowers are found."""
    boxes = scored["boxes"]
    hits = [each for found in boxes["found"].values() for each in found if each["verdict"] == "tp"]
    for each in hits:
        corners = torch.tensor([each["box"], each["of"]], dtype=torch.float64)
        overlap = box_iou(*box_convert(corners, "xywh", "xyxy").split(1))
        assert each["iou"] == pytest.approx(float(overlap), abs=1e-6)
    there = sum(len(scene.boxes) for scene in scenes)
    counts = boxes["counts"]
    assert (counts["tp"], counts["tp"] + counts["fn"]) == (len(hits), there)
    assert counts["tp"] > there / 2
    assert boxes["precision"] > 0.3


def test_regions_are_a_segmentation_whose_pixels_its_evaluation_counts(
    scored, scenes, flowers_url: str, flowers_folder: Path
) -> None:
    regions = scored["regions"]
    assert regions["names"] == {str(index): label for index, label in enumerate(LABELS)}
    counted = np.zeros((len(LABELS), len(LABELS)), dtype=int)
    with Client(flowers_url, trust_env=False) as client:
        paths = [flowers_folder / scene.name for scene in scenes]
        answered = client.predict(paths, model="flower-regions", top_k=len(LABELS))
    for scene, result in zip(scenes, answered, strict=True):
        classes = np.zeros((SIDE, SIDE), dtype=int)
        for each in result.predictions:
            classes[decode_mask(each.mask)] = each.class_id
        np.testing.assert_array_equal(regions["masks"][scene.name], classes)
        np.add.at(counted, (scene.classes, classes), 1)
    # FiftyOne counts class 0, its background, as no class.
    np.testing.assert_array_equal(np.array(regions["confusion"])[1:, 1:], counted[1:, 1:])
    both = np.diag(counted)
    overlap = both / (counted.sum(axis=0) + counted.sum(axis=1) - both)
    assert overlap.mean() > 0.4
