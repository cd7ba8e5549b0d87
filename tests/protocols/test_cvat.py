"""`cvat-cli` itself against the service, with a small CVAT server behind it.

What it uploads is compared with what `/explain` answers for the same frame; masks are read by the
decoder of CVAT's SDK, in CVAT's own environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_boxes
import numpy as np
import pictures
import pytest
from fake_cvat import TASK, FakeCVAT, serving
from flowers import LABELS, SIDE, Flowers
from running import running

from api_schemas.client import Client
from api_schemas.client.results import Result, decode_mask
from api_schemas.options import Task

pytestmark = [pytest.mark.protocols, pytest.mark.timeout(240)]

ROOT = Path(__file__).parent.parent.parent
SIZE = (120, 90)
FRAMES = {f"{seed}.png": pictures.png(*SIZE, seed=seed) for seed in range(3)}
CLASSES = [f"class {index}" for index in range(7)]

DECODE = """
import json, sys
from cvat_sdk.masks import decode_mask
points, width, height = json.load(sys.stdin)
print(json.dumps([decode_mask(each, image_width=width, image_height=height).tolist()
                  for each in points]))
"""

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment() -> Path:
    """The folder with the commands of .venv-cvat."""
    found = Path(os.environ.get("CAMSERVE_TEST_CVAT", ROOT / ".venv-cvat")) / "bin"
    if not (found / "cvat-cli").exists():
        pytest.skip("cvat-cli is not installed: `make protocols` does it")
    return found


@pytest.fixture
def cli(environment: Path, tmp_path: Path) -> Cli:
    """Run cvat-cli against a fake server's port, with no cache but its own."""
    own = {name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}

    def run(port: int, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        server = ("--server-host", "http://127.0.0.1", "--server-port", str(port))
        command = [str(environment / "cvat-cli"), "--auth", "user:pass", *server, *arguments]
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=os.environ | own | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"},
        )
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran

    return run


@pytest.fixture(scope="module")
def ours(url: str) -> list[Result]:
    """What the service answers for each frame."""
    with Client(url, trust_env=False) as client:
        return list(client.explain(list(FRAMES.values()), include="regions"))


def function(url: str, **parameters: str) -> list[str]:
    given = {"url": url} | parameters
    said = [part for name, value in given.items() for part in ("-p", f"{name}=str:{value}")]
    return ["--function-module", "api_schemas.adapters.cvat", *said]


def masks(environment: Path, shapes: list[Any], size: tuple[int, int] = SIZE) -> Any:
    """Booleans (n, height, width), as CVAT's SDK reads them."""
    sent = json.dumps([[shape["points"] for shape in shapes], *size])
    command = [str(environment / "python"), "-c", DECODE]
    ran = subprocess.run(command, input=sent, capture_output=True, text=True, check=True)
    return np.array(json.loads(ran.stdout))


def test_a_task_gets_the_class_as_a_tag_and_the_evidence_as_a_mask(
    url: str, cli: Cli, environment: Path, ours: list[Result]
) -> None:
    labels = dict.fromkeys(CLASSES, "tag") | {"evidence": "mask", "somebody's own": "any"}
    cvat = FakeCVAT(FRAMES, labels)
    with serving(cvat) as port:
        cli(port, "task", "auto-annotate", str(TASK), *function(url))
    assert (cvat.unknown, cvat.method) == ([], "PATCH")
    tags, shapes = cvat.annotations["tags"], cvat.annotations["shapes"]
    best = [result.predictions[0] for result in ours]
    assert [(tag["frame"], tag["label_id"], tag["source"]) for tag in tags] == [
        (frame, cvat.label(each.label), "auto") for frame, each in enumerate(best)
    ]
    assert [(shape["frame"], shape["label_id"], shape["type"]) for shape in shapes] == [
        (frame, cvat.label("evidence"), "mask") for frame in range(len(FRAMES))
    ]
    np.testing.assert_allclose([shape["score"] for shape in shapes], [each.score for each in best])
    for found, result in zip(masks(environment, shapes), ours, strict=True):
        np.testing.assert_array_equal(found, result.explanations[0].regions.mask)


def test_masks_become_polygons_where_cvat_asks_for_them(
    url: str, cli: Cli, ours: list[Result]
) -> None:
    cvat = FakeCVAT(FRAMES, dict.fromkeys(CLASSES, "any"))
    with serving(cvat) as port:
        told = function(url, shapes="mask", evidence_label="")
        cli(port, "task", "auto-annotate", str(TASK), "--conv-mask-to-poly", *told)
    expected = [
        (frame, cvat.label(result.explanations[0].label), np.ravel(polygon).tolist())
        for frame, result in enumerate(ours)
        for polygon in result.explanations[0].regions.polygons
    ]
    shapes = cvat.annotations["shapes"]
    assert {shape["type"] for shape in shapes} == {"polygon"}
    assert [(each["frame"], each["label_id"], each["points"]) for each in shapes] == expected


def test_boxes_and_peaks_and_only_what_is_sure_enough(
    url: str, cli: Cli, ours: list[Result]
) -> None:
    """The function as a file, existing annotations replaced, CVAT's threshold on the score."""
    cvat = FakeCVAT(FRAMES, {"evidence": "any"})
    scores = sorted(result.predictions[0].score for result in ours)
    file = ROOT / "api_schemas" / "adapters" / "cvat.py"
    told = ["--function-file", str(file), "-p", f"url=str:{url}"]
    told += ["-p", "shapes=str:rectangle,points", "--conf-threshold", str(scores[1])]
    with serving(cvat) as port:
        cli(port, "task", "auto-annotate", str(TASK), "--clear-existing", *told)
    assert cvat.method == "PUT"
    sure = [
        (frame, result.explanations[0].regions)
        for frame, result in enumerate(ours)
        if result.predictions[0].score >= scores[1]
    ]
    assert len(sure) == 2
    expected = [
        (frame, kind, numbers)
        for frame, regions in sure
        for kind, several in (
            ("rectangle", [[x, y, x + w, y + h] for x, y, w, h in regions.boxes]),
            ("points", [list(regions.peak)]),
        )
        for numbers in several
    ]
    assert [
        (each["frame"], each["type"], each["points"]) for each in cvat.annotations["shapes"]
    ] == expected


def test_labels_that_the_task_lacks_are_left_out_where_that_is_allowed(url: str, cli: Cli) -> None:
    cvat = FakeCVAT(FRAMES, {"evidence": "mask"})
    with serving(cvat) as port:
        refused = cli(port, "task", "auto-annotate", str(TASK), *function(url), code=1)
        assert cvat.annotations is None
        cli(port, "task", "auto-annotate", str(TASK), "--allow-unmatched-labels", *function(url))
    assert "label 'class 0' is not in dataset" in refused.stderr
    assert cvat.annotations["tags"] == []
    assert len(cvat.annotations["shapes"]) == len(FRAMES)


def test_shapes_have_the_verdict_on_their_map_where_the_label_has_the_attribute(
    url: str, cli: Cli
) -> None:
    labels = dict.fromkeys(CLASSES, "tag") | {"evidence": "any"}
    cvat = FakeCVAT(FRAMES, labels, {"evidence": ["note", "verdict"]})
    bare = FakeCVAT(FRAMES, labels)
    told = function(url, shapes="tag,rectangle", verify="true")
    with serving(cvat) as port:
        cli(port, "task", "auto-annotate", str(TASK), *told)
    with serving(bare) as port:
        refused = cli(port, "task", "auto-annotate", str(TASK), *told, code=1)
        assert bare.annotations is None
        cli(port, "task", "auto-annotate", str(TASK), "--allow-unmatched-labels", *told)
    assert "attribute 'verdict' of label 'evidence' is not in dataset" in refused.stderr
    with Client(url, trust_env=False) as client:
        ours = list(client.explain(list(FRAMES.values()), include="none", verify=True))
    found = {
        (shape["frame"], attribute["spec_id"], attribute["value"])
        for shape in cvat.annotations["shapes"]
        for attribute in shape["attributes"]
    }
    assert found == {
        (frame, 202, result.explanations[0].verify.verdict) for frame, result in enumerate(ours)
    }
    assert not any(tag.get("attributes") for tag in cvat.annotations["tags"])
    assert len(bare.annotations["shapes"]) == len(cvat.annotations["shapes"])


def test_a_frame_that_cannot_be_answered_costs_no_other(cli: Cli) -> None:
    cvat = FakeCVAT({"large.png": pictures.png(200, 90), **FRAMES}, {"evidence": "points"})
    with serving(cvat) as port, running(max_pixels=SIZE[0] * SIZE[1]) as server:
        told = function(server.url, shapes="points")
        ran = cli(port, "task", "auto-annotate", str(TASK), *told)
    assert [shape["frame"] for shape in cvat.annotations["shapes"]] == [1, 2, 3]
    assert "no annotations for large.png" in ran.stderr


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"shapes": "tag,circle"}, "not 'circle'"),
        ({"layer": "absent"}, "no layer"),
        ({"shapes": "tag", "verify": "true"}, "is for the evidence; add mask"),
    ],
)
def test_a_wrong_parameter_ends_the_command_with_its_reason_and_uploads_nothing(
    url: str, cli: Cli, parameters: dict[str, str], reason: str
) -> None:
    cvat = FakeCVAT(FRAMES, {"evidence": "any"})
    with serving(cvat) as port:
        told = ["--allow-unmatched-labels", *function(url, **parameters)]
        ran = cli(port, "task", "auto-annotate", str(TASK), *told, code=1)
    assert reason in ran.stderr
    assert cvat.annotations is None


def test_it_serves_as_a_function_of_an_agent(url: str, cli: Cli, ours: list[Result]) -> None:
    """Registered by `create-native`, then asked for one frame through the queue."""
    cvat = FakeCVAT(FRAMES, dict.fromkeys(CLASSES, "tag") | {"evidence": "polygon"})
    told = function(url, shapes="tag,polygon")
    with serving(cvat) as port:
        assert cli(port, "function", "create-native", "camserve", *told).stdout == "1\n"
        declared = {each["name"]: each["type"] for each in cvat.function["labels_v2"]}
        assert declared == dict.fromkeys(CLASSES, "tag") | {"evidence": "polygon"}
        mapping = {name: {"name": name} for name in declared}
        cvat.waiting = {
            "ar_id": "ar-1",
            "ar_params": {"type": "annotate_frame", "task": TASK, "frame": 1, "mapping": mapping}
            | {"threshold": None, "conv_mask_to_poly": False},
        }
        cli(port, "function", "run-agent", "1", "--burst", *told)
    assert list(cvat.finished) == ["complete"]
    made = cvat.finished["complete"]["annotations"]
    regions = ours[1].explanations[0].regions
    assert [tag["label_id"] for tag in made["tags"]] == [cvat.label(ours[1].predictions[0].label)]
    assert [shape["points"] for shape in made["shapes"]] == [
        np.ravel(polygon).tolist() for polygon in regions.polygons
    ]


@pytest.mark.parametrize("to_polygons", [False, True])
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_boxes_and_regions_have_the_label_and_the_score_of_their_class(
    cli: Cli, environment: Path, task: Task, *, to_polygons: bool
) -> None:
    """By default the boxes of a detector and the regions of a segmenter; evidence beside them."""
    cvat = FakeCVAT(FRAMES, dict.fromkeys(("cat", "dog", "evidence"), "any"))
    flags = ["--conv-mask-to-poly"] if to_polygons else []
    flags += ["--allow-unmatched-labels", "--conf-threshold", "0.5"]
    with fake_boxes.serving_boxes(task) as url, serving(cvat) as port:
        cli(port, "task", "auto-annotate", str(TASK), *flags, *function(url))
        alone = cvat.annotations["shapes"]
        told = function(url, shapes="box,region,points")
        cli(port, "task", "auto-annotate", str(TASK), *flags, *told)
    cat, dog, evidence = (cvat.label(name) for name in ("cat", "dog", "evidence"))
    assert {shape["frame"] for shape in alone} == set(range(len(FRAMES)))
    drawn = "polygon" if to_polygons else "mask"
    kind = "rectangle" if task == "detection" else drawn
    assert [(each["label_id"], each["type"], each["score"]) for each in alone[:2]] == [
        (cat, kind, 0.875),
        (dog, kind, 0.75),
    ]
    shapes = [each for each in cvat.annotations["shapes"] if each["frame"] == 0]
    assert shapes[-1]["label_id"] == evidence
    boxes = {each["label_id"]: each["points"] for each in shapes if each["type"] == "rectangle"}
    assert boxes[dog] == [60, 30, 84, 60]
    if task == "detection":
        assert boxes[cat] == [10.5, 20, 50.5, 50.25]
    of_dog = [each for each in shapes if each["type"] == drawn and each["label_id"] == dog]
    if to_polygons:
        assert of_dog[0]["points"] == [60, 30, 70, 30, 70, 50, 84, 50, 84, 60, 60, 60]
    else:
        np.testing.assert_array_equal(masks(environment, of_dog)[0], fake_boxes.mask())


# ---- a detector and a segmenter of flowers


@pytest.mark.parametrize("model", ["flower-boxes", "flower-regions"])
def test_a_task_gets_the_flowers_that_are_found_in_each_frame(
    flowers_url: str, cli: Cli, environment: Path, scenes: list[Flowers], model: str
) -> None:
    """Rectangles of a detector, masks of a segmenter, and none of the background."""
    cvat = FakeCVAT({scene.name: scene.file for scene in scenes}, dict.fromkeys(LABELS[1:], "any"))
    told = ["--allow-unmatched-labels", *function(flowers_url, model=model)]
    with serving(cvat) as port:
        cli(port, "task", "auto-annotate", str(TASK), *told)
    with Client(flowers_url, trust_env=False) as client:
        answered = client.predict([scene.file for scene in scenes], model=model)
    expected = [
        (frame, each)
        for frame, result in enumerate(answered)
        for each in result.predictions
        if each.class_id
    ]
    shapes = cvat.annotations["shapes"]
    kind = "rectangle" if model == "flower-boxes" else "mask"
    assert [(each["frame"], each["label_id"], each["type"]) for each in shapes] == [
        (frame, cvat.label(each.label), kind) for frame, each in expected
    ]
    assert [each["score"] for each in shapes] == [
        pytest.approx(each.score, abs=1e-5) for _, each in expected
    ]
    if kind == "rectangle":
        for shape, (_, each) in zip(shapes, expected, strict=True):
            x, y, w, h = each.box
            assert shape["points"] == pytest.approx([x, y, x + w, y + h])
        return
    found = masks(environment, shapes, (SIDE, SIDE))
    for mask, (_, each) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mask, decode_mask(each.mask))
