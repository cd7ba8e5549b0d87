"""Replicas of the served models, lent to one user at a time and proved clean when they return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
from torch import nn

from service.errors import CamserveError, ModelNotReady, UnknownModel, nearest
from service.models.loaded import LoadedModel

_log = structlog.get_logger(__name__)

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_PARAMETERS_CHANGED = "parameters changed in place"

Hooks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """Everything about a module tree that a request must leave as it found it.

    hooks:      the ids of the hooks of each module, and of each parameter's own gradient hooks. A
                model may own some (`weight_norm` does), so the proof is equality, not emptiness.
    training:   the mode of each module.
    frozen:     `requires_grad` of each parameter.
    parameters: the version counter of each parameter: in-place writes raise it.
    buffers:    likewise of each buffer, running statistics above all.
    gradients:  the names of parameters that hold a `.grad`.
    """

    hooks: Hooks
    training: tuple[bool, ...]
    frozen: tuple[bool, ...]
    parameters: tuple[int, ...]
    buffers: tuple[int, ...]
    gradients: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Condition:
        parameters = list(module.named_parameters())
        return cls(
            hooks=_hooks_of(module),
            training=tuple(each.training for each in module.modules()),
            frozen=tuple(p.requires_grad for _, p in parameters),
            parameters=tuple(p._version for _, p in parameters),
            buffers=tuple(b._version for b in module.buffers()),
            gradients=tuple(name for name, p in parameters if p.grad is not None),
        )

    def faults(self, after: Condition) -> list[str]:
        """What differs in `after`, as words for the log; empty where the replica is clean."""
        found = {
            "hooks left or removed": self.hooks != after.hooks,
            "training mode changed": self.training != after.training,
            "requires_grad changed": self.frozen != after.frozen,
            _PARAMETERS_CHANGED: self.parameters != after.parameters,
            "buffers changed in place": self.buffers != after.buffers,
            "gradients left": self.gradients != after.gradients,
        }
        return [fault for fault, is_so in found.items() if is_so]


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of a model, for one user at a time."""

    model: LoadedModel
    module: nn.Module
    condition: Condition


@dataclass(slots=True)
class _Served:
    """A model in the pool. `idle` is a stack: the replica used last is the warmest."""

    model: LoadedModel
    size: int
    idle: list[Replica]


class ModelPool:
    """The served models and their replicas.

        with pool.lease("resnet50") as replica, record(replica.module, targets=["layer4"]) as seen:
            logits = replica.module(batch)

    A lease is exclusive. When it ends the pool proves that the replica is as it was built; one that
    is not is logged, counted and replaced by a fresh copy, never lent again. Where the parameters,
    which all replicas share, were changed in place, every replica is replaced and the weights are
    read again from their source through `reload`.

    replicas: how many of each model; as many as worker threads, so that a lease never waits.
    reload:   builds a model again from its spec.
    """

    def __init__(
        self,
        models: list[LoadedModel],
        *,
        replicas: int,
        reload: Callable[[LoadedModel], LoadedModel] | None = None,
    ) -> None:
        self._changed = threading.Condition()
        self._reload = reload
        self._replaced = dict.fromkeys((model.name for model in models), 0)
        self._live: dict[int, Replica] = {}
        self._served = {
            model.name: _Served(model, replicas, [self._build(model) for _ in range(replicas)])
            for model in models
        }

    @property
    def models(self) -> Mapping[str, LoadedModel]:
        """The models by name, in the order they were given: the first is the default."""
        return {name: served.model for name, served in self._served.items()}

    @property
    def replaced(self) -> Mapping[str, int]:
        """How many replicas of each model came back dirty."""
        return dict(self._replaced)

    def model(self, name: str | None) -> LoadedModel:
        """The model of that name, or the default one. Raises UnknownModel."""
        if name is None:
            return next(iter(self._served.values())).model
        if name not in self._served:
            known = ", ".join(self._served)
            raise UnknownModel(
                f"No model is called {name!r}.{nearest(name, self._served)} Served: {known}."
            )
        return self._served[name].model

    def size(self, name: str) -> int:
        """How many replicas of a model there are."""
        return self._served[name].size

    @contextmanager
    def lease(self, name: str, timeout: float | None = None) -> Iterator[Replica]:
        """Lend one replica of a model for the length of the `with`.

        Raises UnknownModel, and ModelNotReady where none is free within `timeout` seconds.
        """
        self.model(name)
        served = self._served[name]
        with self._changed:
            if not self._changed.wait_for(lambda: served.idle, timeout):
                raise ModelNotReady(f"No replica of {name!r} became free in time; try again.")
            replica = served.idle.pop()
        try:
            yield replica
        finally:
            self._take_back(served, replica)

    def hooks_live(self) -> int:
        """How many hooks sit on all replicas beyond those the models own, counted now."""
        with self._changed:
            replicas = list(self._live.values())
        return sum(
            sum(map(len, _hooks_of(replica.module))) - sum(map(len, replica.condition.hooks))
            for replica in replicas
        )

    def faults(self) -> list[str]:
        """What is wrong with the pool while nothing uses it: empty when it is whole.

        Whole means: every replica is idle and in the condition it was built in.
        """
        with self._changed:
            found = [
                f"{name}: {len(served.idle)} of {served.size} replicas idle"
                for name, served in self._served.items()
                if len(served.idle) != served.size
            ]
            return found + [
                f"{name}: {fault}"
                for name, served in self._served.items()
                for replica in served.idle
                for fault in replica.condition.faults(Condition.of(replica.module))
            ]

    def _take_back(self, served: _Served, replica: Replica) -> None:
        faults = replica.condition.faults(Condition.of(replica.module))
        with self._changed:
            outdated = replica.model is not served.model
        fresh = replica
        if faults or outdated:
            fresh = self._replace(served, replica, faults)
        with self._changed:
            if fresh is not replica:
                del self._live[id(replica)]
            served.idle.append(fresh)
            self._changed.notify()

    def _replace(self, served: _Served, replica: Replica, faults: list[str]) -> Replica:
        name = replica.model.name
        for parameter in replica.module.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        with self._changed:
            if faults:
                self._replaced[name] += 1
                _log.warning("replica_replaced", model=name, faults=faults)
            if _PARAMETERS_CHANGED in faults and replica.model is served.model:
                self._reload_weights(served)
            return self._build(served.model)

    def _reload_weights(self, served: _Served) -> None:
        if self._reload is None:
            return
        try:
            served.model = self._reload(served.model)
        except CamserveError as error:
            _log.error("reload_failed", model=served.model.name, detail=error.detail)
            return
        served.idle = [self._swap(old, served.model) for old in served.idle]

    def _swap(self, old: Replica, model: LoadedModel) -> Replica:
        del self._live[id(old)]
        return self._build(model)

    def _build(self, model: LoadedModel) -> Replica:
        module = model.replicate()
        replica = Replica(model, module, Condition.of(module))
        with self._changed:
            self._live[id(replica)] = replica
        return replica


def _hooks_of(module: nn.Module) -> Hooks:
    """The ids of all hooks: one tuple a module, then one a parameter."""
    return (
        *(
            tuple(hook for table in _HOOK_TABLES for hook in list(getattr(each, table)))
            for each in module.modules()
        ),
        *(tuple(parameter._backward_hooks or ()) for parameter in module.parameters()),
    )
