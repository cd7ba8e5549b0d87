"""Whatever is sent: an answer or a problem in its promised form, and never a server's error.

500 cases here; `CAMSERVE_FUZZ_CASES=20000` makes a night of it.
"""

from __future__ import annotations

import base64
import json
import string
from collections.abc import Iterator
from typing import Any, get_args

import pictures
import pytest
from fuzzing import broken_pictures, fuzzed, memory_bounded, real_pictures
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api_schemas.answers import Answer, Problem
from api_schemas.options import Colormap, ExplainOptions, Method

pytestmark = pytest.mark.timeout(0)  # 20,000 cases take their time; each is bounded by the service

PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def fuzzed_client(serve) -> Iterator[TestClient]:
    served = serve(models=("tiny:small", "other=tiny:other"), max_pixels=4_000_000, max_cost=50)
    with served as client, memory_bounded():
        yield client


def check(response: Any) -> int:
    """The answer is in its promised form, and nothing broke on the server's side."""
    status: int = response.status_code
    assert status < 500 or status in (503, 504), response.text
    if response.headers["content-type"].startswith("image/"):
        assert status == 200
        assert pictures.opened(response.content).size
        return status
    body = response.json()
    if status == 200:
        answer = Answer.model_validate(body)
        for result in answer.results:
            assert (result.error is None) != (result.predictions is None)
            assert result.error is None or result.error.status not in (500, 501, 502)
    else:
        assert response.headers["content-type"] == "application/problem+json"
        problem = Problem.model_validate(body)
        assert problem.status == status
        assert problem.detail[-1] in ".?"
    return status


def test_every_real_picture_is_answered(fuzzed_client: TestClient) -> None:
    """What the accidents happen to is good before them."""
    for data in real_pictures():
        assert check(fuzzed_client.post("/predict", content=data, headers=PNG)) == 200


@fuzzed(0.6)
@given(data=broken_pictures())
def test_a_broken_picture_is_answered_or_refused(fuzzed_client: TestClient, data: bytes) -> None:
    route = "/explain?include=overlay&include=regions"
    status = check(fuzzed_client.post(route, content=data, headers=PNG))
    assert status in (200, 400, 413, 415)


@fuzzed(0.1)
@given(files=st.lists(broken_pictures(), min_size=2, max_size=4))
def test_broken_pictures_together_are_answered_one_by_one(
    fuzzed_client: TestClient, files: list[bytes]
) -> None:
    """As a form and as JSON alike."""
    form = fuzzed_client.post("/predict", files=[("image", data) for data in files])
    images = [{"data": base64.b64encode(data).decode()} for data in files]
    text = fuzzed_client.post("/predict", json={"images": images})
    assert check(form) == check(text)
    if form.status_code == 200:
        one, other = ([_rounded(each) for each in a.json()["results"]] for a in (form, text))
        assert one == other


def _rounded(result: dict[str, Any]) -> dict[str, Any]:
    """A result up to what depends on who else was in the batch: the last digits, and near ties."""
    scores = [round(each["score"], 4) for each in result.get("predictions", [])]
    return {key: value for key, value in result.items() if key != "predictions"} | {
        "scores": scores
    }


TEXTS = """
0 1 -1 6 7 1e400 nan inf 999999999999999999999999999999 0x10 true null [] {} * ** [
features features.0 features.3 head type:Conv2d none stats image array heatmap overlay grid regions
crop pad squash native model source png webp small other
{"boxes":[[0,0,9,9]]} {"boxes":[]} {"boxes":[[1e300,-1e300,1e300,1e300]],"fill":"blur"}
{"rle":{"size":[30,40],"counts":[600,600]},"hide":"rest"}
"""
WORDS = st.sampled_from(
    [*TEXTS.split(), "", "class 1", "?" * 50, *get_args(Method), *get_args(Colormap)]
)
NAMES = st.sampled_from(sorted(ExplainOptions.model_fields))
VALUES = WORDS | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)
LIKELY = {
    "method": st.sampled_from(get_args(Method)),
    "samples": st.integers(1, 20),
    "steps": st.integers(1, 10),
    "top_k": st.integers(1, 9),
    "include": st.lists(st.sampled_from(["heatmap", "overlay", "grid", "regions"]), min_size=1),
    "size": st.sampled_from(["source", "model", "native"]),
    "fit": st.sampled_from(["crop", "squash", "pad"]),
    "threshold": st.floats(0, 1),
    "opacity": st.floats(0, 1),
    "colormap": st.sampled_from(get_args(Colormap)),
    "format": st.sampled_from(["jpeg", "png", "webp"]),
    "targets": st.lists(st.integers(0, 6), max_size=3),
    "layer": st.sampled_from(["features", "features.0", "features.2", "features.4"]),
    "activations": st.sampled_from(["**", "features.*", "head", "type:Conv2d"]),
    "activation_as": st.sampled_from(["stats", "image", "array"]),
    "activation_kind": st.sampled_from(["output", "input", "grad_output", "grad_input"]),
    "mask": st.sampled_from(['{"boxes":[[1,2,9.5,9]]}', '{"boxes":[[0,0,99,99]],"fill":"blur"}']),
}


@fuzzed(0.1)
@given(options=st.lists(st.tuples(NAMES | st.text(string.ascii_letters, max_size=5), VALUES)))
def test_any_options_are_answered_or_refused(
    fuzzed_client: TestClient, options: list[tuple[str, str]]
) -> None:
    sent = [(name, value.encode(errors="replace").decode()) for name, value in options]
    response = fuzzed_client.post("/explain", params=sent, content=real_pictures()[0], headers=PNG)
    assert check(response) in (200, 404, 422)


@fuzzed(0.1)
@given(
    options=st.fixed_dictionaries({}, optional=LIKELY),
    picture=st.sampled_from(range(len(real_pictures()))),
    accept=st.sampled_from(["", "image/*", "image/webp", "application/json;q=0.5, image/png"]),
)
def test_likely_options_are_answered_or_refused(
    fuzzed_client: TestClient, options: dict[str, Any], picture: int, accept: str
) -> None:
    response = fuzzed_client.post(
        "/explain",
        params=options,
        content=real_pictures()[picture],
        headers={**PNG, "accept": accept},
    )
    assert check(response) in (200, 422, 406 if "image" in accept else 422)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=5), inner),
    max_leaves=12,
)


@fuzzed(0.1)
@given(
    body=st.dictionaries(NAMES, ANY_JSON, max_size=4),
    images=ANY_JSON | st.lists(st.dictionaries(st.sampled_from(["data", "url"]), ANY_JSON)),
    good=st.booleans(),
)
def test_any_json_is_answered_or_refused(
    fuzzed_client: TestClient, body: dict[str, Any], images: Any, *, good: bool
) -> None:
    if good:
        images = [{"data": base64.b64encode(real_pictures()[0]).decode()}]
    text = json.dumps({**body, "images": images}).encode()
    headers = {"content-type": "application/json"}
    response = fuzzed_client.post("/explain", content=text, headers=headers)
    assert check(response) in (200, 400, 404, 413, 415, 422)
