"""The condition of a module: what it sees, what it leaves alone, and what it restores."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from keeping import KEEPS, Keeping, Unreadable
from tiny import SmallNet, loaded
from torch import Tensor, nn

from service.models.loaded import LoadedModel
from service.models.pool import ModelPool
from service.models.probes.condition import Condition

IMAGES = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def leased(pool: ModelPool, image: Tensor) -> Tensor:
    with pool.lease("tiny", timeout=0) as replica, torch.no_grad():
        return replica.module(image)


@functools.cache
def model_that_keeps(kind: str) -> LoadedModel:
    module = Keeping(kind).eval().requires_grad_(requires_grad=False)
    return replace(loaded(SmallNet()), module=module)  # which never ran


@pytest.mark.parametrize("kind", KEEPS)
def test_what_a_model_keeps_of_one_call_is_seen_and_never_reaches_the_next(kind: str) -> None:
    pool = ModelPool([model_that_keeps(kind)], replicas=1)
    alone = [leased(ModelPool([model_that_keeps(kind)], replicas=1), image) for image in IMAGES]
    for number, image in enumerate((*IMAGES, *IMAGES)):
        assert torch.equal(leased(pool, image), alone[number % 2])
        assert pool.replaced == {"tiny": number + 1}
    assert pool.faults() == []


@pytest.mark.parametrize("kind", KEEPS)
def test_what_is_bound_or_held_is_restored_and_tensors_that_were_written_are_not(kind: str) -> None:
    module = Keeping(kind).eval().requires_grad_(requires_grad=False)
    condition = Condition.of(module)
    module(IMAGES[0])
    assert condition.faults()
    condition.restore()
    written = kind in {"tensor_in_place", "buffer_in_place", "array", "buffer_data"}
    rebuilt = kind in {"parameter_bound_again", "module_replaced"}
    assert bool(condition.faults()) is (written or rebuilt)


def test_the_words_name_the_attribute() -> None:
    module = Keeping("added_attribute").eval()
    condition = Condition.of(module)
    module(IMAGES[0])
    assert condition.faults() == ["attribute changed: head.kept"]


def test_a_class_whose_forward_was_replaced_is_seen_and_restored() -> None:
    """All modules of the class would run it."""

    class Own(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    module = Own().eval()
    plain, condition = Own.forward, Condition.of(module)
    Own.forward = lambda self, x: plain(self, x) + 1
    assert condition.faults() == ["forward replaced"]
    condition.restore()
    assert Own.forward is plain
    assert condition.faults() == []


class Computing(SmallNet):
    """Computes constants again in each call, and binds equal values."""

    def __init__(self) -> None:
        super().__init__()
        self.grid, self.size, self.scale = torch.arange(16.0), torch.Size([1, 3]), 1.5
        self.names = ("a", "b")
        self.register_buffer("mask", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        self.grid, self.mask = torch.arange(16.0), torch.ones(16)
        self.size, self.scale, self.names = torch.Size([1, 3]), 3 / 2, tuple("ab")
        return super().forward(x)


def test_what_is_computed_again_and_equal_is_unchanged() -> None:
    module = Computing().eval()
    condition = Condition.of(module)
    module(IMAGES[0])
    assert condition.faults() == []


@pytest.mark.parametrize("prepare", ["plain", "inference"])
def test_a_module_that_only_answers_is_clean(prepare: str) -> None:
    module = SmallNet().eval().requires_grad_(requires_grad=False)
    if prepare == "inference":  # has no version counter
        with torch.inference_mode():
            module.features[1].running_mean = module.features[1].running_mean.clone()
    condition = Condition.of(module)
    module(IMAGES[0])
    assert condition.faults() == []


def test_a_loop_of_objects_ends() -> None:
    module = SmallNet().eval()
    module.table = {}
    module.table["itself"], module.back = module.table, [module]
    condition = Condition.of(module)
    assert condition.faults() == []
    module.table["more"] = 1
    assert condition.faults() == ["attribute changed: table"]


def test_a_long_list_is_compared_in_bounded_work() -> None:
    """Of what is longer, the length is compared."""
    looked_at = 0

    class Counted:
        @property
        def __dict__(self) -> dict[str, object]:
            nonlocal looked_at
            looked_at += 1
            return {}

    module = SmallNet().eval()
    module.long = [Counted() for _ in range(100_000)]
    condition = Condition.of(module)
    looked_at = 0
    assert condition.faults() == []
    assert looked_at <= 256
    module.long.append(None)
    assert condition.faults() == ["attribute changed: long"]


def test_an_object_that_copies_share_is_left_alone() -> None:
    """To restore it would change it under the other replicas."""

    class Shared:
        def __deepcopy__(self, memo: object) -> Shared:
            return self

    module = SmallNet().eval()
    module.shared = Shared()
    condition = Condition.of(module)
    module.shared.value = 1
    condition.restore()
    assert module.shared.value == 1


def test_what_cannot_be_looked_into_is_dirty_and_is_replaced() -> None:
    pool = ModelPool([loaded(SmallNet())], replicas=1)
    with pool.lease("tiny") as replica:
        replica.module.features.thing = Unreadable()
        assert isinstance(replica.module.features, nn.Sequential)
    assert pool.replaced == {"tiny": 1}
    assert leased(pool, IMAGES[0]).shape == (1, 7)


def test_an_object_that_cannot_be_looked_into_is_compared_by_its_identity() -> None:
    module = SmallNet().eval()
    module.thing = Unreadable()
    condition = Condition.of(module)
    assert condition.faults() == []
    module.thing = Unreadable()
    assert condition.faults() == ["attribute changed: thing"]
