"""OpenTelemetry traces, where the extra `otel` is installed and the environment asks for them.

A span for a request, a child of its `traceparent`, and within it one for each stage. The standard
OTEL_ variables rule: without an OTLP endpoint among them nothing is imported and nothing happens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog

from service.metrics import STAGES

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_log = structlog.get_logger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def traces_from_environment() -> Traces | None:
    """Traces sent by OTLP over HTTP, or None where nobody asks for them or the extra is absent."""
    wanted = any(map(os.environ.get, _ENDPOINTS))
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not wanted or disabled or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    try:
        # Here and below: an extra, imported where it is wanted.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        _log.warning("no_traces", detail="Install the extra: pip install 'camserve[otel]'.")
        return None
    return Traces(BatchSpanProcessor(OTLPSpanExporter()))


class Traces:
    """Records requests once they have ended, with the times that are known of them by then."""

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415

        name = os.environ.get("OTEL_SERVICE_NAME", "camserve")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("camserve")
        self._extract = tracecontext.TraceContextTextMapPropagator().extract
        self._trace = trace

    def record(
        self, headers: Mapping[str, str], seconds: float, said: Mapping[str, Any], status: int
    ) -> None:
        """Record a request that ends now.

        said: what the log says of it: its method, route, id, model, and the stages' milliseconds.
        The stages of several images are sums, laid one behind the other.
        """
        end = time.time_ns()
        at = end - round(seconds * 1e9)
        names = {"method": "http.request.method", "route": "http.route"}
        known = {key: value for key, value in said.items() if key not in STAGES}
        span = self._tracer.start_span(
            f"{said['method']} {said['route']}",
            context=self._extract(headers),
            kind=self._trace.SpanKind.SERVER,
            start_time=at,
            attributes={
                "http.response.status_code": status,
                **{names.get(key, f"camserve.{key}"): value for key, value in known.items()},
            },
        )
        inside = self._trace.set_span_in_context(span)
        for stage in STAGES[:-1]:
            if stage in said:
                begun, at = at, at + round(said[stage] * 1e6)
                self._tracer.start_span(stage, context=inside, start_time=begun).end(at)
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()
