"""Loading tells constants that a model builds lazily from state that requests must not share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keeping
import pytest
import torch
from keeping import KEEPS, Keeping
from tiny import SmallNet, loaded
from torch import Tensor, nn

from service.errors import ConfigurationError
from service.models.catalog import ModelSpec
from service.models.loading import load_model
from service.models.pool import ModelPool
from service.models.probes.condition import Condition
from service.models.probes.lazy_state import resolve_lazy_state
from service.models.replicas import replicate

IMAGE = torch.zeros(1, 3, 32, 32)


def master(build: Callable[[], nn.Module]) -> nn.Module:
    return build().eval().requires_grad_(requires_grad=False)


class Lazy(SmallNet):
    """Builds constants in its first call, in four ways."""

    built = 0

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.by_size: dict[tuple[int, ...], Tensor] = {}
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            Lazy.built += 1
            self.table = torch.arange(7.0)
            self.head.sizes = [tuple(x.shape[2:])]
            self.mask = torch.ones(7)
        size = tuple(x.shape[2:])
        if size not in self.by_size:
            self.by_size[size] = torch.ones(7)
        return super().forward(x) * self.mask * self.by_size[size] + self.table


def test_constants_are_built_once_at_load_and_copied_with_the_master() -> None:
    module = master(Lazy)
    assert resolve_lazy_state(module, IMAGE) == ()
    Lazy.built = 0
    pool = ModelPool([replace(loaded(SmallNet()), module=module)], replicas=2)
    for _ in range(4):
        with pool.lease("tiny") as one, pool.lease("tiny") as two:
            one.module(IMAGE)
            two.module(torch.rand(2, 3, 32, 32))
    assert Lazy.built == 0
    assert pool.replaced == {"tiny": 0}


class First(SmallNet):
    """Keeps what it made of the first image for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.mean(dim=(2, 3)).sum()
        return super().forward(x) + self.first


def test_what_depends_on_the_first_image_is_no_constant() -> None:
    module = master(First)
    assert resolve_lazy_state(module, IMAGE) == ("attribute changed: first",)
    assert module.first is None


class OnlyWithRed(SmallNet):
    """Writes the same value in each call, until an image is red."""

    def forward(self, x: Tensor) -> Tensor:
        self.features.red = bool((x > 9).any())
        return super().forward(x) + float(self.features.red)


def test_what_each_call_writes_is_state_though_the_value_is_mostly_equal() -> None:
    assert resolve_lazy_state(master(OnlyWithRed), IMAGE) == ("attribute changed: features.red",)


class OnlyWithGradients(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.head.seen = x
        return super().forward(x)


def test_what_is_written_only_when_gradients_are_wanted_is_seen() -> None:
    assert resolve_lazy_state(master(OnlyWithGradients), IMAGE) == ("attribute changed: head.seen",)


@pytest.mark.parametrize("kind", KEEPS)
def test_what_a_model_keeps_at_every_call_is_undone_without_being_counted(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = master(lambda: Keeping(kind))
    before = {name: id(value) for name, value in vars(module).items()}
    stateful = resolve_lazy_state(module, IMAGE)
    assert stateful
    assert {name: id(value) for name, value in vars(module).items()} == before
    pool = ModelPool([replace(loaded(SmallNet()), module=module, stateful=stateful)], replicas=1)
    images = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    alone = [replicate(module)(image) for image in images]
    for number in (0, 1, 1, 0):
        with pool.lease("tiny") as replica:
            assert torch.equal(replica.module(images[number]), alone[number])
    assert pool.replaced == {"tiny": 0}
    assert pool.faults() == []
    assert "replica_replaced" not in capsys.readouterr().err


class Training(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.bias.add_(1)
        return super().forward(x)


def test_a_model_that_writes_into_its_parameters_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="writes into its parameters"):
        resolve_lazy_state(master(Training), IMAGE)


@pytest.mark.parametrize("prepare", ["plain", "weight_norm", "fails", "scripted"])
def test_models_without_state_have_none(prepare: str) -> None:
    module: Any = master(SmallNet)
    if prepare == "weight_norm":
        module = master(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 3)))
    elif prepare == "fails":
        module = master(lambda: nn.Linear(31, 3))
    elif prepare == "scripted":
        with pytest.warns(FutureWarning):
            module = torch.jit.script(module)
    condition = Condition.of(module)
    assert resolve_lazy_state(module, IMAGE) == ()
    assert condition.faults() == []


def test_a_model_that_was_built_in_inference_mode_is_explained() -> None:
    """Its tensors have no version counter, and no gradient passes them."""
    spec = ModelSpec("tiny", "keeping:built_in_inference_mode")
    model = load_model(spec, allow_random_weights=True)
    assert model.no_gradients is None
    assert not any(tensor.is_inference() for tensor in model.module.state_dict().values())


class Forgetful(SmallNet):
    """Drops its table when it is converted or set to a mode, as timm's LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        self.table = {}
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.table = {}
        return super()._apply(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.table:
            self.table["bias"] = torch.ones(7)
        return super().forward(x) + self.table["bias"]


def test_constants_are_built_behind_everything_that_drops_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeping, "forgetful", Forgetful, raising=False)
    model = load_model(ModelSpec("tiny", "keeping:forgetful"), allow_random_weights=True)
    assert model.stateful == ()
    assert model.folded is not None
    pool = ModelPool([model], replicas=1)
    for folded in (False, True):
        with pool.lease("tiny", folded=folded) as replica:
            replica.module(IMAGE)
    assert pool.replaced == {"tiny": 0}
