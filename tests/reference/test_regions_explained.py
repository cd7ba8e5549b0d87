"""Regions of a segmenter and their maps against plain torch on a private copy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from detectors import answer, image, loaded
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from service.images.decode import Source, fit_to_model
from service.inference.questions import Question
from service.models.loaded import LoadedModel

pytestmark = pytest.mark.timeout(120)


def asked(model: LoadedModel, pixels: Tensor, **more: Any) -> Question:
    size = int(pixels.shape[2]), int(pixels.shape[1])
    layers = () if more.get("method") in {"rise", "occlusion"} else model.default_layers
    return Question(
        pixels, **{"top_k": 10, "method": "hirescam", "layers": layers, "source": size, **more}
    )


def test_the_task_and_the_layer_are_found_from_one_forward_pass() -> None:
    model = loaded("segmenter")
    assert (model.task, model.default_layers) == ("segmentation", ("backbone[1]",))
    assert model.preprocessing.whole


def test_the_input_is_the_image_with_the_shorter_side_as_torchvision_resizes_it() -> None:
    model = loaded("segmenter")
    pixels = image(1, (700, 900)).permute(1, 2, 0).contiguous().numpy()
    fitted = fit_to_model(Source(pixels, "PNG", "0"), model.preprocessing)
    expected = transforms.resize(torch.from_numpy(pixels).permute(2, 0, 1), [520])
    assert torch.equal(fitted.pixels, expected)
    assert fitted.geometry.window == (0, 0, 900, 700)


def test_a_long_image_is_compressed_to_four_times_its_shorter_side() -> None:
    model = loaded("segmenter")
    pixels = np.zeros((20, 2000, 3), np.uint8)
    assert fit_to_model(Source(pixels, "PNG", "0"), model.preprocessing).pixels.shape == (
        3,
        520,
        2080,
    )


def test_predictions_are_the_classes_with_their_pixels_and_mean_scores() -> None:
    model, pixels = loaded("segmenter"), image(1, (64, 80))
    with torch.no_grad():
        out = copy.deepcopy(model.module)(model.normalised(pixels[None]))["out"][0]
    classes = out.argmax(dim=0)
    (result,) = answer(model, asked(model, pixels))
    assert {each.class_id for each in result.predictions} == set(classes.unique().tolist())
    listed = [each for each in result.predictions if each.class_id != 0]
    areas = [int(each.mask.sum()) for each in listed if each.mask is not None]
    assert areas == sorted(areas, reverse=True)
    assert 0 not in {each.class_id for each in result.predictions[:-1]}, "the background is last"
    for each in result.predictions:
        inside = classes == each.class_id
        assert each.mask is not None
        assert np.array_equal(each.mask, inside.numpy())
        mean = out.softmax(dim=0)[each.class_id][inside].mean()
        assert each.score == pytest.approx(float(mean), abs=1e-5)


def test_the_map_of_a_region_is_that_of_its_mean_logit() -> None:
    model, pixels = loaded("segmenter"), image(1, (64, 80))
    (result,) = answer(model, asked(model, pixels, explain_top=2))
    module: Any = copy.deepcopy(model.module)
    kept: dict[str, Tensor] = {}

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept["level"] = output["1"].requires_grad_(True)

    module.backbone.register_forward_hook(keep)
    out = module(model.normalised(pixels[None]))["out"][0]
    assert result.explanations
    for explanation in result.explanations:
        assert explanation.region is not None
        inside = torch.from_numpy(explanation.region)
        value = out[explanation.class_id][inside].mean()
        (slope,) = torch.autograd.grad(value, kept["level"], retain_graph=True)
        cam = (slope * kept["level"]).sum(dim=1).relu()[0].detach()
        found = torch.from_numpy(explanation.grid.copy()) * explanation.high
        assert torch.allclose(found, cam, rtol=0, atol=1e-5 * float(cam.max()))


def test_a_point_names_the_connected_region_around_it() -> None:
    model, pixels = loaded("segmenter"), image(1, (64, 80))
    (plain,) = answer(model, asked(model, pixels))
    mask = plain.predictions[0].mask
    assert mask is not None
    row, column = np.argwhere(mask)[0]
    (result,) = answer(model, asked(model, pixels, places=((column + 0.5, row + 0.5),)))
    (explanation,) = result.explanations
    assert explanation.class_id == plain.predictions[0].class_id
    assert explanation.region is not None
    assert explanation.region[row, column]
    assert not (explanation.region & ~mask).any()


def test_a_box_names_the_most_frequent_class_in_it() -> None:
    model, pixels = loaded("segmenter"), image(1, (64, 80))
    (result,) = answer(model, asked(model, pixels, places=((8.0, 8.0, 16.0, 24.0),)))
    (explanation,) = result.explanations
    expected = np.zeros((64, 80), np.bool_)
    expected[8:32, 8:24] = True
    assert explanation.region is not None
    assert np.array_equal(explanation.region, expected)


@pytest.mark.parametrize("method", ["rise", "occlusion"])
def test_black_box_methods_measure_the_probability_over_the_region(method: str) -> None:
    model, pixels = loaded("segmenter"), image(1, (64, 80))
    (result,) = answer(model, asked(model, pixels, method=method, samples=10))
    assert result.explanations[0].grid.shape == (224, 224)
