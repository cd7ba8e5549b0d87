"""Probes and metrics, which respond from memory and never wait for a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from api_schemas.models import Health
from service.errors import ModelNotReady, ShuttingDown
from service.models.library import Entry
from service.pipeline.service import Service
from service.routes.access import may_see_reasons
from service.routes.docs import example, problems
from service.routes.state import service_of

router = APIRouter(tags=["operations"])

_SAMPLES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One line a sample.",
        "content": {
            "text/plain": {"schema": {"type": "string"}, "example": "camserve_queue_size 0.0"}
        },
    }
}


@router.get("/health/live", responses=example({"status": "live"}) | problems(503))
async def live(request: Request) -> Health:
    """The process responds, and not too many of its threads hang."""
    _refuse_where_threads_hang(service_of(request))
    return Health(status="live")


@router.get(
    "/health/ready",
    responses=example({"status": "ready"}) | problems(503),
    response_model_exclude_unset=True,
)
async def ready(request: Request) -> Health:
    """Models are loaded and new requests are accepted."""
    service = service_of(request)
    if not service.admission.is_open:
        raise ShuttingDown("The service is shutting down; use another instance.")
    _refuse_where_threads_hang(service)
    _have_repaired(service)
    entries = service.library.entries
    # A model that a request reloads does not make the service unready.
    loading = [
        n for n, entry in entries.items() if entry.state == "loading" and not entry.on_demand
    ]
    failed = {name: entry for name, entry in entries.items() if entry.reason}
    if loading or not any(entry.state == "ready" or entry.on_demand for entry in entries.values()):
        waiting = f"Loading: {', '.join(loading)}." if loading else "No model is loaded."
        raise ModelNotReady(f"{waiting} {_sentence(request, failed)}".strip(), retry_after=2)
    return _health(request, failed)


@router.get("/metrics", response_class=Response, responses=_SAMPLES | problems(401))
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    # Not on the event loop: counting hooks looks through every module of every replica.
    text = await run_in_threadpool(service_of(request).metrics.render)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _have_repaired(service: Service) -> None:
    """Retry failed loads and repairs after their delay: there may be no request that does it."""
    service.library.retry()
    if service.pool.has_missing:
        service.scheduler.call(service.pool.replace_missing)


def _health(request: Request, failed: Mapping[str, Entry]) -> Health:
    """The response of a service that is ready, with the models that failed."""
    if not failed:
        return Health(status="ready")
    health = Health(status="ready", states={name: entry.state for name, entry in failed.items()})
    if may_see_reasons(request):
        health.reasons = {name: entry.reason or "" for name, entry in failed.items()}
    return health


def _sentence(request: Request, failed: Mapping[str, Entry]) -> str:
    """States of the failed models; the reasons only for authorized clients."""
    if may_see_reasons(request):
        return " ".join(f"{name}: {entry.reason}" for name, entry in failed.items())
    states = ", ".join(f"{name} is {entry.state}" for name, entry in failed.items())
    return f"{states}; GET /models has the reasons." if states else ""


def _refuse_where_threads_hang(service: Service) -> None:
    if not service.scheduler.workers.healthy:
        raise ShuttingDown("Too many worker threads hang; restart this instance.")
