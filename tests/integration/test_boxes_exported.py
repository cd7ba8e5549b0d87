"""COCO exports of boxes and regions, as pycocotools scores them against known flowers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flowers
import numpy as np
import pictures
import pytest
import torch
from flowers import LABELS, SIDE, Flowers, flower_networks
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from running import Server
from torch import Tensor
from typer.testing import CliRunner

from service.cli.main import app

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    ),
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CATEGORIES = [{"id": index, "name": label} for index, label in enumerate(LABELS) if index]


@pytest.fixture(scope="module")
def scenes(shared_data: Path) -> list[Flowers]:
    return flowers.drawn(shared_data, 4)


@pytest.fixture(scope="module")
def server(shared_data: Path) -> Iterator[Server]:
    with flowers.serving() as server:
        yield server


@pytest.fixture
def folder(scenes: list[Flowers], tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for scene in scenes:
        (tmp_path / "photos" / scene.name).write_bytes(scene.file)
    return tmp_path / "photos"


def exported(server: Server, folder: Path, model: str, *options: str) -> Any:
    """What `camserve export coco` writes."""
    out = folder.parent / "coco.json"
    command = ["export", "coco", str(folder), "--out", str(out), "--url", server.url]
    environment = {"NO_PROXY": "127.0.0.1"}
    ran = CliRunner().invoke(app, [*command, "--served", model, *options], env=environment)
    assert ran.exit_code == 0, ran.output
    return json.loads(out.read_text())


def tensor(scene: Flowers) -> Tensor:
    """Its pixels (3, SIDE, SIDE), 0..1."""
    pixels = np.array(pictures.opened(scene.file).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def scored(truth: Any, annotations: list[Any], kind: str) -> list[float]:
    """COCOeval's twelve figures; its lists are copied, because pycocotools writes into them."""
    read = COCO()
    read.dataset = copy.deepcopy(truth)
    read.createIndex()
    evaluation = COCOeval(read, read.loadRes(copy.deepcopy(annotations)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(number) for number in evaluation.stats]


def truth_of(scenes: list[Flowers], annotations: list[Any]) -> Any:
    images = [
        {"id": number, "file_name": scene.name, "width": SIDE, "height": SIDE}
        for number, scene in enumerate(scenes, start=1)
    ]
    numbered = [each | {"id": place} for place, each in enumerate(annotations, start=1)]
    return {"info": {}, "images": images, "categories": CATEGORIES, "annotations": numbered}


def true_boxes(scenes: list[Flowers]) -> list[Any]:
    return [
        {
            "image_id": number,
            "category_id": LABELS.index(label),
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for number, scene in enumerate(scenes, start=1)
        for box, label in zip(scene.boxes, scene.labels, strict=True)
    ]


def test_cocoeval_gives_exported_boxes_the_precision_of_plain_torchvision(
    server: Server, folder: Path, scenes: list[Flowers], capsys
) -> None:
    """The same twelve figures as the detector alone, and most flowers are found."""
    data = exported(server, folder, "flower-boxes", "--explain-top", "2")
    assert [(each["id"], each["name"]) for each in data["categories"]] == [
        (each["id"], each["name"]) for each in CATEGORIES
    ]
    assert [each["file_name"] for each in data["images"]] == [scene.name for scene in scenes]
    with torch.no_grad():
        answers = flower_networks.faster_rcnn()([tensor(scene) for scene in scenes])
    alone = [
        {
            "image_id": number,
            "category_id": int(label),
            "bbox": [x, y, right - x, below - y],
            "score": float(score),
        }
        for number, answer in enumerate(answers, start=1)
        for (x, y, right, below), label, score in zip(
            answer["boxes"].tolist(), answer["labels"], answer["scores"], strict=True
        )
        if score >= 0.5
    ]
    assert len(data["annotations"]) == len(alone) > len(scenes)
    truth = truth_of(scenes, true_boxes(scenes))
    stats = scored(truth, data["annotations"], "bbox")
    assert stats == pytest.approx(scored(truth, alone, "bbox"), abs=1e-6)
    assert stats[1] > 0.5, "average precision at an IoU of .5"


def test_the_evidence_of_an_exported_box_is_a_mask_that_pycocotools_decodes(
    server: Server, folder: Path, scenes: list[Flowers]
) -> None:
    """Of the best box of each image alone; most of it lies in that box."""
    data = exported(server, folder, "flower-boxes")
    explained = [each for each in data["annotations"] if "evidence" in each]
    assert [each["image_id"] for each in explained] == [*range(1, len(scenes) + 1)]
    shares = []
    for each in explained:
        mask = run_lengths.decode(each["evidence"])
        assert mask.shape == (SIDE, SIDE)
        x, y, w, h = (round(number) for number in each["bbox"])
        shares.append(mask[y : y + h, x : x + w].sum() / mask.sum())
        column, row, visible = each["keypoints"]
        assert visible == 2
        assert mask[int(row), int(column)] == 1
    assert np.mean(shares) > 0.75


def test_exported_regions_overlap_with_the_truth_as_the_segmenter_alone_does(
    server: Server, folder: Path, scenes: list[Flowers]
) -> None:
    data = exported(server, folder, "flower-regions", "--top-k", str(len(LABELS)))
    net = flower_networks.lraspp()
    overlaps = []
    for number, scene in enumerate(scenes, start=1):
        mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
        with torch.no_grad():
            alone = net(((tensor(scene) - mean) / std)[None])["out"][0].argmax(dim=0).numpy()
        found = {
            each["category_id"]: each["segmentation"]
            for each in data["annotations"]
            if each["image_id"] == number
        }
        assert found.keys() == set(np.unique(alone).tolist()) - {0}
        for category, segmentation in found.items():
            there = scene.classes == category
            expected = (there & (alone == category)).sum() / (there | (alone == category)).sum()
            (((iou,),),) = (run_lengths.iou([segmentation], [coded(there)], [0]),)
            assert iou == pytest.approx(expected, abs=1e-3)
            overlaps += [iou] if there.any() else []
    assert np.mean(overlaps) > 0.4


def coded(mask: Any) -> Any:
    return run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
