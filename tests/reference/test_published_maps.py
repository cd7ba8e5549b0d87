"""Maps of vision transformers, by the numbers of the methods' published code.

`tools/reference_maps/write.py` wrote them, and names the code and its versions.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from service.inference.contrast import Contrast
from service.inference.questions import Question
from service.models.catalog import InputSpec, ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model

zoo = pytest.importorskip("small_transformers", reason="timm is not installed")

pytestmark = [pytest.mark.reference, pytest.mark.timeout(60)]

PIXELS = oracles.picture(6, zoo.SIDE, zoo.SIDE)
NUMBERS = np.load(Path(__file__).parent / "published_maps.npz")


def published(name: str) -> Tensor:
    return torch.from_numpy(NUMBERS[name])


@cache
def served(name: str) -> LoadedModel:
    size = InputSpec(size=(zoo.SIDE, zoo.SIDE), resize=zoo.SIDE)
    spec = ModelSpec(name, f"small_transformers:{name}", input=size)
    return load_model(spec, allow_random_weights=True)


def explained(name: str, **options) -> Tensor:
    return oracles.raw(oracles.explained(served(name), Question(PIXELS, **options))[0])


@pytest.mark.parametrize("name", ["timm_vit", "vit"])
def test_the_model_is_that_of_the_numbers(name: str) -> None:
    """If this fails, seeds give other weights or images than they did: write the numbers again."""
    model = served(name)
    with torch.no_grad():
        (logits,) = model.replicate()(oracles.input_of(model, PIXELS))
    assert oracles.distance(logits, published(f"logits.{name}")) < 1e-4


def test_attention_rollout_is_that_of_chefers_code() -> None:
    ours = explained("timm_vit", targets=(3,), method="attention_rollout")
    assert oracles.distance(ours, published("rollout").reshape(4, 4)) < 1e-4


@pytest.mark.parametrize("target", [3, 1])
def test_gae_is_that_of_the_authors_notebook(target: int) -> None:
    ours = explained("timm_vit", targets=(target,), method="gae")
    assert oracles.distance(ours, published(f"gae.{target}").reshape(4, 4)) < 1e-4


@pytest.mark.parametrize("target", [3, 1])
def test_libras_input_gradient_is_that_under_the_cp_lrp_rules_of_lxt(target: int) -> None:
    ours = explained("vit", targets=(target,), method="input_gradient", libra=True)
    plain = explained("vit", targets=(target,), method="input_gradient")
    assert oracles.distance(ours, published(f"libra.{target}")) < 1e-4
    assert oracles.distance(plain, published(f"libra.{target}")) > 1e-2


@pytest.mark.parametrize("target", [3, 1])
def test_expected_gradients_are_captums_gradient_shap(target: int) -> None:
    ours = explained("vit", targets=(target,), method="expected_gradients", samples=21, seed=4)
    assert oracles.distance(ours, published(f"expected.{target}")) < 1e-4


@pytest.mark.parametrize("classes", [(5,), (5, 0)])
def test_a_contrast_is_the_finer_cam_of_pytorch_grad_cam(classes: tuple[int, ...]) -> None:
    model, name = served("timm_vit"), ",".join(map(str, classes))
    ours = explained(
        "timm_vit", targets=(3,), layers=model.target_layers(()), contrast=Contrast(classes)
    )
    assert oracles.distance(ours, published(f"contrast.{name}").double().relu()) < 1e-4
