"""Prometheus metrics of the service, with the names of the logs and of `Server-Timing`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from service import __version__

STAGES = ("decode", "queue", "inference", "render", "total")
"""The stages of a request, in order; `total` includes the time between them."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST_SECONDS = _SECONDS[2:]
"""Fewer than of stages: there is one series a bucket for each route, model and method."""

REFUSALS = (401, 429, 503)
"""Statuses of requests that were refused before any work."""


Across = Literal["livesum", "livemin", "livemax", "sum"]

_ACROSS: dict[str, Across] = {
    "process_cpu_seconds_total": "sum",
    "process_max_fds": "livemin",
    "process_start_time_seconds": "livemin",
}
"""What a value of the process is of several ones; others are added up."""


class RequestLabels(NamedTuple):
    """What a request is counted under; each is one of few names, or "".

    model:  a served model. method: of `/explain`. key: the name of the API key.
    """

    model: str = ""
    method: str = ""
    key: str = ""


class Metrics:
    """The metrics of one service; each app has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._of_process = ProcessCollector(registry=None)  # memory, CPU seconds, files, start
        self._gauges: dict[str, Gauge] = {}
        self._readings: Mapping[str, Reading] = {}
        if not self.is_shared:
            self.registry.register(self._of_process)
        self.requests = Counter(
            "camserve_requests",
            "Requests with a response, by route template and status.",
            ("route", "status"),
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "camserve_stage_duration_seconds",
            "Seconds that a request spent in each stage.",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "camserve_request_duration_seconds",
            "Seconds of a whole request with a status below 400, by route template, served model "
            "and method of explanation (empty where there is none).",
            ("route", "model", "method"),
            buckets=_REQUEST_SECONDS,
            registry=self.registry,
        )
        self.refusals = Counter(
            "camserve_refusals",
            "Requests answered 401, 429 or 503, probes excepted, by the name of their key (empty "
            "without a valid one).",
            ("key", "status"),
            registry=self.registry,
        )
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        self.batch_size = Histogram(
            "camserve_batch_size",
            "Images in one forward pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.verdicts = Counter(
            "camserve_verdicts",
            "Verdicts on maps, one for each explanation that `verify` tested.",
            ("model", "method", "verdict"),
            registry=self.registry,
        )
        Gauge(
            "camserve_build_info",
            "1, with the versions of the service, Python and torch as labels.",
            ("version", "python", "torch"),
            registry=self.registry,
            multiprocess_mode="livemax",
        ).labels(__version__, platform.python_version(), importlib.metadata.version("torch")).set(1)

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Count the seconds that one request spent in each stage."""
        for stage, value in seconds.items():
            self._stages[stage].observe(value)

    def count_request(self, route: str, status: int, seconds: float, labels: RequestLabels) -> None:
        """Count one request that has ended."""
        self.requests.labels(route, str(status)).inc()
        if 0 < status < 400:
            self.request_seconds.labels(route, labels.model, labels.method).observe(seconds)
        if status in REFUSALS and not route.startswith("/health/"):
            self.refusals.labels(labels.key, str(status)).inc()

    @property
    def is_shared(self) -> bool:
        """Whether several processes count together, in files (prometheus_client's multiprocess)."""
        return "PROMETHEUS_MULTIPROC_DIR" in os.environ

    def watch(self, readings: Mapping[str, Reading]) -> None:
        """Add values of other objects, by the name of their metric, read at each scrape."""
        self._readings = readings
        if not self.is_shared:
            self.registry.register(Readings(readings))

    def publish(self) -> None:
        """Write the present values of other objects where the other processes read them."""
        for name, reading in self._readings.items():
            for sample in reading.family(name).samples:
                self._set(sample, reading.text, reading.across)
        for metric in self._of_process.collect():
            for sample in metric.samples:
                self._set(sample, metric.documentation, _ACROSS.get(sample.name, "livesum"))

    def _set(self, sample: Sample, text: str, across: Across) -> None:
        gauge = self._gauges.get(sample.name)
        if gauge is None:
            gauge = Gauge(
                sample.name,
                text,
                tuple(sample.labels),
                registry=self.registry,
                multiprocess_mode=across,
            )
            self._gauges[sample.name] = gauge
        (gauge.labels(**sample.labels) if sample.labels else gauge).set(sample.value)

    def render(self) -> bytes:
        """The text exposition format of Prometheus, of all processes that count together."""
        if not self.is_shared:
            return generate_latest(self.registry)
        self.publish()
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class Reading(NamedTuple):
    """A value of another object, or one for each value of a label.

    label:  its name, if `read` returns a mapping; several are comma-separated, and the mapping has
            tuples. counts: whether the value only grows.
    across: what it is of several processes, as prometheus_client names it.
    """

    text: str
    read: Callable[[], float | Mapping[str, float] | Mapping[tuple[str, ...], float]]
    label: str = ""
    counts: bool = False
    across: Across = "livesum"

    def family(self, name: str) -> Metric:
        """The metric `name`, without the prefix, with the present values."""
        family = CounterMetricFamily if self.counts else GaugeMetricFamily
        labels = self.label.split(",") if self.label else []
        metric = family(f"camserve_{name}", self.text, labels=labels)
        values = self.read()
        for key, value in values.items() if isinstance(values, Mapping) else [((), values)]:
            metric.add_metric([key] if isinstance(key, str) else list(key), value)
        return metric


class Readings(Collector):
    """Values of other objects by the name of their metric, read at each scrape."""

    def __init__(self, readings: Mapping[str, Reading]) -> None:
        self._readings = readings

    def collect(self) -> Iterable[Metric]:
        for name, reading in self._readings.items():
            yield reading.family(name)
