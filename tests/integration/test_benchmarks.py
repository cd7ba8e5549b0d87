"""The benchmarks run: each script in its smallest form, on a tiny model."""

from __future__ import annotations

import importlib
import io
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

pytest.importorskip("litserve", reason="no extra `bench`")

ROOT = Path(__file__).parent.parent.parent
TINY = {"BENCH_MODEL": "tiny:small", "BENCH_WEIGHTS": "", "BENCH_LAYER": "features"}

with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # OpenVINO's converter traces with TorchScript
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # the scripts set them at import
        patch.setenv(name, "1")
    for name, value in TINY.items():
        patch.setenv(name, value)
    patch.syspath_prepend(ROOT / "benchmarks")
    import core
    import gpu
    import memory
    import over_http
    import races
    import report
    from measuring import Results, photograph, ratio

    before = torch.get_num_threads(), cv2.getNumThreads()
    PEERS = {
        name: importlib.import_module(f"peers.{name}")
        for name in (
            *("fastapi_gradcam", "fastapi_torchcam", "fastapi_captum"),
            *("fastapi_eager", "fastapi_openvino", "litserve_torchcam"),
        )
    }
    torch.set_num_threads(before[0])

FASTAPI = [name for name in PEERS if name.startswith("fastapi")]


@pytest.fixture(scope="module")
def ours(client) -> over_http.Said:
    return said(client, "/explain?include=overlay&include=grid")


def said(client: TestClient, path: str) -> over_http.Said:
    files = {"image": ("photo.jpg", photograph(0), "image/jpeg")}
    response = client.post(path, files=files)
    assert response.status_code == 200, response.text
    return over_http.read(response.json())


def test_ratios_are_taken_round_by_round_and_their_interval_holds_nineteen_of_twenty():
    slow, fast = [2.0, 4.0, 6.0, 8.0, 100.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ratio(slow, fast).median == 2.0
    assert (ratio(slow, fast).low, ratio(slow, fast).high) == (2.0, 20.0)
    many = [float(each) for each in range(1, 101)]
    found = ratio(many, [1.0] * 100)
    assert (found.low, found.high) == (41.0, 60.0)  # of 100 normal or other values, the 41st, 60th


def test_what_is_finished_is_kept_and_not_measured_again(tmp_path: Path):
    Results(tmp_path / "found.json").keep("core/a/1", {"seconds": 1}, [1, 2])
    again = Results(tmp_path / "found.json")
    assert again.has("core/a/1", {"seconds": 1})
    assert again.found("core/a/1") == [1, 2]
    assert not again.has("core/a/1", {"seconds": 2})
    assert not Results(tmp_path / "found.json", again=True).has("core/a/1", {"seconds": 1})


@pytest.mark.timeout(60)
def test_the_core_times_every_contender_and_their_maps_agree(tmp_path: Path, capsys):
    short = ["--models", "tiny:small", "--batches", "1", "--seconds", "0", "--rounds", "2"]
    core.main([*short, "--out", str(tmp_path / "found.json")])
    found = Results(tmp_path / "found.json").found("core/tiny:small/1")
    explain = {core.HOOKED, core.COMPILED, "pytorch-grad-cam", "TorchCAM", "Captum"}
    assert explain | set(core.LIMITS) <= set(found["times"])
    assert all(len(times["wall"]) == 2 for times in found["times"].values())
    assert min(found["agreement"].values()) > 0.98, found["agreement"]
    assert "| tiny:small, 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", FASTAPI)
def test_every_peer_answers_the_class_and_the_map_that_the_service_answers(name: str, ours):
    with TestClient(PEERS[name].app) as client:
        path = "/explain?grid=true" if hasattr(PEERS[name], "explain") else "/predict"
        assert over_http.check([said(client, path)], [ours]) is None


def test_the_peer_in_litserve_answers_the_same(ours, monkeypatch):
    for variable, tiny in TINY.items():
        monkeypatch.setenv(variable, tiny)
    api = PEERS["litserve_torchcam"].Explain(api_path="/explain")
    api.setup("cpu")
    cv2.setNumThreads(before[1])
    form = {"image": SimpleNamespace(file=io.BytesIO(photograph(0)))}
    answer = api.encode_response(api.predict(api.decode_request(form)))
    assert over_http.check([over_http.read(json.loads(json.dumps(answer)))], [ours]) is None


def test_a_wrong_answer_is_noticed(ours):
    other = over_http.Said(ours.class_id + 1, ours.cam)
    assert over_http.check([other], [ours])
    turned = over_http.Said(ours.class_id, np.ascontiguousarray(ours.cam[::-1]))
    assert over_http.check([turned], [ours])


@pytest.mark.timeout(180)
def test_servers_race_and_the_report_judges_every_target(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support"))
    monkeypatch.setenv("CAMSERVE_CACHE_DIR", str(tmp_path))
    tiny = ["--model", "tiny:small", "--layer", "features", "--servers", "camserve", "torchcam"]
    short = ["--loads", over_http.BUSY, "--rounds", "1", "--seconds", "0.2"]
    file, page, plot = (tmp_path / name for name in ("found.json", "page.md", "plot.svg"))
    over_http.main([*tiny, *short, "--out", str(file)])
    results = Results(file)
    rows = results.found(f"http/0/{over_http.BUSY}")
    assert set(rows) == {over_http.OURS, over_http.OURS_PREDICT, "FastAPI + TorchCAM"}
    assert all(row["rate"] > 0 and row["cpu"] > 0 and row["peak"] > 50 for row in rows.values())
    assert set(results.found("http-check").values()) == {None}

    page.write_text("# Before\n\n<!-- bench:begin -->old<!-- bench:end -->\n\nafter\n")
    report.write(results, page, plot)
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert "FastAPI + TorchCAM" in plot.read_text()
    lines = [line for line in text.splitlines() if line.startswith(("- **", "- not"))]
    assert len(lines) == len(report.targets())
    assert sum(line.startswith("- **") for line in lines) == 3  # TorchCAM, /predict, p99
    report.write(results, page, plot)
    assert page.read_text() == text


@pytest.mark.timeout(30)
@pytest.mark.parametrize("lane", ["hooked", "compiled"])
def test_threads_race_and_every_answer_of_the_service_is_right(lane: str, capsys):
    small = ["--model", "tiny:small", "--layers", "features.2", "features", "--side", "32"]
    races.main([*small, "--only", f"camserve, {lane} lane", "--threads", "4", "--each", "3"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"answers": 12, "wrong": 0, "raised": 0, "left": "nothing"}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("library", races.LIBRARIES[:4])
def test_alone_every_library_explains_the_same_case_twice_alike(library: str):
    small = ["--model", "tiny:small", "--layers", "features.2", "--side", "32"]
    options = races.options_of([*small, "--only", library, "--threads", "1", "--each", "1"])
    found = races.run_one(options, library, threads=1)
    assert (found.wrong, found.raised) == (0, 0)


@pytest.mark.timeout(30)
def test_a_mix_of_requests_is_answered_and_its_memory_read(run_server, monkeypatch):
    monkeypatch.setattr(memory, "SAMPLED_EVERY", 10)
    with run_server(workers=2) as server:
        port = server.address[1]
        mix = memory.Mix(port, os.getpid(), 20, memory.layers_of(port, "small"))
        mix.run()
    assert mix.statuses == {200: 20}
    assert len(mix.rss) == 2
    assert memory.replica("tiny:small", count=2) < 20


def test_the_slope_of_memory_forgets_the_start_and_one_outlier():
    rss: list[Any] = [0.0, 90.0, *(100 + 0.5 * step for step in range(20))]
    rss[10] = 500.0
    assert memory.slope(rss, first=2) == pytest.approx(5.0)


@pytest.mark.timeout(30)
def test_the_card_s_stages_are_timed_on_a_cpu_too(tmp_path: Path, capsys):
    tiny = ["--device", "cpu", "--model", "tiny:small", "--batches", "2", "--seconds", "0"]
    gpu.main([*tiny, "--out", str(tmp_path / "gpu.json")])
    table = capsys.readouterr().out
    assert "| 2 | /explain, compiled, float32 |" in table
    assert "| 2 | /explain, hooked, float32 |" in table
    assert "| map to overlay, JPEG |" in table


def test_without_a_card_the_script_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    assert "no CUDA device" in capsys.readouterr().out
