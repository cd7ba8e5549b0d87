"""Prometheus metrics of the service, with the names of the logs and of `Server-Timing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

STAGES = ("decode", "queue", "inference", "render", "total")
"""The stages of a request, in order; `total` includes the time between them."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one service; each app has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU seconds, files, start
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
        for stage in STAGES:
            self.stage_seconds.labels(stage)
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

    def watch(self, collector: Collector) -> None:
        """Add a collector that is read at each scrape."""
        self.registry.register(collector)

    def render(self) -> bytes:
        """The text exposition format of Prometheus."""
        return generate_latest(self.registry)


class Readings(Collector):
    """Values of other objects, read at each scrape.

    gauges:        name → (help, function).
    replaced:      number of dirty replicas of each model.
    device_memory: bytes held on each GPU.
    """

    def __init__(
        self,
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
        replaced: Callable[[], Mapping[str, int]],
        device_memory: Callable[[], Mapping[str, int]],
    ) -> None:
        self._gauges = gauges
        self._replaced = replaced
        self._device_memory = device_memory

    def collect(self) -> Iterable[Metric]:
        for name, (text, read) in self._gauges.items():
            yield GaugeMetricFamily(f"camserve_{name}", text, value=read())
        replaced = CounterMetricFamily(
            "camserve_replicas_replaced",
            "Replicas that were returned dirty and replaced.",
            labels=["model"],
        )
        for model, count in self._replaced().items():
            replaced.add_metric([model], count)
        yield replaced
        memory = GaugeMetricFamily(
            "camserve_device_memory_bytes",
            "GPU memory that this process holds for tensors, free or in use.",
            labels=["device"],
        )
        for device, held in self._device_memory().items():
            memory.add_metric([device], held)
        yield memory
