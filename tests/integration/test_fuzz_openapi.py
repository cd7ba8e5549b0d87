"""Every route of the OpenAPI document, asked what the document allows and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fuzzing import CASES, memory_bounded, real_pictures
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup

pytestmark = pytest.mark.timeout(0)

load_all_checks()

# Real pictures wherever the document says that bytes are wanted; without them every body would be
# refused at its first bytes.
PICTURES = st.sampled_from(real_pictures())
schemathesis.openapi.format("binary", PICTURES)
for kind in ("image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, PICTURES)


@pytest.fixture(scope="module")
def document(run_server) -> Iterator[Any]:
    served = run_server(models=("tiny:small", "other=tiny:other"), max_cost=50)
    with served as server, memory_bounded():
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=CONFIG)


CHECKED = CHECKS.get_all()
REFUSALS = ["400", "401", "403", "404", "405", "406", "413", "415", "422", "429", "431", "503"]
CONFIG = schemathesis.Config.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}
)
REFUSES_WHAT_IS_VALID = {
    "POST /explain": "options that exclude each other; text that must be base64, or an allowed URL",
    "POST /predict": "as /explain",
    "POST /experiments": "as /explain; names that must differ, images and channels that must exist",
    "POST /integrations/label-studio/setup": "text that must be a labeling configuration",
    "POST /integrations/label-studio/predict": "as its setup",
    "GET /integrations/label-studio/overlay.png": "a key that must have been signed here",
}
"""Routes that may refuse what their schema allows, each for what no schema can say."""


def test_every_route_keeps_to_its_document(document: Any) -> None:
    found = []
    for result in document.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            try:
                ask(operation.as_strategy(generation_mode=mode), excluded(operation.label))
            except Unsatisfiable:  # nothing breaks the document here
                continue
            except FailureGroup as group:
                found += [f"{operation.label}: {failure}" for failure in group.exceptions]
    assert not found, "\n\n".join(found)


def excluded(label: str) -> list[Any]:
    """The checks that a route is not held to."""
    free = label in REFUSES_WHAT_IS_VALID
    return [check for check in CHECKED if free and check.__name__ == "positive_data_acceptance"]


def ask(cases: st.SearchStrategy[Any], without: list[Any]) -> None:
    @settings(
        max_examples=max(1, CASES // 500),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],
    )
    @given(case=cases)
    def asked(case: Any) -> None:
        case.call_and_validate(checks=CHECKED, excluded_checks=without)

    asked()
