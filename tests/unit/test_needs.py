"""What a model lacks for some methods is measured when it loads, and says so in a clause."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import SmallNet, loaded
from torch import Tensor, nn

from api_schemas.methods import METHODS
from service.inference.method_table import why_not
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel
from service.models.needs import missing_needs

NO_ATTENTION = "it has no attention between tokens"


class Smooth(nn.Module):
    """No ReLU, and two linear layers behind the last map."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 4, 3)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.gelu(self.maps(x)).mean(dim=(2, 3)))


class Failing(SmallNet):
    """Runs when its layers are traced, and never again."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).runs += 1
        if self.runs > 1:
            raise RuntimeError("planted")
        return super().forward(x)


def with_needs(module: nn.Module) -> LoadedModel:
    model = loaded(module)
    return replace(model, missing=missing_needs(model, torch.rand(1, 3, 32, 32)))


def refused(model: LoadedModel) -> dict[str, str | None]:
    reasons = {name: why_not(model, name) for name in METHODS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def without_attention(reasons: dict[str, str | None]) -> dict[str, str | None]:
    """The reasons of methods that attention has no part in."""
    return {name: why for name, why in reasons.items() if "attention" not in METHODS[name].needs}


def test_a_convolutional_net_lacks_attention_alone() -> None:
    reasons = refused(with_needs(SmallNet()))
    assert reasons == {"attention_rollout": NO_ATTENTION, "gae": NO_ATTENTION}


def test_a_net_without_relus_and_with_two_linear_layers_lacks_three_methods_more() -> None:
    assert refused(with_needs(Smooth())) == {
        "cam": "it has more than pooling and one linear layer behind maps",
        "guided_backprop": "it has no ReLU to guide",
        "guided_gradcam": "it has no ReLU to guide",
        "attention_rollout": NO_ATTENTION,
        "gae": NO_ATTENTION,
    }


@pytest.mark.parametrize("lack", ["no_layers", "no_gradients"])
def test_a_scripted_model_lacks_what_its_reason_says(lack: str) -> None:
    model = replace(loaded(SmallNet()), **{lack: "it is scripted"})
    assert missing_needs(model, torch.rand(1, 3, 32, 32)) == {}
    reasons = without_attention(refused(model))
    assert set(reasons.values()) == {"it is scripted"}
    assert {"gradcam", "input_gradient"} & reasons.keys()
    assert not {"rise", "occlusion"} & reasons.keys()


def test_a_model_without_a_feature_map_has_no_method_of_layers() -> None:
    model = loaded(SmallNet())
    layers = tuple(replace(layer, layout=None) for layer in model.layers)
    reasons = without_attention(refused(replace(model, layers=layers, target_layer=None)))
    assert set(reasons.values()) == {"none of its layers returns a feature map"}
    assert reasons.keys() == {name for name, record in METHODS.items() if record.has_layer}


def test_a_model_whose_pass_fails_lacks_nothing_that_is_known() -> None:
    assert missing_needs(loaded(Failing()), torch.rand(1, 3, 32, 32)) == {}


def test_the_measurement_leaves_the_model_as_it_was() -> None:
    module = SmallNet()
    module.features.append(nn.BatchNorm2d(16, momentum=0.5).train())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with_needs(module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("daisy", "rose"), "2 classes: daisy, rose"),
        (tuple(f"class {index}" for index in range(5)), "5 classes"),
        (tuple(f"bird {index}" for index in range(1000)), "1,000 classes"),
        (("a" * 150, "b" * 150), "2 classes"),
    ],
)
def test_a_model_knows_its_classes(labels: tuple[str, ...], words: str) -> None:
    assert replace(loaded(SmallNet()), labels=labels).knows == words


def test_the_built_in_model_knows_flowers_until_it_gets_other_weights() -> None:
    model = replace(loaded(SmallNet()), labels=("daisy", "rose"))
    builtin = replace(model, spec=ModelSpec("builtin", "builtin"))
    assert builtin.knows == "2 flowers: daisy, rose"
