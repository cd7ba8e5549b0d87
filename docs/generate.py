"""Write the files of docs/reference that say what the code says: settings, errors, routes, metrics.

    python docs/generate.py

A test compares the committed pages with what this would write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry

from service import errors
from service.app import build_service, create_app
from service.routes.problems import STATUS, status_of
from service.settings import Settings

REFERENCE = Path(__file__).parent / "reference"


def settings_page() -> str:
    """A table of every setting: flag, environment variable, default, meaning."""
    lines = [
        "# Settings",
        "",
        "Each setting is a flag of `camserve serve` and an environment variable; the flag wins.",
        "",
        "| flag | environment | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        flag = {"models": "--model"}.get(name, f"--{name.replace('_', '-')}")
        default = field.get_default()
        shown = "" if default in (None, (), "") else f"`{str(default).lower()}`"
        lines.append(f"| `{flag}` | `CAMSERVE_{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines) + "\n"


def errors_page() -> str:
    """A table of every error code with its status."""
    lines = [
        "# Errors",
        "",
        "Every error is an `application/problem+json` body (RFC 9457). `code` is stable: switch",
        "on it. `detail` says what to do, `request_id` is also in the header `X-Request-ID` and in",
        "the server's log. 429 and 503 carry `Retry-After`, in seconds.",
        "On the routes of other servers' protocols the body is theirs.",
        "",
        "| code | status | meaning |",
        "|---|---|---|",
    ]
    rows = [
        (status_of(cls("")), cls.code, (cls.__doc__ or "").splitlines()[0])
        for cls in _classes(errors.CamserveError)
        if cls in STATUS
    ]
    lines += [f"| `{code}` | {status} | {text} |" for status, code, text in sorted(rows)]
    lines += [
        "",
        "A route or method that does not exist answers `not_found` (404) or `method_not_allowed`",
        "(405) in the same form.",
    ]
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """A table of every metric."""
    service = build_service(Settings(workers=1, compile=False))
    lines = [
        "# Metrics",
        "",
        "`GET /metrics` in Prometheus' text format. The stages are those of `timing_ms`, of the",
        "header `Server-Timing` and of the log: `decode`, `queue`, `inference`, `render`, `total`.",
        "",
        "| metric | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    lines += sorted(_metric_rows(service.metrics.registry))
    return "\n".join(lines) + "\n"


def _metric_rows(registry: CollectorRegistry) -> Iterator[str]:
    for metric in registry.collect():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        labels = {"camserve_requests": "route, status", "camserve_replicas_replaced": "model"}
        label = labels.get(metric.name, "stage" if "stage" in metric.name else "")
        yield f"| `{name}` | {metric.type} | {label} | {metric.documentation} |"


def _classes(base: type[errors.CamserveError]) -> Iterator[type[errors.CamserveError]]:
    yield base
    for cls in base.__subclasses__():
        yield from _classes(cls)


def openapi_document() -> str:
    """What `/openapi.json` answers."""
    app = create_app(Settings(workers=1, compile=False), background=True)
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


PAGES = {
    "settings.md": settings_page,
    "errors.md": errors_page,
    "metrics.md": metrics_page,
    "openapi.json": openapi_document,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
        print(f"docs/reference/{name}")
