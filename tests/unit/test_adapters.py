"""What the adapters make of an answer, without the tools: `tests/protocols` has the real ones."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from api_schemas import answers
from api_schemas.adapters import coco, cvat, fiftyone, labelbox
from api_schemas.client.errors import ImageRefused
from api_schemas.client.results import Explanation, Prediction, Regions, Result
from service.cli.export.export_command import KINDS
from service.images.run_lengths import rle_encode

ROOT = Path(__file__).parent.parent.parent
HEIGHT, WIDTH = 40, 60


def mask() -> NDArray[np.bool_]:
    """An L, and a square inside the corner of its box, two pixels away from it."""
    made = np.zeros((HEIGHT, WIDTH), dtype=bool)
    made[10:30, 5:8] = True
    made[27:30, 5:30] = True
    made[12:20, 20:25] = True
    return made


def regions(of: NDArray[np.bool_]) -> Regions:
    rle = answers.MaskRLE(size=of.shape, counts=rle_encode(of).counts)
    if not of.any():
        return Regions(0.5, None, [], [], rle)
    boxes = [(5.0, 10.0, 25.0, 20.0), (20.0, 12.0, 5.0, 8.0)]
    square = [(20.0, 12.0), (25.0, 12.0), (25.0, 20.0), (20.0, 20.0)]
    corner = [(5.0, 10.0), (8.0, 10.0), (8.0, 27.0), (30.0, 27.0), (30.0, 30.0), (5.0, 30.0)]
    return Regions(0.5, (22.5, 16.5), boxes, [corner, square], rle)


def explanation(of: NDArray[np.bool_], class_id: int = 2) -> Explanation:
    return Explanation(
        class_id=class_id,
        label=f"class {class_id}",
        score=0.75,
        contrast=None,
        method="gradcam",
        layer="features",
        range=(0.0, 1.0),
        flags=[],
        cost=answers.Cost(forwards=1),
        grid=None,
        heatmap=None,
        overlay=None,
        regions=regions(of),
    )


def result(*explanations: Explanation) -> Result:
    return Result(
        image=answers.ImageInfo(width=WIDTH, height=HEIGHT, format="PNG", sha256="0" * 64),
        predictions=[answers.Prediction(class_id=2, label="class 2", score=0.75, logit=3.0)],
        explanations=list(explanations),
    )


INFO = answers.ImageInfo(width=WIDTH, height=HEIGHT, format="PNG", sha256="0" * 64)
LABELS = ["class 0", "class 1", "class 2"]
NOTHING = np.zeros((HEIGHT, WIDTH), dtype=bool)
REFUSED = Result(error=ImageRefused("no picture"))


# COCO

reads_with_pycocotools = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def loaded(data: object, tmp_path: Path) -> COCO:
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(data))
    return COCO(file)


@reads_with_pycocotools
def test_pycocotools_reads_the_same_mask_box_and_area(tmp_path: Path, capsys) -> None:
    data = coco.dataset([("a.png", result(explanation(mask())))], LABELS, "said")
    read = loaded(data, tmp_path)
    (annotation,) = read.loadAnns(read.getAnnIds(imgIds=[1]))
    np.testing.assert_array_equal(read.annToMask(annotation), mask())
    run_lengths = read.annToRLE(annotation)
    assert annotation["bbox"] == reference.toBbox(run_lengths).tolist()
    assert annotation["area"] == reference.area(run_lengths)
    assert annotation["keypoints"] == [22.5, 16.5, 2]
    assert read.loadCats(annotation["category_id"])[0]["name"] == "class 2"
    assert read.loadImgs(1) == [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]


def test_an_annotation_of_a_tested_map_has_the_verdict_and_its_agreement() -> None:
    tested = Explanation(**{**vars_of(explanation(mask())), "verify": verification()})
    data = coco.dataset([("a.png", result(tested)), ("b.png", result(explanation(mask())))], LABELS)
    first, second = data["annotations"]
    assert (first["verdict"], first["agreement"]) == ("supported", 0.71)
    assert set(first) - set(second) == {"verdict", "agreement"}


def verification() -> answers.Verification:
    return answers.Verification(
        verdict="supported",
        agreement=0.71,
        agreement_by_fill=answers.Fills(mean=0.7, blur=0.72),
        elsewhere=answers.Elsewhere(median=0.04, best=0.55),
        p_place=0.01,
        p_centred=0.02,
        baselines=answers.Baselines(centre=0.31, contrast=0.22),
        forwards=40,
        design="pb40/0",
    )


@reads_with_pycocotools
def test_its_annotations_are_results_for_pycocotools(tmp_path: Path, capsys) -> None:
    data = coco.dataset([("a.png", result(explanation(mask())))], LABELS)
    read = loaded({**data, "annotations": []}, tmp_path).loadRes(data["annotations"])
    (annotation,) = read.loadAnns(read.getAnnIds())
    assert annotation["score"] == 0.75
    np.testing.assert_array_equal(read.annToMask(annotation), mask())


def test_coco_keeps_ids_apart_and_lists_a_picture_without_evidence() -> None:
    several = [
        ("broken.png", REFUSED),
        ("two.png", result(explanation(mask(), 0), explanation(mask(), 1))),
        ("none.png", result(explanation(NOTHING))),
        ("one.png", result(explanation(mask()))),
    ]
    data = coco.dataset(several, LABELS)
    assert [(each["id"], each["file_name"]) for each in data["images"]] == [
        (2, "two.png"),
        (3, "none.png"),
        (4, "one.png"),
    ]
    assert [
        (each["id"], each["image_id"], each["category_id"]) for each in data["annotations"]
    ] == [(1, 2, 1), (2, 2, 2), (3, 4, 3)]
    assert [each["id"] for each in data["categories"]] == [1, 2, 3]


def test_an_answer_without_regions_is_refused_with_what_to_ask_for() -> None:
    bare = Explanation(**{**vars_of(explanation(mask())), "regions": None})
    with pytest.raises(ValueError, match="include="):
        coco.dataset([("a.png", result(bare))], LABELS)
    with pytest.raises(ValueError, match="include="):
        list(labelbox.rows([("a.png", result(bare))]))


def vars_of(made: Explanation) -> dict[str, object]:
    return {name: getattr(made, name) for name in Explanation.__slots__}


def run_lengths(of: NDArray[np.bool_]) -> answers.MaskRLE:
    return answers.MaskRLE(size=of.shape, counts=rle_encode(of).counts)


def square(left: int, top: int, side: int) -> NDArray[np.bool_]:
    made = np.zeros((HEIGHT, WIDTH), dtype=bool)
    made[top : top + side, left : left + side] = True
    return made


def detected(*explanations: Explanation) -> Result:
    """Two boxes of one class; the second has a mask."""
    first = Prediction(2, "class 2", 0.9, 2.2, detection=0, box=(4.5, 6.0, 20.0, 12.5))
    region = run_lengths(square(30, 10, 8))
    second = Prediction(
        2, "class 2", 0.6, 0.4, detection=1, box=(29.0, 9.0, 10.0, 10.0), mask=region
    )
    return Result(image=INFO, predictions=[first, second], explanations=list(explanations))


def segmented(*explanations: Explanation) -> Result:
    """The regions of two classes, and one without a pixel."""
    masks = {1: square(0, 0, 20), 2: square(30, 20, 10), 0: NOTHING}
    predictions = [
        Prediction(
            each, f"class {each}", 0.8, 2.0, mask=run_lengths(of), area=float(np.asarray(of).sum())
        )
        for each, of in masks.items()
    ]
    return Result(image=INFO, predictions=predictions, explanations=list(explanations))


def of_second() -> Explanation:
    fields = vars_of(explanation(mask())) | {"detection": 1, "box": (29.0, 9.0, 10.0, 10.0)}
    return Explanation(**fields)


@reads_with_pycocotools
def test_each_detection_is_an_annotation_with_its_box_and_the_evidence_beside_it(
    tmp_path: Path, capsys
) -> None:
    data = coco.dataset([("a.png", detected(of_second()))], LABELS)
    read = loaded(data, tmp_path)
    first, second = read.loadAnns(read.getAnnIds(imgIds=[1]))
    assert (first["bbox"], first["area"], first["score"]) == ([4.5, 6.0, 20.0, 12.5], 250.0, 0.9)
    assert (first["keypoints"], first["num_keypoints"]) == ([0, 0, 0], 0)
    assert "evidence" not in first
    assert read.annToMask(first)[6:18, 5:24].all(), "the box, where there is no mask"
    np.testing.assert_array_equal(read.annToMask(second), square(30, 10, 8))
    assert (second["bbox"], second["area"]) == ([29.0, 9.0, 10.0, 10.0], 64)
    assert second["keypoints"] == [22.5, 16.5, 2]
    np.testing.assert_array_equal(reference.decode(second["evidence"]), mask())


@reads_with_pycocotools
def test_detections_are_results_that_cocoeval_scores(tmp_path: Path, capsys) -> None:
    """The same boxes as truth: every precision is 1."""
    data = coco.dataset([("a.png", detected())], LABELS)
    truth = loaded(data, tmp_path)
    evaluation = COCOeval(truth, truth.loadRes(data["annotations"]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == 1


@reads_with_pycocotools
def test_each_class_of_a_segmenter_is_an_annotation_with_its_region() -> None:
    data = coco.dataset([("a.png", segmented())], LABELS)
    first, second = data["annotations"]
    assert (first["category_id"], second["category_id"]) == (2, 3)
    assert (first["bbox"], first["area"]) == ([0, 0, 20, 20], 400)
    np.testing.assert_array_equal(reference.decode(second["segmentation"]), square(30, 20, 10))


def test_the_region_of_the_background_is_no_annotation() -> None:
    result = segmented()
    rest = Prediction(0, "background", 0.9, 3.0, mask=run_lengths(square(0, 20, 20)), area=400.0)
    result = Result(image=INFO, predictions=[*result.predictions[:2], rest])
    annotations = coco.dataset([("a.png", result)], ["background", "class 1", "class 2"])
    assert [each["category_id"] for each in annotations["annotations"]] == [1, 2]
    named = coco.dataset([("a.png", result)], LABELS)["annotations"]
    assert [each["category_id"] for each in named] == [2, 3, 1], "class 0 is one of the others"


def test_with_a_background_a_category_has_the_number_of_its_class() -> None:
    data = coco.dataset([("a.png", detected())], ["__background__", "person", "class 2"])
    assert [(each["id"], each["name"]) for each in data["categories"]] == [
        (1, "person"),
        (2, "class 2"),
    ]
    assert {each["category_id"] for each in data["annotations"]} == {2}


# Labelbox


def test_an_image_without_a_detection_has_no_class() -> None:
    nothing = Result(image=INFO, predictions=[], explanations=[])
    assert coco.dataset([("a.png", nothing)], LABELS)["annotations"] == []
    assert list(labelbox.rows([("a.png", nothing)])) == []


def test_labelbox_rows_are_the_class_and_the_evidence_in_pixels() -> None:
    names = {kind: f"a {kind}" for kind in labelbox.KINDS}
    made = list(labelbox.rows([("a.png", result(explanation(mask())))], names))
    assert {row["dataRow"]["globalKey"] for row in made} == {"a.png"}
    by_name: dict[str, list[labelbox.Row]] = {}
    for row in made:
        by_name.setdefault(row["name"], []).append(row)
    (chosen,) = by_name["a classification"]
    assert chosen["answer"] == {"name": "class 2", "confidence": 0.75}
    assert by_name["a bbox"][1]["bbox"] == {"left": 20.0, "top": 12.0, "width": 5.0, "height": 8.0}
    assert by_name["a polygon"][1]["polygon"][2] == {"x": 25.0, "y": 20.0}
    assert by_name["a point"][0]["point"] == {"x": 22.5, "y": 16.5}
    (drawn,) = by_name["a mask"]
    picture = pictures.opened(base64.b64decode(drawn["mask"]["png"]))
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), mask().astype(np.uint8))
    assert {row["confidence"] for row in made if row is not chosen} == {0.75}


def test_labelbox_rows_have_the_same_uuid_again_and_no_two_the_same() -> None:
    several = [(name, result(explanation(mask()))) for name in ("a.png", "b.png")]
    first, again = ([row["uuid"] for row in labelbox.rows(several)] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(first) == 4


def test_a_picture_without_evidence_has_its_class_alone() -> None:
    several = [("broken.png", REFUSED), ("none.png", result(explanation(NOTHING)))]
    names = {kind: kind for kind in labelbox.KINDS}
    (row,) = labelbox.rows(several, names)
    assert row["name"] == "classification"


def test_labelbox_refuses_a_kind_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="circle"):
        list(labelbox.rows([], {"circle": "evidence"}))
    assert KINDS == labelbox.KINDS


# CVAT


def test_labels_are_declared_with_the_type_of_what_they_hold() -> None:
    assert cvat.spec_labels(LABELS, ["tag", "mask"], "evidence") == {
        "class 0": (0, "tag"),
        "class 1": (1, "tag"),
        "class 2": (2, "tag"),
        "evidence": (3, "mask"),
    }
    assert cvat.spec_labels(LABELS[:1], ["tag", "mask"], "") == {"class 0": (0, "any")}
    assert cvat.spec_labels(LABELS[:1], ["polygon"], "") == {"class 0": (0, "polygon")}
    assert cvat.spec_labels(LABELS, ["polygon", "points"], "why") == {"why": (3, "any")}
    assert cvat.spec_labels(LABELS[:1], ["tag"], "why") == {"class 0": (0, "tag")}
    with pytest.raises(ValueError, match="'class 1', which is a class"):
        cvat.spec_labels(LABELS, ["tag", "mask"], "class 1")


def test_labels_that_two_classes_share_are_declared_once() -> None:
    assert cvat.spec_labels(["crane", "ant", "crane"], ["tag"], "") == {
        "crane": (0, "tag"),
        "ant": (1, "tag"),
    }


def test_shapes_are_numbers_in_turn_in_pixels() -> None:
    found = regions(mask())
    assert cvat.outlines(found, "rectangle")[1] == [20.0, 12.0, 25.0, 20.0]
    assert cvat.outlines(found, "polygon")[1] == [20.0, 12.0, 25.0, 12.0, 25.0, 20.0, 20.0, 20.0]
    assert cvat.outlines(found, "points") == [[22.5, 16.5]]
    for kind in ("rectangle", "polygon", "points"):
        assert cvat.outlines(regions(NOTHING), kind) == []


# FiftyOne


def test_each_box_has_the_mask_of_its_own_region_alone() -> None:
    (corner, of_corner), (square, of_square) = fiftyone.parts(regions(mask()))
    assert (corner, square) == ((5.0, 10.0, 25.0, 20.0), (20.0, 12.0, 5.0, 8.0))
    assert of_square.all()
    expected = mask()[10:30, 5:30].copy()
    expected[2:10, 15:20] = False
    np.testing.assert_array_equal(of_corner, expected)


def test_a_heatmap_is_shrunk_to_its_side_and_never_grown() -> None:
    strengths = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    indexed = Image.fromarray(strengths).convert("P")
    indexed.putdata(strengths.ravel())
    indexed.putpalette(bytes(range(255, -1, -1)) * 3)
    np.testing.assert_array_equal(fiftyone.scaled_heatmap(indexed, 512), strengths)
    small = fiftyone.scaled_heatmap(indexed, 30)
    assert small.shape == (20, 30)
    np.testing.assert_allclose(small.mean(), strengths.mean(), atol=1)


# All of them


ALONE = """
import sys
import api_schemas.adapters.coco, api_schemas.adapters.cvat, api_schemas.adapters.labelbox
import api_schemas.adapters.fiftyone
print(sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.timeout(60)
def test_the_adapters_import_no_torch_and_no_service() -> None:
    command = [sys.executable, "-c", ALONE]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    for heavy in ("service", "torch", "torchvision", "fastapi", "starlette"):
        assert f"'{heavy}'" not in ran.stdout
