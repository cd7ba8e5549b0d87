"""openapi-python-client writes a client of the committed document, which explains an image."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pictures
import pytest
from running import running

pytestmark = [pytest.mark.protocols, pytest.mark.timeout(240)]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DOCUMENT = ROOT / "docs" / "reference" / "openapi.json"
KEY = "of the generated client"

PAGE = (ROOT / "docs" / "how-to" / "generate-a-client.md").read_text()
CONFIG = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0] + "post_hooks: []\n"


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of .venv-openapi."""
    found = Path(os.environ.get("CAMSERVE_TEST_OPENAPI", ROOT / ".venv-openapi")) / "bin/python"
    if not found.exists():
        pytest.skip("openapi-python-client is not installed: `make protocols` does it")
    return found


@pytest.fixture(scope="module")
def generated(python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that has the client's package, and what the tool printed."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "config.yml").write_text(CONFIG)
    tool = [str(python), "-m", "openapi_python_client", "generate", "--meta", "none"]
    tool += ["--path", str(DOCUMENT), "--config", "config.yml", "--output-path", "camserve_client"]
    done = subprocess.run(tool, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


def test_a_client_is_generated_without_a_warning(generated: tuple[Path, str]) -> None:
    _, printed = generated
    assert "arning" not in printed, printed
    assert "rror" not in printed, printed


def test_the_generated_client_compiles_without_a_warning(
    python: Path, generated: tuple[Path, str]
) -> None:
    compile_all = [str(python), "-W", "error", "-m", "compileall", "-q", "camserve_client"]
    done = subprocess.run(
        compile_all, cwd=generated[0], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_names_are_those_of_the_operations_and_options(generated: tuple[Path, str]) -> None:
    """Renaming one of them breaks programs that use a generated client."""
    package = generated[0] / "camserve_client"
    assert {path.stem for path in (package / "api" / "classify").glob("[a-z]*.py")} == {
        *("explain", "predict", "experiments")
    }
    models = {path.stem for path in (package / "models").glob("*.py")}
    assert {"method", "include", "fit", "size", "colormap", "overlay_format"} <= models
    assert not {name for name in models if name.startswith(("explain_method", "region_method"))}


@pytest.fixture(scope="module")
def seen(
    python: Path, generated: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the generated client read from a service with a key."""
    folder = tmp_path_factory.mktemp("served")
    keys, image = folder / "keys", folder / "a.png"
    keys.write_text(f"client:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    image.write_bytes(pictures.png(120, 90))
    with running(api_keys_file=keys) as server:
        command = [str(python), "-W", "error", str(HERE / "openapi_client.py")]
        command += [server.url, str(image), KEY]
        environment = os.environ | {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(generated[0])}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_generated_client_explains_an_image_of_a_form_of_json_and_alone(
    seen: dict[str, Any],
) -> None:
    (form,), (read,), (raw,) = (seen[way]["results"] for way in ("form", "json", "raw"))
    assert form["image"] == read["image"] == raw["image"]
    assert [len(each["predictions"]) for each in (form, read, raw)] == [3, 2, 5]
    assert form["predictions"][0]["score"] == pytest.approx(raw["predictions"][0]["score"])
    assert form["explanations"][0]["method"] == "layercam"
    assert form["explanations"][0]["grid"]["dtype"] == "float32"
    assert read["explanations"][0]["method"] == "hirescam"
    assert raw["explanations"][0]["heatmap"]["media_type"] == "image/png"


def test_the_generated_client_reads_models_layers_kernels_and_problems(
    seen: dict[str, Any],
) -> None:
    assert seen["models"] == ["small"]
    assert "features.0" in seen["layers"]
    assert bytes.fromhex(seen["kernels"]) == b"\x89PNG\r\n\x1a\n"
    assert seen["refused"]["code"] == "unauthorized"
    assert "No API key was sent" in seen["refused"]["detail"]
