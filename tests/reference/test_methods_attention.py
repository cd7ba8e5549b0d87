"""Attention rollout and generic attention explainability, against plain torch on private copies."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import oracles
import pytest
import torch
from tiny import SmallNet, loaded
from torch import Tensor, nn
from torch.nn import functional

from service.cam.attention import AttentionMode, Differentiable, Rollout, attention_weights
from service.errors import InvalidOption
from service.inference import method_table
from service.inference.contrast import Contrast
from service.inference.method_table import check_method
from service.inference.questions import Question
from service.models.catalog import InputSpec, ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model

zoo = pytest.importorskip("small_transformers", reason="timm is not installed")

pytestmark = [pytest.mark.reference, pytest.mark.timeout(60)]

SIDE = zoo.SIDE
PIXELS = oracles.picture(6, SIDE, SIDE)


@cache
def served(name: str) -> LoadedModel:
    size = InputSpec(size=(SIDE, SIDE), resize=SIDE)
    spec = ModelSpec(name, f"small_transformers:{name}", input=size)
    return load_model(spec, allow_random_weights=True)


def image_of(model: LoadedModel, seed: int = 6) -> Tensor:
    return oracles.input_of(model, oracles.picture(seed, SIDE, SIDE))


def explained(model: LoadedModel, method: str, **options) -> Tensor:
    question = Question(PIXELS, targets=(3,), method=method, **options)
    return oracles.raw(oracles.explained(model, question)[0])


# ---- what the mode sees


def attentions_by_hooks(net: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the attention of each layer with its graph, by timm's unfused code."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        found.append(args[0])

    for module in net.modules():
        if hasattr(module, "attn_drop"):
            module.fused_attn = False
            module.attn_drop.register_forward_pre_hook(keep)
    return net(image.clone().requires_grad_()), found


def attentions_by_hand(net: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same of torchvision's ViT, from its weights."""
    found: list[Tensor] = []
    x = net._process_input(image.clone().requires_grad_())
    x = torch.cat([net.class_token.expand(len(x), -1, -1), x], dim=1) + net.encoder.pos_embedding
    for block in net.encoder.layers:
        y, attention = block.ln_1(x), block.self_attention
        heads = attention.num_heads
        projected = functional.linear(y, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (
            each.unflatten(2, (heads, -1)).transpose(1, 2) for each in projected.chunk(3, dim=2)
        )
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=3)
        weights.retain_grad()
        found.append(weights)
        x = x + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return net.heads(net.encoder.ln(x)[:, 0]), found


CLASS_TOKEN = {
    "vit": ([0], 1),
    "timm_vit": ([0], 1),
    "timm_deit": ([0], 1),
    "timm_deit_distilled": ([0, 1], 2),
    "timm_deit3": ([0], 1),
    "timm_dinov2": ([0], 1),
    "timm_dinov2_registers": ([0], 5),
}
"""The tokens that the head reads, and how many come before the patches, by the papers."""

MEAN = {
    "timm_vit_gap": (range(1, 17), 1),
    "timm_siglip_gap": (range(16), 0),
    "timm_beit": (range(1, 17), 1),
    "timm_eva02": (range(1, 17), 1),
}


def by_peer(name: str) -> tuple[Tensor, list[Tensor]]:
    net, image = served(name).replicate(), image_of(served(name))
    return (attentions_by_hand if name == "vit" else attentions_by_hooks)(net, image)


@pytest.mark.parametrize("name", [*CLASS_TOKEN, *MEAN])
def test_the_attention_seen_is_that_of_the_layers(name: str) -> None:
    _, expected = by_peer(name)
    found: list[Tensor] = []
    net = served(name).replicate()
    with torch.no_grad(), AttentionMode(lambda each: found.append(each) or each):
        net(image_of(served(name)))
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_outputs_and_gradients_are_the_untouched_models(name: str) -> None:
    """In float32 for 15 models; the deeper ones round by more, and are compared in float64."""
    model = served(name)
    dtype, near = (torch.float64, 1e-9) if name in zoo.OTHERS else (torch.float32, 1e-5)
    net, image = copy.deepcopy(model.module).to(dtype), image_of(model).to(dtype)

    def passed(mode: AttentionMode | None) -> tuple[Tensor, Tensor]:
        pixels = image.clone().requires_grad_()
        if mode is None:
            logits = model.logits(net(pixels))
        else:
            with mode:
                logits = model.logits(net(pixels))
        return logits.detach(), torch.autograd.grad(logits[0, 3], pixels)[0]

    expected = passed(None)
    calls = range(1000)
    for note in (Rollout([]), Differentiable(calls)):
        for ours, theirs in zip(passed(AttentionMode(note)), expected, strict=True):
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < near


def test_four_threads_record_their_own_attention_alone() -> None:
    """Two record, two do not; one of each runs the very same modules."""
    model = served("timm_vit")
    shared, own = model.replicate(), model.replicate()
    images = [image_of(model, seed) for seed in range(4)]
    with torch.no_grad():
        expected = [shared(image) for image in images]
    start = threading.Barrier(4)

    def work(number: int) -> list[tuple[Tensor, int]]:
        net, results = (shared, shared, own, own)[number], []
        start.wait(10)
        for _ in range(20):
            found: list[Tensor] = []
            with torch.no_grad():
                if number % 2:
                    with AttentionMode(lambda each, found=found: found.append(each) or each):
                        logits = net(images[number])
                else:
                    logits = net(images[number])
            results.append((logits, len(found)))
        return results

    with ThreadPoolExecutor(4) as threads:
        for number, results in enumerate(threads.map(work, range(4))):
            for logits, seen in results:
                assert seen == (3 if number % 2 else 0)
                torch.testing.assert_close(logits, expected[number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"attn_mask": torch.randn(5, 6)},
    {"attn_mask": torch.arange(30).reshape(5, 6) % 3 > 0},
    {"attn_mask": torch.zeros(5, 6, dtype=torch.bool)},
])  # fmt: skip
def test_attention_weights_are_those_of_torchs_own_function(options) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator) for n in (5, 6, 6))
    expected = functional.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(attention_weights(q, k, options) @ v, expected)


def test_grouped_queries_and_dropout_give_what_they_give() -> None:
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    found: list[Tensor] = []
    with AttentionMode(lambda each: found.append(each) or each):
        ours = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        functional.scaled_dot_product_attention(q, q, q, None, 0.5)
        torch.zeros(2, 5).softmax(dim=-1), torch.zeros(2, 5, 5).softmax(dim=1)
    torch.testing.assert_close(
        ours, functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )
    assert [each.shape for each in found] == [(1, 4, 5, 5)]


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_is_seen_whether_it_returns_its_weights_or_not(need_weights) -> None:
    net = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, found = torch.randn(1, 5, 8), list[Tensor]()
    with torch.no_grad(), AttentionMode(lambda each: found.append(each) or each):
        ours, _ = net(x, x, x, need_weights=need_weights)
    with torch.no_grad():
        expected, weights = net(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(found[0].reshape(1, 2, 5, 5), weights)


# ---- the maps


@pytest.mark.parametrize("name", [*CLASS_TOKEN, *MEAN])
def test_attention_rollout_is_the_papers_product_at_what_the_head_reads(name: str) -> None:
    """Abnar and Zuidema 2020: mean over heads, half of the residual, layer upon layer."""
    rows, prefix = (CLASS_TOKEN | MEAN)[name]
    _, attentions = by_peer(name)
    flow = torch.eye(attentions[0].shape[-1], dtype=torch.float64)
    for attention in attentions:
        flow = (attention[0].detach().double().mean(dim=0) / 2 + torch.eye(len(flow)) / 2) @ flow
    expected = flow[list(rows)].mean(dim=0)[prefix:].reshape(4, 4)
    assert oracles.distance(explained(served(name), "attention_rollout"), expected) < 1e-5


def test_a_pooling_heads_own_attention_is_the_last_factor() -> None:
    """SigLIP: one learned query draws from all patches; nothing goes around it."""
    model = served("timm_siglip")
    assert model.attention.rows == (0,)
    assert not model.attention.class_token
    found: list[Tensor] = []
    _, attentions = attentions_by_hooks(model.replicate(), image_of(model))
    net = model.replicate()
    pool = net.attn_pool
    pool.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        net(image_of(model))
        heads = pool.num_heads
        q = pool.q_norm(pool.q(pool.latent).unflatten(2, (heads, -1)).transpose(1, 2))
        k = pool.kv(found[0]).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)[0]
        weights = (q @ pool.k_norm(k).transpose(2, 3) * pool.scale).softmax(dim=-1)
    flow = torch.eye(16)
    for attention in attentions[:3]:
        flow = (attention[0].detach().mean(dim=0) / 2 + torch.eye(16) / 2) @ flow
    expected = (weights[0].mean(dim=0) @ flow)[0].reshape(4, 4)
    assert oracles.distance(explained(model, "attention_rollout"), expected.double()) < 1e-5


@pytest.mark.parametrize("contrast", [None, 5])
@pytest.mark.parametrize("name", CLASS_TOKEN)
def test_gae_is_the_papers_sum_of_positive_gradient_times_attention(name: str, contrast) -> None:
    """Chefer et al. 2021, equations 5 and 6, from gradients that autograd left on the attention."""
    rows, prefix = CLASS_TOKEN[name]
    logits, attentions = by_peer(name)
    value = logits[0, 3] if contrast is None else logits[0, 3] - logits[0, contrast]
    value.backward()
    relevance = torch.eye(attentions[0].shape[-1])
    for each in attentions:
        cam = (each.grad * each.detach())[0].clamp(min=0).mean(dim=0)
        relevance = relevance + cam @ relevance
    expected = relevance[list(rows)].mean(dim=0)[prefix:].reshape(4, 4)
    compared = None if contrast is None else Contrast((contrast,))
    ours = explained(served(name), "gae", contrast=compared)
    assert oracles.distance(ours, expected.double()) < 1e-4


def test_gae_of_several_classes_is_that_of_each_alone() -> None:
    model = served("timm_vit")
    (answer,) = oracles.answers(model, Question(PIXELS, targets=(3, 1), method="gae"))
    first, second = (oracles.raw(each) for each in answer.explanations)
    assert oracles.distance(first, explained(model, "gae")) < 1e-5
    assert float((first - second).abs().max()) > 1e-3 * float(first.max())
    assert "class_blind" not in answer.explanations[0].flags


def test_rollout_is_the_same_for_all_classes_and_says_so() -> None:
    question = Question(PIXELS, targets=(3, 1), method="attention_rollout")
    (answer,) = oracles.answers(served("timm_vit"), question)
    first, second = answer.explanations
    assert (first.grid == second.grid).all()
    assert "class_blind" in first.flags


# ---- refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin", "within windows"),
        ("timm_swin", "within windows"),
        ("timm_swinv2", "within windows"),
        ("timm_pvt", "different numbers of tokens"),
        ("timm_crossvit", "different numbers of tokens"),
        ("timm_cait", "different numbers of tokens"),
        ("timm_xcit", "tokens or channels"),
    ],
)
@pytest.mark.parametrize("method", ["attention_rollout", "gae"])
def test_a_model_whose_attention_cannot_be_multiplied_is_refused_with_the_reason(
    name: str, reason: str, method: str
) -> None:
    with pytest.raises(InvalidOption, match=reason):
        check_method(served(name), method)


@pytest.mark.parametrize("name", [*MEAN, "timm_siglip"])
def test_gae_is_refused_without_a_class_token(name: str) -> None:
    check_method(served(name), "attention_rollout")
    with pytest.raises(InvalidOption, match="defined for a class token"):
        check_method(served(name), "gae")


def test_memory_is_bounded_before_the_run(monkeypatch) -> None:
    """Three layers of two heads, 17 × 17 tokens, with gradients; of rollout, one layer."""
    model = served("timm_vit")
    whole = 3 * 3 * 2 * 17 * 17 * 4
    for method, size in (("gae", whole), ("attention_rollout", whole // 3)):
        monkeypatch.setattr(method_table, "ATTENTION_BYTES", size)
        check_method(model, method)
        monkeypatch.setattr(method_table, "ATTENTION_BYTES", size - 1)
        with pytest.raises(InvalidOption, match="smaller images"):
            check_method(model, method)


class OffTheWay(nn.Module):
    """Attention that the logits do not need, before and behind the one that they do."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, stride=16)
        self.norm = nn.LayerNorm(8)
        self.unused, self.attention = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in "12")
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        self.unused(x, x, x)
        mixed = self.attention(x, x, x)[0]
        self.unused(mixed, mixed, mixed)
        return self.head(mixed.mean(dim=1))


class Pooled(OffTheWay):
    """A CNN whose pooling is attention from one query to all places."""

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.attention(places[:, :1] * 0, places, places)[0][:, 0])


class Channels(OffTheWay):
    """Attention from channel to channel, as in XCiT."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        weights = (x.transpose(1, 2) @ x)[:, None].softmax(dim=-1)
        return self.head((x[:, None] @ weights).mean(dim=(1, 2)))


def test_attention_between_channels_is_refused() -> None:
    with pytest.raises(InvalidOption, match="between 8 channels or queries"):
        check_method(tiny(Channels), "attention_rollout")


def tiny(build: Callable[[], nn.Module]) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return loaded(build(), side=64)


def test_attention_off_the_way_to_the_logits_has_no_part() -> None:
    model = tiny(OffTheWay)
    assert model.attention.calls == (1,)
    assert model.attention.rows == tuple(range(16))
    net, seen = model.replicate(), list[Tensor]()
    net.attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        net(image_of(model))
        _, weights = net.attention(seen[0], seen[0], seen[0], average_attn_weights=True)
    expected = (weights[0] / 2 + torch.eye(16) / 2).mean(dim=0).reshape(4, 4)
    assert oracles.distance(explained(model, "attention_rollout"), expected.double()) < 1e-5


def test_a_convolutional_network_with_a_pooling_query_is_rolled_out_by_that_alone() -> None:
    model = tiny(Pooled)
    assert model.attention.rows == (0,)
    assert explained(model, "attention_rollout").shape == (4, 4)


def test_a_network_without_attention_is_refused() -> None:
    for model in (tiny(SmallNet), replace(tiny(SmallNet), attention="it was not measured")):
        with pytest.raises(InvalidOption, match=r"cannot be explained by `gae`: it .* gradcam"):
            check_method(model, "gae")
