"""Probes and metrics: they answer from memory and never wait for a worker."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api_schemas.models import Health
from service.errors import ShuttingDown
from service.routes.docs import problems
from service.routes.state import service_of

router = APIRouter(tags=["operations"])


@router.get("/health/live")
async def live() -> Health:
    """The process answers."""
    return Health(status="live")


@router.get("/health/ready", responses=problems(503))
async def ready(request: Request) -> Health:
    """Models are loaded and new requests are taken."""
    if not service_of(request).admission.is_open:
        raise ShuttingDown("The service is shutting down; ask another instance.")
    return Health(status="ready")


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
