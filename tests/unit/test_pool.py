"""The pool: exclusive leases, and the proof that each replica came back as it was lent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny import SmallNet, loaded
from torch import nn

from service.errors import ConfigurationError, ModelNotReady, UnknownModel
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool, Replica

PATIENCE = 4.0


def small(name: str = "tiny", seed: int = 0) -> LoadedModel:
    return loaded(SmallNet(seed=seed), name)


def answer(replica: Replica) -> torch.Tensor:
    with torch.no_grad():
        return replica.module(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))


# ---- leases


def test_models_are_found_by_name_and_the_first_is_the_default() -> None:
    pool = ModelPool([small("one"), small("two")], replicas=1)
    assert list(pool.models) == ["one", "two"]
    assert pool.model(None).name == "one"
    assert pool.model("two").name == "two"
    assert pool.size("two") == 1
    with pytest.raises(UnknownModel, match=r"'tow'.*Did you mean 'two'\?.*Served: one, two"):
        pool.model("tow")


def test_an_unknown_model_cannot_be_leased() -> None:
    pool = ModelPool([small()], replicas=1)
    with pytest.raises(UnknownModel), pool.lease("other"):
        pass


def test_a_replica_has_one_user_at_a_time() -> None:
    pool = ModelPool([small()], replicas=2)
    with pool.lease("tiny") as first, pool.lease("tiny") as second:
        assert first is not second
        assert first.module is not second.module
        with pytest.raises(ModelNotReady, match="'tiny'"), pool.lease("tiny", timeout=0.01):
            pass
    assert pool.faults() == []


def test_a_lease_waits_until_a_replica_comes_back() -> None:
    pool = ModelPool([small()], replicas=1)
    with ThreadPoolExecutor(1) as threads:
        entered = threading.Event()

        def wait_for_it() -> Replica:
            entered.set()
            with pool.lease("tiny", timeout=PATIENCE) as replica:
                return replica

        with pool.lease("tiny") as lent:
            waiting = threads.submit(wait_for_it)
            assert entered.wait(PATIENCE)
            assert not waiting.done()
        assert waiting.result(PATIENCE) is lent


def test_leases_of_one_model_leave_the_others_alone() -> None:
    pool = ModelPool([small("one"), small("two")], replicas=1)
    with pool.lease("one"), pool.lease("two", timeout=0) as replica:
        assert replica.model.name == "two"


def test_the_replica_used_last_is_lent_first() -> None:
    """It is the warmest."""
    pool = ModelPool([small()], replicas=3)
    with pool.lease("tiny") as first:
        pass
    with pool.lease("tiny") as second:
        assert second is first


def test_replicas_share_parameters_and_nothing_else() -> None:
    pool = ModelPool([small()], replicas=2)
    with pool.lease("tiny") as one, pool.lease("tiny") as two:
        for mine, yours in zip(one.module.parameters(), two.module.parameters(), strict=True):
            assert mine.data_ptr() == yours.data_ptr()
            assert not mine.requires_grad
        for mine, yours in zip(one.module.buffers(), two.module.buffers(), strict=True):
            assert mine.data_ptr() != yours.data_ptr()
        with one.module.features.register_forward_hook(lambda *_: None):
            assert not two.module.features._forward_hooks
        assert not any(module.training for module in one.module.modules())


def test_the_master_is_never_lent() -> None:
    master = small()
    pool = ModelPool([master], replicas=1)
    with pool.lease("tiny") as replica:
        assert replica.module is not master.module


def test_many_threads_find_the_pool_whole_afterwards() -> None:
    pool = ModelPool([small()], replicas=2)
    inside = threading.Semaphore(2)

    def use(turn: int) -> None:
        with pool.lease("tiny", timeout=PATIENCE) as replica:
            assert inside.acquire(blocking=False), "more users than replicas"
            if turn % 3 == 0:
                replica.module.train()
            inside.release()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(use, range(60)))
    assert pool.faults() == []
    assert pool.replaced == {"tiny": 20}


# ---- proof


def leave_hook(module: nn.Module) -> None:
    module.features[0].register_forward_hook(lambda *_: None)


def fail_with_a_hook_left(module: nn.Module) -> None:
    leave_hook(module)
    raise RuntimeError("planted")


def leave_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def leave_backward_hook(module: nn.Module) -> None:
    module.head.register_full_backward_hook(lambda *_: None)


def leave_backward_pre_hook(module: nn.Module) -> None:
    module.head.register_full_backward_pre_hook(lambda *_: None)


def leave_gradient(module: nn.Module) -> None:
    module.head.weight.grad = torch.ones_like(module.head.weight)


def leave_part_in_training(module: nn.Module) -> None:
    module.features[1].train()


def leave_thawed(module: nn.Module) -> None:
    module.head.weight.requires_grad_()


def change_buffer(module: nn.Module) -> None:
    module.features[1].running_mean.add_(1)


def change_parameter(module: nn.Module) -> None:
    with torch.no_grad():
        module.head.weight.mul_(2)


FAULTS: dict[Callable[[nn.Module], None], str] = {
    leave_hook: "hooks left or removed",
    leave_pre_hook: "hooks left or removed",
    leave_backward_hook: "hooks left or removed",
    leave_backward_pre_hook: "hooks left or removed",
    leave_gradient: "gradients left",
    leave_part_in_training: "training mode changed",
    leave_thawed: "requires_grad changed",
    change_buffer: "buffers changed in place",
}


@pytest.mark.parametrize(("soil", "words"), FAULTS.items(), ids=[each.__name__ for each in FAULTS])
def test_a_dirty_replica_is_counted_and_never_lent_again(soil, words: str, capsys) -> None:
    pool = ModelPool([small()], replicas=1)
    with pool.lease("tiny") as dirty:
        before = answer(dirty)
        soil(dirty.module)
        assert pool.replaced == {"tiny": 0}
    assert pool.replaced == {"tiny": 1}
    assert pool.faults() == []
    assert pool.hooks_live() == 0
    with pool.lease("tiny") as fresh:
        assert fresh is not dirty
        assert fresh.module is not dirty.module
        assert torch.equal(answer(fresh), before)
    assert pool.replaced == {"tiny": 1}


def test_a_clean_replica_is_lent_again() -> None:
    pool = ModelPool([small()], replicas=1)
    with pool.lease("tiny") as first:
        answer(first)
        leave = first.module.features.register_forward_hook(lambda *_: None)
        leave.remove()
    with pool.lease("tiny") as second:
        assert second is first
    assert pool.replaced == {"tiny": 0}


def test_an_exception_goes_on_and_the_replica_comes_back() -> None:
    pool = ModelPool([small()], replicas=1)
    with pytest.raises(RuntimeError, match="planted"), pool.lease("tiny"):
        raise RuntimeError("planted")
    assert pool.faults() == []
    assert pool.replaced == {"tiny": 0}


def test_a_replica_left_dirty_by_an_exception_is_replaced() -> None:
    pool = ModelPool([small()], replicas=1)
    with pytest.raises(RuntimeError), pool.lease("tiny") as replica:
        fail_with_a_hook_left(replica.module)
    assert pool.replaced == {"tiny": 1}
    assert pool.faults() == []


def test_hooks_are_counted_while_they_live() -> None:
    pool = ModelPool([small()], replicas=2)
    with pool.lease("tiny") as replica:
        handles = [
            module.register_forward_hook(lambda *_: None) for module in replica.module.features
        ]
        assert pool.hooks_live() == 5
        for handle in handles:
            handle.remove()
        assert pool.hooks_live() == 0


class OwnHook(SmallNet):
    """A model that brings a hook, as `weight_norm` does; without it its answer is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.head.register_forward_hook(lambda _module, _args, output: output + 1)


def test_hooks_that_a_model_owns_are_copied_and_clean() -> None:
    model = loaded(OwnHook())
    pool = ModelPool([model], replicas=2)
    for _ in range(3):
        with pool.lease("tiny") as replica:
            assert len(replica.module.head._forward_hooks) == 1
            answer(replica)
    assert pool.hooks_live() == 0
    assert pool.replaced == {"tiny": 0}


def test_a_model_that_lost_its_own_hook_is_dirty() -> None:
    pool = ModelPool([loaded(OwnHook())], replicas=1)
    with pool.lease("tiny") as replica:
        replica.module.head._forward_hooks.clear()
    assert pool.replaced == {"tiny": 1}
    with pool.lease("tiny") as fresh:
        assert len(fresh.module.head._forward_hooks) == 1


def test_the_pool_says_what_is_wrong_while_a_replica_is_away() -> None:
    pool = ModelPool([small()], replicas=2)
    with pool.lease("tiny"):
        assert pool.faults() == ["tiny: 1 of 2 replicas idle"]
    assert pool.faults() == []


# ---- parameters, which all replicas share, are changed


def test_changed_parameters_are_read_again_for_every_replica() -> None:
    """Also for the one that another user holds; only the guilty one is counted."""
    loads: list[str] = []

    def reload(model: LoadedModel) -> LoadedModel:
        loads.append(model.name)
        return small()

    pool = ModelPool([small()], replicas=3, reload=reload)
    with pool.lease("tiny") as innocent:
        before = answer(innocent)
    with pool.lease("tiny") as innocent, pool.lease("tiny") as guilty:
        change_parameter(guilty.module)
        assert not torch.equal(answer(innocent), before)
    assert loads == ["tiny"]
    with pool.lease("tiny") as one, pool.lease("tiny") as two, pool.lease("tiny") as three:
        for replica in (one, two, three):
            assert replica.model is pool.model("tiny")
            assert replica is not innocent
            assert replica is not guilty
            assert torch.equal(answer(replica), before)
    assert loads == ["tiny"]
    assert pool.faults() == []
    assert pool.hooks_live() == 0


@pytest.mark.parametrize(
    "error", [ConfigurationError("planted"), RuntimeError("planted"), OSError()]
)
def test_weights_that_cannot_be_read_again_leave_a_pool_that_still_lends(error) -> None:
    def reload(_: LoadedModel) -> LoadedModel:
        raise error

    pool = ModelPool([small()], replicas=1, reload=reload)
    with pool.lease("tiny") as replica:
        change_parameter(replica.module)
    assert pool.replaced == {"tiny": 1}
    with pool.lease("tiny", timeout=0):
        pass
    assert pool.faults() == []


# ---- versions


def test_a_newer_version_is_lent_to_new_users_and_the_old_one_to_those_who_hold_it() -> None:
    old, new = small(seed=0), replace(small(seed=1), version="1" * 12)
    pool = ModelPool([old], replicas=1)
    with pool.use("tiny") as held:
        assert held is old
        pool.put(new)
        assert pool.model("tiny") is new
        with pool.lease(held) as replica, pool.lease("tiny") as present:
            assert replica.model is old
            assert present.model is new
    with pytest.raises(UnknownModel, match="not served any more"), pool.lease(old):
        pass
    assert pool.faults() == []


def test_a_removed_model_is_unknown_and_finishes_what_it_does() -> None:
    pool = ModelPool([small("one"), small("two")], replicas=1)
    with pool.lease("one") as replica:
        pool.remove("one")
        assert answer(replica).shape == (1, 7)
        assert list(pool.models) == ["two"]
        with pytest.raises(UnknownModel), pool.lease("one"):
            pass
    assert pool.faults() == []
    with pytest.raises(UnknownModel):
        pool.remove("one")


def test_who_waits_for_a_version_that_is_replaced_meanwhile_still_gets_it() -> None:
    old = small()
    pool = ModelPool([old], replicas=1)
    with ThreadPoolExecutor(1) as threads:
        entered = threading.Event()

        def wait_for_it() -> LoadedModel:
            entered.set()
            with pool.lease(old, timeout=PATIENCE) as replica:
                return replica.model

        with pool.lease("tiny"):
            waiting = threads.submit(wait_for_it)
            assert entered.wait(PATIENCE)
            with pool._changed:
                assert pool._changed.wait_for(lambda: pool._versions[id(old)].users == 2, 1)
            pool.put(small(seed=1))
        assert waiting.result(PATIENCE) is old
    assert pool.faults() == []


def test_a_pool_without_models_says_that_none_is_loaded() -> None:
    pool = ModelPool(replicas=1)
    with pytest.raises(ModelNotReady):
        pool.model(None)
    with pytest.raises(UnknownModel):
        pool.model("tiny")
