"""OpenTelemetry traces, if the extra `otel` is installed and the environment enables them.

Each request is a span, a child of its `traceparent`, with one child span per stage. The standard
OTEL_ variables apply: without an OTLP endpoint nothing is imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog

from service.errors import install_hint
from service.metrics import STAGES

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_log = structlog.get_logger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def traces_from_environment() -> Traces | None:
    """Traces by OTLP over HTTP, or None if they are not enabled or the extra is missing."""
    wanted = any(map(os.environ.get, _ENDPOINTS))
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not wanted or disabled or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    try:
        # Here and below: an extra, imported only if enabled.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        _log.warning("no_traces", detail=f"The extra otel is missing: {install_hint('otel')}.")
        return None
    return Traces(BatchSpanProcessor(OTLPSpanExporter()))


class Traces:
    """Records requests after they have ended, with the times of their stages."""

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
        self, headers: Mapping[str, str], seconds: float, fields: Mapping[str, Any], status: int
    ) -> None:
        """Record a request that ends now.

        fields: those of the log: method, route, id, model, and the milliseconds of each stage. For
        several images the stages are sums, one after the other.
        """
        end = time.time_ns()
        at = end - round(seconds * 1e9)
        names = {"method": "http.request.method", "route": "http.route"}
        known = {key: value for key, value in fields.items() if key not in STAGES}
        span = self._tracer.start_span(
            f"{fields['method']} {fields['route']}",
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
            if stage in fields:
                begun, at = at, at + round(fields[stage] * 1e6)
                self._tracer.start_span(stage, context=inside, start_time=begun).end(at)
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()
