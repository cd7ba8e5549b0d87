"""Replicas of the served models, lent to one user at a time and proved clean when they return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import structlog
from torch import nn

from service.errors import ModelNotReady, UnknownModel, nearest
from service.models.condition import PARAMETERS_CHANGED, Condition, hooks_of
from service.models.loaded import LoadedModel

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of a model, for one user at a time; `folded` where it is of its folded form."""

    model: LoadedModel
    module: nn.Module
    condition: Condition
    folded: bool = False


@dataclass(slots=True, eq=False)
class _Served:
    """One version of a model. `idle` are stacks: the replica used last is the warmest.

    size: replicas in each stack, that of the model as it is and that of its folded form.
    users: how many requests hold this version. A retired version stays until the last one is done.
    """

    model: LoadedModel
    size: int
    idle: dict[bool, list[Replica]] = field(default_factory=dict)
    users: int = 0
    retired: bool = False

    def replicas(self) -> Iterator[Replica]:
        """All that are idle."""
        return chain.from_iterable(self.idle.values())


class ModelPool:
    """The served models and their replicas.

        with pool.use("resnet50") as model:                 # one version, however long it takes
            with pool.lease(model) as replica, record(replica.module, targets=["layer4"]) as seen:
                logits = replica.module(batch)

    A lease is exclusive. When it ends the pool proves that the replica is as it was built; one that
    is not is logged, counted and replaced by a fresh copy, never lent again. Where the parameters,
    which all replicas share, were changed in place, every replica is replaced and the weights are
    read again from their source through `reload`.

    A model can be put beside an older version of it: new users get the new one, and the old one is
    freed when its last user is done.

    replicas: how many of each form of a model; as many as worker threads, so that a lease never
              waits.
    reload:   builds a model again from its spec.
    """

    def __init__(
        self,
        models: Iterable[LoadedModel] = (),
        *,
        replicas: int,
        reload: Callable[[LoadedModel], LoadedModel] | None = None,
    ) -> None:
        self._changed = threading.Condition()
        self._size = replicas
        self._reload = reload
        self._replaced: dict[str, int] = {}
        self._live: dict[int, Replica] = {}
        self._lent: dict[int, tuple[_Served, Replica]] = {}
        self._served: dict[str, _Served] = {}
        self._versions: dict[int, _Served] = {}
        for model in models:
            self.put(model)

    @property
    def models(self) -> Mapping[str, LoadedModel]:
        """The models by name, in the order they came: the first is the default."""
        with self._changed:
            return {name: served.model for name, served in self._served.items()}

    @property
    def replaced(self) -> Mapping[str, int]:
        """How many replicas of each model came back dirty."""
        return dict(self._replaced)

    def put(self, model: LoadedModel) -> None:
        """Serve a model from now on, in place of an older version of that name."""
        served = _Served(model, self._size)
        forms = (False, True) if model.folded else (False,)
        served.idle = {
            folded: [self._build(model, folded) for _ in range(self._size)] for folded in forms
        }
        with self._changed:
            old = self._served.get(model.name)
            self._served[model.name] = self._versions[id(model)] = served
            self._replaced.setdefault(model.name, 0)
            if old is not None:
                self._retire(old)
            self._changed.notify_all()

    def remove(self, name: str) -> None:
        """Serve a model no longer; who uses it finishes on it. Raises UnknownModel."""
        self.model(name)
        with self._changed:
            self._retire(self._served.pop(name))

    def model(self, name: str | None) -> LoadedModel:
        """The model of that name, or the default one. Raises UnknownModel."""
        with self._changed:
            return self._current(name).model

    def size(self, name: str) -> int:
        """How many replicas of a model there are."""
        return self._served[name].size

    @contextmanager
    def use(self, name: str | None) -> Iterator[LoadedModel]:
        """Hold one version of a model: inside the `with` it can be leased, whatever is put."""
        with self._changed:
            served = self._current(name)
            served.users += 1
            model = served.model
        try:
            yield model
        finally:
            with self._changed:
                served.users -= 1
                self._free_if_done(served)

    @contextmanager
    def lease(
        self, model: LoadedModel | str, timeout: float | None = None, *, folded: bool = False
    ) -> Iterator[Replica]:
        """Lend one replica of a model, or of the present version of a name, to one user.

        folded: lend one of the folded form, where the model has one.

        Raises UnknownModel, and ModelNotReady where none is free within `timeout` seconds.
        """
        with self._changed:
            served = self._version(model)
            served.users += 1  # before the wait, or a retired version could be freed meanwhile
            idle = served.idle[folded and True in served.idle]
            if not self._changed.wait_for(lambda: idle, timeout):
                served.users -= 1
                self._free_if_done(served)
                raise ModelNotReady(
                    f"No replica of {served.model.name!r} became free in time; try again."
                )
            replica = idle.pop()
            self._lent[id(replica)] = served, replica
        try:
            yield replica
        finally:
            self._take_back(served, replica)

    def abandon(self, replica: Replica) -> None:
        """Put a fresh replica in the place of one whose user does not come back.

        Should the user come back after all, the replica is thrown away. Does nothing where it is
        not lent.
        """
        with self._changed:
            served, _ = self._lent.pop(id(replica), (None, None))
            if served is None:
                return
            self._replaced[replica.model.name] += 1
            served.idle[replica.folded].append(self._swap(replica, served.model))
            self._changed.notify_all()

    def hooks_live(self) -> int:
        """How many hooks sit on all replicas beyond those the models own, counted now."""
        with self._changed:
            replicas = list(self._live.values())
        return sum(
            sum(map(len, hooks_of(replica.module))) - sum(map(len, replica.condition.hooks))
            for replica in replicas
        )

    def faults(self) -> list[str]:
        """What is wrong with the pool while nothing uses it: empty when it is whole.

        Whole means: every replica is idle and in the condition it was built in, and there are none
        but those of the models served.
        """
        with self._changed:
            found = [
                f"{name}: {len(idle)} of {served.size} replicas idle"
                for name, served in self._served.items()
                for idle in served.idle.values()
                if len(idle) != served.size
            ]
            whole = sum(served.size * len(served.idle) for served in self._served.values())
            if len(self._live) != whole:
                found.append(f"{len(self._live)} replicas live")
            return found + [
                f"{name}: {fault}"
                for name, served in self._served.items()
                for replica in served.replicas()
                for fault in replica.condition.faults(Condition.of(replica.module))
            ]

    def _current(self, name: str | None) -> _Served:
        if name is None and self._served:
            return next(iter(self._served.values()))
        if name is None:
            raise ModelNotReady("No model is loaded yet; try again.")
        if name not in self._served:
            known = ", ".join(self._served)
            raise UnknownModel(
                f"No model is called {name!r}.{nearest(name, self._served)} Served: {known}."
            )
        return self._served[name]

    def _version(self, model: LoadedModel | str) -> _Served:
        if isinstance(model, str):
            return self._current(model)
        if id(model) not in self._versions:
            raise UnknownModel(f"This version of {model.name!r} is not served any more.")
        return self._versions[id(model)]

    def _take_back(self, served: _Served, replica: Replica) -> None:
        faults = replica.condition.faults(Condition.of(replica.module))
        with self._changed:
            if self._lent.pop(id(replica), None) is None:  # abandoned: another is in its place
                if PARAMETERS_CHANGED in faults and replica.model is served.model:
                    self._reload_weights(served)
                served.users -= 1
                self._free_if_done(served)
                return
        fresh = self._replace(served, replica, faults) if faults else replica
        with self._changed:
            if fresh.model is not served.model:  # the weights were read again meanwhile
                fresh = self._swap(fresh, served.model)
            served.idle[fresh.folded].append(fresh)
            served.users -= 1
            self._free_if_done(served)
            self._changed.notify_all()

    def _replace(self, served: _Served, replica: Replica, faults: list[str]) -> Replica:
        name = replica.model.name
        for parameter in replica.module.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        with self._changed:
            self._replaced[name] += 1
            _log.warning("replica_replaced", model=name, faults=faults)
            if PARAMETERS_CHANGED in faults and replica.model is served.model:
                self._reload_weights(served)
            return self._swap(replica, served.model)

    def _reload_weights(self, served: _Served) -> None:
        if self._reload is None:
            return
        try:
            served.model = self._reload(served.model)
        except Exception as error:  # noqa: BLE001 - a replica that is not given back is lost
            _log.error("reload_failed", model=served.model.name, exc_info=error)
            return
        # The same weights of the same spec: requests that hold the spoiled model go on with this.
        self._versions[id(served.model)] = served
        for idle in served.idle.values():  # in place: others wait for these very lists
            idle[:] = [self._swap(old, served.model) for old in idle]

    def _retire(self, served: _Served) -> None:
        served.retired = True
        self._free_if_done(served)

    def _free_if_done(self, served: _Served) -> None:
        if served.retired and not served.users:
            for replica in served.replicas():
                self._live.pop(id(replica), None)
            served.idle.clear()
            for key in [key for key, version in self._versions.items() if version is served]:
                del self._versions[key]

    def _swap(self, old: Replica, model: LoadedModel) -> Replica:
        del self._live[id(old)]
        return self._build(model, old.folded)

    def _build(self, model: LoadedModel, folded: bool) -> Replica:
        module = model.replicate(folded=folded)
        replica = Replica(model, module, Condition.of(module), folded)
        with self._changed:
            self._live[id(replica)] = replica
        return replica
