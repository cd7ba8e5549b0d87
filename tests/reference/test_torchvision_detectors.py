"""Every detector and segmenter of torchvision, with random weights, against a private copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectors import answer, image, oracle, plain, question
from torch import Tensor

from service.models.catalog import InputSpec, ModelSpec
from service.models.loading import load_model

pytestmark = [pytest.mark.large, pytest.mark.timeout(900)]

POOLED = {"rpn_post_nms_top_n_test": 20, "box_detections_per_img": 8, "box_score_thresh": 0.0}
ANCHORED = {"topk_candidates": 40, "detections_per_img": 8, "score_thresh": 0.0}
SMALL = {"min_size": 160, "max_size": 200}
DETECTORS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": POOLED | SMALL,
    "fasterrcnn_mobilenet_v3_large_fpn": POOLED | SMALL,
    "fasterrcnn_resnet50_fpn": POOLED | SMALL,
    "fasterrcnn_resnet50_fpn_v2": POOLED | SMALL,
    "maskrcnn_resnet50_fpn": POOLED | SMALL,
    "maskrcnn_resnet50_fpn_v2": POOLED | SMALL,
    "keypointrcnn_resnet50_fpn": POOLED | SMALL,
    "retinanet_resnet50_fpn": ANCHORED | SMALL,
    "retinanet_resnet50_fpn_v2": ANCHORED | SMALL,
    "fcos_resnet50_fpn": ANCHORED | SMALL,
    "ssd300_vgg16": ANCHORED,
    "ssdlite320_mobilenet_v3_large": ANCHORED,
}
SEGMENTERS = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_gives_the_boxes_of_torchvision_and_the_maps_of_a_full_backward_pass(
    name: str,
) -> None:
    spec = ModelSpec(name, f"torchvision/{name}", arguments=DETECTORS[name])
    model = load_model(spec, allow_random_weights=True)
    assert model.task == "detection"
    pixels = image(1, (150, 190))
    expected = plain(model, pixels)
    (result,) = answer(model, question(model, pixels, explain_top=3, min_score=0.0))
    assert [each.score for each in result.predictions] == expected["scores"].tolist()
    assert [each.class_id for each in result.predictions] == expected["labels"].tolist()
    assert len(result.explanations) == 3
    for explanation in result.explanations:
        levels = oracle(model, pixels, explanation.detection or 0)
        assert tuple(levels) == explanation.layers
        (cam,) = levels.values()
        found = torch.from_numpy(explanation.grid.copy()) * explanation.high
        assert torch.allclose(found, cam, rtol=0, atol=1e-5 * float(cam.max()))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_gives_the_maps_of_a_full_backward_pass(name: str) -> None:
    small = InputSpec(size=(128, 128), resize=128)
    spec = ModelSpec(name, f"torchvision/{name}", input=small)
    model = load_model(spec, allow_random_weights=True)
    assert model.task == "segmentation"
    pixels = image(1, (128, 160))
    layers = model.default_layers
    asked = question(model, pixels, layers=layers, source=(160, 128), explain_top=2)
    (result,) = answer(model, asked)
    module: Any = copy.deepcopy(model.module)
    part = layers[0].removeprefix("backbone[").removesuffix("]")
    kept: dict[str, Tensor] = {}

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept["level"] = output[part].requires_grad_(True)

    module.backbone.register_forward_hook(keep)
    out = module(model.normalised(pixels[None]))["out"][0]
    assert result.explanations
    for explanation in result.explanations:
        assert explanation.region is not None
        value = out[explanation.class_id][torch.from_numpy(explanation.region)].mean()
        (slope,) = torch.autograd.grad(value, kept["level"], retain_graph=True)
        cam = (slope * kept["level"]).sum(dim=1).relu()[0].detach()
        found = torch.from_numpy(explanation.grid.copy()) * explanation.high
        assert torch.allclose(found, cam, rtol=0, atol=1e-4 * float(cam.max()))
