"""Prometheus scrapes a loaded service: what the dashboard and the alerts ask has answers."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from deployment import DEPLOY, ROOT, alerts, queries

from service.evaluation.drift import MIN_IMAGES, Baseline, observe
from service.models.catalog import parse_model
from service.models.loading import load_model

pytestmark = [pytest.mark.container, pytest.mark.timeout(500)]

SAMPLE = (ROOT / "examples" / "sunflower.jpg").read_bytes()
PATIENCE = 180.0
KEY = "of-the-load"


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `prometheus` and `promtool`: installed, or Debian's package unpacked."""
    if shutil.which("promtool") and (installed := shutil.which("prometheus")):
        return Path(installed).parent
    folder = tmp_path_factory.mktemp("prometheus")
    try:
        fetch = ["apt-get", "download", "prometheus"]
        subprocess.run(fetch, cwd=folder, check=True, capture_output=True)
        (package,) = folder.glob("*.deb")
        unpack = ["dpkg", "-x", package, folder]
        subprocess.run(unpack, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, ValueError):
        pytest.skip("Prometheus is not installed, and Debian's package cannot be had here")
    return folder / "usr" / "bin"


@pytest.mark.parametrize(
    "words",
    [
        "check rules rules/camserve.yml",
        "check config prometheus.yml",
        "test rules tests/camserve.yml",
    ],
)
def test_promtool_finds_nothing_wrong(tools: Path, words: str) -> None:
    done = subprocess.run(
        [tools / "promtool", *words.split()],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "tests" / "camserve.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in alerts()}


@contextmanager
def process(command: list[Any], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("wb") as said,
        subprocess.Popen(command, stdout=said, stderr=said, **options) as p,
    ):
        try:
            yield p
        finally:
            p.terminate()
            p.wait(40)


def baseline(folder: Path) -> Path:
    """A baseline of the built-in model: of noise, so that there are distances."""
    model = load_model(parse_model("builtin"))
    generator = np.random.default_rng(0)
    grids = generator.random((MIN_IMAGES, 10, 10), dtype=np.float32)
    known = [observe(model.labels[0], 0.5, grid) for grid in grids]
    file = folder / "baseline.json"
    layers = (model.target_layer or "",)
    file.write_bytes(Baseline.of(model.name, model.version, "gradcam", layers, known).write())
    return file


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The service as its own process; where it listens."""
    log = folder / "service.log"
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--device", "cpu"]
    command += ["--workers", "1", "--max-queue", "6"]
    keys = folder / "keys"
    keys.write_text(f"load:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    command += ["--api-keys-file", str(keys), "--baseline", str(baseline(folder))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    with process(command, log, env=environment) as served:
        address = awaited(
            lambda: re.search(r"serves on http://(\S+)", log.read_text()), served, log
        )
        yield address[1]


@contextmanager
def scraping(tools: Path, folder: Path, target: str) -> Iterator[httpx.Client]:
    """Prometheus with our rules and a second between scrapes; its API."""
    said = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    said["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    said["rule_files"] = [str(DEPLOY / "prometheus" / "rules" / "*.yml")]
    (job,) = said["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(said))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [tools / "prometheus", f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    log = folder / "prometheus.log"
    with (
        process(command, log) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as api,
    ):
        awaited(lambda: answers(api), server, log)
        yield api


def answers(api: httpx.Client) -> bool:
    try:
        return api.get("/-/ready").is_success
    except httpx.TransportError:
        return False


def awaited(look: Any, of: subprocess.Popen[bytes], log: Path) -> Any:
    """What `look` finds, once it finds something."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if found := look():
            return found
        assert of.poll() is None, log.read_text()[-2000:]
        threading.Event().wait(0.1)
    pytest.fail(f"not within {PATIENCE} s: {log.read_text()[-2000:]}")


@contextmanager
def loaded(url: str) -> Iterator[None]:
    """Eight clients that ask for all sorts of things, bad ones too, until the end of the block."""
    over = threading.Event()
    asks = [
        ("/explain", SAMPLE),
        ("/explain?include=overlay&include=regions", SAMPLE),
        ("/predict", SAMPLE),
        ("/explain?activations=layer3&activation_as=image", SAMPLE),
        ("/explain", b"no picture"),
        ("/explain?no_such_option=1", SAMPLE),
        ("/explain?verify=true&include=none", SAMPLE),
        ("/predict", b"with a wrong key"),
    ]

    def client(number: int) -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            while not over.is_set():
                path, body = asks[number % len(asks)]
                key = "wrong" if body.endswith(b"wrong key") else KEY
                headers = {"content-type": "image/jpeg", "x-api-key": key}
                assert http.post(path, content=body, headers=headers).status_code < 500
                assert http.get("/health/ready").is_success
                number += 1

    with ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        stack.callback(over.set)
        clients = [pool.submit(client, number) for number in range(8)]
        yield
        over.set()
        for each in clients:
            each.result()


def values(api: httpx.Client, expression: str) -> list[float]:
    """What a query answers now."""
    answer = api.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    return [float(each["value"][1]) for each in answer["data"]["result"]]


def test_every_query_of_the_dashboard_has_data_from_a_loaded_service(
    tools: Path, tmp_path: Path
) -> None:
    """Those of GPUs excepted: here is none, and no exporter for it; they must be valid queries."""
    with serving(tmp_path) as target, scraping(tools, tmp_path, target) as api:
        with loaded(f"http://{target}"):
            missing = {each for each in queries() if not each.needs_gpu}
            until = time.monotonic() + PATIENCE
            while missing and time.monotonic() < until:
                threading.Event().wait(0.5)
                missing = {
                    each
                    for each in missing
                    if not any(math.isfinite(value) for value in values(api, each.expression))
                }
            assert not missing
            for each in queries():
                assert each.needs_gpu == (not values(api, each.expression)), each
        rules = api.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert [rule["name"] for rule in rules] == [rule["alert"] for rule in alerts()]
        assert all(rule["health"] == "ok" for rule in rules), rules
        assert (
            values(api, "camserve_memory_limit_bytes")[0]
            > values(api, 'process_resident_memory_bytes{job="camserve"}')[0]
        )
