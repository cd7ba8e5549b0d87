"""The parts that answer requests, and the bounds of one request."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.images.budget import DecodeBudget
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
    """The parts that answer requests, put together by `create_app`.

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
    decoding: DecodeBudget = field(default_factory=DecodeBudget)
    is_near: bool = False
