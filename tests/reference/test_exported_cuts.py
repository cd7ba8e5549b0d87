"""Models that torch.fx cannot trace are cut by torch.export, and the lane's numbers are theirs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn

from service.inference.batch import run, run_compiled
from service.inference.questions import InferenceResult, Question, lane_of
from service.models.catalog import ModelSpec
from service.models.compiled import exported
from service.models.compiled.cut import Uncuttable, split
from service.models.compiled.exported import split_exported
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [pytest.mark.reference, pytest.mark.timeout(180)]

PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
    "num_labels": 4,
}
WINDOWS = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "image_size": 64,
    "num_labels": 4,
}

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Beit": ("BeitForImageClassification", PLAIN, "beit.layers.1.layernorm_before"),
    "DeiT": ("DeiTForImageClassification", PLAIN, "deit.layers.1.layernorm_before"),
    "Dinov2": ("Dinov2ForImageClassification", PLAIN, "dinov2.encoder.layer.1.norm1"),
    "Siglip": (  # a head beside the logits attends from a learned query, one for each image
        "SiglipForImageClassification",
        {"vision_config": PLAIN, "num_labels": 4},
        "vision_model.post_layernorm",
    ),
    "Swin": (
        "SwinForImageClassification",
        WINDOWS,
        "swin.encoder.layers.1.blocks.0.layernorm_before",
    ),
    "ViT": ("ViTForImageClassification", PLAIN, "vit.layers.1.layernorm_before"),
}


def model_of(name: str) -> nn.Module:
    class_name, settings, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, class_name)(config).eval().requires_grad_(False)


def hooked(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The activation and the gradient of the first class at a layer by plain torch; the logits."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    handle = model.get_submodule(layer).register_forward_hook(keep)
    logits = model(images).logits
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), seen[0])
    return seen[0].detach(), gradient, logits.detach()


@pytest.mark.parametrize("name", MODELS)
def test_front_and_tail_are_the_model_for_every_batch(name: str) -> None:
    model, layer = model_of(name), MODELS[name][2]
    with pytest.raises(Uncuttable):
        split(model, layer)
    front, tail = split_exported(model, layer, torch.zeros(1, 3, 64, 64), "logits")
    for batch in (1, 2, 3, 5):
        images = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
        activation, gradient, logits = hooked(model, layer, images)
        crossing, *beside = front(images)
        crossing.requires_grad_()
        output = tail(crossing, *beside)["logits"]
        (slope,) = torch.autograd.grad(output[:, 0].sum(), crossing)
        torch.testing.assert_close(crossing.detach(), activation, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.detach(), logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(slope, gradient, atol=1e-6, rtol=1e-4)


def test_only_the_norm_and_its_residual_cross() -> None:
    """Neither the image, for its batch size, nor a mask that hides nothing."""
    front, tail = split_exported(
        model_of("ViT"), MODELS["ViT"][2], torch.zeros(1, 3, 64, 64), "logits"
    )
    crossing, *beside = front(torch.rand(3, 3, 64, 64))
    assert [tuple(each.shape) for each in beside] == [tuple(crossing.shape)] == [(3, 17, 32)]
    attentions = [node for node in tail.graph.nodes if "attention" in str(node.target)]
    assert attentions
    assert all(len(node.args) < 4 or node.args[3] is None for node in attentions)


def test_front_and_tail_share_the_parameters_of_the_model() -> None:
    model, layer = model_of("ViT"), MODELS["ViT"][2]
    cut = split_exported(model, layer, torch.zeros(1, 3, 64, 64), "logits")
    known = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(each.data_ptr() in known for part in cut for each in part.parameters())


@pytest.mark.parametrize("layer", ["vit.embeddings.dropout.nothing", "vit.layers.0.mlp.none"])
def test_a_layer_that_is_not_there_is_named(layer: str) -> None:
    with pytest.raises(Uncuttable, match="has nothing of"):
        split_exported(model_of("ViT"), layer, torch.zeros(1, 3, 64, 64), "logits")


def test_other_threads_run_the_same_weights_undisturbed() -> None:
    """Export patches `nn.Module` for every thread, and its kernels round differently."""
    model, layer = model_of("ViT"), MODELS["ViT"][2]
    replica, images = model_of("ViT"), torch.rand(2, 3, 64, 64)
    expected = hooked(replica, layer, images)
    done, faults = threading.Event(), list[str]()

    def serve() -> None:
        while not done.is_set():
            for value, wanted in zip(hooked(replica, layer, images), expected, strict=True):
                if type(value) is not Tensor or not torch.allclose(value, wanted, 0, 1e-5):
                    faults.append("other numbers")

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(3):
        split_exported(model, layer, torch.zeros(1, 3, 64, 64), "logits")
    done.set()
    thread.join()
    assert not faults


def test_a_model_of_hugging_face_has_a_compiled_lane(tmp_path: Path) -> None:
    model = served("Dinov2", tmp_path)
    assert model.compiled is not None, model.not_compiled
    assert model.compiled.layer == MODELS["Dinov2"][2]
    assert model.compiled.parity is not None
    assert max(model.compiled.parity.activation, model.compiled.parity.map) < 1e-4


def served(name: str, folder: Path) -> LoadedModel:
    model_of(name).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return load_model(ModelSpec("m", f"hf/{folder}"), compiler=Compiler(largest=5))


def questions(model: LoadedModel, seed: int) -> tuple[Question, Question]:
    """A map by plain gradients, and the same by corrected ones."""
    layers = model.target_layers(())
    plain = Question(oracles.picture(seed, 64, 64), targets=(1,), layers=layers)
    return plain, replace(plain, libra=True)


def grids(answers: Sequence[object]) -> list[np.ndarray]:
    assert all(isinstance(each, InferenceResult) for each in answers), answers
    return [each.explanations[0].grid for each in answers]


@pytest.mark.parametrize("name", ["Dinov2", "Swin", "ViT"])
def test_a_correction_of_an_exported_tail_is_that_of_the_hooked_lane(name, tmp_path) -> None:
    """Export calls operators, which the rules do not see; the tail calls functions again."""
    model = served(name, tmp_path)
    pairs = [questions(model, seed) for seed in range(3)]
    corrected = [each for _, each in pairs]
    assert {lane_of(model, each) for each in corrected} == {"compiled"}
    with oracles.leased(model) as replica:
        expected = grids(run(replica, corrected))
    plain = grids(run_compiled(model, [each for each, _ in pairs]))
    for one, other, bare in zip(
        grids(run_compiled(model, corrected)), expected, plain, strict=True
    ):
        np.testing.assert_allclose(one, other, atol=5e-4)
        assert np.abs(one - bare).max() > 1e-3


def test_a_correction_runs_hooked_where_the_tail_calls_operators(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(exported, "_FUNCTIONS", {})
    model = served("Dinov2", tmp_path)
    plain, corrected = questions(model, 0)
    assert lane_of(model, plain) == "compiled"
    assert lane_of(model, corrected) != "compiled"
    with oracles.leased(model) as replica:
        one, other = (grids(run(replica, [each]))[0] for each in (plain, corrected))
    assert np.abs(one - other).max() > 1e-3
