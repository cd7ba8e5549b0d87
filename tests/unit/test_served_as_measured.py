"""A model is served as what it was measured to be: its output, its input, its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from misbehaving import SIDE, Crops
from tiny import SmallNet
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from service.errors import ConfigurationError, InvalidOption
from service.models import loading
from service.models.catalog import InputSpec, ModelSpec
from service.models.loading import load_model
from service.models.models_toml import read_config

INPUT = InputSpec(size=(SIDE, SIDE), mean=(0.0,), std=(1.0,))


def load(builder: str, **more: Any):
    return load_model(ModelSpec("m", f"misbehaving:{builder}", **{"input": INPUT} | more))


def own_output(model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(images)


@pytest.mark.parametrize(
    ("builder", "chances"),
    [
        ("softmax", lambda output: output),
        ("log_softmax", torch.exp),
        ("sigmoid", lambda output: output),
    ],
)
def test_scores_of_a_model_with_its_own_activation_are_its_output(builder: str, chances) -> None:
    model = load(builder)
    images = torch.rand(2, 3, SIDE, SIDE)
    expected = chances(own_output(model, images))
    logits = model.logits(own_output(model, images))
    assert torch.allclose(model.scores(logits), expected, atol=1e-6)
    assert torch.allclose(logits, expected.log() - (1 - expected).log(), atol=1e-4)


def test_an_operator_who_wants_the_output_as_it_is_gets_it() -> None:
    model = load("softmax", output="none")
    images = torch.rand(1, 3, SIDE, SIDE)
    assert torch.equal(model.logits(own_output(model, images)), own_output(model, images))


def test_a_softmax_of_one_logit_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"softmax of one logit is 1 .* \[negative, positive\]"
    ):
        load("one_logit")
    with pytest.raises(ConfigurationError, match="softmax of one"):
        load("one_logit", output="softmax", labels=("no", "yes"))


@pytest.mark.parametrize("output", [None, "sigmoid"])
def test_one_logit_is_served_for_two_labels(output: str | None) -> None:
    model = load("one_logit", output=output, labels=("no", "yes"))
    logit = own_output(model, torch.rand(1, 3, SIDE, SIDE))
    logits = model.logits(logit)
    assert torch.equal(logits, torch.cat([-logit, logit], dim=1))
    assert torch.allclose(model.scores(logits).sum(), torch.tensor(1.0))
    assert model.labels == ("no", "yes")


def test_one_probability_is_served_for_two_labels() -> None:
    model = load("one_probability", labels=("no", "yes"))
    chance = own_output(model, torch.rand(1, 3, SIDE, SIDE))
    scores = model.scores(model.logits(chance))
    assert torch.allclose(scores, torch.cat([1 - chance, chance], dim=1), atol=1e-6)


def test_one_logit_and_one_label_stay_one_class() -> None:
    assert load("one_logit", output="sigmoid", labels=("cat",)).labels == ("cat",)
    assert load("one_logit", output="none").labels == ("class 0",)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mean = [123.675, 116.28, 103.53]", "write 0.485 for 123.675"),
        ("mean = 128", "write 0.502 for 128"),
        ("std = [58.395, 57.12, 57.375]", "write 0.229 for 58.395"),
        ("std = [0.2, 57.12, 0.2]", "write 0.224 for 57.12"),
    ],
)
def test_mean_and_std_in_0_to_255_are_named(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text(f'[[model]]\nname = "m"\nbuilder = "tiny:small"\ninput = {{ {text} }}\n')
    with pytest.raises(ConfigurationError, match=f"values in 0..1.*{named}"):
        read_config(file)


def test_metadata_in_0_to_255_are_named(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    safetensors.torch.save_file(SmallNet().state_dict(), file, {"mean": "123.7,116.3,103.5"})
    with pytest.raises(ConfigurationError, match=r"values in 0..1.*write 0.4851 for 123.7"):
        load_model(ModelSpec("m", "tiny:small", file))


def test_a_std_that_gives_0_to_255_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text(
        '[[model]]\nname = "m"\nbuilder = "tiny:small"\ninput = { mean = 0, std = 0.00392 }\n'
    )
    (spec,) = read_config(file)
    assert spec.input.std == (0.00392,)


def grey() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


class Grey(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


def test_a_model_of_one_channel_is_served_from_the_command_line_alone(monkeypatch) -> None:
    monkeypatch.setattr("misbehaving.one_channel", Grey, raising=False)
    preprocessing = load_model(ModelSpec("grey", "misbehaving:one_channel")).preprocessing
    assert preprocessing.channels == 1
    assert (preprocessing.mean, preprocessing.std) == ((0.449,), (0.226,))


def test_a_model_that_crops_its_input_sees_that_part() -> None:
    model = load("Crops")
    assert isinstance(model.module, Crops)
    assert model.preprocessing.covers == (0.25, 0.25, 0.5, 0.5)


def test_a_model_whose_replicas_are_not_independent_has_one() -> None:
    model = load("ReadsGlobal")
    assert model.replicate() is model.module
    assert load("Drops").behaviour.deterministic is False


@pytest.mark.parametrize("said", ["features", "features.4"])
def test_a_target_layer_in_no_known_order_is_refused_where_it_was_said(said: str) -> None:
    with pytest.raises(
        ConfigurationError, match="positions of its cells are not in rows and columns"
    ):
        load("Rolled", target_layer=said)


# ---- the target layer


@pytest.mark.parametrize(
    ("builder", "expected"),
    [
        ("ClassTokens", "blocks.2.norm1"),
        ("UnusedAtEnd", "features"),
        ("Spectral", "features"),
        ("OddlyShaped", "features"),
    ],
)
def test_an_odd_layer_takes_the_maps_of_no_other(builder: str, expected: str) -> None:
    model = load(builder)
    assert model.target_layer == expected
    assert model.layer(expected).target
    assert model.no_gradients is None


def test_a_model_without_a_default_layer_names_the_way_out() -> None:
    model = load("Flat")
    assert model.target_layer is None
    assert model.no_gradients is None
    with pytest.raises(InvalidOption, match=r"`layer`.*`target_layer`"):
        model.target_layers(())


def test_a_layer_in_no_known_order_says_so_when_it_is_named() -> None:
    with pytest.raises(InvalidOption, match="positions of its cells are not in rows and columns"):
        load("Rolled").target_layers(("features",))


def test_a_configured_target_layer_costs_no_more(monkeypatch) -> None:
    cost = count_forwards(monkeypatch)
    model = load("ClassTokens", target_layer="blocks.1.norm1")
    assert model.target_layer == "blocks.1.norm1"
    assert cost.total <= 25


@pytest.mark.parametrize(
    "builder",
    [
        *("sigmoid", "ReadsGlobal", "ReadsClosure", "forward_of_master", "Locked", "UnusedAtEnd"),
        *("Drops", "OwnFunction", "Crops", "ClassTokens", "Flat", "MeanOfBatch"),
    ],
)
def test_what_is_measured_costs_at_most_25_forward_passes(builder: str, monkeypatch) -> None:
    cost = count_forwards(monkeypatch)
    load(builder)
    assert 15 < cost.total <= 25


class Cost:
    total = 0.0


def count_forwards(monkeypatch) -> Cost:
    """Count what `_measured` runs: images through the module or a copy, and walks back."""
    cost, measure, walk = Cost(), loading._measured, torch.autograd.grad

    def measured(model, *more: Any):
        kind = type(model.module)

        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            cost.total += len(args[0]) if isinstance(module, kind) else 0

        def grad(*args: Any, is_grads_batched: bool = False, **named: Any) -> Any:
            cost.total += 1.5 * (len(args[2]) if is_grads_batched else 1)
            return walk(*args, is_grads_batched=is_grads_batched, **named)

        hook = register_module_forward_pre_hook(count)
        with hook, monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", grad)
            return measure(model, *more)

    monkeypatch.setattr(loading, "_measured", measured)
    return cost
