"""The compiled lane of transformers: a residual goes beside the cut, the numbers stay the hooked's.

Small networks of the families' own code, with random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from service.inference.batch import Unfinished, run, run_compiled
from service.inference.questions import Question, lane_of
from service.models.catalog import ModelSpec
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model

timm = pytest.importorskip("timm", reason="timm is not installed: pip install camserve[timm]")

pytestmark = [pytest.mark.reference, pytest.mark.timeout(120)]

SIDE = 64


def torchvision_vit() -> nn.Module:
    return VisionTransformer(SIDE, 16, 3, 2, 32, 64, num_classes=9)


def torchvision_swin() -> nn.Module:
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=9)


def of_timm(name: str, **more: object) -> Callable[[], nn.Module]:
    small = {"img_size": SIDE, "embed_dim": 32, "num_classes": 9} | more
    return lambda: timm.create_model(name, **small)


PLAIN = {"depth": 3, "num_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": torchvision_vit,
    "swin": torchvision_swin,
    "timm_vit": of_timm("vit_small_patch16_224", **PLAIN),
    "timm_vit_gap": of_timm("vit_base_patch16_rope_reg1_gap_256", **PLAIN, patch_size=16),
    "timm_deit": of_timm("deit_small_patch16_224", **PLAIN),
    "timm_deit_distilled": of_timm("deit_small_distilled_patch16_224", **PLAIN),
    "timm_deit3": of_timm("deit3_small_patch16_224", **PLAIN),
    "timm_dinov2": of_timm("vit_small_patch14_dinov2", **PLAIN, patch_size=16),
    "timm_dinov2_registers": of_timm("vit_small_patch14_reg4_dinov2", **PLAIN, patch_size=16),
    "timm_beit": of_timm("beit_base_patch16_224", **PLAIN),
    "timm_eva02": of_timm("eva02_tiny_patch14_224", **PLAIN, patch_size=16),
    "timm_siglip": of_timm("vit_base_patch16_siglip_224", **PLAIN),
    "timm_swin": of_timm(
        "swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(2, 4), window_size=4
    ),
    "timm_swinv2": of_timm(
        "swinv2_tiny_window8_256", depths=(2, 2), num_heads=(2, 4), window_size=4
    ),
}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`package.module:function` builders come from this file."""
    monkeypatch.setitem(sys.modules, "residual_cut_models", sys.modules[__name__])


def __getattr__(name: str) -> Callable[[], nn.Module]:
    """Builders by name, each with weights under which attention and classes differ."""
    if name not in MODELS:
        raise AttributeError(name)

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = MODELS[name]().eval()
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.2)
        return module

    return build


def compiled(name: str) -> LoadedModel:
    size = ModelSpec("x", "y").input
    spec = ModelSpec(
        name,
        f"residual_cut_models:{name}",
        input=type(size)(size=(SIDE, SIDE), resize=SIDE),
    )
    return load_model(
        spec,
        allow_random_weights=True,
        compiler=Compiler(streams=2, single_request_threads=2, largest=5),
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_compiled_lane_answers_as_the_hooked_one_in_batches_of_any_size(name: str) -> None:
    model = compiled(name)
    assert model.compiled is not None, model.not_compiled
    layers = model.target_layers(())
    for count in (1, 3, 5):
        asked = [
            Question(oracles.picture(seed, SIDE, SIDE), targets=(2, 7), contrast=5, layers=layers)
            for seed in range(count)
        ]
        assert {lane_of(model, each) for each in asked} == {"compiled"}
        with oracles.leased(model) as replica:
            expected = run(replica, asked)
        for one, other in zip(run_compiled(model, asked), expected, strict=True):
            for mine, theirs in zip(one.explanations, other.explanations, strict=True):
                assert theirs.grid.any()
                np.testing.assert_allclose(mine.grid, theirs.grid, atol=2e-4)
                assert mine.high == pytest.approx(theirs.high, rel=1e-3)
            for mine, theirs in zip(one.predictions, other.predictions, strict=True):
                assert mine.score == pytest.approx(theirs.score, rel=1e-3)


@pytest.mark.parametrize("method", ["rise", "scorecam", "occlusion"])
def test_methods_of_forward_passes_and_verdicts_run_through_a_residual_cut(method: str) -> None:
    model = compiled("timm_vit")
    layers = model.target_layers(()) if method == "scorecam" else ()
    question = Question(
        oracles.picture(1, SIDE, SIDE), method=method, layers=layers, samples=40, verify=True
    )
    assert lane_of(model, question) == "compiled"
    (expected,) = oracles.answers(replace(model, compiled=None), question)
    with oracles.leased(model) as replica:
        (steps,) = run_compiled(model, [question])
        assert isinstance(steps, Unfinished)
        found = oracles.finished(replica, steps)
    (ours,), (theirs,) = found.explanations, expected.explanations
    np.testing.assert_allclose(ours.grid, theirs.grid, atol=1e-3)
    assert ours.verdict.verdict == theirs.verdict.verdict
    assert ours.verdict.agreement == pytest.approx(theirs.verdict.agreement, abs=1e-3)
