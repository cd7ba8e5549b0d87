"""`camserve audit`: results, exit codes, broken input, and a run that resumes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import audited
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from service.cli.audit import auditor
from service.cli.main import app

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty images of each class, in a folder for each."""
    audited.write_images(tmp_path / "images", 30)
    return tmp_path / "images"


def run(folder: Path, *more: str, builder: str = "corner") -> Any:
    """The command, in this process; its results are in `out` beside the images."""
    config = audited.configured(folder.parent, builder)
    flags = ("--config", str(config), "--out", str(folder.parent / "out"), "--allow-random-weights")
    return CliRunner().invoke(app, ["audit", str(folder), *flags, "--no-compile", *more])


def found(folder: Path) -> dict[str, Any]:
    """The JSON of the run."""
    values: dict[str, Any] = json.loads((folder.parent / "out" / "audit.json").read_text())
    return values


def test_an_audit_writes_json_tables_and_a_report(folder: Path) -> None:
    (folder / "green" / "broken.png").write_bytes(b"no image")
    done = run(folder, "--labels", "by-folder")
    assert done.exit_code == 0, done.output
    one, *others = found(folder)["classes"]
    assert (one["label"], one["verdict"], one["labelled"]) == ("corner", "suspected_cue", 30)
    assert "suspected_cue" not in {each["verdict"] for each in others}
    assert [each["path"] for each in found(folder)["failed"]] == ["green/broken.png"]
    rows = pq.read_table(folder.parent / "out" / "images.parquet").to_pylist()
    assert len(rows) == 121
    assert [row["error_code"] for row in rows if row["error_code"]] == ["unsupported_image"]
    assert sum(row["label"] == row["given_label"] is not None for row in rows) == 120
    trials = pq.read_table(folder.parent / "out" / "trials.parquet").to_pylist()
    confirmed = [row for row in trials if row["stage"] == "confirm" and row["class_id"] == 0]
    assert {"top left corner"} <= {row["place"] for row in confirmed}
    page = (folder.parent / "out" / "audit.html").read_text()
    assert "confirmed on unseen pairs" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "green/broken.png" in page


def test_a_report_shows_a_paste_that_failed(folder: Path) -> None:
    run(folder)
    parts = [each for each in found(folder)["classes"][1]["findings"] if each["kind"] == "part"]
    assert parts[0]["flips"]["k"] < parts[0]["flips"]["n"]
    page = (folder.parent / "out" / "audit.html").read_text()
    assert "kept its class: the edit failed here" in page


def test_the_exit_code_is_1_if_a_class_has_a_verdict_of_fail_on(folder: Path) -> None:
    assert run(folder, "--fail-on", "suspected_cue").exit_code == 1
    assert run(folder, "--fail-on", "not_tested").exit_code == 0


def test_an_interrupted_run_audits_only_the_classes_that_are_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder)
    first = found(folder)
    (folder.parent / "out" / "class-00002.json").unlink()
    (folder.parent / "out" / "audit.json").unlink()
    audited_ids = list[int]()
    real: Callable[..., Any] = auditor.audit_class

    def counted(*arguments: Any) -> Any:
        audited_ids.append(arguments[3])
        return real(*arguments)

    monkeypatch.setattr(auditor, "audit_class", counted)
    assert run(folder).exit_code == 0
    assert audited_ids == [2]
    assert found(folder) == first


def test_results_of_another_seed_are_refused(folder: Path) -> None:
    run(folder)
    again = run(folder, "--seed", "1")
    assert again.exit_code == 2
    assert "seed was 0 and is 1" in " ".join(again.output.split())


def test_masks_tell_a_part_of_the_object_apart(folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    square = [[8, 8, 23, 8, 23, 23, 8, 23]]
    coco = {
        "images": [
            {"id": i, "file_name": name, "width": 32, "height": 32} for i, name in enumerate(names)
        ],
        "annotations": [{"image_id": i, "segmentation": square} for i in range(len(names))],
    }
    file = folder.parent / "masks.json"
    file.write_text(json.dumps(coco))
    assert run(folder, "--masks", str(file)).exit_code == 0
    verdicts = [one["verdict"] for one in found(folder)["classes"]]
    assert verdicts[0] == "suspected_cue"
    assert "part_of_object" in verdicts[1:]
    assert "look" not in verdicts


def test_few_images_are_not_tested(folder: Path) -> None:
    for file in sorted((folder / "red").iterdir())[5:]:
        file.unlink()
    run(folder)
    last = found(folder)["classes"][3]
    assert last["verdict"] == "not_tested"
    assert "5 images" in last["untested"]["everything"]


def test_a_model_without_a_target_layer_says_that_parts_are_not_tested(folder: Path) -> None:
    assert run(folder, builder="direct").exit_code == 0
    one = found(folder)["classes"][0]
    assert one["verdict"] == "suspected_cue"
    assert "parts" in one["untested"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--fail-on", "cue"), "there is no such verdict"),
        (("--labels", "nothing.csv"), "cannot be read"),
        (("--labels", "{0}/other.csv"), "names none of the images"),
        (("--labels", "{0}/columns.csv"), "no columns path and label"),
        (("--labels", "{0}/strange.json"), "is a class of the model"),
        (("--masks", "{0}/nothing.json"), "cannot be read"),
        (("--masks", "{0}/list.json"), "is no COCO file"),
        (("--masks", "{0}/others.json"), "has a mask for none of the images"),
        (("--masks", "{0}/size.json"), "has 64 × 64 pixels there"),
        (("--masks", "{0}/broken.json"), "is not valid JSON"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(
    folder: Path, flags: tuple[str, str], sentence: str
) -> None:
    at = folder.parent
    (at / "other.csv").write_text("path,label\nz.png,green\n")
    (at / "columns.csv").write_text("file,class\na.png,green\n")
    (at / "strange.json").write_text(json.dumps({"000.png": "zebra"}))
    (at / "list.json").write_text("[1, 2]")
    (at / "broken.json").write_text("{")
    for name, file, side in (("others", "z.png", 32), ("size", "000.png", 64)):
        image = {"id": 1, "file_name": file, "width": side, "height": side}
        annotation = {"image_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]}
        (at / f"{name}.json").write_text(
            json.dumps({"images": [image], "annotations": [annotation]})
        )
    done = run(folder, flags[0], flags[1].format(at))
    assert done.exit_code == 2
    assert sentence in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert run(tmp_path / "images").exit_code == 2
    assert run(tmp_path / "absent").exit_code == 2


def test_a_folder_of_broken_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    done = run(tmp_path / "images")
    assert done.exit_code == 2
    assert "no image could be read" in " ".join(done.output.split())


def test_the_models_of_these_tests_agree() -> None:
    images, labels = audited.images(5)
    batch = torch.stack(images) / 255
    nets: list[nn.Module] = [audited.SeesCorner(), audited.SeesCornerDirectly()]
    assert [net(batch).argmax(dim=1).tolist() for net in nets] == [labels, labels]
