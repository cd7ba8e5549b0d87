"""`create_app(settings)`: build all parts of the service, start them and end them."""

from __future__ import annotations

import asyncio
import importlib.resources
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

import fastapi_offline
import structlog
import torch
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware

from service import __version__
from service.errors import ConfigurationError, ShuttingDown, nearest
from service.evaluation.drift import DriftWatch, read_baseline
from service.images.budget import DecodeBudget
from service.integrations.label_studio.host import LabelStudio, LabelStudioHost
from service.integrations.registry import INTEGRATIONS
from service.metrics import Metrics, Reading
from service.models.catalog import ModelSpec, parse_models, with_int8
from service.models.compiled.lane import Compiler
from service.models.library import Library
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.models_toml import read_config
from service.models.pool import ModelPool
from service.pipeline.service import Limits, Service
from service.resources import device_memory, memory_limit, return_freed_memory
from service.routes import (
    classify,
    docs,
    experiments,
    health,
    kernel_images,
    problems,
    served_models,
)
from service.routes.hosts import host_rule, is_loopback
from service.routes.middleware import (
    CORS,
    Access,
    BehindPrefix,
    BoundedHeaders,
    BoundedQuery,
    DrainUnreadBody,
    HeadAsGet,
    HostCheck,
    RefusedWhenFull,
    RequestContext,
)
from service.routes.page.router import page_router
from service.scheduling.admission import Admission
from service.scheduling.scheduler import Scheduler
from service.scheduling.transfers import Transfers
from service.security.addresses import parse_hosts
from service.security.fetcher import Fetcher
from service.security.keys import KeyFile
from service.security.quotas import Bounds, Quotas
from service.settings import Settings
from service.tracing import Traces, traces_from_environment

_log = structlog.get_logger(__name__)

GRACE_SECONDS = 30.0
"""How long the service waits at its end for accepted requests."""

PUBLISH_SECONDS = 2.0
"""How old a gauge of another server process may be in `/metrics`."""

_MODULES = (classify, experiments, served_models, kernel_images, health)
_ROUTERS = (
    *(module.router for module in _MODULES),
    *(router for integration in INTEGRATIONS for router in integration.routers),
)

_DOCS_FILES = importlib.resources.files(fastapi_offline) / "static"


def create_app(settings: Settings, *, background: bool = False, only: str | None = None) -> FastAPI:
    """The service as an ASGI app; its threads live in its lifespan.

    background: load the models after the start, so that probes are answered meanwhile; an error is
    in the model's state. Otherwise they are loaded here.
    only: the name of the single model to serve, of those in the settings.

    Raises ConfigurationError if the settings are invalid or a model cannot be loaded.
    """
    label_studio = _label_studio(settings)
    service = build_service(settings, load=not background, only=only)
    traces = traces_from_environment()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        app.state.loading = service.library.load_in_background() if background else []
        _reload_on_sighup(service, settings)
        _warn_without_authentication(settings)
        publishing = asyncio.create_task(_publish(service.metrics))
        try:
            yield
        finally:
            publishing.cancel()
            service.admission.close()
            await _in_thread(lambda: service.scheduler.close(GRACE_SECONDS))
            await _in_thread(service.library.close)
            for fetcher in (service.fetcher, label_studio.host):
                if fetcher is not None:
                    await fetcher.aclose()
            if traces is not None:
                await _in_thread(traces.close)

    app = FastAPI(
        title="camserve",
        version=__version__,
        summary="Image classification with the evidence for it.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=docs.operation_id,
    )
    app.state.service = service
    app.state.label_studio = label_studio
    app.state.integrations = INTEGRATIONS
    for router in _ROUTERS:
        app.include_router(router)
    _serve_page(app)
    problems.install(app)
    _add_middleware(app, service, settings, traces)
    return app


def _add_middleware(
    app: FastAPI, service: Service, settings: Settings, traces: Traces | None
) -> None:
    """Add the middleware that every request passes, from the innermost to the outermost."""
    bounds = Bounds(settings.key_rate, settings.key_concurrency, settings.key_cost)
    is_shared = service.metrics.is_shared
    costly = (*classify.router.routes, *experiments.router.routes)
    routes = {route.path: route for route in costly if isinstance(route, APIRoute)}
    app.add_middleware(RefusedWhenFull, admission=service.admission, routes=routes)
    app.add_middleware(BoundedQuery)
    app.add_middleware(
        Access,
        keys=service.api_keys,
        quotas=Quotas(bounds, processes=settings.process_count if is_shared else 1),
        open_metrics=settings.open_metrics,
    )
    hosts = host_rule(settings.host, settings.allowed_hosts, keys=service.api_keys is not None)
    if hosts is not None:
        app.add_middleware(HostCheck, rule=hosts)
    app.add_middleware(DrainUnreadBody)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    app.add_middleware(BoundedHeaders)
    every = tuple(route for router in _ROUTERS for route in router.routes)
    app.add_middleware(RequestContext, metrics=service.metrics, traces=traces, routes=every)
    app.add_middleware(HeadAsGet)
    prefix = settings.root_path.rstrip("/")
    if prefix:
        app.add_middleware(BehindPrefix, prefix=prefix)


def build_service(settings: Settings, *, load: bool = True, only: str | None = None) -> Service:
    """Build all parts and, with `load`, load the models; no thread runs yet."""
    specs = [spec for spec in model_specs(settings) if only in (None, spec.name)]
    load_one = model_loader(settings)
    pool = ModelPool(replicas=settings.worker_count, reload=lambda model: load_one(model.spec))
    library = Library(pool, specs, load_one, max_bytes=settings.max_model_bytes)
    if load:
        library.load_all()
    metrics = Metrics()
    transfers = Transfers(
        rate=settings.min_transfer_rate,
        grace=settings.transfer_grace,
        most=settings.max_uploads,
        most_per_client=settings.max_uploads_per_client,
    )
    admission = Admission(
        max_images=settings.queue_limit,
        max_bytes=settings.max_queue_bytes,
        max_answer_bytes=settings.max_held_answer_bytes or max(memory_limit() // 8, 256 << 20),
        make_room=transfers.make_room,
    )
    scheduler = Scheduler(
        pool,
        metrics,
        workers=settings.worker_count,
        helpers=settings.helper_count,
        max_batch=settings.batch_size,
        max_delay=settings.batch_delay,
        threads_per_worker=settings.torch_threads,
        hang_seconds=settings.hang_timeout,
    )
    limits = Limits(
        images=settings.max_images,
        body_bytes=settings.max_body_bytes,
        pixels=settings.max_pixels,
        render_side=settings.max_render_side,
        activation_bytes=settings.max_activation_bytes,
        cost=settings.max_cost,
        answer_bytes=settings.max_answer_bytes,
        timeout=settings.request_timeout,
        formats=settings.image_formats,
    )
    drift = _drift_watch(settings, [spec.name for spec in specs])
    service = Service(
        pool,
        library,
        scheduler,
        admission,
        metrics,
        limits,
        transfers,
        admin_keys=None if settings.admin_keys_file is None else KeyFile(settings.admin_keys_file),
        fetcher=_fetcher(settings) if settings.allowed_image_hosts else None,
        api_keys=None if settings.api_keys_file is None else KeyFile(settings.api_keys_file),
        decoding=DecodeBudget(settings.max_decode_bytes),
        is_near=is_loopback(settings.host),
        watch=None if drift is None else drift.note,
    )
    metrics.watch(_readings(service) | _drift_readings(drift))
    return service


def _readings(service: Service) -> dict[str, Reading]:
    """The metrics that are read when they are scraped."""
    pool, library, admission = service.pool, service.library, service.admission
    scheduler, transfers = service.scheduler, service.transfers
    key_files = [keys for keys in (service.api_keys, service.admin_keys) if keys is not None]
    return {
        "queue_size": Reading("Images waiting for a worker.", lambda: scheduler.waiting),
        "images_held": Reading(
            "Images admitted, without a response yet.", lambda: admission.images
        ),
        "answer_bytes_held": Reading(
            "Bytes of responses being built or sent.", lambda: admission.answer_bytes
        ),
        "requests_arriving": Reading("Partially received requests.", lambda: transfers.arriving),
        "answers_leaving": Reading(
            "Responses that clients have not read completely.", lambda: transfers.leaving
        ),
        "workers_hanging": Reading(
            "Abandoned worker threads that have not returned.", lambda: scheduler.workers.abandoned
        ),
        "hooks_live": Reading("Hooks on all replicas, except the models' own.", pool.hooks_live),
        "memory_limit_bytes": Reading(
            "Memory limit of this process: that of its container, or of the machine.",
            memory_limit,
            across="livemin",
        ),
        "models": Reading(
            "Configured models by state.", library.count_by_state, "state", across="livemax"
        ),
        "last_reload_successful": Reading(
            "1 if the files of models and keys could be read when last tried, and no newest "
            "version of a model failed to load; otherwise 0.",
            lambda: library.is_current and all(keys.is_current for keys in key_files),
            across="livemin",
        ),
        "replicas_replaced": Reading(
            "Replicas that were returned dirty and replaced.",
            lambda: pool.replaced,
            "model",
            True,
            "sum",
        ),
        "device_memory_bytes": Reading(
            "GPU memory that this process holds for tensors, free or in use.",
            device_memory,
            "device",
        ),
    }


def _drift_watch(settings: Settings, names: Sequence[str]) -> DriftWatch | None:
    """What compares answers with the baseline. Raises ConfigurationError for another model's."""
    if settings.baseline is None:
        return None
    baseline = read_baseline(settings.baseline)
    if baseline.model not in names:
        raise ConfigurationError(
            f"--baseline {settings.baseline} is of the model {baseline.model!r}, and the models "
            f"are {', '.join(names)}.{nearest(baseline.model, names)}"
        )
    return DriftWatch(baseline)


def _drift_readings(drift: DriftWatch | None) -> dict[str, Reading]:
    """The metrics of drift; their values are there once the window has enough images."""

    def read(value: Literal["psi", "noise"]) -> Callable[[], dict[tuple[str, ...], float]]:
        if drift is None:
            return dict
        return lambda: {
            (drift.baseline.model, found.label, found.feature): getattr(found, value)
            for found in drift.distances()
        }

    labels = "model,class,feature"
    return {
        "drift_psi": Reading(
            "Population stability index of the last 500 answers and the baseline, by feature, of "
            "all images (empty class) and by class.",
            read("psi"),
            labels,
            across="livemax",
        ),
        "drift_noise": Reading(
            "The index that 9,999 of 10,000 such windows stay below without drift.",
            read("noise"),
            labels,
            across="livemax",
        ),
        "drift_images": Reading(
            "Answers that are compared with the baseline: at most 500.",
            lambda: {} if drift is None else {drift.baseline.model: float(drift.images)},
            "model",
        ),
    }


def _label_studio(settings: Settings) -> LabelStudio:
    secrets = (settings.label_studio_token, settings.overlay_secret)
    token, secret = (value.get_secret_value() if value else None for value in secrets)
    host = None
    if settings.label_studio_url:
        host = LabelStudioHost(
            settings.label_studio_url,
            token,
            allowed=parse_hosts(settings.allowed_image_hosts),
            max_bytes=settings.max_body_bytes,
            seconds=settings.image_url_timeout,
        )
    return LabelStudio(host, secret, settings.label_studio_score)


def _fetcher(settings: Settings) -> Fetcher:
    return Fetcher(
        parse_hosts(settings.allowed_image_hosts),
        max_bytes=settings.max_body_bytes,
        seconds=settings.image_url_timeout,
    )


def model_specs(settings: Settings) -> tuple[ModelSpec, ...]:
    """The models that the settings name. Raises ConfigurationError."""
    configured = () if settings.config is None else read_config(settings.config)
    specs = parse_models(settings.models, settings.weights, configured)
    placed = [replace(spec, app_dir=settings.app_dir) for spec in specs]
    return with_int8(placed, settings.int8)


def model_loader(settings: Settings) -> Callable[[ModelSpec], LoadedModel]:
    """A function that loads one model by the settings. Both raise ConfigurationError."""
    device = _device(settings.device, "--device")
    compiler = Compiler(
        cache=settings.cache_folder,
        streams=settings.worker_count,
        single_request_threads=settings.single_request_thread_count,
        largest=settings.batch_size,
        precision=settings.precision,
    )

    def load_one(spec: ModelSpec) -> LoadedModel:
        source = f"{spec.at('device')}: device"
        try:
            return load_model(
                spec,
                device=_device(spec.device, source) if spec.device else device,
                allow_random_weights=settings.allow_random_weights,
                compiler=compiler if settings.compile else None,
                sensitivity=settings.sensitivity,
            )
        finally:
            return_freed_memory()

    return load_one


def _reload_on_sighup(service: Service, settings: Settings) -> None:
    """On SIGHUP read the files of keys and models again: new versions replace the old ones."""
    one_at_a_time = threading.Lock()

    def reread() -> None:
        with one_at_a_time:
            for keys in (service.api_keys, service.admin_keys):
                if keys is not None:
                    keys.reread()
            try:
                service.library.replace_all(model_specs(settings))
                service.library.has_read_config = True
            except (ConfigurationError, ShuttingDown) as error:
                service.library.has_read_config = False
                _log.error("reread_failed", detail=error.detail)

    loop = asyncio.get_running_loop()
    # Only the main thread can install a signal handler.
    if threading.current_thread() is threading.main_thread():
        # Files may be on a slow disk, so they are not read on the loop.
        loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, reread))


def _warn_without_authentication(settings: Settings) -> None:
    """Log a warning if other machines can reach the service without a key."""
    if not is_loopback(settings.host) and settings.api_keys_file is None:
        _log.warning(
            "open_to_all",
            host=settings.host,
            detail="Every client that reaches this address may use the service without a key; "
            "set CAMSERVE_API_KEYS_FILE.",
        )


def _device(name: str, source: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"{source} {name} cannot be used here; use cpu, or auto for the best device."
        ) from error
    return name


def _serve_page(app: FastAPI) -> None:
    """The page at `/`, and `/docs` with local scripts: browsers contact no other host."""
    app.include_router(page_router())
    app.mount("/docs/static", StaticFiles(directory=str(_DOCS_FILES)), name="docs-static")

    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = docs.complete(generate(), INTEGRATIONS)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


async def _publish(metrics: Metrics) -> None:
    """Keep what other processes read of this one up to date, where there are others."""
    while metrics.is_shared:
        await _in_thread(metrics.publish)
        await asyncio.sleep(PUBLISH_SECONDS)


async def _in_thread(function: Callable[[], None]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, function)
