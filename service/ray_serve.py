"""The same app under Ray Serve: replicas on many machines, as many as the load requires.

    serve run service.ray_serve:app
    serve run service.ray_serve:many_models models='["torchvision/resnet50", "builtin"]'

`deploy/ray/` has the configuration files. Settings come as arguments and from the environment of
the nodes. Ray sends requests to replicas that are ready, checks their health, and lets them finish
before they end.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service import logs
from service.app import create_app, model_specs
from service.errors import CamserveError, UnknownModel, nearest
from service.integrations.label_studio import overlay
from service.integrations.protocols import repository
from service.resources import spare_collector, tune_allocator
from service.routes.access import is_admin, path_of, sent_key
from service.routes.hosts import host_rule
from service.routes.middleware import BehindPrefix
from service.routes.problems import problem
from service.routes.server.draining import SWITCH_SECONDS
from service.routes.state import service_in
from service.settings import Settings, warn_of_unknown_variables

DEPLOYMENT: dict[str, Any] = {
    "name": "camserve",
    "ray_actor_options": {"num_cpus": 1},
    "max_ongoing_requests": 16,
    "max_queued_requests": 64,
    "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=1),
    "graceful_shutdown_timeout_s": 35,
}
"""Defaults for a configuration file, which must set the number of replicas."""

OVERLAY = f"{overlay.router.prefix}/overlay.png"
ADMIN = f"{repository.router.prefix}/"
MAX_OPTIONS = 1000
"""The most parameters of a query; the app refuses more."""


def replica_settings(arguments: dict[str, Any]) -> Settings:
    """Set up this process for a replica and return its settings.

    Ray's proxy listens and not the replica, so the host is set as for a service that other machines
    reach. Workers: as many as the cores that Ray gave the replica, not those of the machine; with a
    GPU, the default for a GPU.
    """
    resources = ray.get_runtime_context().get_assigned_resources()
    cores = max(1, int(resources.get("CPU", 1)))
    workers = {} if resources.get("GPU") else {"workers": cores}
    given = {"host": "0.0.0.0", **workers, "single_request_threads": cores, **arguments}  # noqa: S104
    settings = Settings(**given)
    logs.configure(settings.log_format)
    warn_of_unknown_variables()
    tune_allocator()
    spare_collector()
    sys.setswitchinterval(SWITCH_SECONDS)
    return settings


class AllModels:
    """One process with the models of the settings, all loaded before it is ready."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._app = create_app(replica_settings(arguments))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def check_health(self) -> None:
        """Ray replaces a replica where this raises."""
        _check_workers(self._app)


class ManyModels:
    """One process that has some of many models: those that were requested last.

    Each has a separate app. A request names its model in the header `serve_multiplexed_model_id`,
    by which Ray finds a replica that has it, or in the query as `model`; without either it gets the
    first model.

    No model is loaded for a request before its host and its key are checked. A request that fails
    the check, or needs no key, is handled by the app of a loaded model, or by `_front`, which has
    none.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._settings = replica_settings(arguments)
        self._names = [spec.name for spec in model_specs(self._settings)]
        self._loaded: list[_ModelApp] = []
        self._front = create_app(self._settings, background=True)
        self._service = service_in(self._front)
        self._service.library.load_on_demand()
        self._hosts = host_rule(
            self._settings.host,
            self._settings.allowed_hosts,
            keys=self._service.api_keys is not None,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        prefix = self._settings.root_path.rstrip("/")
        return _AsgiApp(BehindPrefix(self._handle, prefix) if prefix else self._handle)

    def check_health(self) -> None:
        """Ray replaces a replica where this raises."""
        for model in self._loaded:
            _check_workers(model.app)

    @serve.multiplexed(max_num_models_per_replica=3)  # type: ignore[untyped-decorator]
    async def _model(self, name: str) -> _ModelApp:
        """Load a model. Raises ConfigurationError."""
        model = _ModelApp(await asyncio.to_thread(create_app, self._settings, only=name))
        await model.open()
        self._loaded = [other for other in self._loaded if other.is_open] + [model]
        return model

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            name = self._model_name(scope)
            app = self._any_app() if name is None else (await self._model(name)).app
        except CamserveError as error:
            # The app knows which form errors have on this path.
            await problem(Request({**scope, "app": self._front}), error)(scope, receive, send)
            return
        await app(scope, receive, send)

    def _model_name(self, scope: Scope) -> str | None:
        """The model of a request that may load one; None for any other request.

        Raises UnknownModel.
        """
        headers, path, query = Headers(scope=scope), path_of(scope), scope["query_string"]
        if self._hosts is not None and not all(map(self._hosts.accepts, headers.getlist("host"))):
            return None
        if path == OVERLAY:
            return self._known(self._model_of_overlay(query))
        if path.startswith(ADMIN):
            admitted = is_admin(headers, self._service.admin_keys)
        else:
            keys = self._service.api_keys
            admitted = keys is None or keys.owner(sent_key(headers)) is not None
        if not admitted or query.count(b"&") >= MAX_OPTIONS:
            return None
        named = parse_qs(query.decode("latin-1"))
        return self._known(serve.get_multiplexed_model_id() or named.get("model", self._names)[0])

    def _model_of_overlay(self, query: bytes) -> str | None:
        """The model of a signed overlay key; None if the key is invalid."""
        try:
            grant, _ = overlay.read_query(query, self._front.state.label_studio.secret)
        except CamserveError:
            return None
        return grant.model or self._names[0]

    def _known(self, name: str | None) -> str | None:
        if name is not None and name not in self._names:
            raise UnknownModel(f"No model is called {name!r}.{nearest(name, self._names)}")
        return name

    def _any_app(self) -> FastAPI:
        """An app for requests that need no model: probes, pages, refusals."""
        loaded = [model.app for model in self._loaded if model.is_open]
        return loaded[-1] if loaded else self._front


@dataclass(frozen=True, slots=True)
class _AsgiApp:
    """An app without a lifespan, in a form that uvicorn recognises as ASGI."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        for moment in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{moment}.complete"})


class _ModelApp:
    """One model's app; Ray deletes the least recently used one."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.is_open = False
        self._loop = asyncio.get_running_loop()

    async def open(self) -> None:
        """Start the app's threads."""
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        self.is_open = True

    async def close(self) -> None:
        """Let the app finish accepted requests, and end its threads."""
        if self.is_open:
            self.is_open = False
            await self._lifespan.__aexit__(None, None, None)

    def __del__(self) -> None:
        """Called by Ray in a thread, and once more when nothing refers to this."""
        if self.is_open and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self.close(), self._loop).result()


def _check_workers(app: FastAPI) -> None:
    if not service_in(app).scheduler.workers.healthy:
        raise RuntimeError("Too many worker threads hang.")


def app(arguments: dict[str, Any]) -> Any:
    """Replicas that have all the models. arguments: settings by name, as in the environment."""
    return serve.deployment(**DEPLOYMENT)(serve.ingress()(AllModels)).bind(arguments)


def many_models(arguments: dict[str, Any]) -> Any:
    """Replicas that have at most three of the models each."""
    return serve.deployment(**DEPLOYMENT)(serve.ingress()(ManyModels)).bind(arguments)
