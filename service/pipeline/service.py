"""The parts of the service, the bounds of one request, and what its images have in common."""

from __future__ import annotations

import threading
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
    """Bounds of one request, in seconds, bytes, pixels and forward passes (`cost`)."""

    images: int
    body_bytes: int
    pixels: int
    render_side: int
    activation_bytes: int
    cost: float
    timeout: float
    answer_bytes: int = 64 << 20
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that answer requests, put together by `create_app`.

    is_near: whether only this machine can reach the service.
    watch: called in a worker with each answer of an image and the model input, if answers are
           watched for drift.
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
    watch: Callable[[LoadedModel, InferenceResult, Tensor], None] | None = None


@dataclass(slots=True)
class Clock:
    """Seconds by stage, summed over the images of one request.

    started: on `time.monotonic()`'s clock, from when `total` counts.
    """

    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, stage: str, seconds: float) -> None:
        """Add the seconds of one image to a stage; from any thread."""
        with self._lock:
            self.seconds[stage] += seconds

    def stop(self) -> None:
        """Set `total`; only the first call does, since the answer may contain it by then."""
        self.seconds["total"] = self.seconds["total"] or time.monotonic() - self.started

    def milliseconds(self) -> dict[str, float]:
        return {stage: round(value * 1000, 3) for stage, value in self.seconds.items()}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all images of a request have in common.

    question: makes the question of an image, as `ResolvedOptions.question` does.
    hiding:   the part of each image to hide for a second inference, if any.
    deadline: of the request, on `time.monotonic()`'s clock; None: no deadline.
    keeps_preview: whether a preview to draw on is kept even if the options have no overlay.
    keeps_source: whether the decoded images are kept, to be edited.
    """

    service: Service
    model: LoadedModel
    options: CommonOptions
    question: Callable[..., Question]
    hiding: Hiding | None
    deadline: float | None = None
    clock: Clock = field(default_factory=Clock)
    keeps_preview: bool = False
    keeps_source: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ProcessedImage:
    """One image after decoding and inference; `masked` is inference with a part of it hidden."""

    upload: Upload
    inference: InferenceResult
    masked: InferenceResult | None
