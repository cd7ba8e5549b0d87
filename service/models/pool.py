"""Replicas of the served models, lent to one user at a time and proved clean when they return."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain

import structlog
from torch import nn

from service.errors import ModelNotReady, UnknownModel, nearest
from service.models.backoff import Backoff
from service.models.loaded import LoadedModel
from service.models.probes.condition import PARAMETERS_CHANGED, Condition, hooks_of
from service.models.probes.torch_state import kept_torch_state

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of a model, for one user at a time; `folded` where it is of its folded form."""

    model: LoadedModel
    module: nn.Module
    condition: Condition
    folded: bool = False


@dataclass(slots=True, eq=False)
class Served:
    """One version of a model. `idle` are stacks: the replica used last is the warmest.

    size:      replicas in each stack, that of the model as it is and that of its folded form.
    vacant:    how many of each are missing: lost, and not being built.
    users:     how many requests hold this version. A retired version stays until the last is done.
    spoiled:   the parameters, which all replicas share, were changed and not read again yet.
    reloading: a thread reads them again.
    building, reading: when replicas may be built, and the weights read again.
    reason:    why there is none.
    """

    model: LoadedModel
    size: int
    idle: dict[bool, list[Replica]] = field(default_factory=dict)
    vacant: dict[bool, int] = field(default_factory=dict)
    users: int = 0
    retired: bool = False
    spoiled: bool = False
    reloading: bool = False
    building: Backoff = field(default_factory=Backoff)
    reading: Backoff = field(default_factory=Backoff)
    reason: str = ""

    def replicas(self) -> Iterator[Replica]:
        """All that are idle."""
        return chain.from_iterable(self.idle.values())

    def wants_reading(self, now: float) -> bool:
        """Whether a thread should read the weights again now."""
        return self.spoiled and not self.reloading and self.reading.is_over(now)

    def wants_building(self, now: float) -> bool:
        """Whether a thread should build a replica now."""
        is_quiet = not self.reloading and not self.wants_reading(now)
        return is_quiet and any(self.vacant.values()) and self.building.is_over(now)

    def wants_work(self, now: float) -> bool:
        return self.wants_reading(now) or self.wants_building(now)

    def is_lost(self, folded: bool) -> bool:
        """Whether no replica of a form is left, and none is being built."""
        return self.vacant[folded] == self.size and not self.reloading


class ModelPool:
    """The served models and their replicas.

        with pool.use("resnet50") as model:                 # one version, however long it takes
            with pool.lease(model) as replica, record(replica.module, targets=["layer4"]) as seen:
                logits = replica.module(batch)

    A lease is exclusive. Torch's own state of the thread and of the process is kept around it. When
    it ends the pool verifies that the replica is as it was built. What the model is known to change
    at every call (`LoadedModel.stateful`) is restored. Any other difference makes the replica
    dirty, also that it cannot be verified: it is logged, counted and replaced by a fresh copy,
    never lent again. Where the parameters, which all replicas share, were changed in place, every
    replica is replaced and the weights are read again from their source through `reload`.

    A replica that cannot be built leaves a vacancy. Each lease, each return and `mend` try again
    once a delay has passed that doubles with each failure; `lost` says which models have none left.

    A model can be put beside an older version of it: new users get the new one, and the old one is
    freed when its last user is done.

    No code of a model runs while a lock is held: building, verifying and reloading are outside.

    replicas: how many of each form of a model; as many as worker threads, so that a lease never
              waits. A model whose copies do not answer as it does has one: itself.
    reload:   builds a model again from its spec.
    clock:    seconds, for the delays.
    """

    def __init__(
        self,
        models: Iterable[LoadedModel] = (),
        *,
        replicas: int,
        reload: Callable[[LoadedModel], LoadedModel] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changed = threading.Condition()
        self._size = replicas
        self._reload = reload
        self._clock = clock
        self._replaced: dict[str, int] = {}
        self._live: dict[int, Replica] = {}
        self._lent: dict[int, tuple[Served, Replica]] = {}
        self._served: dict[str, Served] = {}
        self._versions: dict[int, Served] = {}
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
        with self._changed:
            return dict(self._replaced)

    @property
    def lost(self) -> Mapping[str, str]:
        """The models that can answer nothing now, each with the reason."""
        with self._changed:
            return {
                name: served.reason
                for name, served in self._served.items()
                if served.spoiled or any(map(served.is_lost, served.idle))
            }

    @property
    def wants_mending(self) -> bool:
        """Whether `mend` has something to do now."""
        with self._changed:
            now = self._clock()
            return any(served.wants_work(now) for served in self._versions.values())

    def put(self, model: LoadedModel) -> None:
        """Serve a model from now on, in place of an older version of that name."""
        self.serve(self.prepare(model))

    def prepare(self, model: LoadedModel) -> Served:
        """Build the replicas of a model that is not served yet. Raises what building raises."""
        served = Served(model, self._size if model.behaviour.isolated else 1)
        for folded in (False, True) if model.folded else (False,):
            served.idle[folded] = [_build(model, folded) for _ in range(served.size)]
            served.vacant[folded] = 0
        return served

    def serve(self, served: Served) -> list[object]:
        """Serve what was prepared, in place of an older version. Runs no code of the model.

        Returns what is not needed any more, to be let go where no lock is held.
        """
        model = served.model
        with self._changed:
            old = self._served.get(model.name)
            self._served[model.name] = self._versions[id(model)] = served
            self._live.update((id(replica), replica) for replica in served.replicas())
            self._replaced.setdefault(model.name, 0)
            freed = [] if old is None else self._retire(old)
            self._changed.notify_all()
        return freed

    def remove(self, name: str) -> list[object]:
        """Serve a model no longer; who uses it finishes on it. Raises UnknownModel.

        Returns what is not needed any more, to be let go where no lock is held.
        """
        with self._changed:
            served = self._current(name)
            del self._served[name]
            return self._retire(served)

    def model(self, name: str | None) -> LoadedModel:
        """The model of that name, or the default one. Raises UnknownModel."""
        with self._changed:
            return self._current(name).model

    def sound(self, model: LoadedModel, timeout: float | None = None) -> LoadedModel:
        """What answers for a model that is held: its weights may have been read again since.

        Raises ModelNotReady where its parameters were changed and are not read again within
        `timeout` seconds.
        """
        with self._changed:
            served = self._versions.get(id(model))
        if served is None:  # of another pool
            return model
        self._mend(served)
        with self._changed:
            self._changed.wait_for(lambda: not served.reloading, timeout)
            if served.spoiled:
                raise self._unavailable(served)
            return served.model

    def size(self, name: str) -> int:
        """How many replicas of a model there are."""
        with self._changed:
            served = self._served.get(name)
            return 0 if served is None else served.size - served.vacant[False]

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
            self._leave(served)

    @contextmanager
    def lease(
        self, model: LoadedModel | str, timeout: float | None = None, *, folded: bool = False
    ) -> Iterator[Replica]:
        """Lend one replica of a model, or of the present version of a name, to one user.

        folded: lend one of the folded form, where the model has one.

        Raises UnknownModel, and ModelNotReady where none is free within `timeout` seconds, or none
        is left and none can be built now.
        """
        with self._changed:
            served = self._version(model)
            served.users += 1  # before the wait, or a retired version could be freed meanwhile
        try:
            replica = self._claim(served, folded and True in served.idle, timeout)
            # Also around the end: what the model entered and never left may be freed there, and
            # changes the thread once more.
            with kept_torch_state():
                try:
                    with kept_torch_state():
                        yield replica
                finally:
                    self._take_back(served, replica)
        finally:
            self._leave(served)

    def abandon(self, replica: Replica) -> None:
        """Put a fresh replica in the place of one whose user does not come back.

        Should the user come back after all, the replica is thrown away. Does nothing where it is
        not lent.
        """
        self.drop(replica)
        self.mend()

    def drop(self, replica: Replica) -> None:
        """`abandon` without building the fresh replica, which `mend` does; runs no model's code."""
        with self._changed:
            served, _ = self._lent.pop(id(replica), (None, None))
            if served is None:
                return
            self._replaced[replica.model.name] += 1
            if not _is_copied(replica) and self._reload is not None:
                self._spoil(served)  # its user may still run it
            self._lose(served, replica)

    def mend(self) -> None:
        """Build what is missing and may be tried again now."""
        with self._changed:
            every = list(dict.fromkeys(self._versions.values()))
        for served in every:
            self._mend(served)

    def hooks_live(self) -> int:
        """How many hooks sit on all replicas beyond those the models own, counted now."""
        with self._changed:
            replicas = list(self._live.values())
        return sum(
            sum(map(len, hooks_of(replica.module))) - replica.condition.hooks
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
            idle = [(name, r) for name, served in self._served.items() for r in served.replicas()]
        return found + [f"{name}: {fault}" for name, r in idle for fault in _faults_of(r)]

    def _current(self, name: str | None) -> Served:
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

    def _version(self, model: LoadedModel | str) -> Served:
        if isinstance(model, str):
            return self._current(model)
        if id(model) not in self._versions:
            raise UnknownModel(f"This version of {model.name!r} is not served any more.")
        return self._versions[id(model)]

    def _claim(self, served: Served, folded: bool, timeout: float | None) -> Replica:
        until = None if timeout is None else time.monotonic() + timeout
        idle = served.idle[folded]

        def is_decided() -> bool:
            wanted = served.wants_work(self._clock())
            return bool(idle) or wanted or served.is_lost(folded)

        while True:
            with self._changed:
                rest = None if until is None else until - time.monotonic()
                if not self._changed.wait_for(is_decided, rest):
                    raise ModelNotReady(
                        f"No replica of {served.model.name!r} became free in time; try again."
                    )
                if idle and not served.wants_reading(self._clock()):
                    replica = idle.pop()
                    self._lent[id(replica)] = served, replica
                    return replica
                if not served.wants_work(self._clock()):
                    raise self._unavailable(served)
            self._mend(served)

    def _unavailable(self, served: Served) -> ModelNotReady:
        backoff = served.reading if served.spoiled else served.building
        wait = backoff.seconds_left(self._clock())
        return ModelNotReady(
            f"Model {served.model.name!r} cannot answer now: {served.reason} "
            f"The next attempt is in {wait} s.",
            retry_after=wait,
        )

    def _take_back(self, served: Served, replica: Replica) -> None:
        faults = _faults_of(replica)
        is_known = set(replica.model.stateful).issuperset(faults)
        left = _restored(replica) if faults and is_known else faults
        if left:
            _make_harmless(replica)
        dirty = [] if is_known else faults
        freed: list[object] = []
        with self._changed:
            was_lent = self._lent.pop(id(replica), None) is not None
            is_current = replica.model is served.model
            # Of a model that is its own only replica nothing clean is left to copy.
            is_spoiled = PARAMETERS_CHANGED in faults or (left and not _is_copied(replica))
            if is_spoiled and is_current and self._reload is not None:
                freed = self._spoil(served)
            if was_lent and dirty:
                self._replaced[replica.model.name] += 1
            if was_lent and not left and is_current and not served.reloading:
                served.idle[replica.folded].append(replica)
            elif was_lent:
                self._lose(served, replica)
            self._changed.notify_all()
        if was_lent and dirty:
            _log.warning("replica_replaced", model=replica.model.name, faults=dirty)
        del freed
        self._mend(served, users=1)

    def _lose(self, served: Served, replica: Replica) -> None:
        """Note that a replica is gone; holds the lock."""
        self._live.pop(id(replica), None)
        served.vacant[replica.folded] += 1
        self._changed.notify_all()

    def _spoil(self, served: Served) -> list[object]:
        """Lend none of what shares the changed parameters; holds the lock."""
        if served.spoiled:
            return []
        served.spoiled = True
        served.reason = "A request modified the parameters that its replicas share."
        return self._lose_idle(served)

    def _lose_idle(self, served: Served) -> list[object]:
        """Take all idle replicas away, and return them; holds the lock."""
        lost: list[object] = []
        for idle in served.idle.values():  # in place: others wait for these very lists
            while idle:
                lost.append(idle[-1])
                self._lose(served, idle.pop())
        return lost

    def _mend(self, served: Served, *, users: int = 0) -> None:
        """Build what a version misses, where no other thread does and the delay has passed.

        users: how many of its users do not need it any more.
        """
        while True:
            with self._changed:
                now = self._clock()
                unwanted = served.retired and served.users <= users
                if unwanted or not served.wants_work(now):
                    return
                model, folded = served.model, None
                if served.wants_reading(now):
                    served.reloading = True
                else:
                    folded = next(form for form, count in served.vacant.items() if count)
                    served.vacant[folded] -= 1
            if folded is None:
                self._read_again(served, model)
            else:
                self._fill(served, model, folded=folded)

    def _fill(self, served: Served, model: LoadedModel, *, folded: bool) -> None:
        """Build one replica into the place that was taken for it."""
        try:
            replica = _build(model, folded)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - or the place would be lost
            with self._changed:
                served.vacant[folded] += 1
                served.reason = (
                    "No replica of it can be built; the log of the service has the cause."
                )
                served.building.failed(self._clock())
                self._changed.notify_all()
            _log.error("replica_not_built", model=model.name, exc_info=error)
            return
        with self._changed:
            served.building.succeeded()
            outdated = served.reloading or served.wants_reading(self._clock())
            if outdated or model is not served.model:
                served.vacant[folded] += 1
            else:
                served.idle[folded].append(replica)
                self._live[id(replica)] = replica
            self._changed.notify_all()

    def _read_again(self, served: Served, model: LoadedModel) -> None:
        """Read changed weights again. Where that fails, replicas are built of what there is."""
        assert self._reload is not None
        try:
            with kept_torch_state():
                fresh = self._reload(model)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - or the place would be lost
            with self._changed:
                served.reloading = False
                served.reading.failed(self._clock())
                served.reason = (
                    "A request modified the parameters that its replicas share, and its weights "
                    "cannot be reloaded; the log of the service has the cause."
                )
                self._changed.notify_all()
            _log.error("reload_failed", model=model.name, exc_info=error)
            return
        with self._changed:
            served.model, served.spoiled, served.reloading = fresh, False, False
            served.reading.succeeded()
            # The same weights of the same spec: who holds the spoiled model goes on with this.
            self._versions[id(fresh)] = served
            lost = self._lose_idle(served)
            self._changed.notify_all()
        del lost

    def _leave(self, served: Served) -> None:
        """One user less."""
        freed: list[object] = []
        with self._changed:
            served.users -= 1
            freed += self._free_if_done(served)
            self._changed.notify_all()

    def _retire(self, served: Served) -> list[object]:
        served.retired = True
        return self._free_if_done(served)

    def _free_if_done(self, served: Served) -> list[object]:
        """Forget a version that nobody uses; what it held is returned, and freed without a lock."""
        if not served.retired or served.users:
            return []
        freed: list[object] = [*served.replicas()]
        for replica in served.replicas():
            self._live.pop(id(replica), None)
        served.idle = {form: [] for form in served.idle}
        for key in [key for key, version in self._versions.items() if version is served]:
            del self._versions[key]
        return [*freed, served.model]


def _is_copied(replica: Replica) -> bool:
    """Whether it is a copy, and not the model itself."""
    return replica.model.behaviour.isolated


def _build(model: LoadedModel, folded: bool) -> Replica:
    with kept_torch_state():
        module = model.replicate(folded=folded)
        return Replica(model, module, Condition.of(module), folded)


def _faults_of(replica: Replica) -> list[str]:
    """What is wrong with a replica; that it cannot be verified is a fault as well."""
    try:
        return replica.condition.faults()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is what a request made of it
        return [f"it cannot be verified ({type(error).__name__}: {str(error)[:200]})"]


def _restored(replica: Replica) -> list[str]:
    """Restore attributes; what is wrong even then."""
    try:
        replica.condition.restore()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
        return [f"it cannot be restored ({type(error).__name__}: {str(error)[:200]})"]
    return _faults_of(replica)


def _make_harmless(replica: Replica) -> None:
    """Undo in a replica that is thrown away what others would see: a scripted one is shared."""
    with suppress(Exception):
        replica.condition.restore()
    with suppress(Exception):
        replica.condition.freeze()
