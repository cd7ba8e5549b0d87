"""`create_app(settings)`: the parts put together, and their life from start to end."""

from __future__ import annotations

import asyncio
import importlib.resources
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import fastapi_offline
import torch
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from api_schemas.options import ExplainOptions
from service import __version__
from service.admission import Admission
from service.errors import ConfigurationError
from service.metrics import Metrics, Readings
from service.models.catalog import parse_models
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool
from service.routes import classify, docs, health, kernels, models, problems
from service.routes.middleware import BehindPrefix, DrainUnreadBody, RequestContext
from service.routes.state import Limits, Service
from service.scheduler import Scheduler
from service.settings import Settings

GRACE_SECONDS = 30.0
"""How long the end of the service waits for what was accepted."""

_DOCS_FILES = importlib.resources.files(fastapi_offline) / "static"


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI app; its models are loaded here, its threads live in its lifespan.

    Raises ConfigurationError where a model cannot be loaded.
    """
    service = build_service(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        try:
            yield
        finally:
            service.admission.close()
            await _in_thread(lambda: service.scheduler.close(GRACE_SECONDS))

    app = FastAPI(
        title="camserve",
        version=__version__,
        summary="Image classification with the evidence for it.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for router in (classify.router, models.router, kernels.router, health.router):
        app.include_router(router)
    _serve_docs(app)
    problems.install(app, options=list(ExplainOptions.model_fields))
    app.add_middleware(DrainUnreadBody)
    app.add_middleware(RequestContext, metrics=service.metrics)
    prefix = settings.root_path.rstrip("/")
    if prefix:
        app.add_middleware(BehindPrefix, prefix=prefix)
    return app


def build_service(settings: Settings) -> Service:
    """Load the models and build all parts; no thread runs yet."""
    pool = ModelPool(
        load_models(settings),
        replicas=settings.worker_count,
        reload=lambda model: _load(model, settings),
    )
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
    return Service(pool, scheduler, admission, metrics, limits)


def load_models(settings: Settings) -> list[LoadedModel]:
    """Every model that the settings name. Raises ConfigurationError."""
    if settings.app_dir is not None and str(settings.app_dir) not in sys.path:
        sys.path.insert(0, str(settings.app_dir))
    device = _device(settings.device)
    return [
        load_model(spec, device=device, allow_random_weights=settings.allow_random_weights)
        for spec in parse_models(settings.models, settings.weights)
    ]


def _load(model: LoadedModel, settings: Settings) -> LoadedModel:
    return load_model(
        model.spec,
        device=_device(settings.device),
        allow_random_weights=settings.allow_random_weights,
    )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"--device {name} cannot be used here; cpu always can, auto takes what there is."
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
