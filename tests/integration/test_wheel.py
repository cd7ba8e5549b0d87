"""The wheel: what is in it, and that it works without the checkout it was built from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pictures
import pytest
from PIL import Image

import service

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("api_schemas", "camserve", "service")

pytestmark = pytest.mark.timeout(120)


def run(*command: str | Path, folder: Path) -> str:
    """The standard output of a command that must succeed, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `pip wheel .` makes it; the build backend is one of the test tools."""
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir"]
    run(*pip, *offline, "--wheel-dir", folder, ROOT, folder=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The commands of a new environment that holds the wheel alone.

    Its dependencies are those of this environment, behind its own packages. A path in a `.pth` file
    brings no other `.pth` file along, so that an editable installation of the checkout stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    here = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(here) + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    install = ["--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    run(*pip, *install, wheel, folder=folder)
    return folder / "bin"


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    information = f"camserve-{service.__version__}.dist-info"
    packed = {name for name in names if name.partition("/")[0] != information}
    there = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == there
    assert "service/models/builtin/weights.safetensors" in packed
    assert {f"service/routes/page/{name}" for name in ("index.html", "app.js", "page.css")} < packed
    assert {f"{information}/licenses/{name}" for name in ("LICENSE", "NOTICE")} < names


def test_an_installed_wheel_explains_an_image_without_the_checkout(
    environment: Path, tmp_path: Path
) -> None:
    where = run(
        environment / "python", "-c", "import service; print(service.__file__)", folder=tmp_path
    )
    assert Path(where.strip()).is_relative_to(environment.parent)
    help_text = run(environment / "camserve", "--help", folder=tmp_path)
    assert "explain" in help_text
    (tmp_path / "noise.png").write_bytes(pictures.png())
    options = ("noise.png", "--json", "--out", "explained")
    answer = run(environment / "camserve", "explain", *options, folder=tmp_path)
    assert json.loads(answer)["model"]["name"] == "builtin"
    with Image.open(tmp_path / "explained" / "noise.heatmap.png") as heatmap:
        assert heatmap.size == (80, 60)
