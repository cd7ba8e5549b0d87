"""Detectors and segmenters of Hugging Face against its own processing and a full backward pass."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectors import answer
from small_detectors import DETECTORS, SEGMENTERS, build, image, processor, save
from torch import Tensor, nn

from service.cam.regions import source_mask
from service.images.decode import Source, fit_to_model
from service.inference.contrast import Contrast
from service.inference.questions import Question
from service.models.catalog import InputSpec, ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [pytest.mark.reference, pytest.mark.timeout(300)]

SIZES = ((70, 90), (131, 60), (31, 40), (9, 180))
CROPPED = ("MobileViT", "MobileViTV2", "MobileNetV2")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small model of a class, loaded as `hf/FOLDER`; and its folder."""
    kept: dict[str, tuple[LoadedModel, Path]] = {}

    def get(name: str) -> tuple[LoadedModel, Path]:
        if name not in kept:
            folder = save(transformers, name, tmp_path_factory.mktemp("hf") / name)
            kept[name] = load_model(ModelSpec(name, f"hf/{folder}")), folder
        return kept[name]

    return get


def question(model: LoadedModel, pixels: Tensor, **more: Any) -> Question:
    """The question that a request for an upright image (3, h, w) becomes."""
    source = Source(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), "PNG", "")
    given = fit_to_model(source, model.preprocessing)
    method = more.get("method", "hirescam")
    layers = () if method in {"rise", "occlusion", None} else model.default_layers
    common = {"top_k": 100, "method": method, "layers": layers, "min_score": 0.0}
    return Question(
        given.pixels,
        source=source.size,
        seen=given.geometry.content,
        shown=given.geometry.seen,
        **(common | more),  # type: ignore[arg-type]
    )


def theirs(name: str, folder: Path, pixels: Tensor) -> tuple[Any, nn.Module, Tensor]:
    """The output of the folder's model for the processor's own batch of one image."""
    kind = "SemanticSegmentation" if name in SEGMENTERS else "ObjectDetection"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    module = auto.from_pretrained(folder, local_files_only=True).eval()
    batch = processor(transformers, name)(pixels, return_tensors="pt")
    with torch.no_grad():
        return module(**batch), module, batch["pixel_values"]


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_scores_and_labels_are_those_of_transformers(loaded: Any, name: str) -> None:
    """Equal within rounding of float32: the service's batch of one is another memory layout."""
    model, folder = loaded(name)
    assert (model.task, model.queries) == ("detection", True)
    for size in SIZES:
        pixels = image(3, size)
        if name == "Yolos" and max(size) > 16 * min(size):  # its own processor fails
            continue
        raw, *_ = theirs(name, folder, pixels)
        kind = processor(transformers, name)
        # These list as many boxes as asked, the service as many as there are queries.
        process = kind.post_process_object_detection
        more = {"top_k": 12} if "top_k" in inspect.signature(process).parameters else {}
        (expected,) = process(raw, threshold=0.0, target_sizes=[size], **more)
        order = expected["scores"].argsort(descending=True, stable=True)
        (result,) = answer(model, question(model, pixels, method=None))
        assert len(result.predictions) == len(order) > 0
        found = torch.tensor([each.score for each in result.predictions])
        torch.testing.assert_close(found, expected["scores"][order], rtol=1e-5, atol=1e-6)
        assert [each.class_id for each in result.predictions] == expected["labels"][order].tolist()
        boxes = expected["boxes"][order]
        sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        ours = torch.tensor([each.box for each in result.predictions])
        torch.testing.assert_close(ours, sides, rtol=1e-5, atol=1e-5 * max(size))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_classes_are_those_of_transformers(loaded: Any, name: str) -> None:
    """Of a processor that crops, those of the crop, and not stretched over the whole image."""
    model, folder = loaded(name)
    assert model.task == "segmentation"
    for size in SIZES[:3]:
        pixels = image(3, size)
        raw, *_ = theirs(name, folder, pixels)
        asked = question(model, pixels, method=None)
        target = tuple(asked.pixels.shape[1:]) if name in CROPPED else size
        (expected,) = processor(transformers, name).post_process_semantic_segmentation(
            raw, target_sizes=[target]
        )
        classes = expected if isinstance(expected, Tensor) else expected["segmentation"]
        (result,) = answer(model, asked)
        assert {each.class_id for each in result.predictions} == set(classes.unique().tolist())
        for each in result.predictions:
            assert each.mask is not None
            wrong = each.mask != (classes == each.class_id).numpy()
            assert wrong.mean() <= (0 if name not in CROPPED else 2e-3)


def level_of(module: Any, path: str, given: Tensor) -> tuple[Any, Tensor]:
    """The output of a private copy, and that of one of its modules, as its next module takes it."""
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Tensor) -> Tensor:
        kept.append(output.clone() if output.requires_grad else output.detach().requires_grad_())
        return kept[-1].clone()

    handle = module.get_submodule(path).register_forward_hook(keep, prepend=True)
    raw = module(given)
    handle.remove()
    return raw, kept[-1]


def as_map(model: LoadedModel, path: str, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A layer's output (1, …) as (C, h, w): by hand for tokens."""
    if values.ndim == 4:
        return values[0]
    rows, columns = (-(-side // 16) for side in size)  # patches of 16 pixels, or stride 32 in Swin
    if rows * columns > values.shape[1]:
        rows, columns = rows // 2, columns // 2
    first = 0 if values.shape[1] == rows * columns else 1
    return values[0, first : first + rows * columns].T.unflatten(1, (rows, columns))


def test_tokens_are_read_in_rows(loaded: Any) -> None:
    assert loaded("Yolos")[0].layer("vit.encoder.layer.2.layernorm_before").layout.prefix == 1


@pytest.mark.parametrize("name", DETECTORS)
def test_the_map_of_a_box_is_that_of_a_full_backward_pass(loaded: Any, name: str) -> None:
    model, folder = loaded(name)
    pixels = image(4, (70, 90))
    count = 3 if len(model.default_layers) == 1 else 1  # more levels take as many passes
    (result,) = answer(model, question(model, pixels, explain_top=count))
    _, module, batch = theirs(name, folder, pixels)
    assert len(result.explanations) == count
    for explanation in result.explanations:
        assert explanation.layers == model.default_layers
        assert explanation.grid.any(), "a map that is zero proves nothing"
        for path in explanation.layers:
            (alone,) = answer(model, question(model, pixels, explain_top=count, layers=(path,)))
            one = alone.explanations[explanation.detection or 0]
            raw, level = level_of(copy.deepcopy(module), path, batch)
            logits = raw.logits[0] if model.output == "sigmoid" else raw.logits[0, :, :-1]
            scores = raw.logits[0].sigmoid()
            if model.output == "softmax":
                scores = raw.logits[0].softmax(dim=-1)[:, :-1]
            query = int((scores[:, one.class_id] - one.score).abs().argmin())
            (slope,) = torch.autograd.grad(logits[query, one.class_id], level)
            size = (batch.shape[2], batch.shape[3])
            values, given = (as_map(model, path, each, size) for each in (level, slope))
            cam = (values * given).sum(dim=0).relu().detach()
            found = torch.from_numpy(one.grid.copy()) * one.high
            assert torch.allclose(found, cam, rtol=0, atol=1e-5 * max(float(cam.max()), 1e-3))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_the_map_of_a_region_is_that_of_a_full_backward_pass(loaded: Any, name: str) -> None:
    model, folder = loaded(name)
    pixels = image(4, (70, 90))
    (result,) = answer(model, question(model, pixels, explain_top=2))
    _, module, batch = theirs(name, folder, pixels)
    given = model.normalised(question(model, pixels).pixels[None])
    (path,) = model.default_layers
    if name not in CROPPED:  # one of them takes BGR
        torch.testing.assert_close(given, batch, rtol=0, atol=0.05)
    assert any(each.grid.any() for each in result.explanations), "zeros prove nothing"
    for explanation in result.explanations:
        assert "layer_not_used" not in explanation.flags
        private: Any = copy.deepcopy(model.module if name in CROPPED else module)
        raw, level = level_of(private, path, given)
        logits, region = raw.logits[0], torch.from_numpy(explanation.region)[None, None].float()
        share = nn.functional.interpolate(
            region, logits.shape[1:], mode="bilinear", antialias=True
        )[0, 0]
        value = (logits[explanation.class_id] * share).sum() / share.sum()
        (slope,) = torch.autograd.grad(value, level)
        size = (given.shape[2], given.shape[3])
        values, slopes = (as_map(model, path, each, size) for each in (level, slope))
        cam = (values * slopes).sum(dim=0).relu().detach()
        found = torch.from_numpy(explanation.grid.copy()) * explanation.high
        assert torch.allclose(found, cam, rtol=0, atol=1e-5 * max(float(cam.max()), 1e-3))


@pytest.mark.parametrize("name", ["Detr", "RTDetr", "Yolos"])
def test_images_in_a_batch_get_what_they_get_alone(loaded: Any, name: str) -> None:
    model, _ = loaded(name)
    questions = [question(model, image(seed, (70, 90)), explain_top=2) for seed in (1, 4)]
    together = answer(model, *questions)
    for one, result in zip(questions, together, strict=True):
        (alone,) = answer(model, one)
        for mine, other in zip(alone.explanations, result.explanations, strict=True):
            assert mine.class_id == other.class_id
            assert mine.score == pytest.approx(other.score, abs=1e-5)
            assert abs(torch.from_numpy(mine.grid - other.grid)).max() <= 1e-3


@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr", "RTDetr", "Yolos"])
def test_edges_and_contrasts_are_of_the_query_of_the_box(loaded: Any, name: str) -> None:
    model, _ = loaded(name)
    pixels = image(1, (70, 90))
    for of in ("x1", "y2"):
        (result,) = answer(model, question(model, pixels, of=of))
        assert result.explanations[0].grid.any()
        assert "layer_not_used" not in result.explanations[0].flags
    label = result.explanations[0].class_id
    (result,) = answer(model, question(model, pixels, contrast=Contrast(((label + 1) % 4,))))
    (explanation,) = result.explanations
    assert dict(explanation.contrast) == {(label + 1) % 4: 1.0}
    assert explanation.logit_difference is not None
    assert explanation.logit_difference > 0


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("size", [(1, 1), (8, 160), (160, 8), (2, 400)])
def test_extreme_images_have_answers(loaded: Any, name: str, size: tuple[int, int]) -> None:
    model, _ = loaded(name)
    (result,) = answer(model, question(model, image(1, size)))
    assert len(result.predictions) == 12
    assert len(result.explanations) == 1


def test_a_detector_whose_processor_is_refused_is_served_with_a_transform(tmp_path: Path) -> None:
    """RF-DETR's processor resizes without rounding to levels."""
    build(transformers, "RfDetr").save_pretrained(tmp_path)
    transform = InputSpec(size=(56, 56), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    model = load_model(ModelSpec("rf", f"hf/{tmp_path}", input=transform))
    assert model.default_layers == ("model.backbone.projector",)
    (result,) = answer(model, question(model, image(1, (70, 90))))
    assert result.explanations[0].grid.any()


def test_nothing_detected_is_no_error(loaded: Any) -> None:
    model, _ = loaded("Detr")
    (result,) = answer(model, question(model, image(1, (70, 90)), min_score=1.0))
    assert result.predictions == ()
    assert result.explanations == ()


@pytest.mark.parametrize("name", ["Detr", "RTDetr", "Segformer"])
@pytest.mark.parametrize("method", ["rise", "occlusion"])
def test_black_box_methods_cover_the_image(loaded: Any, name: str, method: str) -> None:
    model, _ = loaded(name)
    asked = question(model, image(1, (70, 90)), method=method, samples=20)
    (result,) = answer(model, asked)
    (explanation,) = result.explanations
    assert explanation.grid.shape == model.preprocessing.canvas


def test_masks_cover_the_source(loaded: Any) -> None:
    """Each pixel of the source is in exactly one mask, which has the size of the source."""
    model, _ = loaded("Segformer")
    for size in ((131, 60), (97, 151), (33, 77), (101, 103), (1, 1)):
        pixels = image(2, size)
        source = Source(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), "PNG", "")
        geometry = fit_to_model(source, model.preprocessing).geometry
        (result,) = answer(model, question(model, pixels, method=None))
        assert {each.mask.shape for each in result.predictions if each.mask is not None} == {size}
        masks = [source_mask(each.mask, geometry) for each in result.predictions]
        assert (sum(mask.astype(int) for mask in masks) == 1).all()
