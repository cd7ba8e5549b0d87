"""`create_app(settings)`: the parts put together, and their life from start to end."""

from __future__ import annotations

import asyncio
import importlib.resources
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import fastapi_offline
import structlog
import torch
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from api_schemas.options import ExplainOptions
from service import __version__
from service.admission import Admission
from service.errors import ConfigurationError
from service.integrations import repository
from service.keys import read_keys
from service.metrics import Metrics, Readings
from service.models.catalog import ModelSpec, check_names, parse_models
from service.models.config import read_config
from service.models.library import Library
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool
from service.routes import classify, docs, health, kernels, models, problems
from service.routes.middleware import BehindPrefix, DrainUnreadBody, RequestContext
from service.routes.state import Limits, Service
from service.scheduler import Scheduler
from service.settings import Settings

_log = structlog.get_logger(__name__)

GRACE_SECONDS = 30.0
"""How long the end of the service waits for what was accepted."""

_DOCS_FILES = importlib.resources.files(fastapi_offline) / "static"


def create_app(settings: Settings, *, background: bool = False) -> FastAPI:
    """The service as an ASGI app; its threads live in its lifespan.

    background: load the models after the start, so that probes are answered meanwhile; what fails
    is in their states. Otherwise they are loaded here.

    Raises ConfigurationError where the settings are wrong or a model cannot be loaded.
    """
    service = build_service(settings, load=not background)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        app.state.loading = service.library.load_in_background() if background else []
        _reread_on_hang_up(service, settings)
        try:
            yield
        finally:
            service.admission.close()
            await _in_thread(lambda: service.scheduler.close(GRACE_SECONDS))
            await _in_thread(service.library.close)

    app = FastAPI(
        title="camserve",
        version=__version__,
        summary="Image classification with the evidence for it.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for router in (
        classify.router,
        models.router,
        kernels.router,
        health.router,
        repository.router,
    ):
        app.include_router(router)
    _serve_docs(app)
    problems.install(app, options=list(ExplainOptions.model_fields))
    app.add_middleware(DrainUnreadBody)
    app.add_middleware(RequestContext, metrics=service.metrics)
    prefix = settings.root_path.rstrip("/")
    if prefix:
        app.add_middleware(BehindPrefix, prefix=prefix)
    return app


def build_service(settings: Settings, *, load: bool = True) -> Service:
    """Build all parts and, unless told not to, load the models; no thread runs yet."""
    load_one = model_loader(settings)
    pool = ModelPool(replicas=settings.worker_count, reload=lambda model: load_one(model.spec))
    library = Library(pool, model_specs(settings), load_one, max_bytes=settings.max_model_bytes)
    if load:
        library.load_all()
    metrics = Metrics()
    admission = Admission(max_images=settings.max_queue, max_bytes=settings.max_queue_bytes)
    scheduler = Scheduler(
        pool, metrics, workers=settings.worker_count, max_batch=settings.max_batch
    )
    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "queue_size": ("Images that wait for a worker.", lambda: scheduler.waiting),
        "images_held": ("Images admitted and not yet answered.", lambda: admission.images),
        "hooks_live": ("Hooks on all replicas beyond the models' own.", pool.hooks_live),
    }
    metrics.watch(Readings(gauges, lambda: pool.replaced))
    limits = Limits(
        images=settings.max_images,
        body_bytes=settings.max_body_bytes,
        pixels=settings.max_pixels,
        render_side=settings.max_render_side,
        activation_bytes=settings.max_activation_bytes,
        cost=settings.max_cost,
        timeout=settings.request_timeout,
    )
    admin_keys = {} if settings.admin_keys_file is None else read_keys(settings.admin_keys_file)
    return Service(pool, library, scheduler, admission, metrics, limits, admin_keys)


def model_specs(settings: Settings) -> tuple[ModelSpec, ...]:
    """Every model that the settings name. Raises ConfigurationError."""
    if settings.app_dir is not None and str(settings.app_dir) not in sys.path:
        sys.path.insert(0, str(settings.app_dir))
    if settings.config is None:
        return parse_models(settings.models, settings.weights)
    specs = read_config(settings.config)
    if settings.models or settings.weights:
        specs += parse_models(settings.models, settings.weights)
    check_names(specs)
    return specs


def model_loader(settings: Settings) -> Callable[[ModelSpec], LoadedModel]:
    """What loads one model as the settings say. Raises ConfigurationError, as the loader does."""
    device = _device(settings.device, "--device")

    def load_one(spec: ModelSpec) -> LoadedModel:
        own = _device(spec.device, f"{spec.at('device')}: device") if spec.device else device
        return load_model(spec, device=own, allow_random_weights=settings.allow_random_weights)

    return load_one


def _reread_on_hang_up(service: Service, settings: Settings) -> None:
    """On SIGHUP read the models' files again: new versions replace the old ones."""

    def reread() -> None:
        try:
            service.library.replace_all(model_specs(settings))
        except ConfigurationError as error:
            _log.error("reread_failed", detail=error.detail)

    # Signals reach the main thread alone; in a test's thread there is nothing to install.
    if threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reread)


def _device(name: str, said_by: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"{said_by} {name} cannot be used here; cpu always can, auto takes what there is."
        ) from error
    return name


def _serve_docs(app: FastAPI) -> None:
    """`/docs` with its scripts from here: no other host is asked."""
    app.mount("/docs/static", StaticFiles(directory=str(_DOCS_FILES)), name="docs-static")

    @app.get("/docs", include_in_schema=False)
    async def swagger(request: Request) -> HTMLResponse:
        prefix = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(
            openapi_url=f"{prefix}/openapi.json",
            title="camserve: routes",
            swagger_js_url=f"{prefix}/docs/static/swagger-ui-bundle.js",
            swagger_css_url=f"{prefix}/docs/static/swagger-ui.css",
            swagger_favicon_url=f"{prefix}/docs/static/favicon.png",
        )

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> RedirectResponse:
        return RedirectResponse(f"{request.scope.get('root_path', '').rstrip('/')}/docs")

    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in docs.components().items():
            schemas.setdefault(name, schema)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _in_thread(function: Callable[[], None]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, function)
