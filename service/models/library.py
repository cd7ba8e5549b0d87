"""The configured models and their states; loads, replaces and unloads them at run time."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import structlog

from service.errors import (
    CamserveError,
    ConfigurationError,
    ModelNotReady,
    ShuttingDown,
    UnknownModel,
    nearest,
)
from service.models.backoff import Backoff
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool, Served
from service.models.probes.torch_state import kept_torch_state

_log = structlog.get_logger(__name__)

State = Literal["loading", "ready", "failed", "unloaded"]

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 300.0
"""A request retries a failed load: first after this delay, which doubles with each further failure,
up to the maximum."""


def _backoff() -> Backoff:
    return Backoff(FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the library.

    state:      `ready` if and only if the pool serves a version of it.
    reason:     why it failed, is not loaded, or is not the newest version.
    progress:   the current step of a load.
    on_demand:  whether a request reloads it; false if an operator unloaded it.
    size:       bytes of its parameters and buffers, after it was loaded.
    used:       time of the last request, on `time.monotonic()`'s clock.
    generation: changes with every load and unload; only a load of the current one counts.
    backoff:    when a failed load may be retried.
    """

    spec: ModelSpec
    state: State
    reason: str | None = None
    progress: str | None = None
    on_demand: bool = False
    size: int = 0
    used: float = field(default_factory=time.monotonic)
    generation: int = 0
    backoff: Backoff = field(default_factory=_backoff)


class Library:
    """The configured models, loaded one after the other by one thread.

    A new version is loaded beside the old one and replaces it in the pool when it is ready;
    requests that started on the old version finish on it. If a model fails to load, the others and
    its own older version remain served; requests for it retry the load, with growing delays.

    The last command takes precedence: a load that was superseded by another load, by `unload` or by
    `replace_all` has no effect when it ends. The pool serves exactly the models that are `ready`.

    Models are loaded, built and freed without holding a lock.

    load:      loads the model of a spec. Raises ConfigurationError.
    max_bytes: limit of all loaded models; 0: no limit. The least recently used model is evicted,
               and reloaded when a request needs it.
    clock:     seconds, for the delays.

    `has_read_config` is for whoever reads the specs again: whether that succeeded.
    """

    def __init__(
        self,
        pool: ModelPool,
        specs: Sequence[ModelSpec],
        load: Callable[[ModelSpec], LoadedModel],
        *,
        max_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._load = load
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._generations = itertools.count(1)
        self._entries = {spec.name: Entry(spec, "loading") for spec in specs}
        self._loads: dict[str, Future[None]] = {}
        self._queued: set[str] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._is_open = True
        self.has_read_config = True

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every model by name, in the configured order: the first is the default.

        A loaded model without a replica has the state `failed`.
        """
        with self._lock:
            entries = dict(self._entries)
            lost = self._pool.lost
        for name in entries.keys() & lost.keys():
            entries[name] = replace(entries[name], state="failed", reason=lost[name])
        return entries

    @property
    def is_current(self) -> bool:
        """Whether the configuration could be read, and no newest version of a model failed."""
        failed = (each.reason and each.state != "unloaded" for each in self.entries.values())
        return self.has_read_config and not any(failed)

    def count_by_state(self) -> dict[str, int]:
        """The number of models in each state."""
        found = Counter(entry.state for entry in self.entries.values())
        return {state: found[state] for state in get_args(State)}

    @property
    def default(self) -> str:
        """The name of the model for requests without `model`. Raises ModelNotReady."""
        with self._lock:
            return self._default()

    def load_all(self) -> None:
        """Load every model in this thread. Raises the first ConfigurationError."""
        for name in self.entries:
            with self._lock:
                generation = self._begin(name)
            error = self._run(name, generation)
            if error is not None:
                raise error

    def load_in_background(self) -> list[Future[None]]:
        """Load every model in the loader thread; a failure is recorded in its entry."""
        return [self.load(name) for name in self.entries]

    def load_on_demand(self) -> None:
        """Load each model when the first request needs it."""
        with self._lock:
            for name in self._entries:
                self._set(name, state="unloaded", on_demand=True)

    def load(self, name: str) -> Future[None]:
        """Load a model, or a new version of it; the future ends when it is served.

        If a load of it is running, it is loaded once more, because its files may have changed.

        The future raises ConfigurationError if the model cannot be loaded, UnknownModel if it is
        unloaded meanwhile. Raises UnknownModel, ShuttingDown.
        """
        with self._lock:
            self._known(name)
            return self._schedule(name)

    def unload(self, name: str) -> None:
        """Stop serving a model until `load`. Raises UnknownModel."""
        with self._lock:
            freed = self._stop(self._known(name))
            future = self._loads.pop(name, None)
            reason = "It was unloaded."
            self._set(name, state="unloaded", reason=reason, progress=None, on_demand=False)
        del freed
        _fail(future, UnknownModel(f"Model {name!r} was unloaded while it was loading."))

    def replace_all(self, specs: Sequence[ModelSpec]) -> list[Future[None]]:
        """Serve exactly these models: reload each, remove all others.

        Raises ShuttingDown.
        """
        names = {spec.name for spec in specs}
        freed: list[object] = []
        dropped: list[tuple[str, Future[None] | None]] = []
        with self._lock:
            self._refuse_when_closed()
            for entry in [e for name, e in self._entries.items() if name not in names]:
                freed += self._stop(entry)
                dropped.append((entry.spec.name, self._loads.pop(entry.spec.name, None)))
            self._entries = {
                spec.name: replace(self._entries[spec.name], spec=spec, backoff=_backoff())
                if spec.name in self._entries
                else Entry(spec, "loading")
                for spec in specs
            }
            self._queued.clear()  # pending loads, too: they have the old specs
            futures = [self._schedule(spec.name) for spec in specs]
        del freed
        for name, future in dropped:
            _fail(future, UnknownModel(f"Model {name!r} is not served any more."))
        return futures

    def demand(self, name: str | None) -> Future[None] | None:
        """Record a request for a model; returns the future of its load if it is not loaded.

        After a failed load, it is reloaded once the delay has passed.

        Raises UnknownModel, and ModelNotReady if the model is not available now.
        """
        with self._lock:
            entry = self._known(self._default() if name is None else name)
            self._set(entry.spec.name, used=time.monotonic())
            if entry.state == "ready":
                self._retry(entry)
                return None
            if entry.on_demand or self._retry(entry):
                pending = self._loads.get(entry.spec.name)
                return pending or self._schedule(entry.spec.name, quietly=True)
        if entry.state == "unloaded":
            raise UnknownModel(f"Model {entry.spec.name!r} is not loaded; an operator unloaded it.")
        # The reason may name files, so that only /models shows it.
        wait = entry.backoff.seconds_left(self._clock()) if entry.state == "failed" else 5
        raise ModelNotReady(
            f"Model {entry.spec.name!r} is {entry.state}; GET /models/{entry.spec.name} says more.",
            retry_after=wait,
        )

    def retry(self) -> None:
        """Retry failed loads in the background, if their delay has passed."""
        with self._lock:
            for entry in list(self._entries.values()):
                self._retry(entry)

    def entry(self, name: str) -> Entry:
        """The entry of a model. Raises UnknownModel with the nearest names."""
        entries = self.entries
        if name not in entries:
            raise self._unknown(name)
        return entries[name]

    def close(self) -> None:
        """Wait for the current load, and cancel pending ones."""
        with self._lock:
            self._is_open = False
            thread = self._thread
        if thread is not None:
            thread.shutdown(cancel_futures=True)
        with self._lock:
            futures = list(self._loads.values())
            self._loads.clear()
        for future in futures:
            _fail(future, _shutting_down())

    # ---- while the lock is held

    def _default(self) -> str:
        for name in self._entries:
            return name
        raise ModelNotReady("No model is named in the settings of this service.")

    def _known(self, name: str) -> Entry:
        if name not in self._entries:
            raise self._unknown(name)
        return self._entries[name]

    def _unknown(self, name: str) -> UnknownModel:
        known = list(self._entries)
        return UnknownModel(
            f"No model is called {name!r}.{nearest(name, known)} Served: {', '.join(known)}."
        )

    def _refuse_when_closed(self) -> None:
        if not self._is_open:
            raise _shutting_down()

    def _begin(self, name: str) -> int:
        """A new generation, and its number."""
        generation = next(self._generations)
        self._set(name, generation=generation)
        return generation

    def _schedule(self, name: str, *, quietly: bool = False) -> Future[None]:
        """Queue the load of a model. quietly: its state changes only when the load has ended."""
        self._refuse_when_closed()
        future = self._loads.get(name)
        if future is not None and name in self._queued:
            return future  # it has not started, and will read the current files
        if future is None:
            future = self._loads[name] = Future()
            future.set_running_or_notify_cancel()  # cancelling one waiter does not cancel the load
        generation = self._begin(name)
        self._set(name, progress="waiting for other models to load")
        if self._entries[name].state != "ready" and not quietly:
            self._set(name, state="loading", reason=None)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="camserve-loader")
        self._queued.add(name)
        self._thread.submit(self._run, name, generation)
        return future

    def _retry(self, entry: Entry) -> bool:
        """Retry a failed load; returns whether a load is pending or running."""
        name, backoff = entry.spec.name, entry.backoff
        if not backoff.failures or not self._is_open or entry.state not in ("ready", "failed"):
            return False
        if name not in self._loads and backoff.is_over(self._clock()):
            self._schedule(name, quietly=True)
        return name in self._loads

    def _stop(self, entry: Entry) -> list[object]:
        """Stop serving an entry, and supersede its loads."""
        name = entry.spec.name
        freed = self._pool.remove(name) if entry.state == "ready" else []
        self._begin(name)
        self._queued.discard(name)
        return freed

    def _is_current(self, name: str, generation: int) -> bool:
        return name in self._entries and self._entries[name].generation == generation

    def _set(self, name: str, **changes: object) -> None:
        """Change an entry."""
        self._entries[name] = replace(self._entries[name], **changes)  # type: ignore[arg-type]

    def _make_room(self, name: str, size: int) -> tuple[list[str], list[object]]:
        """Evict the least recently used models until a model of `size` bytes fits.

        Returns their names, and objects that the caller frees without holding a lock.
        """
        others = [e for e in self._entries.values() if e.state == "ready" and e.spec.name != name]
        taken = size + sum(entry.size for entry in others)
        names: list[str] = []
        freed: list[object] = []
        for entry in sorted(others, key=lambda entry: entry.used):
            if not self._max_bytes or taken <= self._max_bytes:
                break
            taken -= entry.size
            names.append(entry.spec.name)
            freed += self._pool.remove(entry.spec.name)
            reason = "It was evicted to free memory for another model; a request for it reloads it."
            self._set(entry.spec.name, state="unloaded", reason=reason, on_demand=True)
        return names, freed

    # ---- in the thread that loads

    def _run(self, name: str, generation: int) -> BaseException | None:
        """Load a model unless this generation is superseded; returns the error of a failed load."""
        with self._lock:
            if not self._is_current(name, generation):
                return None
            self._queued.discard(name)
            spec = self._entries[name].spec
        try:
            self._note(name, generation, "reading and testing the model")
            with kept_torch_state():
                model = self._load(spec)
            size = _size_of(model)
            self._refuse_too_large(name, size)
            self._note(name, generation, "building replicas")
            served = self._pool.prepare(model)
        except BaseException as error:  # noqa: BLE001 - others wait for the end of this
            self._failed(name, generation, error)
            return error
        self._serve(name, generation, served, size)
        return None

    def _refuse_too_large(self, name: str, size: int) -> None:
        if self._max_bytes and size > self._max_bytes:
            raise ConfigurationError(
                f"model {name!r} needs {size} bytes, and the limit for all models is "
                f"{self._max_bytes}: raise CAMSERVE_MAX_MODEL_BYTES."
            )

    def _serve(self, name: str, generation: int, served: Served, size: int) -> None:
        with self._lock:
            if not self._is_current(name, generation):
                return
            evicted, freed = self._make_room(name, size)
            freed += self._pool.serve(served)
            self._entries[name].backoff.succeeded()
            self._set(name, state="ready", reason=None, progress=None, on_demand=False, size=size)
            future = self._loads.pop(name, None)
        del freed
        for evicted_name in evicted:
            _log.info("model_evicted", model=evicted_name)
        model = served.model
        _log.info("model_ready", model=name, version=model.version, target_layer=model.target_layer)
        if future is not None:
            future.set_result(None)

    def _failed(self, name: str, generation: int, error: BaseException) -> None:
        known = isinstance(error, CamserveError)
        reason = str(error) if known else "It failed to load; the server's log has the cause."
        _log.error("model_failed", model=name, detail=reason, exc_info=None if known else error)
        with self._lock:
            if not self._is_current(name, generation):
                return
            entry = self._entries[name]
            entry.backoff.failed(self._clock())
            # An older version remains served; the reason says why it is not the newest.
            state: State = "ready" if entry.state == "ready" else "failed"
            self._set(name, state=state, reason=reason, progress=None, on_demand=False)
            future = self._loads.pop(name, None)
        _fail(future, error if known else ConfigurationError(f"Model {name!r}: {reason}"))

    def _note(self, name: str, generation: int, progress: str) -> None:
        with self._lock:
            if self._is_current(name, generation):
                self._set(name, progress=progress)


def _fail(future: Future[None] | None, error: BaseException) -> None:
    if future is not None:
        future.set_exception(error)


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("The service is shutting down; send the request to another instance.")


def _size_of(model: LoadedModel) -> int:
    tensors = (*model.module.parameters(), *model.module.buffers())
    return sum(tensor.nbytes for tensor in tensors)
