"""Replicas of the served models, leased to one user at a time and verified when returned."""

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
    """One copy of a model, for one user at a time; `folded`: of its folded form."""

    model: LoadedModel
    module: nn.Module
    condition: Condition
    folded: bool = False


@dataclass(slots=True, eq=False)
class Served:
    """One version of a model. `idle` are stacks: the replica used last is the warmest.

    size:      replicas per stack; there is one stack for the model and one for its folded form.
    vacant:    missing replicas per form: lost, and not being built.
    unused:    forms without replicas, because no request has needed one yet.
    users:     requests that hold this version. A retired version remains until the last is done.
    spoiled:   the shared parameters were modified and not reloaded yet.
    reloading: a thread reloads them.
    building, reading: when replicas may be built, and the weights reloaded.
    reason:    why no replica is available.
    """

    model: LoadedModel
    size: int
    idle: dict[bool, list[Replica]] = field(default_factory=dict)
    vacant: dict[bool, int] = field(default_factory=dict)
    unused: set[bool] = field(default_factory=set)
    users: int = 0
    retired: bool = False
    spoiled: bool = False
    reloading: bool = False
    building: Backoff = field(default_factory=Backoff)
    reading: Backoff = field(default_factory=Backoff)
    reason: str = ""

    def replicas(self) -> Iterator[Replica]:
        """All idle replicas."""
        return chain.from_iterable(self.idle.values())

    def wants_reading(self, now: float) -> bool:
        """Whether a thread should reload the weights now."""
        return self.spoiled and not self.reloading and self.reading.is_over(now)

    def wants_building(self, now: float) -> bool:
        """Whether a thread should build a replica now."""
        is_quiet = not self.reloading and not self.wants_reading(now)
        return is_quiet and any(self.vacant.values()) and self.building.is_over(now)

    def wants_work(self, now: float) -> bool:
        return self.wants_reading(now) or self.wants_building(now)

    def count(self, folded: bool) -> int:
        """How many replicas a form has when none is lost."""
        return 0 if folded in self.unused else self.size

    def use(self, folded: bool) -> None:
        """Have the replicas of a form built from now on."""
        if folded in self.unused:
            self.unused.remove(folded)
            self.vacant[folded] = self.size

    def is_lost(self, folded: bool) -> bool:
        """Whether no replica of a form is left, and none is being built."""
        return self.vacant[folded] == self.size and not self.reloading


class ModelPool:
    """The served models and their replicas.

        with pool.use("resnet50") as model:                 # the same version until the end
            with pool.lease(model) as replica, record(replica.module, targets=["layer4"]) as seen:
                logits = replica.module(batch)

    A lease is exclusive. Torch's state of the thread and of the process is restored at its end. The
    pool then verifies that the replica is unchanged. State that the model is known to change in
    every call (`LoadedModel.stateful`) is restored. Any other difference, or a failed verification,
    makes the replica dirty: it is logged, counted, replaced by a new copy and never leased again.
    If the shared parameters were modified in place, every replica is replaced and the weights are
    reloaded from their source through `reload`.

    Replicas of the folded form of a model with a compiled lane are built when one is first leased.

    A replica that cannot be built leaves a vacancy. Each lease, each return and
    `replace_missing` retry after a delay that doubles with each failure; `lost` lists the models
    without a replica.

    A new version of a model can be added beside the old one: new users get the new version, and the
    old one is freed when its last user is done.

    No code of a model runs while a lock is held.

    replicas: number per form of a model; one per worker thread, so that a lease never waits. A
              model whose copies behave differently has one: itself.
    reload:   loads a model again from its spec.
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
        """The models by name, in the order in which they were added: the first is the default."""
        with self._changed:
            return {name: served.model for name, served in self._served.items()}

    @property
    def replaced(self) -> Mapping[str, int]:
        """The number of dirty replicas of each model."""
        with self._changed:
            return dict(self._replaced)

    @property
    def lost(self) -> Mapping[str, str]:
        """The models that are not available now, each with the reason."""
        with self._changed:
            return {
                name: served.reason
                for name, served in self._served.items()
                if served.spoiled or any(map(served.is_lost, served.idle))
            }

    @property
    def has_missing(self) -> bool:
        """Whether `replace_missing` has something to do now."""
        with self._changed:
            now = self._clock()
            return any(served.wants_work(now) for served in self._versions.values())

    def put(self, model: LoadedModel) -> None:
        """Serve a model instead of an older version of the same name."""
        self.serve(self.prepare(model))

    def prepare(self, model: LoadedModel) -> Served:
        """Build the replicas of a model that is not served yet. Raises the errors of building."""
        served = Served(model, self._size if model.behaviour.isolated else 1)
        for folded in (False, True) if model.folded else (False,):
            later = folded and model.compiled is not None
            count = 0 if later else served.size
            served.idle[folded] = [_build(model, folded) for _ in range(count)]
            served.vacant[folded] = 0
            served.unused |= {folded} if later else set()
        return served

    def serve(self, served: Served) -> list[object]:
        """Serve a prepared model instead of an older version. Runs no code of the model.

        Returns objects that the caller frees without holding a lock.
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
        """Stop serving a model; current users finish on it. Raises UnknownModel.

        Returns objects that the caller frees without holding a lock.
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
        """The current form of a held model, whose weights may have been reloaded since.

        Raises ModelNotReady if its parameters were modified and are not reloaded within `timeout`
        seconds.
        """
        with self._changed:
            served = self._versions.get(id(model))
        if served is None:  # of another pool
            return model
        self._replace_missing(served)
        with self._changed:
            self._changed.wait_for(lambda: not served.reloading, timeout)
            if served.spoiled:
                raise self._unavailable(served)
            return served.model

    def size(self, name: str) -> int:
        """The number of replicas of a model."""
        with self._changed:
            served = self._served.get(name)
            return 0 if served is None else served.size - served.vacant[False]

    @contextmanager
    def use(self, name: str | None) -> Iterator[LoadedModel]:
        """Hold one version of a model: inside the `with` it can be leased, even when replaced."""
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
        """Lease one replica of a model, or of the current version of a name, to one user.

        folded: lease one of the folded form, if the model has one.

        Raises UnknownModel, and ModelNotReady if none is free within `timeout` seconds, or if none
        is left and none can be built now.
        """
        with self._changed:
            served = self._version(model)
            served.users += 1  # before the wait, or a retired version could be freed meanwhile
        try:
            replica = self._claim(served, folded and True in served.idle, timeout)
            # Also around the end: context managers that the model never exited may be freed there,
            # and change the state of the thread again.
            with kept_torch_state():
                try:
                    with kept_torch_state():
                        yield replica
                finally:
                    self._take_back(served, replica)
        finally:
            self._leave(served)

    def abandon(self, replica: Replica) -> None:
        """Replace a leased replica whose user does not return.

        If the user returns later, the replica is discarded. Does nothing if it is not leased.
        """
        self.drop(replica)
        self.replace_missing()

    def drop(self, replica: Replica) -> None:
        """`abandon` without building a new replica (`replace_missing`); runs no code of a model."""
        with self._changed:
            served, _ = self._lent.pop(id(replica), (None, None))
            if served is None:
                return
            self._replaced[replica.model.name] += 1
            if not _is_copied(replica) and self._reload is not None:
                self._spoil(served)  # its user may still be running it
            self._lose(served, replica)

    def replace_missing(self) -> None:
        """Build missing replicas whose delay has passed."""
        with self._changed:
            every = list(dict.fromkeys(self._versions.values()))
        for served in every:
            self._replace_missing(served)

    def hooks_live(self) -> int:
        """The number of hooks on all replicas, without those that the models own."""
        with self._changed:
            replicas = list(self._live.values())
        return sum(
            sum(map(len, hooks_of(replica.module))) - replica.condition.hooks
            for replica in replicas
        )

    def faults(self) -> list[str]:
        """The faults of an unused pool; empty if it is whole.

        Whole means: every replica is idle and in its original condition, and all replicas belong to
        served models.
        """
        with self._changed:
            faults = [
                f"{name}: {len(idle)} of {served.count(form)} replicas idle"
                for name, served in self._served.items()
                for form, idle in served.idle.items()
                if len(idle) != served.count(form)
            ]
            whole = sum(sum(map(each.count, each.idle)) for each in self._served.values())
            if len(self._live) != whole:
                faults.append(f"{len(self._live)} replicas live")
            idle = [(name, r) for name, served in self._served.items() for r in served.replicas()]
        return faults + [f"{name}: {fault}" for name, r in idle for fault in _faults_of(r)]

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
        with self._changed:
            served.use(folded)

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
            self._replace_missing(served)

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
            # A model that is its own only replica has no clean copy left.
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
        self._replace_missing(served, users=1)

    def _lose(self, served: Served, replica: Replica) -> None:
        """Record the loss of a replica; the caller holds the lock."""
        self._live.pop(id(replica), None)
        served.vacant[replica.folded] += 1
        self._changed.notify_all()

    def _spoil(self, served: Served) -> list[object]:
        """Lease no replica that shares the modified parameters; the caller holds the lock."""
        if served.spoiled:
            return []
        served.spoiled = True
        served.reason = "A request modified the parameters that its replicas share."
        return self._lose_idle(served)

    def _lose_idle(self, served: Served) -> list[object]:
        """Remove all idle replicas, and return them; the caller holds the lock."""
        lost: list[object] = []
        for idle in served.idle.values():  # in place: other threads wait for these lists
            while idle:
                lost.append(idle[-1])
                self._lose(served, idle.pop())
        return lost

    def _replace_missing(self, served: Served, *, users: int = 0) -> None:
        """Build the missing replicas of a version, unless another thread does or the delay remains.

        users: the number of its users that no longer need it.
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
        """Build one replica for a vacancy that was claimed."""
        try:
            replica = _build(model, folded)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the vacancy must not be lost
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
        """Reload modified weights. If that fails, replicas are built from the present ones."""
        assert self._reload is not None
        try:
            with kept_torch_state():
                fresh = self._reload(model)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the reload must be retried
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
            # The same weights of the same spec: holders of the spoiled model continue with it.
            self._versions[id(fresh)] = served
            lost = self._lose_idle(served)
            self._changed.notify_all()
        del lost

    def _leave(self, served: Served) -> None:
        """Release one user."""
        freed: list[object] = []
        with self._changed:
            served.users -= 1
            freed += self._free_if_done(served)
            self._changed.notify_all()

    def _retire(self, served: Served) -> list[object]:
        served.retired = True
        return self._free_if_done(served)

    def _free_if_done(self, served: Served) -> list[object]:
        """Remove an unused version; returns its objects, which the caller frees without a lock."""
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
    """Whether it is a copy and not the model itself."""
    return replica.model.behaviour.isolated


def _build(model: LoadedModel, folded: bool) -> Replica:
    with kept_torch_state():
        module = model.replicate(folded=folded)
        return Replica(model, module, Condition.of(module), folded)


def _faults_of(replica: Replica) -> list[str]:
    """The faults of a replica; a failed verification is a fault, too."""
    try:
        return replica.condition.faults()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a request may have broken it
        return [f"it cannot be verified ({type(error).__name__}: {str(error)[:200]})"]


def _restored(replica: Replica) -> list[str]:
    """Restore attributes; returns the remaining faults."""
    try:
        replica.condition.restore()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
        return [f"it cannot be restored ({type(error).__name__}: {str(error)[:200]})"]
    return _faults_of(replica)


def _make_harmless(replica: Replica) -> None:
    """Undo changes in a discarded replica that others would see: scripted modules are shared."""
    with suppress(Exception):
        replica.condition.restore()
    with suppress(Exception):
        replica.condition.freeze()
