"""Detectors and segmenters through `/predict`, `/explain` and the command line."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detectors
import numpy as np
import PIL.Image
import pytest
import torch
from starlette.testclient import TestClient
from torchvision.ops import box_iou
from typer.testing import CliRunner

from api_schemas.client.results import read_answer
from service.cli.compare.compare_run import _check_any
from service.cli.main import app
from service.errors import ConfigurationError
from service.evaluation.compare import summarise
from service.images.run_lengths import rle_encode
from service.inference import detection
from service.models.catalog import ModelSpec
from service.models.loading import load_model
from service.pipeline.trials import _is_part

pytestmark = pytest.mark.timeout(120)

PNG = {"content-type": "image/png"}


def png(width: int = 90, height: int = 70, seed: int = 1) -> bytes:
    pixels = detectors.image(seed, (height, width)).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def client(serve, tmp_path_factory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("models")
    labels = json.dumps(detectors.LABELS)
    tables = [
        f'[[model]]\nname = "{kind}"\nbuilder = "detectors:{kind}"\nlabels = {labels}\n'
        for kind in ("faster_rcnn", "segmenter", "own")
    ]
    (folder / "models.toml").write_text("\n".join(tables))
    with serve(models=(), config=str(folder / "models.toml")) as client:
        yield client


def explained(client: TestClient, data: bytes, **options: Any) -> Any:
    return client.post("/explain", params=options, content=data, headers=PNG)


def test_a_prediction_is_a_box_and_an_explanation_names_it(client: TestClient) -> None:
    response = explained(client, png(), min_score=0.3, explain_top=2, include="grid")
    assert response.status_code == 200, response.text
    (result,) = read_answer(response.content).results
    assert [each.detection for each in result.predictions] == [*range(len(result.predictions))]
    first = result.explanations[0]
    assert (first.detection, first.box) == (0, result.predictions[0].box)
    assert (first.method, first.of) == ("hirescam", "class")
    assert str(first.layer).startswith("backbone[")
    assert first.grid is not None
    assert result.seen == (0, 0, 90, 70)


def test_the_lanes_of_a_detector_are_listed_and_a_layer_inside_is_explained(serve) -> None:
    with serve(models=("detectors:faster_rcnn",), compile=True) as client:
        lanes = {each["name"]: each for each in client.get("/models/faster_rcnn").json()["lanes"]}
        inside = explained(client, png(), min_score=0.3, layer="backbone.stem")
    assert {name for name, lane in lanes.items() if lane["ready"]} == {"hooked", "compiled"}
    assert not lanes["compiled"].get("reason")
    assert inside.json()["results"][0]["explanations"][0]["layer"] == "backbone.stem"


def test_a_box_is_named_by_its_place(client: TestClient) -> None:
    predicted = client.post("/predict", params={"min_score": 0.3}, content=png(), headers=PNG)
    second = predicted.json()["results"][0]["predictions"][1]
    at = ",".join(map(str, second["box"]))
    (result,) = explained(client, png(), min_score=0.3, at=at).json()["results"]
    (explanation,) = result["explanations"]
    assert explanation["box"] == second["box"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"at": "1000,1000"}, "No detection is at the point"),
        ({"at": "0,0,1,1"}, "No detection overlaps"),
        ({"method": "eigencam"}, "not for models of the task detection"),
        ({"method": "guided_gradcam"}, "not for models of the task detection"),
        ({"fit": "squash"}, "`fit`"),
        ({"verify": "search"}, "`verify=search`"),
        ({"verify": "true", "contrast": "ring"}, "which `contrast` does not explain"),
        ({"verify": "true", "of": "x1"}, "which `of=x1` does not explain"),
        ({"mask": '{"boxes": [[0,0,5,5]]}'}, "`mask`"),
        ({"activations": "backbone"}, "`activations`"),
        ({"uncertainty": "true"}, "`uncertainty`"),
        ({"model": "segmenter", "uncertainty": "true"}, "`uncertainty`"),
        ({"of": "x1", "method": "gradcam"}, "`of=x1`"),
        ({"model": "own", "contrast": "ring"}, "`contrast`"),
        ({"model": "segmenter", "of": "x1"}, "`of`"),
        ({"model": "segmenter", "min_score": "0.5"}, "`min_score`"),
        ({"model": "segmenter", "at": "1000,1000"}, "covers nothing"),
    ],
)
def test_what_a_task_does_not_have_is_refused_by_name(
    client: TestClient, options: dict[str, str], word: str
) -> None:
    response = explained(client, png(), **options)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_option")
    assert word in response.json()["detail"]


def test_nothing_found_is_an_answer(client: TestClient) -> None:
    response = explained(client, png(), min_score=1)
    (result,) = response.json()["results"]
    assert (response.status_code, result["predictions"], result["explanations"]) == (200, [], [])
    image = client.post(
        "/explain",
        params={"min_score": 1},
        content=png(),
        headers={**PNG, "accept": "image/png"},
    )
    assert image.status_code == 422
    assert "min_score" in image.json()["detail"]


@pytest.mark.parametrize("size", [(1, 1), (160, 8), (8, 160)])
@pytest.mark.parametrize("model", ["faster_rcnn", "own"])
def test_extreme_images_have_answers(client: TestClient, size: tuple[int, int], model: str) -> None:
    include = ["heatmap", "overlay", "grid", "regions"]
    for shown in ("source", "model", "native"):
        response = explained(
            client,
            png(*size),
            model=model,
            min_score=0,
            explain_top=100,
            include=include,
            size=shown,
        )
        assert response.status_code == 200, response.text


def test_the_open_inference_protocol_refuses_segmenters(client: TestClient) -> None:
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    tensor = {
        "inputs": [
            {
                "name": "images",
                "shape": list(pixels.shape),
                "datatype": "UINT8",
                "data": pixels.flatten().tolist(),
            }
        ]
    }
    response = client.post("/v2/models/segmenter/infer", json=tensor)
    assert 400 <= response.status_code < 500, response.text
    assert "segments" in response.text


@pytest.mark.parametrize("model", ["faster_rcnn", "own", "segmenter"])
def test_a_box_and_a_region_have_a_verdict(client: TestClient, model: str) -> None:
    given = {} if model == "segmenter" else {"min_score": 0.3}
    (result,) = read_answer(
        explained(client, png(), model=model, verify="true", **given).content
    ).results
    (explanation,) = result.explanations
    assert explanation.verify is not None
    assert explanation.verify.verdict in {"supported", "inconclusive", "refuted"}
    assert explanation.verify.forwards == 40


def tried(client: TestClient, edits: Any, **options: Any) -> Any:
    body = {"images": [{"data": base64.b64encode(png()).decode()}], "edits": edits, **options}
    return client.post("/experiments", json=body)


HIDE = {"name": "a", "edit": "hide", "fill": "grey", "region": {"boxes": [[20, 10, 30, 25]]}}


def test_the_effect_of_an_edit_on_a_box_is_that_of_torchvision(client: TestClient) -> None:
    model = detectors.loaded("faster_rcnn")
    pixels = detectors.image(1)
    before = detectors.plain(model, pixels)
    changed = pixels.clone()
    changed[:, 10:35, 20:50] = 128
    after = detectors.plain(model, changed)
    x1, y1, x2, y2 = before["boxes"][1].tolist()
    response = tried(
        client, [HIDE], at=[x1, y1, x2 - x1, y2 - y1], min_score=0.3, controls=2, top_k=100
    )
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    (edit,) = result["edits"]
    (change,) = edit["changes"]
    overlaps = box_iou(before["boxes"][1:2], after["boxes"])[0]
    matches = (overlaps >= 0.5) & (after["labels"] == before["labels"][1])
    score = float(torch.where(matches, after["scores"], 0).max())
    assert change["class_id"] == int(before["labels"][1])
    assert change["detection"] == 1
    assert change["box"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
    assert change["score"] == pytest.approx(score, abs=1e-5)
    assert change["score_change"] == pytest.approx(score - float(before["scores"][1]), abs=1e-5)
    assert change["stays"] == (score >= 0.3)
    shown = [each for each in after["scores"].tolist() if each >= 0.3]
    assert [each["score"] for each in edit["predictions"]] == pytest.approx(shown, abs=1e-5)
    assert len(change["control"]["score_changes"]) == change["control"]["n"] == 2
    assert result["forwards"] == 5


def test_the_controls_of_a_part_of_a_box_lie_in_the_box() -> None:
    """A third of the box fits in; a region beside it, or most of the box, is tried anywhere."""
    mask = np.zeros((70, 90), np.bool_)
    mask[20:30, 30:40] = True
    assert _is_part(mask, (25, 15, 30, 20))
    assert not _is_part(mask, (28, 18, 13, 13))
    assert not _is_part(mask, (32, 15, 30, 20))


def test_the_effect_of_an_edit_on_a_region_is_listed(client: TestClient) -> None:
    response = tried(client, [HIDE], model="segmenter", controls=1)
    assert response.status_code == 200, response.text
    (edit,) = response.json()["results"][0]["edits"]
    (change,) = edit["changes"]
    assert 0 <= change["score"] <= 1
    assert change["stays"] == (change["overlap"] >= 0.5)
    assert change["control"]["n"] == 1
    assert "box" not in change


def test_an_image_without_detections_has_edits_without_changes(client: TestClient) -> None:
    response = tried(client, [HIDE], min_score=1)
    assert response.status_code == 200, response.text
    (edit,) = response.json()["results"][0]["edits"]
    assert (edit["changes"], edit["control"]) == ([], None)


def test_an_edit_without_a_place_has_no_control(client: TestClient) -> None:
    response = tried(client, [{"name": "a", "edit": "recolour", "to": "rgb"}], min_score=0.3)
    (edit,) = response.json()["results"][0]["edits"]
    (change,) = edit["changes"]
    assert change["score_change"] == 0
    assert change["overlap"] == 1
    assert (change["stays"], change["control"]) == (True, None)


@pytest.mark.parametrize(
    ("edits", "options", "words"),
    [
        ([{"name": "a", "edit": "flip"}], {}, "which `flip` changes"),
        (
            [{"name": "a", "edit": "channels", "layer": "backbone", "channels": [0]}],
            {},
            "edits of layers are for models that classify",
        ),
        ([{**HIDE, "region": {"of": "disc"}}], {}, "region.of is for models that classify"),
        ([HIDE], {"fit": "squash"}, "`fit`"),
        ([HIDE], {"model": "segmenter", "fit": "crop"}, "`fit=crop`"),
        ([HIDE], {"model": "segmenter", "min_score": 0.5}, "`min_score`"),
        ([HIDE], {"at": "500,500"}, "No detection is at the point"),
        ([HIDE], {"at": "1,2,3"}, "a point x,y or a box"),
    ],
)
def test_an_experiment_that_a_task_does_not_have_is_refused_by_name(
    client: TestClient, edits: Any, options: Any, words: str
) -> None:
    response = tried(client, edits, **options)
    assert response.status_code == 422, response.text
    assert words in response.json()["detail"]


def test_a_region_is_explained(client: TestClient) -> None:
    response = explained(client, png(), model="segmenter", explain_top=2)
    (result,) = read_answer(response.content).results
    areas = [each.area or 0 for each in result.predictions]
    assert sum(areas) == 70 * 90
    assert all(each.mask is not None for each in result.predictions)
    assert all(each.region is not None for each in result.explanations)


def named(mask: np.ndarray) -> str:
    rle = rle_encode(mask)
    return json.dumps({"size": rle.size, "counts": rle.counts})


def test_a_mask_names_a_region_as_its_box_does(client: TestClient) -> None:
    mask = np.zeros((70, 90), np.bool_)
    mask[20:50, 10:60] = True
    asked = {"model": "segmenter", "targets": "2", "include": "grid"}
    by_mask, by_box = (
        read_answer(explained(client, png(), at=at, **asked).content).results[0].explanations[0]
        for at in (named(mask), "10,20,50,30")
    )
    assert by_box.grid.any()
    assert np.abs(by_mask.grid - by_box.grid).max() < 0.1


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (named(np.ones((70, 91), np.bool_)), "a mask in `at` is for an image of"),
        ('{"size": [70, 90], "counts": [6301]}', "a mask in `at` cannot be read"),
        ('{"size": [70, 90], "counts": [6300]}', "covers nothing"),
    ],
)
def test_a_mask_that_names_no_part_of_the_image_is_refused(
    client: TestClient, at: str, words: str
) -> None:
    response = explained(client, png(), model="segmenter", at=at)
    assert response.status_code == 422, response.text
    assert words.lower() in response.json()["detail"].lower()


def test_the_regions_of_a_photograph_of_twelve_megapixels_fit_into_an_answer(
    client: TestClient,
) -> None:
    file = io.BytesIO()
    PIL.Image.open(io.BytesIO(png())).resize((4000, 3000)).save(file, "JPEG")
    response = explained(client, file.getvalue(), model="segmenter", explain_top=3)
    assert response.status_code == 200, response.text
    (result,) = read_answer(response.content).results
    assert sum(each.area or 0 for each in result.predictions) == 4000 * 3000


def test_after_all_that_no_hook_is_left(client: TestClient) -> None:
    pool = client.app.state.service.pool  # type: ignore[attr-defined]
    assert pool.hooks_live() == 0
    assert pool.faults() == []


def test_a_model_says_its_task(client: TestClient) -> None:
    assert client.get("/models/faster_rcnn").json()["task"] == "detection"
    assert client.get("/models/segmenter").json()["task"] == "segmentation"


def test_the_command_line_writes_a_file_per_box(tmp_path: Path) -> None:
    image, out = tmp_path / "a.png", tmp_path / "out"
    image.write_bytes(png())
    options = ["--explain-top", "2", "--min-score", "0.3", "--out", str(out)]
    model = ["--model", "detectors:faster_rcnn"]
    done = CliRunner().invoke(app, ["explain", str(image), *model, *options])
    assert done.exit_code == 0, done.output
    assert sorted(each.name for each in out.glob("*.overlay.jpeg")) == [
        "a.1.overlay.jpeg",
        "a.overlay.jpeg",
    ]


def test_the_check_of_a_detector_explains_noise() -> None:
    done = CliRunner().invoke(app, ["check", "--model", "detectors:retinanet"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("flag", ["--sheet", "--tensorboard"])
def test_a_sheet_of_a_detector_is_refused(tmp_path: Path, flag: str) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(png())
    given = [flag, str(tmp_path / "a.jpg")]
    done = CliRunner().invoke(
        app, ["explain", str(image), "--model", "detectors:faster_rcnn", *given]
    )
    assert done.exit_code == 2
    assert f"{flag} is for models that classify" in " ".join(done.output.split())


def test_the_report_of_a_detector_has_a_map_for_each_box_with_its_verdict(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    report = tmp_path / "a.html"
    options = ["--explain-top", "2", "--min-score", "0.3", "--verify", "true"]
    model = ["--model", "detectors:faster_rcnn"]
    given = ["explain", str(tmp_path / "a.png"), *model, *options, "--report", str(report)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    page = report.read_text()
    assert page.count('<rect class="box"') == 2
    assert page.count('<details class="verdict') == 2
    assert "<dd>hirescam</dd>" in page
    assert "<dd>backbone[0], backbone[1]</dd>" in page


def test_the_report_of_a_detector_that_finds_nothing_shows_the_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    report = tmp_path / "a.html"
    model = ["--model", "detectors:faster_rcnn", "--min-score", "1"]
    given = ["explain", str(tmp_path / "a.png"), *model, "--report", str(report)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    page = report.read_text()
    assert "<h2>nothing found</h2>" in page
    assert "<figure><img" in page


def test_a_comparison_of_detectors_counts_detections(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    report = tmp_path / "a.html"
    given = ["compare", "detectors:faster_rcnn", "detectors:faster_rcnn", str(tmp_path), "--json"]
    given += ["--fail-on", "flips=0", "--report", str(report)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    overall = json.loads(done.stdout)["overall"]
    assert overall["images"] > 0
    assert (overall["flips"], overall["score_distance"]) == (0, 0)
    assert "Counted are detections" in report.read_text()


def test_a_comparison_in_which_nothing_is_detected_is_refused() -> None:
    model = detectors.loaded("faster_rcnn")
    with pytest.raises(ConfigurationError, match="neither model detects anything"):
        _check_any(summarise(model, model, []))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"at": named(np.ones((70, 90), np.bool_))}, "takes boxes and points of a detector"),
        ({"at": "5,5", "min_score": "1"}, "There is nothing at 5, 5"),
        ({"model": "own", "contrast": "1"}, "does not show the logits behind a box"),
        ({"at": "1,1,2,2"}, "IoU"),
    ],
)
def test_a_place_or_a_contrast_that_cannot_be_explained_is_refused(
    client: TestClient, options: dict[str, str], words: str
) -> None:
    response = explained(client, png(), **options)
    assert response.status_code == 422, response.text
    assert words in response.json()["detail"]


@pytest.mark.parametrize("of", ["x1", "y2"])
def test_an_edge_of_a_detector_without_a_known_head_has_a_map(client: TestClient, of: str) -> None:
    response = explained(client, png(), model="own", of=of, include="grid")
    assert response.status_code == 200, response.text
    (explanation,) = read_answer(response.content).results[0].explanations
    assert explanation.of == of


def test_a_region_is_contrasted_with_another_class(client: TestClient) -> None:
    asked = {"model": "segmenter", "targets": "2", "include": "grid"}
    plain, contrasted, back = (
        read_answer(explained(client, png(), **asked, **more).content).results[0].explanations[0]
        for more in ({}, {"contrast": "1"}, {"contrast": "3"})
    )
    assert contrasted.contrast == 1
    assert not np.allclose(plain.grid, contrasted.grid)
    assert not np.allclose(back.grid, contrasted.grid)
    assert contrasted.logit_difference is not None


def test_masks_that_take_too_much_memory_are_refused_before_they_are_laid_out(
    serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "MASK_BYTES", 70 * 90 * 4)
    with serve(models=("detectors:mask_rcnn",)) as client:
        response = explained(client, png())
        assert response.status_code == 422, response.text
        assert "gives masks, and this image has 6,300 pixels" in response.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "segmentation"}, "the task is segmentation, and the model returns"),
        ({"target_layer": "backbne"}, "is not a layer that a map can be drawn from"),
        ({"labels": ("a", "b")}, "labels"),
    ],
)
def test_what_a_configuration_says_of_a_detector_in_vain_is_refused_when_it_is_loaded(
    fields: dict[str, Any], words: str
) -> None:
    spec = ModelSpec("boxes", "detectors:faster_rcnn", **fields)
    with pytest.raises(ConfigurationError, match=words):
        load_model(spec)


def test_labels_without_the_background_get_it() -> None:
    model = load_model(ModelSpec("boxes", "detectors:faster_rcnn", labels=detectors.LABELS[1:]))
    assert model.labels == ("__background__", *detectors.LABELS[1:])
