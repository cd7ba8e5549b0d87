"""The HTTP clients of other languages and tools against the service: Java's, curl, node's fetch."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pictures
import pytest

pytestmark = [pytest.mark.protocols, pytest.mark.timeout(180)]

HERE = Path(__file__).parent
PNG = "content-type: image/png"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that takes several reads of a socket."""
    path = tmp_path_factory.mktemp("images") / "image.png"
    path.write_bytes(pictures.png(300, 200))
    return path


@pytest.fixture(scope="module")
def expected(url: str, file: Path) -> Any:
    """The predictions that a plain client gets."""
    answer = httpx.post(
        f"{url}/predict",
        content=file.read_bytes(),
        headers={"content-type": "image/png"},
        trust_env=False,
    )
    return answer.raise_for_status().json()["results"][0]["predictions"]


def check(answer: Any, expected: Any, images: int = 1) -> None:
    """The answer has the expected predictions for each image; in a batch the last bit differs."""
    assert len(answer["results"]) == images
    for result in answer["results"]:
        found = result["predictions"]
        assert [each["class_id"] for each in found] == [each["class_id"] for each in expected]
        scores = [[each["score"] for each in several] for several in (found, expected)]
        np.testing.assert_allclose(*scores, rtol=1e-5)


def run(*command: object) -> str:
    """What a client printed; it ended well."""
    ran = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


# ---- Java

VERSIONS = ("HTTP_1_1", "HTTP_2")


@pytest.fixture(scope="module")
def java(url: str, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Status, version and body of each answer, by the version that is preferred and the call."""
    compilers = [name for name in ("javac", "ecj") if shutil.which(name)]
    if not compilers or not shutil.which("java"):
        pytest.skip("Java is not installed: a JDK, or default-jre-headless and ecj of Debian")
    classes = tmp_path_factory.mktemp("classes")
    run(
        compilers[0],
        "-proc:none",
        "-source",
        "11",
        "-target",
        "11",
        "-d",
        classes,
        HERE / "JavaClient.java",
    )
    answers = defaultdict(list)
    for line in run("java", "-cp", classes, "JavaClient", url, file).splitlines():
        preferred, name, status, version, body = line.split("\t")
        answers[preferred, name].append((int(status), version, json.loads(base64.b64decode(body))))
    return answers


@pytest.mark.parametrize("preferred", VERSIONS)
@pytest.mark.parametrize(
    "call",
    [
        "file",
        "file, second",
        "stream",
        "stream, second",
        "expects 100",
        "form",
        "json",
        "after errors",
    ],
)
def test_javas_client_gets_the_predictions_of_a_plain_one(
    java, expected, preferred: str, call: str
) -> None:
    """Preferring HTTP/2, as it does by default, it asks for an upgrade with every request."""
    ((status, version, body),) = java[preferred, call]
    assert (status, version) == (200, "HTTP_1_1"), body
    check(body, expected)


@pytest.mark.parametrize("preferred", VERSIONS)
def test_javas_client_may_send_several_at_once(java, expected, preferred: str) -> None:
    answers = java[preferred, "at once"]
    assert len(answers) == 8
    for status, _, body in answers:
        assert status == 200, body
        check(body, expected)


@pytest.mark.parametrize("preferred", VERSIONS)
def test_javas_client_lists_the_models(java, preferred: str) -> None:
    ((status, version, body),) = java[preferred, "models"]
    assert (status, version) == (200, "HTTP_1_1")
    assert [each["name"] for each in body["models"]] == ["small"]


@pytest.mark.parametrize("preferred", VERSIONS)
@pytest.mark.parametrize(
    ("call", "expected_status", "words"),
    [
        ("wrong option", 422, "Did you mean 'top_k'"),
        ("no type", 415, "No content type was sent"),
        ("wrong method", 405, "it accepts POST"),
    ],
)
def test_javas_client_reads_why_it_is_refused(
    java, preferred: str, call: str, expected_status: int, words: str
) -> None:
    ((status, _, body),) = java[preferred, call]
    assert status == expected_status
    assert words in body["detail"]


# ---- curl


@pytest.fixture(scope="module")
def curl() -> list[str]:
    """How curl is called; it ends after 20 seconds."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    return ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "20"]


def needs_http2(curl: list[str]) -> None:
    if "HTTP2" not in run(*curl, "--version"):
        pytest.skip("this curl is built without HTTP/2")


FILE = ["--header", PNG, "--data-binary", "@{file}"]
CHUNKED = ["--header", "Transfer-Encoding: chunked"]
WAITS = ["--header", "Expect: 100-continue"]

CALLS: dict[str, list[str]] = {
    "a file": FILE,
    "chunks": CHUNKED + FILE,
    "a wait for 100": WAITS + FILE,
    "chunks and a wait": CHUNKED + WAITS + FILE,
    "an upload": ["--request", "POST", "--header", PNG, "--upload-file", "{file}"],
    "a form": ["--form", "image=@{file}"],
    "a form in base64": ["--form", "image=@{file};encoder=base64"],
    "a form in chunks": [*CHUNKED, "--form", "image=@{file}"],
    "a compressed answer": ["--compressed", "--form", "image=@{file}"],
    "JSON": ["--header", "content-type: application/json", "--data", "@{json}"],
}


@pytest.fixture(scope="module")
def predict(
    curl: list[str], url: str, file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, str]]:
    """Have curl ask `/predict` with some arguments: the answer, and the variable `out` of curl."""
    document = tmp_path_factory.mktemp("json") / "request.json"
    document.write_text(
        json.dumps({"images": [{"data": base64.b64encode(file.read_bytes()).decode()}]})
    )

    def ask(*arguments: str, out: str = "http_version") -> tuple[Any, str]:
        given = [each.format(file=file, json=document) for each in arguments]
        written = run(*curl, *given, "--write-out", f"\n%{{{out}}}", f"{url}/predict")
        body, _, value = written.rpartition("\n")
        return json.loads(body), value

    return ask


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_curl_gets_the_predictions_of_a_plain_client(predict, expected, call: list[str]) -> None:
    answer, _ = predict("--http1.1", *call)
    check(answer, expected)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_curl_that_would_upgrade_is_answered_by_http_1_1(
    curl, predict, expected, call: list[str]
) -> None:
    needs_http2(curl)
    answer, version = predict("--http2", *call)
    assert version == "1.1"
    check(answer, expected)


@pytest.mark.parametrize("name", ["a file", "a form", "a wait for 100", "JSON"])
def test_curl_that_speaks_http_1_0_is_answered(predict, expected, name: str) -> None:
    answer, _ = predict("--http1.0", *CALLS[name])
    check(answer, expected)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl_sends_its_next_request_on_the_same_connection(
    curl, url, file, expected, version: str
) -> None:
    needs_http2(curl)
    one = [*curl[1:], version, "--form", f"image=@{file}", f"{url}/predict"]
    one += ["--write-out", "\n%{num_connects}\n"]
    lines = run("curl", *one, "--next", *one, "--next", *one).splitlines()
    assert lines[1::2] == ["1", "0", "0"]
    for body in lines[::2]:
        check(json.loads(body), expected)


def test_curl_that_insists_on_http_2_ends_at_once_with_an_error(curl, url) -> None:
    """It does not wait until its time is over, which it would report by its code 28."""
    needs_http2(curl)
    command = [*curl, "--http2-prior-knowledge", f"{url}/models"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode not in (0, 28), ran.stderr
    assert ran.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--data-binary", "@{file}"], "415", "content-type: image/jpeg"),
        (["--upload-file", "{file}"], "405", "it accepts POST"),
        (["--form", "file=@{file}"], "422", "sent as 'image'"),
        (["--form", "image=@{file};encoder=quoted-printable"], "415", "quoted-printable"),
        (
            ["--header", PNG, "--data-binary", "@{json}"],
            "415",
            "JSON (its content type is application/json)",
        ),
    ],
)
def test_curl_reads_why_it_is_refused(
    predict, arguments: list[str], status: str, words: str
) -> None:
    problem, answered = predict(*arguments, out="http_code")
    assert answered == status
    assert words in problem["detail"]


# ---- node


@pytest.fixture(scope="module")
def node(url: str, file: Path) -> Any:
    """Status and body of each call by its name."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    if run("node", "--print", "typeof fetch").strip() != "function":
        pytest.skip("this node has no fetch: it came with version 18")
    return json.loads(run("node", HERE / "node_client.mjs", url, file))


@pytest.mark.parametrize(
    ("call", "images"),
    [
        ("form", 1),
        ("form of two", 2),
        ("blob", 1),
        ("buffer", 1),
        ("stream", 1),
        ("stream, second", 1),
        ("json", 1),
    ],
)
def test_nodes_fetch_gets_the_predictions_of_a_plain_client(
    node, expected, call: str, images: int
) -> None:
    assert node[call]["status"] == 200, node[call]
    check(node[call]["body"], expected, images)


def test_nodes_fetch_may_send_several_at_once(node, expected) -> None:
    assert [each["status"] for each in node["at once"]] == [200] * 8
    for each in node["at once"]:
        check(each["body"], expected)


def test_nodes_fetch_lists_the_models(node) -> None:
    assert [each["name"] for each in node["models"]["body"]["models"]] == ["small"]


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        ("no type", 415, "No content type was sent"),
        ("text type", 415, "'text/plain'"),
        ("wrong option", 422, "Did you mean 'top_k'"),
    ],
)
def test_nodes_fetch_reads_why_it_is_refused(node, call: str, status: int, words: str) -> None:
    assert node[call]["status"] == status
    assert words in node[call]["body"]["detail"]
