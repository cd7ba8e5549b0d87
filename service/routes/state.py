"""What the routes work with: put on the app once, by `create_app`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import Request

from service.images.budget import DecodeBudget
from service.integrations.label_studio.host import LabelStudio
from service.metrics import Metrics
from service.models.library import Library
from service.models.pool import ModelPool
from service.scheduling.admission import Admission
from service.scheduling.scheduler import Scheduler
from service.scheduling.transfers import Transfers
from service.security.fetcher import Fetcher
from service.security.keys import KeyFile


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request; seconds, bytes, pixels."""

    images: int
    body_bytes: int
    pixels: int
    render_side: int
    activation_bytes: int
    cost: float
    timeout: float
    answer_bytes: int = 64 << 20
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that every route may use.

    is_near: whether only this machine can reach the service.
    """

    pool: ModelPool
    library: Library
    scheduler: Scheduler
    admission: Admission
    metrics: Metrics
    limits: Limits
    transfers: Transfers
    admin_keys: KeyFile | None = None
    fetcher: Fetcher | None = None
    api_keys: KeyFile | None = None
    label_studio: LabelStudio = field(default_factory=LabelStudio)
    decoding: DecodeBudget = field(default_factory=DecodeBudget)
    is_near: bool = False


def service_of(request: Request) -> Service:
    """The parts of the app that this request came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
