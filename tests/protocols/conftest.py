"""The service as its own process, and the interpreter that has the real clients."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import flowers
import pytest
from flowers import Flowers

ROOT = Path(__file__).parent.parent.parent
ADMIN = "let me in"


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of .venv-protocols."""
    found = Path(os.environ.get("CAMSERVE_TEST_PROTOCOLS", ROOT / ".venv-protocols")) / "bin/python"
    if not found.exists():
        pytest.skip("the clients of KServe and Triton are not installed: `make protocols` does it")
    return found


@pytest.fixture(scope="session")
def admin_key() -> str:
    """What opens the model repository."""
    return ADMIN


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `camserve serve` listens, with the model `small` and an admin's key."""
    folder = tmp_path_factory.mktemp("service")
    keys, log = folder / "admins", folder / "log"
    keys.write_text(f"ops:{hashlib.sha256(ADMIN.encode()).hexdigest()}\n")
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--device", "cpu"]
    command += ["--model", "small=tiny:small", "--admin-keys-file", str(keys)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
    environment |= {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    with log.open("w") as said:
        process = subprocess.Popen(
            command, env=environment, stdout=said, stderr=subprocess.PIPE, text=True
        )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"serves on (http://\S+)", line):
                yield found[1]
                break
        else:
            pytest.fail("the service ended before it served")
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="session")
def scenes(shared_data: Path) -> list[Flowers]:
    """Images with known flowers."""
    return flowers.drawn(shared_data, 4)


@pytest.fixture(scope="session")
def flowers_url(shared_data: Path) -> Iterator[str]:
    """Where `flower-boxes` and `flower-regions`, which find them, are served."""
    with flowers.serving() as server:
        yield server.url


@pytest.fixture(scope="session")
def flowers_folder(scenes: list[Flowers], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as files."""
    folder = tmp_path_factory.mktemp("flowers")
    for scene in scenes:
        (folder / scene.name).write_bytes(scene.file)
    return folder
