"""The OpenAPI document: committed, complete, and its examples such as the schemas allow."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from api_schemas.options import ExplainRequest, PredictRequest
from service import errors
from service.app import create_app
from service.routes.problems import status_of
from service.settings import Settings

DOCS = Path(__file__).parent.parent.parent / "docs"
SNAPSHOT = DOCS / "reference" / "openapi.json"

WITHOUT_JSON = {
    "/metrics",
    "/models/{name}/kernels/{layer}",
    "/integrations/label-studio/overlay.png",
}
"""Answer text or a picture."""

WEBHOOK = "/integrations/label-studio/webhook"
"""Takes anything, from anybody, and does nothing."""

WITHOUT_BODY = {
    "/v2/repository/models/{name}/load",
    "/v2/repository/models/{name}/unload",
    WEBHOOK,
}


@cache
def document() -> dict[str, Any]:
    return create_app(Settings(workers=1), background=True).openapi()


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def contents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every media type of every request and answer, with where it is."""
    for method, path, operation in operations():
        bodies = {"request": operation.get("requestBody", {}), **operation["responses"]}
        for place, body in bodies.items():
            for kind, content in body.get("content", {}).items():
                yield f"{method} {path} {place} {kind}", content


@pytest.mark.timeout(60)
def test_the_committed_document_is_what_the_service_answers() -> None:
    """`python docs/generate.py` writes it anew; a change of it is a change of the contract."""
    pages = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]
    assert SNAPSHOT.read_text(encoding="utf-8") == pages["reference/openapi.json"]()


def test_the_service_answers_it_whole(client) -> None:
    served = client.get("/openapi.json").json()
    assert served == json.loads(json.dumps(document()))
    assert client.get("/openapi.json").json() == served


def test_every_route_has_a_tag_that_is_described_and_a_summary() -> None:
    described = {tag["name"] for tag in document()["tags"] if tag["description"]}
    used = set()
    for method, path, operation in operations():
        assert len(operation["tags"]) == 1, (method, path)
        assert operation["summary"][-1] not in ".\n", (method, path)
        assert len(operation["summary"]) < 90, (method, path)
        used |= set(operation["tags"])
    assert used == described


def test_every_json_answer_and_every_body_has_an_example() -> None:
    for method, path, operation in operations():
        if path not in WITHOUT_JSON:
            assert "example" in operation["responses"]["200"]["content"]["application/json"], path
        body = operation.get("requestBody", {}).get("content", {})
        assert body or method == "get" or path in WITHOUT_BODY, path
        if "application/json" in body:
            assert "example" in body["application/json"], path


def test_every_error_has_a_body_with_an_example() -> None:
    for method, path, operation in operations():
        failures = {k: v for k, v in operation["responses"].items() if k != "200"}
        assert failures or path == WEBHOOK, (method, path)
        for status, response in failures.items():
            assert response["description"], (path, status)
            for content in response["content"].values():
                assert "example" in content, (path, status)


def test_examples_are_what_the_schemas_allow() -> None:
    checked = 0
    for place, content in contents():
        if "example" in content:
            schema = {**content["schema"], "components": document()["components"]}
            wrong = list(jsonschema_rs.validator_for(schema).iter_errors(content["example"]))
            assert not wrong, (place, wrong)
            checked += 1
    assert checked > 100


def test_requests_of_the_examples_are_read_by_the_models_themselves() -> None:
    paths = document()["paths"]
    for path, form in (("/explain", ExplainRequest), ("/predict", PredictRequest)):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]
        assert form.model_validate(body["example"]).images


def test_codes_of_the_examples_are_those_of_their_status() -> None:
    classes = {cls.code: cls for cls in all_errors(errors.CamserveError)}
    for _, path, operation in operations():
        for status, response in operation["responses"].items():
            problem = response.get("content", {}).get("application/problem+json")
            if problem:
                example = problem["example"]
                assert str(example["status"]) == status, path
                assert status_of(classes[example["code"]]("")) == int(status), path


def all_errors(base: type[errors.CamserveError]) -> Iterator[type[errors.CamserveError]]:
    yield base
    for cls in base.__subclasses__():
        yield from all_errors(cls)


def test_servers_are_relative_and_every_reference_leads_somewhere(serve) -> None:
    assert document()["servers"] == [{"url": "."}]
    schemas = document()["components"]["schemas"]
    text = json.dumps(document())
    named = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert named == set(schemas)
    with serve(root_path="/vision") as client:
        servers = client.get("/vision/openapi.json").json()["servers"]
    assert all("//" not in server["url"] for server in servers)
