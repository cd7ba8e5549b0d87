"""The compiled lane of real detectors and segmenters against torch on a private copy."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import answer, image, oracle, plain, question
from torch import Tensor

from service.inference.questions import InferenceResult, Question, lane_of
from service.models.catalog import InputSpec, ModelSpec
from service.models.compiled.lane import TOLERANCES, Compiler
from service.models.compiled.parts import difference_of_boxes
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.tasks import Detections

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent.parent / "tools" / "flower_scenes")
    import flower_networks
    import scenes

pytestmark = pytest.mark.timeout(600)

SMALL = {"min_size": 160, "max_size": 200}
FLOWERS = ("flower_networks:faster_rcnn", "flower_networks:lraspp")
# Not Faster R-CNN: with random weights its first stage proposes boxes by chance.
DETECTORS: dict[str, dict[str, Any]] = {
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0, "detections_per_img": 20},
}
LARGE: dict[str, dict[str, Any]] = {
    "fcos_resnet50_fpn": SMALL
    | {"score_thresh": 0.0, "detections_per_img": 8, "topk_candidates": 40},
    "retinanet_resnet50_fpn": SMALL
    | {"score_thresh": 0.0, "detections_per_img": 8, "topk_candidates": 40},
    "ssd300_vgg16": {"score_thresh": 0.0, "detections_per_img": 8},
}
TOLERANCE = TOLERANCES["float32"]


@cache
def served(builder: str, **arguments: Any) -> LoadedModel:
    labels = flower_networks.LABELS if builder.startswith("flower") else None
    sizes = {"lraspp": 320, "lraspp_mobilenet_v3_large": 128, "fcn_resnet50": 128}
    side = sizes.get(builder.replace(":", "/").rpartition("/")[2])
    size = InputSpec() if side is None else InputSpec(size=(side, side), resize=side)
    if ":" not in builder:
        builder, arguments = "detectors:sharp", {"name": builder, **arguments}
    spec = ModelSpec("m", builder, arguments=arguments, labels=labels, input=size)
    model = load_model(spec, allow_random_weights=True, compiler=Compiler())
    assert model.is_compiled, model.not_compiled
    return model


def scene(seed: int, count: int = 4) -> Tensor:
    """A drawn scene with flowers' colors, 320 × 320."""
    colors = [torch.full((3, 130, 170), 40 + 80 * n, dtype=torch.uint8) for n in range(3)]
    photos = scenes.Photos(colors, torch.arange(3))
    pixels: Tensor = next(scenes.scenes(photos, count, seed)).pixels
    return pixels


def detections(result: InferenceResult) -> Detections:
    sides = torch.tensor([each.box for each in result.predictions]).reshape(-1, 4)
    return Detections(
        torch.cat([sides[:, :2], sides[:, :2] + sides[:, 2:]], dim=1),
        torch.tensor([each.score for each in result.predictions]),
        torch.tensor([each.class_id for each in result.predictions]),
    )


def check_boxes(model: LoadedModel, pixels: Tensor) -> None:
    """Boxes and maps of the compiled lane are those of torch on a private copy."""
    asked = question(model, pixels, explain_top=3, min_score=0.0)
    assert lane_of(model, asked) == "folded"
    (result,) = answer(model, asked, lane="folded")
    expected = plain(model, pixels)
    raw = Detections(expected["boxes"], expected["scores"], expected["labels"])
    assert len(raw.scores)
    assert difference_of_boxes(raw, detections(result)) <= TOLERANCE.logits
    compared = 0
    for explanation in result.explanations:
        number = _same_box(raw, detections(result), explanation.detection or 0)
        if number is None:  # suppression kept another of nearly the same score
            continue
        (layer, cam), *others = oracle(model, pixels, number).items()
        assert not others
        if (layer,) == explanation.layers:
            found = torch.from_numpy(explanation.grid.copy()) * explanation.high
            limit = TOLERANCE.map * float(cam.max())
            assert torch.allclose(found, cam, rtol=0, atol=limit)
            compared += 1
    assert compared


def _same_box(expected: Detections, actual: Detections, number: int) -> int | None:
    gaps = (expected.boxes - actual.boxes[number]).abs().amax(dim=1)
    gaps = gaps.masked_fill(expected.labels != actual.labels[number], float("inf"))
    best = int(gaps.argmin())
    near = float(gaps[best]) < 0.5
    return best if near and abs(expected.scores[best] - actual.scores[number]) < 1e-3 else None


@pytest.mark.usefixtures("shared_data")
def test_the_trained_detector_gives_the_boxes_and_maps_of_torch() -> None:
    check_boxes(served(FLOWERS[0]), scene(3))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_with_random_weights_gives_the_boxes_and_maps_of_torch(name: str) -> None:
    check_boxes(served(name, **DETECTORS[name]), image(1, (150, 190)))


@pytest.mark.large
@pytest.mark.parametrize("name", LARGE)
def test_a_large_detector_gives_the_boxes_and_maps_of_torch(name: str) -> None:
    check_boxes(served(name, **LARGE[name]), image(1, (150, 190)))


def check_regions(model: LoadedModel, pixels: Tensor) -> None:
    """Regions and their maps are those of torch on a private copy, for the same regions."""
    size = int(pixels.shape[2]), int(pixels.shape[1])
    asked = question(model, pixels, explain_top=2, source=size)
    assert lane_of(model, asked) == "folded"
    (result,) = answer(model, asked, lane="folded")
    module: Any = copy.deepcopy(model.module)
    (path,) = model.default_layers
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept.append(output[path.partition("[")[2].rstrip("]")].requires_grad_())

    module.backbone.register_forward_hook(keep)
    logits = module(model.normalised(pixels[None]))["out"][0]
    for one in result.explanations:
        region = torch.from_numpy(one.region.copy())
        changed = (logits.argmax(dim=0) != one.class_id)[region].float().mean()
        assert changed <= 1e-4
        value = logits[one.class_id][region].mean()
        assert one.logit == pytest.approx(float(value.detach()), rel=2e-3, abs=1e-4)
        (slope,) = torch.autograd.grad(value, kept[0], retain_graph=True)
        cam = (slope * kept[0]).sum(dim=1).relu()[0].detach()
        found = torch.from_numpy(one.grid.copy()) * one.high
        assert torch.allclose(found, cam, rtol=0, atol=TOLERANCE.map * float(cam.max()))
    assert result.explanations


@pytest.mark.usefixtures("shared_data")
def test_the_trained_segmenter_gives_the_regions_and_maps_of_torch() -> None:
    check_regions(served(FLOWERS[1]), scene(3))


def test_a_segmenter_with_random_weights_gives_the_regions_and_maps_of_torch() -> None:
    check_regions(served("lraspp_mobilenet_v3_large"), image(1, (128, 160)))


@pytest.mark.large
def test_a_large_segmenter_gives_the_regions_and_maps_of_torch() -> None:
    check_regions(served("fcn_resnet50"), image(1, (128, 160)))


@pytest.mark.usefixtures("shared_data")
def test_threads_at_once_with_images_of_any_size_get_what_they_get_alone() -> None:
    model = served(FLOWERS[0])
    sizes = ((320, 320), (240, 320), (320, 200))
    asked = [_cut(model, scene(n), *sizes[n % 3]) for n in range(6)]
    expected = [answer(model, one)[0] for one in asked]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda one: answer(model, one, lane="folded")[0], asked))
    for one, other in zip(found, expected, strict=True):
        assert difference_of_boxes(detections(other), detections(one)) <= TOLERANCE.logits
        assert len(one.explanations) == len(other.explanations)


def _cut(model: LoadedModel, pixels: Tensor, height: int, width: int) -> Question:
    return question(model, pixels[:, :height, :width].contiguous(), explain_top=2, min_score=0.1)
