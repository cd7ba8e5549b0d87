"""Traces: a span a request and a span a stage, where they are asked for and never otherwise."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pictures
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service import app, tracing
from service.tracing import Traces, traces_from_environment

PNG = {"content-type": "image/png"}
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def test_a_request_is_a_span_of_its_callers_trace_with_a_span_a_stage(
    serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    traces = Traces(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(app, "traces_from_environment", lambda: traces)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with serve() as client:
        client.get("/health/live")
        sent = {**PNG, "traceparent": f"00-{trace}-{parent}-01", "x-api-key": "secret"}
        answer = client.post("/explain?seed=3", content=pictures.png(), headers=sent)
        client.post("/explain", content=b"no picture", headers=PNG)
        spans = exporter.get_finished_spans()
    roots = [span for span in spans if span.name == "POST /explain"]
    assert [span.attributes["http.response.status_code"] for span in roots] == [200, 415]
    root = roots[0]
    assert f"{root.context.trace_id:032x}" == trace
    assert f"{root.parent.span_id:016x}" == parent
    assert root.attributes["camserve.request_id"] == answer.headers["x-request-id"]
    assert root.attributes["camserve.model"] == "small"
    assert root.attributes["http.route"] == "/explain"
    assert "secret" not in str([span.to_json() for span in spans])
    stages = [span for span in spans if span.parent and span.parent.span_id == root.context.span_id]
    assert [span.name for span in stages] == ["decode", "queue", "inference", "render"]
    timing = answer.json()["timing_ms"]
    for span in stages:
        took = (span.end_time - span.start_time) / 1e6
        assert took == pytest.approx(timing[span.name], abs=0.001)
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time
    assert roots[1].context.trace_id != root.context.trace_id


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nothing_is_traced_that_nobody_asked_for(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracing, "Traces", lambda *_: pytest.fail("it was built"))
    assert traces_from_environment() is None


def test_without_the_extra_the_service_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(tracing._log, "warning", lambda _event, detail: told.append(detail))
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert traces_from_environment() is None
    assert "install -e '.[otel]'" in told[0]


def test_opentelemetry_is_not_imported_unless_it_is_asked_for() -> None:
    """In a process of its own: here the tests have imported it."""
    code = "import sys, service.tracing as t; t.traces_from_environment(); "
    code += "sys.exit('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": "."})
    assert done.returncode == 0


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An address that takes OTLP over HTTP, and what came, read by OpenTelemetry's own messages."""
    came: list[ExportTraceServiceRequest] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert (self.path, self.headers["content-type"]) == (
                "/v1/traces",
                "application/x-protobuf",
            )
            came.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", came
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_what_is_left_at_the_end_reaches_a_collector(
    serve, monkeypatch: pytest.MonkeyPatch, collector, compression: str
) -> None:
    endpoint, came = collector
    monkeypatch.setenv(ENDPOINT, endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "flowers")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with serve() as client:
        sent = {**PNG, "traceparent": f"00-{trace}-{parent}-01"}
        assert client.post("/explain", content=pictures.png(), headers=sent).status_code == 200
    resources = [resource for message in came for resource in message.resource_spans]
    named = {(a.key, a.value.string_value) for r in resources for a in r.resource.attributes}
    assert ("service.name", "flowers") in named
    spans = [span for r in resources for scope in r.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {trace}
    (root,) = (span for span in spans if span.parent_span_id.hex() == parent)
    assert root.name == "POST /explain"
    inside = [span.name for span in spans if span.parent_span_id == root.span_id]
    assert sorted(inside) == ["decode", "inference", "queue", "render"]


@pytest.mark.timeout(30)
def test_a_collector_that_is_gone_costs_no_answer(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serve() as client:
        assert client.post("/explain", content=pictures.png(), headers=PNG).status_code == 200
