"""What integrations register, and that the generic routes know none of them by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import APIRouter

from service.integrations.registry import INTEGRATIONS
from service.routes.integration import Integration

ROUTES = Path(__file__).parent.parent.parent / "service" / "routes"
NAMES = (
    "anylabeling",
    "cvat",
    "fiftyone",
    "kserve",
    "labelbox",
    "label.?studio",
    "mlserver",
    "open.?inference",
    "tensorflow.?serving",
    "torchserve",
    "triton",
    "vertex",
)
PATHS = ("/v1", "/v2", "/ping", "/predictions", "/explanations", "/integrations/")
TEXT = {".py", ".js", ".html", ".css"}


def test_no_module_of_the_routes_names_a_protocol() -> None:
    files = [path for path in ROUTES.rglob("*") if path.suffix in TEXT]
    assert len(files) > 30
    named = re.compile("|".join((*NAMES, *PATHS)), re.IGNORECASE)
    found = {
        f"{path.relative_to(ROUTES)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if named.search(line)
    }
    assert not found


def test_the_paths_of_integrations_are_those_that_the_test_above_looks_for() -> None:
    paths = {
        path
        for integration in INTEGRATIONS
        for path in (
            *(route.path for router in integration.routers for route in router.routes),
            *integration.prefixes,
            *integration.open_paths,
            *integration.open_below,
        )
    }
    assert all(path.startswith(PATHS) for path in paths)
    assert {root for root in PATHS if any(path.startswith(root) for path in paths)} == set(PATHS)


def test_every_router_of_an_integration_has_the_one_tag_that_its_description_is_of() -> None:
    for integration in INTEGRATIONS:
        assert len({tuple(router.tags) for router in integration.routers}) == 1
        assert len(integration.routers[0].tags) == 1


def test_no_two_integrations_claim_one_path() -> None:
    prefixes = [prefix for integration in INTEGRATIONS for prefix in integration.prefixes]
    for prefix in prefixes:
        assert [each for each in prefixes if each.startswith(prefix)] == [prefix]


MINE = Integration(
    routers=(APIRouter(tags=["mine"]),),
    description="An example.",
    prefixes=("/mine/",),
    error_body=lambda status, code, detail: {"is": [status, code, detail]},
    statuses={429: 503},
    open_paths=frozenset({"/mine/ready"}),
    open_below=("/mine/open/",),
)


@pytest.mark.parametrize(
    ("status", "theirs"), [(404, 404), (406, 400), (415, 400), (422, 400), (424, 400), (429, 503)]
)
def test_an_error_below_a_prefix_has_the_protocols_body_and_status(
    status: int, theirs: int
) -> None:
    answer = MINE.error("/mine/x", status, "a_code", "A detail.")
    assert answer == (theirs, {"is": [theirs, "a_code", "A detail."]})


def test_an_error_elsewhere_is_not_the_protocols() -> None:
    assert MINE.error("/mine", 404, "a_code", "A detail.") is None
    plain = Integration(routers=MINE.routers, description="", prefixes=("/mine/",))
    assert plain.error("/mine/x", 404, "a_code", "A detail.") is None


@pytest.mark.parametrize(
    ("path", "is_open"),
    [
        ("/mine/ready", True),
        ("/mine/ready/x", False),
        ("/mine/open/x", True),
        ("/mine/open", False),
        ("/", False),
    ],
)
def test_only_what_an_integration_names_is_open(path: str, is_open: bool) -> None:
    assert MINE.is_open(path) == is_open
