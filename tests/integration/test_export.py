"""`camserve export`: COCO and Labelbox files, explained here or by a service, in source pixels."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from disks import playing
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from service.cli.main import app

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    ),
]

ROOT = Path(__file__).parent.parent.parent
HERE = ("--device", "cpu", "--workers", "1", "--model")
TARGET = ("--target", "1", "--layer", "maps")
SQUARE = (70, 30, 40, 30)
"""x, y, w, h of what is green in a black picture of 160 by 120, inside the centre crop."""


def export(*arguments: object, code: int = 0) -> str:
    """Run the command; what it said."""
    environment = {"NO_PROXY": "127.0.0.1", "COLUMNS": "200"}
    ran = CliRunner().invoke(app, ["export", *map(str, arguments)], env=environment)
    assert ran.exit_code == code, ran.output
    assert "Traceback" not in ran.output
    return " ".join(ran.output.split())


def green_square() -> pictures.Pixels:
    pixels = np.zeros((120, 160, 3), dtype=np.uint8)
    x, y, w, h = SQUARE
    pixels[y : y + h, x : x + w] = (0, 255, 0)
    return pixels


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The green square upright, and stored on its side with the EXIF orientation that rights it."""
    folder = tmp_path / "photos"
    (folder / "phone").mkdir(parents=True)
    (folder / "upright.png").write_bytes(pictures.file(green_square()))
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    on_its_side = np.rot90(green_square())
    turned = pictures.file(on_its_side, "JPEG", quality=95, subsampling=0, exif=exif)
    (folder / "phone" / "turned.jpg").write_bytes(turned)
    return folder


def test_a_square_that_is_the_evidence_is_where_it_is_in_the_upright_picture(
    photos: Path, tmp_path: Path, capsys
) -> None:
    """The net of `tiny.PaperNet` sees class 1 where a picture is green: its map is that square."""
    out = tmp_path / "coco.json"
    export("coco", photos, "--out", out, *HERE, "tiny:paper", *TARGET)
    read = COCO(out)
    assert [image["file_name"] for image in read.loadImgs(read.getImgIds())] == [
        "phone/turned.jpg",
        "upright.png",
    ]
    for image in read.loadImgs(read.getImgIds()):
        assert (image["width"], image["height"]) == (160, 120)
        (annotation,) = read.loadAnns(read.getAnnIds(imgIds=[image["id"]]))
        assert annotation["category_id"] == 2
        np.testing.assert_allclose(annotation["bbox"], SQUARE, atol=2)
        x, y, w, h = SQUARE
        inside = np.zeros((120, 160), dtype=bool)
        inside[y : y + h, x : x + w] = True
        found = read.annToMask(annotation).astype(bool)
        assert (found & inside).sum() / (found | inside).sum() > 0.9
        column, row, visible = annotation["keypoints"]
        assert inside[int(row), int(column)]
        assert visible == 2


def test_a_service_that_is_asked_gives_the_same_file(
    photos: Path, tmp_path: Path, run_server
) -> None:
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    options = ("--target", "class 3", "--threshold", "0.3")
    export("coco", photos, "--out", here, *HERE, "tiny:small", *options)
    with run_server(models=("tiny:other", "small=tiny:small")) as server:
        remote = ("--url", server.url, "--served", "small")
        export("coco", photos, "--out", there, *remote, *options)
    assert _rounded(here) == _rounded(there)


def test_annotations_of_tested_maps_have_the_verdict(
    photos: Path, tmp_path: Path, run_server
) -> None:
    here, there, plain = (tmp_path / f"{name}.json" for name in ("here", "there", "plain"))
    export("coco", photos, "--out", here, *HERE, "tiny:paper", *TARGET, "--verify", "true")
    with run_server(models=("tiny:paper",)) as server:
        export("coco", photos, "--out", there, "--url", server.url, *TARGET, "--verify", "true")
    export("coco", photos, "--out", plain, *HERE, "tiny:paper", *TARGET)
    for ours, remote in zip(_annotations(here), _annotations(there), strict=True):
        assert ours["verdict"] == remote["verdict"] == "supported", "the square is the evidence"
        assert ours["agreement"] == pytest.approx(remote["agreement"], abs=1e-3)
    assert not any("verdict" in each for each in _annotations(plain))


def _annotations(file: Path) -> Any:
    return json.loads(file.read_text())["annotations"]


def _rounded(file: Path) -> Any:
    data = json.loads(file.read_text())
    for annotation in data["annotations"]:
        annotation["score"] = round(annotation["score"], 5)
    return data


def test_labelbox_rows_name_the_features_of_the_ontology(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.ndjson"
    features = ("--feature", "classification=flower", "--feature", "bbox=where")
    export("labelbox", photos, "--out", out, *HERE, "tiny:paper", *TARGET, *features)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["dataRow"]["globalKey"], row["name"]) for row in rows] == [
        (key, name) for key in ("phone/turned.jpg", "upright.png") for name in ("flower", "where")
    ]
    for row in rows[1::2]:
        box = row["bbox"]
        found = [box[side] for side in ("left", "top", "width", "height")]
        np.testing.assert_allclose(found, SQUARE, atol=2)


def test_one_bad_file_costs_no_other_and_is_told(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "coco.json"
    said = export("coco", photos, "--out", out, *HERE, "tiny:small", code=1)
    assert "failed: broken.png: " in said
    assert "2 explained, 1 failed" in said
    assert len(json.loads(out.read_text())["images"]) == 2


def test_what_is_wrong_for_all_is_one_sentence_and_writes_nothing(
    photos: Path, tmp_path: Path, run_server
) -> None:
    out = tmp_path / "out"
    small = (*HERE, "tiny:small")
    for sentence, arguments in (
        ("has no layer 'absent'", ("coco", photos, *small, "--layer", "absent")),
        ("there is no file", ("coco", tmp_path / "nowhere", *small)),
        ("write KIND=NAME", ("labelbox", photos, *small, "--feature", "circle=evidence")),
        ("--feature is only for labelbox", ("coco", photos, *small, "--feature", "mask=evidence")),
        ("cannot be written", ("coco", photos, *small, "--out", tmp_path / "no" / "folder.json")),
    ):
        assert sentence in export(*arguments[:2], "--out", out, *arguments[2:], code=2)
    with run_server() as server:
        remote = ("--out", out, "--url", server.url)
        said = export("coco", photos, *remote, "--served", "absent", code=2)
        assert "No model is called 'absent'" in said
        said = export("labelbox", photos, *remote, "--layer", "absent", code=2)
        assert "has no layer 'absent'" in said
    assert not out.exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["photos"]


def test_an_export_is_on_the_disk_when_it_has_its_name(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "coco.json"
    with playing(tmp_path, monkeypatch) as disk:
        disk.when_named.append(lambda path: synced.append(path.stat().st_ino in disk.synced))
        synced: list[bool] = []
        export("coco", photos, "--out", out, *HERE, "tiny:small")
        assert disk.is_kept(out)
    assert synced == [True]


def test_a_name_that_is_not_utf_8_is_exported_as_text(photos: Path, tmp_path: Path) -> None:
    (photos / "upright.png").rename(photos / os.fsdecode(b"up\xff.png"))
    out = tmp_path / "coco.json"
    export("coco", photos, "--out", out, *HERE, "tiny:small")
    names = {each["file_name"] for each in json.loads(out.read_text())["images"]}
    assert names == {"phone/turned.jpg", r"up\xff.png"}


def test_the_commands_of_the_how_to_do_what_it_says(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "how-to" / "labelbox-and-coco.md"
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    for line in lines:
        camserve, command, *arguments = shlex.split(line)
        assert (camserve, command) == ("camserve", "export")
        export(*arguments, *HERE, "tiny:small")
    assert {"coco.json", "labels.ndjson", "labelbox.ndjson"} <= {
        each.name for each in tmp_path.iterdir()
    }
