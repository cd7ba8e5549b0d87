"""Every route of the OpenAPI document, asked what the document allows and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fuzzing import CASES, real_pictures
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
    with run_server(models=("tiny:small", "other=tiny:other"), max_cost=50) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


# A model, layer or class of any name is well formed and still not there.
NOT_PROMISED = ("positive_data_acceptance",)
CHECKED = [check for check in CHECKS.get_all() if check.__name__ not in NOT_PROMISED]


def test_every_route_keeps_to_its_document(document: Any) -> None:
    found = []
    for result in document.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            try:
                ask(operation.as_strategy(generation_mode=mode))
            except Unsatisfiable:  # nothing breaks the document here
                continue
            except FailureGroup as group:
                found += [f"{operation.label}: {failure}" for failure in group.exceptions]
    assert not found, "\n\n".join(found)


def ask(cases: st.SearchStrategy[Any]) -> None:
    @settings(
        max_examples=max(1, CASES // 500),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],
    )
    @given(case=cases)
    def asked(case: Any) -> None:
        case.call_and_validate(checks=CHECKED)

    asked()
