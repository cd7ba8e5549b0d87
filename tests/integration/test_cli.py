"""The command line: what a person types, what comes back, and how it ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pictures
import pytest
import torch
from PIL import Image
from tiny import SmallNet
from typer.testing import CliRunner

from service.cli.main import app
from service.settings import Settings

SUPPORT = Path(__file__).parents[1] / "support"
ROOT = SUPPORT.parents[1]

pytestmark = pytest.mark.timeout(120)

run = CliRunner()

TINY = ["--model", "tiny:small", "--workers", "1"]


def said(result: object) -> str:
    """All that a command printed, line breaks of the terminal taken out."""
    return " ".join(result.output.split())  # type: ignore[attr-defined]


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`camserve serve` as a process on a free port: the process, its URL, and what it announced."""
    command = [sys.executable, "-m", "service", "serve", "--port", "0", *arguments]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        lines: list[str] = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if "README.md" in line:
                    break
            url = next(line.split()[-1] for line in lines if "serves on" in line)
            yield process, url, lines
        finally:
            process.kill()


def test_explain_writes_an_overlay_a_heatmap_and_a_json_for_each_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(pictures.jpeg(64, 48))
    result = run.invoke(
        app, ["explain", str(tmp_path / "a.jpg"), "--out", str(tmp_path / "o"), *TINY]
    )
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "o").iterdir()}
    assert written == {"a.overlay.jpeg", "a.heatmap.png", "a.json"}
    with Image.open(tmp_path / "o" / "a.overlay.jpeg") as overlay:
        assert overlay.size == (64, 48)
    numbers = json.loads((tmp_path / "o" / "a.json").read_text())
    assert numbers["explanations"][0]["grid"]["shape"] == [56, 56]


def test_one_bad_file_does_not_stop_the_rest_and_the_exit_code_says_so(tmp_path: Path) -> None:
    photos = tmp_path / "photos" / "deep"
    photos.mkdir(parents=True)
    (photos / "good.png").write_bytes(pictures.png())
    (photos / "bad.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    result = run.invoke(app, ["explain", str(tmp_path / "photos"), "--out", str(out), *TINY])
    assert result.exit_code == 1
    assert "1 explained, 1 failed" in said(result)
    assert "bad.jpg" in said(result)
    assert (out / "deep" / "good.heatmap.png").exists()
    assert not list(out.rglob("bad*"))


def test_files_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(pictures.png(seed=1))
    (tmp_path / "a.jpg").write_bytes(pictures.jpeg(seed=2))
    out = tmp_path / "out"
    result = run.invoke(app, ["explain", str(tmp_path), "--out", str(out), *TINY])
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.glob("*.json")} == {"a.png.json", "a.jpg.json"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "nowhere.jpg", *TINY], "there is no file"),
        (["explain", str(ROOT / "tests" / "unit"), *TINY], "there is no image in the folder"),
        (["explain", __file__, "--target", "cat", *TINY], "no class labelled 'cat'"),
        (["explain", __file__, "--layer", "featurs", *TINY], "Did you mean 'features'"),
        (["explain", __file__, "--fit", "stretch", *TINY], "'crop', 'squash' or 'pad'"),
        (["explain", __file__, "--colormap", "rainbow", *TINY], "turbo"),
        (["layers", "torchvision/resnet5"], "Did you mean 'torchvision/resnet"),
        (["layers", "keras/resnet"], "torchvision/NAME"),
        (["models", "--model", "tiny:small", "--model", "tiny:small"], "two models are called"),
        (["models", "--workers", "-1"], "WORKERS"),
        (
            ["serve", "--port", "0", "--device", "abacus", "--model", "tiny:small"],
            "--device abacus",
        ),
    ],
)
def test_what_a_person_can_mend_is_said_in_a_sentence(arguments: list[str], words: str) -> None:
    """Exit code 2, and never a traceback."""
    result = run.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert words in said(result)
    assert "Traceback" not in result.output


def test_a_start_without_weights_or_network_says_how_to_give_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", _refused)
    result = run.invoke(app, ["serve", "--port", "0", "--model", "torchvision/squeezenet1_1"])
    assert result.exit_code == 2
    assert "--weights FILE" in said(result)
    assert "Traceback" not in result.output


def _refused(*_args: object, **_kwargs: object) -> object:
    raise ConnectionRefusedError("no network here")


def test_layers_lists_every_module_and_marks_the_default_target() -> None:
    result = run.invoke(app, ["layers", "tiny:small"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    starred = [line for line in result.output.splitlines() if line.strip().startswith("*")]
    assert len(starred) == 1
    assert "features" in starred[0]
    assert "features.3" in result.output


def test_models_shows_what_would_be_served_and_what_could_be() -> None:
    assert "builtin" in run.invoke(app, ["models"]).output
    assert "torchvision/resnet50" in run.invoke(app, ["models", "--available"]).output


def test_every_setting_is_a_flag_of_serve() -> None:
    shown = run.invoke(app, ["serve", "--help"], env={"COLUMNS": "250"}).output
    for name in Settings.model_fields:
        assert f"CAMSERVE_{name.upper()}" in shown
        flag = "--model" if name == "models" else f"--{name.replace('_', '-')}"
        assert flag in shown


def test_a_weights_file_with_its_own_classes_is_served(tmp_path: Path) -> None:
    torch.save(SmallNet(seed=3).state_dict(), tmp_path / "w.pt")
    result = run.invoke(
        app, ["models", "--model", "tiny:small", "--weights", str(tmp_path / "w.pt")]
    )
    assert result.exit_code == 0, result.output
    wrong = run.invoke(
        app, ["models", "--model", "tiny:other", "--weights", str(tmp_path / "w.pt")]
    )
    assert wrong.exit_code == 2
    assert "head.weight: (7, 16) in the file, (5, 16) here" in said(wrong)


def test_serve_announces_its_address_and_ends_at_once_on_ctrl_c() -> None:
    with serving(*TINY) as (process, url, lines):
        assert httpx.get(f"{url}/health/ready").json() == {"status": "ready"}
        assert any("curl -F image=@examples/" in line for line in lines)
        assert any(f"{url}/docs" in line for line in lines)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130, -signal.SIGINT)
        assert process.stderr is not None
        rest = process.stderr.read()
        assert "Traceback" not in rest
        assert "Finished server process" in rest.splitlines()[-1], "nothing else is said at the end"


def test_what_was_accepted_is_answered_before_the_service_ends() -> None:
    """SIGTERM while a slow explanation runs: it is answered, then the process ends with 0."""
    with serving(*TINY) as (process, url, _):
        params = {"method": "rise", "samples": 1500}
        with httpx.stream(
            "POST",
            f"{url}/explain",
            params=params,
            content=_terminating(process, url, pictures.png()),
            headers={"content-type": "image/png"},
            timeout=60,
        ) as response:
            response.read()
        assert response.status_code == 200
        assert process.wait(30) == 0


def test_while_it_drains_it_listens_and_says_that_it_is_not_ready() -> None:
    """Nothing new is taken, nothing accepted is lost, and a second signal ends it at once."""
    with serving(*TINY, "--drain-delay", "1000", "--drain-timeout", "1000") as (process, url, _):
        png = {"headers": {"content-type": "image/png"}, "timeout": 60}
        rise = {"method": "rise", "samples": 1500}
        with ThreadPoolExecutor(1) as threads, httpx.Client() as client:
            slow = threads.submit(
                httpx.post, f"{url}/explain", params=rise, content=pictures.png(), **png
            )
            while "camserve_images_held 1.0" not in client.get(f"{url}/metrics").text:
                assert not slow.done()
            process.send_signal(signal.SIGTERM)
            while (ready := client.get(f"{url}/health/ready")).status_code == 200:
                assert process.poll() is None
            assert (ready.status_code, ready.json()["code"]) == (503, "shutting_down")
            assert client.get(f"{url}/health/live").status_code == 200
            late = client.post(f"{url}/explain", content=pictures.png(), **png)
            assert (late.status_code, late.json()["code"]) == (503, "shutting_down")
            assert int(late.headers["retry-after"]) > 0
            assert slow.result().status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


def _terminating(process: subprocess.Popen[str], url: str, data: bytes) -> Iterator[bytes]:
    """The body; before its last byte, when most of it has come, the service is told to end."""
    yield data[:-1]
    while "camserve_requests_arriving 1.0" not in httpx.get(f"{url}/metrics").text:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    yield data[-1:]


def test_on_sighup_the_configuration_is_read_again(tmp_path: Path) -> None:
    """A model that is new in models.toml is served, one that is gone is not; requests go on."""
    config = tmp_path / "models.toml"
    config.write_text('[[model]]\nname = "a"\nbuilder = "tiny:small"\n')
    with serving("--config", str(config), "--workers", "1") as (process, url, _):
        assert names(url) == ["a"]
        config.write_text('[[model]]\nname = "b"\nbuilder = "tiny:other"\n')
        process.send_signal(signal.SIGHUP)
        while names(url) != ["b"] or httpx.get(f"{url}/models/b").json()["state"] != "ready":
            assert process.poll() is None
        answer = httpx.post(
            f"{url}/predict", content=pictures.png(), headers={"content-type": "image/png"}
        )
        assert answer.json()["model"]["name"] == "b"
        config.write_text("[[model]]\nname = 1")
        process.send_signal(signal.SIGHUP)
        assert httpx.get(f"{url}/health/ready").status_code == 200
        assert names(url) == ["b"]


def test_on_sighup_the_keys_are_read_again(tmp_path: Path) -> None:
    """At once; a file that is spoiled leaves those that were."""

    def write(key: str) -> None:
        keys.write_text(f"one:{hashlib.sha256(key.encode()).hexdigest()}\n")

    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.get(f"{url}/models", headers=headers).status_code

    keys = tmp_path / "keys"
    write("old")
    arguments = ("--model", "tiny:small", "--api-keys-file", str(keys))
    with serving(*arguments) as (process, url, _):
        assert (status("old"), status("new")) == (200, 401)
        # The stamp is kept, so that only the signal can be what makes the service look.
        stamp = keys.stat()
        write("new")
        os.utime(keys, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        process.send_signal(signal.SIGHUP)
        while status("new") != 200:
            assert process.poll() is None
        assert status("old") == 401
        keys.write_text("nonsense")
        process.send_signal(signal.SIGHUP)
        assert (status("old"), status("new")) == (401, 200)


def names(url: str) -> list[str]:
    """The models that a service lists."""
    return [model["name"] for model in httpx.get(f"{url}/models").json()["models"]]
