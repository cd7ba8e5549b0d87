"""The Python client where there is no torch, no web framework and none of the service's tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pictures
import pytest

from api_schemas.client import Client

ROOT = Path(__file__).parent.parent.parent

IMPORTED = """
import json, sys
from {} import Client
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

ASKS = """
import json, sys
from camserve import Client
with Client(sys.argv[1], trust_env=False) as client:
    result = client.explain(sys.argv[2], include=["grid", "overlay", "regions"])[0]
found = result.explanations[0]
print(json.dumps({
    "label": found.label,
    "grid": found.grid.tolist(),
    "overlay": found.overlay.size,
    "mask": int(found.regions.mask.sum()),
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""

HEAVY = {"cv2", "fastapi", "service", "starlette", "torch", "torchvision", "uvicorn"}


def run(*command: str | Path, **environment: str) -> str:
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("package", ["camserve", "api_schemas.client"])
def test_the_client_imports_no_torch_and_no_service(package: str) -> None:
    code = IMPORTED.replace("{}", package, 1)
    modules = json.loads(run(sys.executable, "-c", code, PYTHONPATH=str(ROOT)))
    assert "httpx" in modules
    assert not HEAVY & set(modules)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with camserve alone and the four libraries that its client needs."""
    folder = tmp_path_factory.mktemp("bare")
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    needs = ["-c", ROOT / "constraints.txt", "httpx", "numpy", "pillow", "pydantic"]
    for command in (
        [sys.executable, "-m", "venv", folder],
        [*pip, *needs],
        [*pip, "--no-deps", ROOT],
    ):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            reason = (ran.stderr or ran.stdout).strip().splitlines()[-1:]
            pytest.skip(f"an environment for the client cannot be made here: {reason}")
    return python


@pytest.mark.protocols
@pytest.mark.timeout(240)
def test_the_client_works_in_an_environment_without_torch(
    bare_python: Path, run_server, tmp_path: Path
) -> None:
    photo = tmp_path / "noise.png"
    photo.write_bytes(pictures.png())
    with run_server() as server:
        with Client(server.url, trust_env=False) as client:
            here = client.explain(photo, include=["grid", "regions"])[0].explanations[0]
        there = json.loads(run(bare_python, "-I", "-c", ASKS, server.url, str(photo)))
    assert there["label"] == here.label
    assert np.array_equal(np.float32(there["grid"]), here.grid)
    assert there["overlay"] == [80, 60]
    assert there["mask"] == here.regions.mask.sum()
    assert not HEAVY & set(there["modules"])
