"""`camserve bulk --ray`: the same shards, by actors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pictures
import pyarrow.parquet as pq
import pytest
from ray_cluster import HEAD, ROOT, SUPPORT, Cluster, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service", "bulk", str(source), str(out)]
    command += ["--model", "tiny:small", "--device", "cpu", "--app-dir", str(SUPPORT)]
    command += ["--shard-size", "10", "--no-images"]
    command += ["--ray", f"{HEAD}:6379", "--ray-cpus", "0.3", "--ray-actors", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CAMSERVE_COMPILE": "false"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_job_that_is_killed_half_way_goes_on_where_it_was(
    cluster: Cluster, tmp_path: Path
) -> None:
    assert cluster.alive()
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for place in range(200):
        (source / f"{place:03}.jpg").write_bytes(pictures.jpeg(32, 24, seed=place % 5))
    (source / "bad.jpg").write_bytes(pictures.jpeg()[:100])
    with start(source, out) as first:
        until(lambda: len(list(out.glob("*.parquet"))) >= 4 or first.poll() is not None)
        assert first.poll() is None, first.stderr and first.stderr.read()
        first.send_signal(signal.SIGKILL)
    with start(source, out) as second:
        said = second.communicate(timeout=150)[1]
    assert second.returncode == 1, said
    assert "200 explained, 1 failed, 0 left" in " ".join(said.split())
    rows = [row for part in out.glob("*.parquet") for row in pq.read_table(part).to_pylist()]
    assert len(rows) == len({row["path"] for row in rows}) == 201
    assert [row["path"] for row in rows if row["error_code"]] == ["bad.jpg"]
