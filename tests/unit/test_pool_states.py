"""The pool under any order of lease, release, crash, abandon, replace, use, unload and close."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from tiny import SmallNet, loaded
from torch import Tensor, nn

from service.errors import ModelNotReady, UnknownModel
from service.models.compiled.folding import fold
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool, Replica

NAMES = ("one", "two")
WITH_FOLDED_FORM = "one"
REPLICAS = 2
PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


class Crash(Exception):
    """What a user of a replica raises."""


# ---- what a user leaves behind


def leave_hook(module: nn.Module) -> None:
    module.features[0].register_forward_hook(lambda *_: None)


def leave_gradient(module: nn.Module) -> None:
    module.head.weight.grad = torch.ones_like(module.head.weight)


def leave_training_mode(module: nn.Module) -> None:
    module.train()


def leave_thawed(module: nn.Module) -> None:
    module.head.weight.requires_grad_()


def change_buffer(module: nn.Module) -> None:
    """Of the model as it is; its folded form has no buffer, and is given one."""
    for buffer in module.buffers():
        buffer.add_(1)
    module.head.register_buffer("left", torch.ones(1))


def change_parameter(module: nn.Module) -> None:
    with torch.no_grad():
        module.head.weight.mul_(2)


SOILS = (
    *(leave_hook, leave_training_mode, change_buffer),
    *(leave_gradient, leave_thawed, change_parameter),
)
"""Of the replica alone, but for the last: that is in the memory which all replicas share."""


# ---- models


@functools.cache
def _base(name: str, seed: int) -> LoadedModel:
    model = loaded(SmallNet(seed=seed), name, side=16)
    model = replace(model, version=f"{seed:012}")
    return replace(model, folded=fold(model.replicate())) if name == WITH_FOLDED_FORM else model


@functools.cache
def expected(name: str, version: str) -> Tensor:
    """What a model answers."""
    with torch.no_grad():
        return _base(name, int(version)).module(PICTURE)


def built(name: str, version: str) -> LoadedModel:
    """A model with memory of its own, as if it had just been read."""
    base = _base(name, int(version))
    module = copy.deepcopy(base.module)
    form = base.folded and fold(module)
    return replace(base, module=module, folded=form)


def reload(model: LoadedModel) -> LoadedModel:
    return built(model.name, model.version)


@dataclass(eq=False)
class Version:
    """One `put`. users: leases and uses of it that have not ended."""

    name: str
    seed: str
    module: weakref.ref[nn.Module]
    users: int = 0
    retired: bool = False


@dataclass(eq=False)
class Lent:
    """An open lease."""

    version: Version
    context: AbstractContextManager[Replica]
    replica: Replica
    abandoned: bool = False


@dataclass(eq=False)
class Used:
    """A version that is held by `use`."""

    version: Version
    context: AbstractContextManager[LoadedModel]
    model: LoadedModel


class PoolStates(RuleBasedStateMachine):
    """Rules are what users do, in one thread; a lease that would have to wait is refused."""

    leases: Bundle[Lent] = Bundle("leases")
    uses: Bundle[Used] = Bundle("uses")

    def __init__(self) -> None:
        super().__init__()
        self.pool = ModelPool(replicas=REPLICAS, reload=reload)
        self.current: dict[str, Version] = {}
        self.versions: list[Version] = []
        self.lent: list[Lent] = []
        self.used: list[Used] = []
        self.outcasts: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    # ---- models come and go

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 2))
    def put(self, name: str, seed: int) -> None:
        model = built(name, str(seed))
        self.pool.put(model)
        if name in self.current:
            self.current[name].retired = True
        self.current[name] = Version(name, model.version, weakref.ref(model.module))
        self.versions.append(self.current[name])

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        if name in self.current:
            self.pool.remove(name)
            self.current.pop(name).retired = True
        else:
            with pytest.raises(UnknownModel):
                self.pool.remove(name)

    # ---- versions are held

    @rule(target=uses, name=st.sampled_from(NAMES))
    def use(self, name: str) -> object:
        context = self.pool.use(name)
        if name not in self.current:
            with pytest.raises(UnknownModel):
                context.__enter__()
            return multiple()
        used = Used(self.current[name], context, context.__enter__())
        used.version.users += 1
        self.used.append(used)
        assert used.model.version == used.version.seed
        return used

    @rule(used=consumes(uses))
    def end_use(self, used: Used) -> None:
        used.context.__exit__(None, None, None)
        used.version.users -= 1
        self.used.remove(used)
        del used.context, used.model

    # ---- replicas are lent

    @rule(target=leases, name=st.sampled_from(NAMES), folded=st.booleans())
    def lease_by_name(self, name: str, folded: bool) -> object:
        if name not in self.current:
            with pytest.raises(UnknownModel):
                self.pool.lease(name).__enter__()
            return multiple()
        return self._lease(name, self.current[name], folded=folded)

    @rule(target=leases, used=uses, folded=st.booleans())
    def lease_what_is_held(self, used: Used, folded: bool) -> object:
        return self._lease(used.model, used.version, folded=folded)

    def _lease(self, model: LoadedModel | str, version: Version, *, folded: bool) -> object:
        folded = folded and version.name == WITH_FOLDED_FORM
        out = [each.replica.folded for each in self._away() if each.version is version]
        context = self.pool.lease(model, timeout=0, folded=folded)
        if out.count(folded) == REPLICAS:
            with pytest.raises(ModelNotReady):
                context.__enter__()
            return multiple()
        replica = context.__enter__()
        version.users += 1
        lent = Lent(version, context, replica)
        self._is_fit(lent)
        self.lent.append(lent)
        return lent

    def _is_fit(self, lent: Lent) -> None:
        """Lent to nobody else, never soiled or abandoned, and it answers as its version does."""
        module = lent.replica.module
        assert all(module is not other.replica.module for other in self.lent)
        assert module not in self.outcasts
        with torch.no_grad():
            torch.testing.assert_close(
                module(PICTURE), expected(lent.version.name, lent.version.seed)
            )

    def _away(self) -> list[Lent]:
        return [each for each in self.lent if not each.abandoned]

    # ---- and come back

    @rule(lent=consumes(leases), crashes=st.booleans())
    def release_clean(self, lent: Lent, crashes: bool) -> None:
        self._release(lent, crashes=crashes)

    @rule(lent=consumes(leases), soils=st.permutations(SOILS), crashes=st.booleans())
    def release_dirty(
        self, lent: Lent, soils: list[Callable[[nn.Module], None]], crashes: bool
    ) -> None:
        replaced = self.pool.replaced.get(lent.version.name, 0)
        soils[0](lent.replica.module)
        self.outcasts.add(lent.replica.module)
        self._release(lent, crashes=crashes)
        if not lent.abandoned:
            assert self.pool.replaced[lent.version.name] == replaced + 1

    @rule(lent=leases)
    def abandon(self, lent: Lent) -> None:
        self.pool.abandon(lent.replica)
        self.outcasts.add(lent.replica.module)
        lent.abandoned = True

    def _release(self, lent: Lent, *, crashes: bool) -> None:
        raised = Crash() if crashes else None
        taken = lent.context.__exit__(type(raised) if raised else None, raised, None)
        assert not taken, "the exception goes on"
        lent.version.users -= 1
        self.lent.remove(lent)
        del lent.context, lent.replica  # what was consumed is still known to Hypothesis

    # ---- what always holds

    @invariant()
    def whole_when_nothing_is_out(self) -> None:
        if not self.lent and not self.used:
            assert self.pool.faults() == []

    @invariant()
    def no_hook_lives(self) -> None:
        assert self.pool.hooks_live() == 0

    @invariant()
    def there_are_as_many_replicas_as_there_must_be(self) -> None:
        forms = {name: 2 if name == WITH_FOLDED_FORM else 1 for name in NAMES}
        kept = [each for each in self.versions if not each.retired or each.users]
        assert len(self.pool._live) == sum(REPLICAS * forms[each.name] for each in kept)
        assert list(self.pool.models) == list(self.current)

    @invariant()
    def versions_that_nobody_uses_any_more_are_freed(self) -> None:
        for version in self.versions:
            if version.retired and not version.users:
                assert version.module() is None, f"{version} is held by somebody"
        self.versions = [each for each in self.versions if not each.retired or each.users]

    def teardown(self) -> None:
        for lent in list(self.lent):
            self.release_clean(lent, crashes=False)
        for used in list(self.used):
            self.end_use(used)
        self.whole_when_nothing_is_out()
        for name in list(self.current):
            self.remove(name)
        self.there_are_as_many_replicas_as_there_must_be()
        assert not self.pool._live
        assert not self.pool._versions
        assert not self.pool._lent


test_the_pool_is_whole_whatever_its_users_do = pytest.mark.timeout(60)(PoolStates.TestCase)
PoolStates.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
