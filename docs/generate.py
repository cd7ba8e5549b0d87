"""Write what the documentation says of the code, and llms.txt, which says what there is to read.

    PYTHONPATH=. python docs/generate.py

A test compares the committed pages with what this would write.
"""

from __future__ import annotations

import inspect
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer.main
import yaml
from prometheus_client import CollectorRegistry

from api_schemas.answers import Verification
from api_schemas.methods import BACKWARD, METHODS, MethodRecord
from api_schemas.options import ExplainOptions
from service import errors
from service.app import build_service, create_app
from service.cli import main
from service.inference.perturbation import windows
from service.routes.problems import STATUS, status_of
from service.settings import Settings

DOCS = Path(__file__).parent
VERBS = ("get", "post", "put", "patch", "delete")
MARKS = "<!-- The table comes from api_schemas/methods.py -->", "<!-- The end of the table -->"
COLUMNS = (
    *("method", "what the map shows", "map", "cost in forward passes", "gradients", "needs"),
    *("when it misleads", "paper"),
)
NEEDS = {
    "layer": "a layer",
    "head": "global average pooling and one linear layer behind it",
    "relu": "ReLU or ReLU6",
    "attention": "attention between the same tokens in all layers",
    "class token": "a class token",
}


def settings_page() -> str:
    """A table of every setting: flag, environment variable, default, meaning."""
    lines = [
        "# Settings",
        "",
        "Each setting is a flag of `camserve serve` and an environment variable.",
        "The flag takes precedence.",
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
        "Every error is an `application/problem+json` body (RFC 9457). `code` is stable: use it in",
        "programs. `detail` says what to do; `request_id` is also in the header `X-Request-ID` and",
        "in the server's log. 429 and 503 have `Retry-After`, in seconds.",
        "Routes of other servers' protocols return errors in the format of that protocol.",
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
        "An unknown route or method returns `not_found` (404) or `method_not_allowed` (405) in the",
        "same format.",
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
        labels = {
            "camserve_device_memory_bytes": "device",
            "camserve_replicas_replaced": "model",
            "camserve_requests": "route, status",
            "camserve_verdicts": "model, method, verdict",
        }
        label = labels.get(metric.name, "stage" if "stage" in metric.name else "")
        yield f"| `{name}` | {metric.type} | {label} | {metric.documentation} |"


def methods_page() -> str:
    """The page of the methods as it is, with a row for each method between its marks."""
    page = (DOCS / "explanation" / "methods.md").read_text(encoding="utf-8")
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    lines = [
        MARKS[0],
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(_method_cells(each))} |" for each in METHODS.values()),
        "",
        MARKS[1],
    ]
    return before + "\n".join(lines) + after


def _method_cells(method: MethodRecord) -> Iterator[str]:
    """A row of the table of methods."""
    walked = "whole model" if method.runs == "gradient" else "behind the layer"
    yield f"`{method.name}`"
    yield method.shows
    yield "−1..1" if method.signed else "0..1"
    yield _method_cost(method)
    yield walked if "gradients" in method.needs else "no"
    yield ", ".join(NEEDS[need] for need in method.needs if need in NEEDS) or "–"
    yield method.misleads or "–"
    yield method.paper


def _method_cost(method: MethodRecord) -> str:
    """What a method costs: the pass that predicts, and what runs behind it."""
    options, walk = ExplainOptions.model_fields, f"{BACKWARD:g} × targets"
    times = {
        "squares": f"squares ({len(windows(224)) ** 2} at 224 px)",
        "samples": f"samples ({method.samples:,})",
        "steps": f"steps ({options['steps'].default})",
    }.get(method.times, method.times)
    passes = {
        "": "1",
        "forward": "2" if times == "once" else f"1 + {times}",
        "gradient": f"2 + {walk}" if times == "once" else f"1 + (1 + {walk}) × {times}",
        "tail": f"2 + {times} × share",
    }[method.runs]
    return f"{passes} + {walk} × share" if method.walks else passes


def _classes(base: type[errors.CamserveError]) -> Iterator[type[errors.CamserveError]]:
    yield base
    for cls in base.__subclasses__():
        yield from _classes(cls)


def openapi_document() -> str:
    """What `/openapi.json` answers."""
    app = create_app(Settings(workers=1, compile=False), background=True)
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


def routes_page() -> str:
    """Every operation of the OpenAPI document: summary, parameters, bodies, answers."""
    document = create_app(Settings(workers=1, compile=False), background=True).openapi()
    lines = [
        "# Routes",
        "",
        "Try each at `/docs` of a running service. [openapi.json](openapi.json) has the schemas",
        "and examples; [Errors](errors.md) describes the problem body.",
    ]
    for tag in document["tags"]:
        found = [
            (path, method, each)
            for path, methods in document["paths"].items()
            for method, each in methods.items()
            if method in VERBS and each["tags"][0] == tag["name"]
        ]
        if found:
            lines += ["", f"## {tag['name']}", "", tag["description"]]
        for path, method, each in found:
            lines += ["", f"### `{method.upper()} {path}`", "", *_operation(each)]
            if path == "/explain":
                lines += ["", *_verification()]
    return "\n".join(lines) + "\n"


def _verification() -> Iterator[str]:
    """The fields that `verify` adds to an explanation."""
    yield "With the option `verify`, each explanation has the field `verify`. " + " ".join(
        inspect.cleandoc(Verification.__doc__ or "").split("\n\n")[1].split()
    )
    yield (
        "`inconclusive`: neither can be said, and nothing is said against the map. A verdict is "
        "about a place on this image: not about why, nor about whether the prediction is right."
    )
    yield "\n| field of `verify` | value | meaning |"
    yield "|---|---|---|"
    definitions = Verification.model_json_schema()
    for name, field in definitions["properties"].items():
        parts = _definition(field, definitions)
        listed = parts.get("properties", {})
        within = f"each with {_names(listed)}" if "items" in str(field) else _names(listed)
        text = field.get("description") or " ".join(parts.get("description", "").split())
        yield f"| `{name}` | {within or _takes(field)} | {_cell(text)} |"


def _definition(field: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """The schema of the object, or of the objects in the list, that a field holds."""
    found = re.search(r"#/\$defs/(\w+)", str(field))
    return document["$defs"][found[1]] if found else {}


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in fields)


def _operation(operation: dict[str, Any]) -> Iterator[str]:
    yield f"**{operation['summary']}.** {operation.get('description', '')}".rstrip()
    bodies = operation.get("requestBody", {}).get("content", {})
    if bodies:
        yield f"\nBody: {', '.join(f'`{kind}`' for kind in bodies)}."
    parameters = operation.get("parameters", [])
    if parameters:
        yield "\n| option | in | value | meaning |"
        yield "|---|---|---|---|"
    for each in parameters:
        text = _cell(each.get("description") or each["schema"].get("description", ""))
        yield f"| `{each['name']}` | {each['in']} | {_takes(each['schema'])} | {text} |"
    if parameters:
        yield ""
    answers = operation["responses"].items()
    good = [f"{status} {_kinds(each)}" for status, each in answers if status < "400"]
    bad = sorted(status for status, _ in answers if status >= "400")
    yield f"Returns {', '.join(good)}" + (f"; problems {', '.join(bad)}." if bad else ".")


def _kinds(answer: dict[str, Any]) -> str:
    kinds = ", ".join(f"`{kind}`" for kind in answer.get("content", {}))
    return f"with {kinds}" if kinds else "without a body"


def _takes(schema: dict[str, Any]) -> str:
    """The values of a parameter, in a few words."""
    schema = next((each for each in schema.get("anyOf", []) if each.get("type") != "null"), schema)
    if "items" in schema:
        return f"{_takes(schema['items'])}, repeated"
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    least, most = schema.get("minimum"), schema.get("maximum")
    bounds = f" {least:g}–{most:g}" if least is not None and most is not None else ""
    return f"{schema.get('type', 'anything')}{bounds}"


def cli_page() -> str:
    """Every command with its arguments and flags, as `--help` has them."""
    lines = [
        "# Command line",
        "",
        "`make` installs it as `.venv/bin/camserve`; `python -m service` is the same. Every",
        "command has `--help`. [How to use it](../how-to/use-the-command-line.md).",
        "",
        "A missing flag is taken from its environment variable, then from its default. Tables",
        "and `--json` go to standard output; progress (on a terminal only), notes and errors to",
        "standard error.",
        "",
        main.EXIT_CODES,
        "",
        "`camserve --install-completion` completes commands, flags and their values in bash, zsh,",
        "fish and PowerShell; `camserve --show-completion` prints the script instead.",
    ]
    group = typer.main.get_command(main.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        lines += ["", f"## `camserve {name}`", "", *_command(command)]
    return "\n".join(lines) + "\n"


def _command(command: Any) -> Iterator[str]:
    yield re.sub(r"\s*\n\s*(?!\n)", " ", str(command.help).strip())
    kinds = [each.type_descriptor.annotation for each in command.params if each.name != "help"]
    taken = [each for each in command.params if each.param_type_name == "argument"]
    words = [each.metavar or each.name.upper() for each in taken]
    yield f"\n```text\ncamserve {command.name} [FLAGS] {' '.join(words)}".rstrip() + "\n```"
    yield "\n| | value | meaning |"
    yield "|---|---|---|"
    flags = [each for each in command.params if each.param_type_name == "option"]
    shown = words + [", ".join((*each.opts, *each.secondary_opts)) for each in flags]
    for each, name, kind in zip((*taken, *flags), shown, kinds, strict=False):
        yield f"| `{name}` | {_kind(kind)} | {_cell(each.help)} |"


def _kind(annotation: Any) -> str:
    """The value of a flag, in a word; nothing for a switch."""
    if get_origin(annotation) is list:
        return f"{_kind(get_args(annotation)[0])}, repeated"
    return {bool: "", int: "integer", float: "number", Path: "path"}.get(annotation, "text")


def _cell(text: str | None) -> str:
    """One line of a table; rich's escapes and the columns' bars made harmless."""
    return " ".join((text or "").replace("\\[", "[").split()).replace("|", "\\|")


def llms_txt() -> str:
    """Title, sentence and place of every page, in the order of the site (https://llmstxt.org)."""
    site = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    lines = [f"# {site['site_name']}", "", f"> {site['site_description']}."]
    for part in site["nav"]:
        ((title, inside),) = part.items()
        pages = [page for page in _pages(inside) if (DOCS / page).exists()]
        if pages:
            lines += ["", f"## {title}", ""]
        for page in pages:
            heading, sentence = _heading(DOCS / page)
            lines.append(f"- [{heading}]({page}): {sentence}")
    return "\n".join(lines) + "\n"


def _pages(nav: Any) -> Iterator[str]:
    """The pages of a part of the site's navigation."""
    if isinstance(nav, str):
        yield nav
    for each in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from _pages(each)


def _heading(page: Path) -> tuple[str, str]:
    """A page's title, and the first sentence below it without its links and marks."""
    title, *paragraphs = page.read_text(encoding="utf-8").strip().split("\n\n")
    text = next(each for each in paragraphs if each[0].isalnum() or each[0] in "`*[")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|\*\*", r"\1", " ".join(text.split()))
    return title.lstrip("# "), re.split(r"(?<=[.!?:]) ", plain, maxsplit=1)[0].rstrip(".:") + "."


PAGES = {
    "explanation/methods.md": methods_page,
    "reference/settings.md": settings_page,
    "reference/errors.md": errors_page,
    "reference/metrics.md": metrics_page,
    "reference/routes.md": routes_page,
    "reference/cli.md": cli_page,
    "reference/openapi.json": openapi_document,
    "explanation/architecture.md": runpy.run_path(str(DOCS / "house.py"))["page"],
    "llms.txt": llms_txt,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")
