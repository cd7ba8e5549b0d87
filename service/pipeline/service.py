"""The parts that answer requests, the bounds of one request, and what is one request's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from api_schemas.options import CommonOptions
from service.images.budget import DecodeBudget
from service.images.upload import Hiding, Upload
from service.inference.questions import InferenceResult, Question
from service.metrics import STAGES, Metrics
from service.models.library import Library
from service.models.loaded import LoadedModel
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


@dataclass(slots=True)
class Clock:
    """Seconds by stage, summed over the images of one request.

    started: on `time.monotonic()`'s clock, from when `total` counts.
    """

    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def stop(self) -> None:
        """Set `total`; only the first call counts, since the answer may hold it by then."""
        self.seconds["total"] = self.seconds["total"] or time.monotonic() - self.started

    def milliseconds(self) -> dict[str, float]:
        return {stage: round(value * 1000, 3) for stage, value in self.seconds.items()}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How each image of a request is answered.

    question: made of an image's pixels, as `resolve.question` returns it.
    hiding:   the part of each image that is hidden for a second answer; None where none is.
    deadline: until when images are waited for, on `time.monotonic()`'s clock; None: for ever.
    photo:    whether a photo to draw on is kept where the options ask for no overlay, too.
    """

    service: Service
    model: LoadedModel
    options: CommonOptions
    question: Callable[[Tensor], Question]
    hiding: Hiding | None
    deadline: float | None = None
    clock: Clock = field(default_factory=Clock)
    photo: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """One image, opened and answered; `masked` with a part of it hidden, where that was asked."""

    upload: Upload
    answer: InferenceResult
    masked: InferenceResult | None
