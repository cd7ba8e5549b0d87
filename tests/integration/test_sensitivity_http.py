"""How much maps depend on the weights, in `/models` and in answers."""

from __future__ import annotations

from collections.abc import Iterator

import pictures
import pytest
from starlette.testclient import TestClient

from api_schemas.methods import METHODS
from service.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(Settings(workers=1, compile=False, sensitivity=True))) as client:
        yield client


def flags(client: TestClient, method: str) -> list[str]:
    headers = {"content-type": "image/png"}
    params = {"method": method}
    answer = client.post("/explain", content=pictures.png(), params=params, headers=headers)
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"] if "results" in answer.json() else [answer.json()]
    return result["explanations"][0]["flags"]


def test_models_lists_every_method_and_null_where_it_was_not_measured(client) -> None:
    listed = {one["method"]: one for one in client.get("/models/builtin").json()["sensitivity"]}
    assert list(listed) == list(METHODS)
    assert listed["guided_backprop"]["weights_hardly_matter"] is True
    assert listed["gradcam"]["weights_hardly_matter"] is False
    assert listed["eigencam"]["head"] > 0.9 > listed["eigencam"]["all"]
    nothing = {"head": None, "half": None, "all": None, "weights_hardly_matter": None}
    for method in ("rise", "occlusion", "scorecam", "ablationcam", "integrated_gradients"):
        assert listed[method] == {"method": method} | nothing


def test_an_answer_says_that_the_weights_hardly_matter_for_its_method(client) -> None:
    assert "weights_hardly_matter" in flags(client, "guided_backprop")
    assert "weights_hardly_matter" not in flags(client, "gradcam")
