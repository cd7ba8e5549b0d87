"""Batch normalisations folded away: the same numbers, the same tree, and where it differs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torchvision
from tiny import loaded
from torch import nn

from service.errors import ModelNotReady
from service.inference.batch import run
from service.inference.questions import Question, lane_of
from service.models.compiled import folding
from service.models.compiled.folding import fold
from service.models.compiled.front import CompiledLane
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool
from service.models.replicas import replicate

torch.manual_seed(0)

PATIENCE = 10.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 1)
        self.after = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        for norm in (self.bn, self.after):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        y = self.shared(x)
        return self.head((self.after(y) + y).mean((2, 3)))


class Branching(Net):
    """Its control flow cannot be traced."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def test_a_pair_is_folded_and_gives_the_same() -> None:
    net = frozen(Net())
    folded = fold(replicate(net))
    x = torch.rand(2, 3, 8, 8)
    assert folded is not None
    assert folded.layers == {"conv", "bn"}
    torch.testing.assert_close(folded.module(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_convolution_whose_output_goes_elsewhere_too_is_left() -> None:
    folded = fold(replicate(frozen(Net())))
    assert folded is not None
    assert type(folded.module.get_submodule("after")) is nn.BatchNorm2d


def test_the_tree_keeps_its_names_and_the_model_its_weights() -> None:
    net = frozen(torchvision.models.resnet18(weights=None, num_classes=5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded = fold(replicate(net))
    assert folded is not None
    names = [path for path, _ in net.named_modules()]
    assert [path for path, _ in folded.module.named_modules()] == names
    assert type(folded.module.get_submodule("layer1.0.bn1")) is nn.Identity
    assert len(folded.layers) == 40
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    shared = folded.module.get_submodule("fc").weight
    assert shared.data_ptr() == net.fc.weight.data_ptr()


def test_the_form_is_built_once_however_many_ask_first(monkeypatch: pytest.MonkeyPatch) -> None:
    build, built, together = folding._folded, [], threading.Barrier(8)

    def counted(*arguments: Any) -> nn.Module:
        built.append(build(*arguments))
        return built[-1]

    def first_use(_: int) -> nn.Module:
        together.wait(PATIENCE)
        return folded.module

    monkeypatch.setattr(folding, "_folded", counted)
    folded = fold(frozen(Net()))
    assert folded is not None
    assert folded._module is None
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(first_use, range(8)))
    assert [*found] == built
    assert folded._module is not None


def test_a_form_that_was_dropped_is_built_again_with_the_same_numbers() -> None:
    x = torch.rand(2, 3, 8, 8)
    folded = fold(frozen(Net()))
    assert folded is not None
    before = folded.module
    answer = before(x)
    folded.drop()
    assert folded._module is None
    assert folded.module is not before
    assert torch.equal(folded.module(x), answer)


@pytest.mark.parametrize("module", [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), Branching()])
def test_nothing_to_fold_or_no_graph_to_see_it_in(module: nn.Module) -> None:
    assert fold(replicate(frozen(module))) is None


def test_a_convolution_with_hooks_of_its_own_is_left() -> None:
    net = Net()
    nn.utils.parametrizations.weight_norm(net.conv)
    folded = fold(replicate(frozen(net)))
    assert folded is None


def test_a_convolution_that_runs_twice_is_left() -> None:
    class Twice(Net):
        def forward(self, x):
            y = self.bn(self.conv(x))
            return y.mean((2, 3)) + self.conv(x).mean((2, 3))

    assert fold(replicate(frozen(Twice()))) is None


def test_a_request_for_a_folded_layer_goes_to_the_model_itself() -> None:
    net = frozen(Net())
    model = replace(loaded(net), folded=fold(replicate(net)))
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert lane_of(model, Question(pixels, method=None)) == "folded"
    assert lane_of(model, Question(pixels, layers=("shared",))) == "folded"
    assert lane_of(model, Question(pixels, layers=("conv",))) == "hooked"
    assert lane_of(model, Question(pixels, layers=("shared",), activations=("bn",))) == "hooked"


def test_the_pool_lends_both_forms() -> None:
    net = frozen(Net())
    model = replace(loaded(net), folded=fold(replicate(net)))
    pool = ModelPool([model], replicas=2)
    with pool.lease(model) as plain, pool.lease(model, folded=True) as folded:
        assert type(plain.module.get_submodule("bn")) is nn.BatchNorm2d
        assert type(folded.module.get_submodule("bn")) is nn.Identity
        question = Question(torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), layers=("bn",))
        (one,), (other,) = run(plain, [question]), run(folded, [question])
    torch.testing.assert_close(
        torch.tensor(one.explanations[0].grid), torch.tensor(other.explanations[0].grid)
    )
    assert pool.faults() == []


def beside_a_lane(net: nn.Module) -> LoadedModel:
    lane = CompiledLane("shared", *[cast(Any, None)] * 2)
    return replace(loaded(net), compiled=lane, folded=fold(net))


def test_beside_a_compiled_lane_the_form_is_built_when_it_is_first_leased() -> None:
    model = beside_a_lane(frozen(Net()))
    pool = ModelPool([model], replicas=2)
    with pool.lease(model) as plain:
        assert type(plain.module.get_submodule("bn")) is nn.BatchNorm2d
    assert model.folded._module is None
    assert (pool.lost, pool.faults(), pool.has_missing) == ({}, [], False)
    with pool.lease(model, folded=True) as one, pool.lease(model, folded=True) as two:
        assert one is not two
        assert type(one.module.get_submodule("bn")) is nn.Identity
    assert (pool.lost, pool.faults(), pool.has_missing) == ({}, [], False)


def test_of_many_first_users_each_gets_a_replica_and_none_is_built_too_many() -> None:
    """More users than replicas, all at once: those without one wait."""
    model, together = beside_a_lane(frozen(Net())), threading.Barrier(6)
    pool, x = ModelPool([model], replicas=3), torch.rand(1, 3, 8, 8)

    def answer(_: int) -> torch.Tensor:
        together.wait(PATIENCE)
        with pool.lease(model, PATIENCE, folded=True) as replica, torch.no_grad():
            return replica.module(x)

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(answer, range(6)))
    expected = model.folded.module(x)
    assert all(torch.equal(each, expected) for each in found)
    assert pool.faults() == []


def test_a_form_that_cannot_be_built_at_its_first_use_is_refused_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> nn.Module:
        raise RuntimeError("planted: cannot be folded")

    now = [100.0]
    model = beside_a_lane(frozen(Net()))
    pool = ModelPool([model], replicas=1, clock=lambda: now[0])
    with monkeypatch.context() as patch:
        patch.setattr(folding, "_folded", fail)
        with (
            pytest.raises(ModelNotReady, match="No replica of it can be built"),
            pool.lease(model, PATIENCE, folded=True),
        ):
            pass
    assert list(pool.lost) == [model.name]
    with pool.lease(model, PATIENCE):
        pass
    now[0] += 1
    with pool.lease(model, PATIENCE, folded=True) as replica:
        assert type(replica.module.get_submodule("bn")) is nn.Identity
    assert (pool.lost, pool.faults()) == ({}, [])
