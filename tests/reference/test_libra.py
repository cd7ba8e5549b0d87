"""`correction=libra`: gradients that add up, by hand on private copies and by their sum."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import oracles
import pytest
import torch
from tiny import SmallNet, loaded
from torch import Tensor, nn
from torch.nn import functional

from api_schemas.methods import METHODS
from api_schemas.options import ExplainOptions
from service.cam.libra import LibraMode
from service.errors import InvalidOption
from service.inference.batch import run, run_compiled
from service.inference.contrast import Contrast
from service.inference.questions import Question, lane_of
from service.models.catalog import InputSpec, ModelSpec
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.pipeline.resolve import resolve_options
from service.pipeline.service import Limits

zoo = pytest.importorskip("small_transformers", reason="timm is not installed")

pytestmark = [pytest.mark.reference, pytest.mark.timeout(120)]

SIDE = zoo.SIDE
PIXELS = oracles.picture(6, SIDE, SIDE)
LIMITS = Limits(32, 1 << 25, 1 << 26, 2048, 1 << 26, 2000, 60)
CORRECTABLE = [name for name, record in METHODS.items() if record.is_correctable]


@cache
def served(name: str, *, compiled: bool = False) -> LoadedModel:
    size = InputSpec(size=(SIDE, SIDE), resize=SIDE)
    spec = ModelSpec(name, f"small_transformers:{name}", input=size)
    compiler = Compiler() if compiled else None
    return load_model(spec, allow_random_weights=True, compiler=compiler)


def norm_by_hand(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    deviation = (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
    return (x - x.mean(dim=-1, keepdim=True)) / deviation * norm.weight + norm.bias


def by_hand(net: nn.Module, image: Tensor, at: str | None = None) -> tuple[Tensor, list[Tensor]]:
    """Torchvision's ViT from its weights, with the paper's constants; the norms of each block."""
    x = net._process_input(image)
    x = torch.cat([net.class_token.expand(len(x), -1, -1), x], dim=1) + net.encoder.pos_embedding
    norms = []
    for block in net.encoder.layers:
        attention = block.self_attention
        norms.append(norm_by_hand(block.ln_1, x))
        projected = functional.linear(
            norms[-1], attention.in_proj_weight, attention.in_proj_bias
        ).unflatten(2, (3, attention.num_heads, -1))
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=3).detach()
        x = x + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        first, _, _, second, _ = block.mlp
        hidden = first(norm_by_hand(block.ln_2, x))
        gate = (0.5 * (1 + torch.erf(hidden / 2**0.5))).detach()
        x = x + second(hidden * gate)
    return net.heads(norm_by_hand(net.encoder.ln, x)[:, 0]), norms


def test_the_input_gradient_is_that_of_the_papers_constants() -> None:
    model = served("vit")
    net = copy.deepcopy(model.module).double()
    image = oracles.input_of(model, PIXELS).double().requires_grad_()
    logits, _ = by_hand(net, image)
    torch.testing.assert_close(logits, net(image))
    (expected,) = torch.autograd.grad(logits[0, 3], image)
    (plain,) = torch.autograd.grad(net(image)[0, 3], image)
    question = Question(PIXELS, targets=(3,), method="input_gradient", libra=True)
    (ours,) = oracles.explained(model, question)
    assert oracles.distance(ours, expected[0].sum(dim=0)) < 1e-4
    assert oracles.distance(ours, plain[0].sum(dim=0)) > 1e-2
    assert "experimental" in ours.flags


@pytest.mark.parametrize("contrast", [None, Contrast((5,))])
def test_a_map_at_a_layer_is_from_the_gradient_by_hand(contrast: Contrast | None) -> None:
    model = served("vit")
    net = copy.deepcopy(model.module).double().requires_grad_(requires_grad=False)
    image = oracles.input_of(model, PIXELS).double().requires_grad_()
    logits, norms = by_hand(net, image)
    value = logits[0, 3] - (0 if contrast is None else logits[0, 5])
    # Of the norm's own use, without the way around it.
    (gradient,) = torch.autograd.grad(value, norms[-1])
    activation, gradient = (
        each[0, 1:].T.reshape(-1, 4, 4).detach() for each in (norms[-1], gradient)
    )
    expected = (gradient * activation).sum(dim=0).relu()
    layers = model.target_layers(())
    assert layers == ("encoder.layers.encoder_layer_2.ln_1",)
    question = Question(
        PIXELS, targets=(3,), method="hirescam", layers=layers, contrast=contrast, libra=True
    )
    (ours,) = oracles.explained(model, question)
    assert oracles.distance(ours, expected) < 1e-4


ADDING_UP = ["vit", "swin", "timm_vit", "timm_deit_distilled", "timm_deit3", "timm_dinov2",
             "timm_beit", "timm_siglip_gap", "timm_swin", "timm_cait", "timm_pvt"]  # fmt: skip


@pytest.mark.parametrize("name", ADDING_UP)
def test_input_times_gradient_adds_up_to_the_logit_where_nothing_is_added(name: str) -> None:
    """The property that the rules are for: exact without biases, class tokens and positions."""
    net = copy.deepcopy(served(name).module).double()
    for path, parameter in net.named_parameters():
        added = ("bias", "token", "pos_embed", "pos_embedding", "dist_token")
        if path.endswith(added) and "table" not in path:
            nn.init.zeros_(parameter)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    image.requires_grad_()
    with LibraMode() as mode:
        logits = served(name).logits(net(image))
    plain = served(name).logits(net(image))
    torch.testing.assert_close(logits, plain, rtol=1e-9, atol=1e-9)
    assert mode.count > 3
    for logit, bare in zip(logits[0, :3], plain[0, :3], strict=True):
        whole = float(logit.detach())
        (gradient,) = torch.autograd.grad(logit, image, retain_graph=True)
        assert float((gradient * image).sum().detach()) == pytest.approx(whole, rel=1e-3)
        (gradient,) = torch.autograd.grad(bare, image, retain_graph=True)
        assert float((gradient * image).sum().detach()) != pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_outputs_stay_the_models(name: str) -> None:
    net, image = served(name).replicate(), oracles.input_of(served(name), PIXELS)
    with torch.no_grad():
        expected = served(name).logits(net(image))
        with LibraMode():
            found = served(name).logits(net(image))
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


FUNCTIONS = {
    "layer_norm": lambda x: functional.layer_norm(x, (6,)),
    "of two dimensions": lambda x: functional.layer_norm(
        x, (5, 6), torch.arange(30.0).reshape(5, 6), eps=0.1
    ),
    "rms_norm": lambda x: functional.rms_norm(x, (6,), torch.arange(6.0)),
    "with epsilon": lambda x: functional.rms_norm(x, [6], eps=0.2),
    "RMSNorm": nn.RMSNorm(6),
    "GELU": nn.GELU("tanh"),
    "SiLU": nn.SiLU(),
    "in place": lambda x: functional.silu(x.clone(), inplace=True),
    "hardswish": functional.hardswish,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_rule_keeps_the_output_and_is_linear_in_the_input(name: str) -> None:
    """`x · ∂y/∂x` is y without its bias: at zeros, too."""
    function = FUNCTIONS[name]
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 0
    x.requires_grad_()
    with LibraMode() as mode:
        y = function(x)
    torch.testing.assert_close(y, function(x))
    assert mode.count == 1
    (gradient,) = torch.autograd.grad((y * y.detach()).sum(), x)
    assert float((gradient * x.detach()).sum()) == pytest.approx(
        float(y.detach().square().sum()), rel=1e-4
    )


@pytest.mark.parametrize("name", ["vit", "timm_vit", "timm_vit_gap"])
@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam"])
def test_the_compiled_lane_corrects_as_the_hooked_one_does(name: str, method: str) -> None:
    model = served(name, compiled=True)
    layers = model.target_layers(())
    asked = [
        Question(oracles.picture(seed, SIDE, SIDE), targets=(3,), method=method, layers=layers)
        for seed in range(3)
    ]
    corrected = [replace(each, libra=True) for each in asked]
    assert {lane_of(model, each) for each in corrected} == {"compiled"}
    with oracles.leased(model) as replica:
        expected = run(replica, corrected)
    plain = run_compiled(model, asked)
    for one, other, bare in zip(run_compiled(model, corrected), expected, plain, strict=True):
        grids = [each.explanations[0].grid for each in (one, other, bare)]
        np.testing.assert_allclose(grids[0], grids[1], atol=5e-4)
        assert np.abs(grids[0] - grids[2]).max() > 1e-3


@pytest.mark.parametrize("method", ["gradcam", "input_gradient"])
def test_a_network_without_anything_to_correct_is_refused(method: str) -> None:
    layers = ("features",) if method == "gradcam" else ()
    question = Question(PIXELS, method=method, layers=layers, libra=True)
    (answer,) = oracles.answers(loaded(SmallNet(), side=SIDE), question)
    assert isinstance(answer, InvalidOption)
    assert "nothing that `correction=libra` changes" in answer.detail


def resolved(**options) -> Question:
    given = ExplainOptions.model_validate({"correction": "libra"} | options)
    return resolve_options(served("timm_vit"), given, LIMITS, 1).question(PIXELS)


@pytest.mark.parametrize("method", METHODS)
def test_methods_from_one_gradient_take_it_and_others_are_refused(method: str) -> None:
    if method in CORRECTABLE:
        assert resolved(method=method).libra
    else:
        with pytest.raises(InvalidOption, match=r"gradcam.* and input_gradient"):
            resolved(method=method)


def test_captured_gradients_stay_the_models_own() -> None:
    with pytest.raises(InvalidOption, match="the model's own"):
        resolved(activations=["norm"], activation_kind="grad_output")
