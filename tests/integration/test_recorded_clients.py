"""The requests of KServe's, Triton's and X-AnyLabeling's clients, as they were recorded.

`tests/protocols/record.py` records them; `make protocols` runs the clients themselves.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

RECORDED = json.loads((Path(__file__).parent / "recorded_clients.json").read_text())
ADMIN = "let me in"


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    keys = tmp_path_factory.mktemp("keys") / "admins"
    keys.write_text(f"ops:{hashlib.sha256(ADMIN.encode()).hexdigest()}\n")
    with serve(admin_keys_file=keys) as client:
        yield client


def sent_again(server: TestClient, request: Any) -> Any:
    return server.request(
        request["method"],
        request["path"],
        content=base64.b64decode(request["body"]),
        headers=request["headers"],
    )


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_a_recorded_request_is_answered_as_the_client_expects(server, number: int) -> None:
    request = RECORDED[number]
    answer = sent_again(server, request)
    assert answer.status_code == request["status"], answer.text
    length = answer.headers.get("inference-header-content-length")
    body = json.loads(answer.content[: None if length is None else int(length)])
    path = request["path"]
    if answer.status_code >= 400:
        assert "error" in body
    elif path.endswith("/infer"):
        check_outputs(body, answer.content[int(length or len(answer.content)) :])
    elif path.endswith((":predict", ":explain")):
        assert all(prediction["label"] for (prediction, *_) in body["predictions"])
    elif path.endswith("v1/predict"):
        assert body["success"] is True


def check_outputs(body: Any, tail: bytes) -> None:
    """Each output has its values in `data`, or as many bytes as it says behind the JSON."""
    for output in body["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            count = 1
            for length in output["shape"]:
                count *= length
            assert len(output["data"]) == count
        else:
            tail = tail[size:]
    assert tail == b""


def test_the_recording_has_every_form_of_every_client() -> None:
    infer = [each for each in RECORDED if each["path"].endswith("/infer")]
    forms = {
        (each["client"], "inference-header-content-length" in each["headers"]) for each in infer
    }
    assert forms == {("kserve", True), ("kserve", False), ("triton", True), ("triton", False)}
    assert {each["client"] for each in RECORDED} == {"kserve", "triton", "x_anylabeling"}
