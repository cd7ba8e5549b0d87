"""Which models there are and in what state; loading, replacing and unloading them at run time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import structlog

from service.errors import CamserveError, ConfigurationError, ModelNotReady, UnknownModel, nearest
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool

_log = structlog.get_logger(__name__)

State = Literal["loading", "ready", "failed", "unloaded"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the library.

    reason:    why it failed, or why it is not loaded.
    progress:  what is being done about it now.
    on_demand: whether a request for it loads it again; not so where somebody unloaded it.
    size:      bytes of its parameters and buffers, once it was loaded.
    used:      when it was last asked for, on `time.monotonic()`'s clock.
    """

    spec: ModelSpec
    state: State
    reason: str | None = None
    progress: str | None = None
    on_demand: bool = False
    size: int = 0
    used: float = field(default_factory=time.monotonic)


class Library:
    """The models that the service was told of, loaded one after the other by one thread.

    A new version is loaded beside the old one and takes its place in the pool when it is ready;
    requests that began on the old one finish on it. A model that fails to load leaves the others,
    and its own older version, serving.

    load:      makes a model of its spec. Raises ConfigurationError.
    max_bytes: of all loaded models together; 0 is no bound. The model that was not asked for the
               longest is unloaded first, and loaded again when a request asks for it.
    """

    def __init__(
        self,
        pool: ModelPool,
        specs: Sequence[ModelSpec],
        load: Callable[[ModelSpec], LoadedModel],
        *,
        max_bytes: int = 0,
    ) -> None:
        self._pool = pool
        self._load = load
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries = {spec.name: Entry(spec, "loading") for spec in specs}
        self._pending: dict[str, Future[None]] = {}
        self._thread: ThreadPoolExecutor | None = None

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every model by name, in the order they were named: the first is the default."""
        with self._lock:
            return dict(self._entries)

    @property
    def default(self) -> str:
        """The name of the model that answers requests that name none."""
        return next(iter(self.entries))

    def load_all(self) -> None:
        """Load every model now, in this thread. Raises the first ConfigurationError."""
        for name in self.entries:
            self._load_now(name)

    def load_in_background(self) -> list[Future[None]]:
        """Load every model in the library's thread; a failure is in its entry."""
        return [self.load(name) for name in self.entries]

    def load_on_demand(self) -> None:
        """Load no model now, and each when a request asks for it."""
        with self._lock:
            for name in self._entries:
                self._set(name, state="unloaded", on_demand=True)

    def load(self, name: str) -> Future[None]:
        """Load a model, or a new version of it; the future ends when it serves.

        The future raises ConfigurationError where it cannot be loaded. Raises UnknownModel.
        """
        self.entry(name)
        with self._lock:
            pending = self._pending.get(name)
            if pending is not None and not pending.done():
                return pending
            self._set(name, progress="waiting for its turn")
            if self._entries[name].state != "ready":
                self._set(name, state="loading", reason=None)
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="camserve-loader")
            self._pending[name] = self._thread.submit(self._load_now, name)
            return self._pending[name]

    def unload(self, name: str) -> None:
        """Serve a model no longer, until it is loaded again by `load`. Raises UnknownModel."""
        if self.entry(name).state == "ready":
            self._pool.remove(name)
        with self._lock:
            self._set(name, state="unloaded", reason="It was unloaded.", on_demand=False)

    def replace_all(self, specs: Sequence[ModelSpec]) -> list[Future[None]]:
        """Serve these models from now on: load each (anew), drop those that are not named."""
        names = {spec.name for spec in specs}
        for name in [name for name in self.entries if name not in names]:
            self.unload(name)
            with self._lock:
                del self._entries[name]
        with self._lock:
            for spec in specs:
                old = self._entries.get(spec.name)
                fresh = Entry(spec, "loading") if old is None else replace(old, spec=spec)
                self._entries[spec.name] = fresh
            self._entries = {spec.name: self._entries[spec.name] for spec in specs}
        return [self.load(spec.name) for spec in specs]

    def demand(self, name: str | None) -> Future[None] | None:
        """Note that a model is asked for; the future of its loading where it was put aside.

        Raises UnknownModel, and ModelNotReady where it cannot be had now.
        """
        entry = self.entry(self.default if name is None else name)
        with self._lock:
            self._set(entry.spec.name, used=time.monotonic())
        if entry.state == "ready":
            return None
        if entry.on_demand:
            return self.load(entry.spec.name)
        if entry.state == "unloaded":
            raise UnknownModel(f"Model {entry.spec.name!r} is not loaded; an operator unloaded it.")
        # The reason may name files; /models shows it where that is allowed.
        raise ModelNotReady(
            f"Model {entry.spec.name!r} is {entry.state}; GET /models/{entry.spec.name} says more.",
            retry_after=5,
        )

    def entry(self, name: str) -> Entry:
        """The entry of a model. Raises UnknownModel with the nearest names."""
        entries = self.entries
        if name not in entries:
            raise UnknownModel(
                f"No model is called {name!r}.{nearest(name, entries)} "
                f"Served: {', '.join(entries)}."
            )
        return entries[name]

    def close(self) -> None:
        """Wait for what is being loaded, and drop what is not begun."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _load_now(self, name: str) -> None:
        spec = self.entry(name).spec
        try:
            self._note(name, progress="reading weights and trying the model out")
            model = self._load(spec)
            size = _size_of(model)
            self._make_room(name, size)
            self._note(name, progress="building replicas")
            self._pool.put(model)
        except Exception as error:
            self._fail(name, error)
            raise
        self._note(name, state="ready", reason=None, progress=None, on_demand=False, size=size)
        _log.info("model_ready", model=name, version=model.version, target_layer=model.target_layer)

    def _fail(self, name: str, error: Exception) -> None:
        known = isinstance(error, CamserveError)
        reason = str(error) if known else "It failed to load; the server's log has the cause."
        _log.error("model_failed", model=name, detail=reason, exc_info=None if known else error)
        # An older version goes on serving; the reason says why it is not the newest.
        state: State = "ready" if name in self._pool.models else "failed"
        self._note(name, state=state, reason=reason, progress=None, on_demand=False)

    def _make_room(self, name: str, size: int) -> None:
        """Unload what was not asked for the longest, until a model of `size` bytes fits."""
        if not self._max_bytes:
            return
        if size > self._max_bytes:
            raise ConfigurationError(
                f"model {name!r} takes {size} bytes, and all models together may take "
                f"{self._max_bytes}: raise CAMSERVE_MAX_MODEL_BYTES."
            )
        with self._lock:
            others = [
                e for e in self._entries.values() if e.state == "ready" and e.spec.name != name
            ]
            taken = size + sum(entry.size for entry in others)
            for entry in sorted(others, key=lambda entry: entry.used):
                if taken <= self._max_bytes:
                    break
                taken -= entry.size
                self._pool.remove(entry.spec.name)
                reason = "It made room for another model; a request for it loads it again."
                self._set(entry.spec.name, state="unloaded", reason=reason, on_demand=True)
                _log.info("model_put_aside", model=entry.spec.name)

    def _note(self, name: str, **changes: object) -> None:
        """Change an entry, unless it was dropped meanwhile."""
        with self._lock:
            if name in self._entries:
                self._set(name, **changes)

    def _set(self, name: str, **changes: object) -> None:
        """Change an entry; holds the lock."""
        self._entries[name] = replace(self._entries[name], **changes)  # type: ignore[arg-type]


def _size_of(model: LoadedModel) -> int:
    tensors = (*model.module.parameters(), *model.module.buffers())
    return sum(tensor.nbytes for tensor in tensors)
