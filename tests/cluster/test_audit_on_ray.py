"""`camserve audit --ray`: the results are those of a run without a cluster, to the last digit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import audited
import pytest
from ray_cluster import HEAD, ROOT, SUPPORT, Cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def audit(folder: Path, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """The exit code of the command, and its JSON."""
    command = [sys.executable, "-m", "service", "audit", str(folder / "images"), "--out", str(out)]
    command += ["--config", str(folder / "models.toml"), "--app-dir", str(SUPPORT)]
    command += ["--device", "cpu", "--allow-random-weights", "--labels", "by-folder"]
    command += ["--fail-on", "suspected_cue", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CAMSERVE_COMPILE": "false"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads((out / "audit.json").read_text())


def test_a_cluster_finds_what_one_machine_finds(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.alive()
    audited.write_images(tmp_path / "images", 70)
    (tmp_path / "images" / "green" / "bad.png").write_bytes(b"no image")
    audited.configured(tmp_path)
    on_ray = ("--ray", f"{HEAD}:6379", "--ray-cpus", "0.3", "--ray-actors", "2")
    alone = audit(tmp_path, tmp_path / "alone")
    together = audit(tmp_path, tmp_path / "together", *on_ray)
    assert alone == together
    assert alone[0] == 1
    assert len(list((tmp_path / "together").glob("scan-*.npz"))) == 2
    pages = [(tmp_path / each / "audit.html").read_text() for each in ("alone", "together")]
    one, other = (re.sub(r"\d+ \w+ \d+, \d+:\d+ UTC", "then", page) for page in pages)
    assert one == other
